"""Settings of the log."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Literal

from loraplex_server.config.declared import check
from loraplex_server.config.setting import Group, Setting

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_log = partial(Setting, group=Group.LOG)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The log on stderr, of the server and its engine alike."""

    level: Annotated[LogLevel, _log(name="log_level", help="least severe messages to log on stderr")] = "info"
    format: Annotated[
        LogFormat,
        _log(name="log_format", help="format of the log; json is one object per line, for collectors"),
    ] = "text"

    def __post_init__(self) -> None:
        check(self)
