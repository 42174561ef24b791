"""Configuration: one schema for YAML files, environment, command line and Python mappings."""

from .loading import LoadedConfig, load_config, show
from .schema import ModelConfig, PluginsConfig, RunConfig, RuntimeConfig, SamplingConfig

__all__ = [
    "LoadedConfig",
    "ModelConfig",
    "PluginsConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "load_config",
    "show",
]
