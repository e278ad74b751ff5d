"""Reading the host's configuration, whatever holds it: its dataclasses, OmegaConf, or plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def look_up(cfg: Any, key: str, default: Any = None) -> Any:
    """Value of a dotted key, such as ``"model.arch.params"``.

    Parameters
    ----------
    cfg : object
        Configuration with attributes or items, nested.
    key : str
        Names joined by dots.
    default : object
        Returned where a part of the key is absent or None.
    """
    value = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is None:
            return default
    return value


def plain(value: Any) -> Any:
    """The same value made of dict, list and scalars only: OmegaConf's containers are no lists for other libraries."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value
