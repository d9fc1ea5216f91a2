"""The whole configuration, frozen, complete and checked before anything is built.

Each setting is declared once, as a field of a part. The command line, the environment, the file,
`loraplex config` and docs/reference/flags.md are made from these declarations.
"""

from __future__ import annotations

import dataclasses

from loraplex_server.config.adapter_settings import AdapterConfig
from loraplex_server.config.api_settings import ApiConfig
from loraplex_server.config.log_settings import LogConfig
from loraplex_server.config.model_settings import ModelConfig
from loraplex_server.config.scheduler_settings import SchedulerConfig


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """All that the engine process needs to know."""

    model: ModelConfig
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    adapters: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The whole configuration."""

    engine: EngineConfig
    api: ApiConfig = dataclasses.field(default_factory=ApiConfig)
