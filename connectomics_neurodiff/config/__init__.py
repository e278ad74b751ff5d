"""Configuration in yacs: every key with unit, range and source; read, validated, frozen, dumped."""

from .defaults import default_config
from .load import as_dict, dump_config, load_config, merge
from .validate import validate

__all__ = ["as_dict", "default_config", "dump_config", "load_config", "merge", "validate"]
