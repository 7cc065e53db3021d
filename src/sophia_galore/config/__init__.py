"""Configuration: YAML, overrides and Hugging Face names in, one frozen `RunConfig` out."""

from __future__ import annotations

from sophia_galore.config.dump import dump_config
from sophia_galore.config.load import load_config
from sophia_galore.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config"]
