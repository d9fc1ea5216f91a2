"""The server's settings: one declaration of each, and what is made from it.

*_settings  the declarations, a file for each part     schema  the whole configuration, made of the parts
setting     what a declaration says                    kinds   how kinds of values are written and read
declared    finds, checks and builds what is declared  layers  flags > environment > file > defaults
cli         the command line                           reference  writes docs/reference/flags.md
"""

from __future__ import annotations

from loraplex_server.config.adapter_settings import AdapterConfig
from loraplex_server.config.api_settings import ApiConfig, TlsFiles, is_loopback
from loraplex_server.config.log_settings import LogConfig
from loraplex_server.config.model_settings import ModelConfig
from loraplex_server.config.scheduler_settings import SchedulerConfig
from loraplex_server.config.schema import EngineConfig, ServerConfig

__all__ = [
    "AdapterConfig",
    "ApiConfig",
    "EngineConfig",
    "LogConfig",
    "ModelConfig",
    "SchedulerConfig",
    "ServerConfig",
    "TlsFiles",
    "is_loopback",
]
