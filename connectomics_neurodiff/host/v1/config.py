"""Our configuration groups in PyTC v1's tree."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from ...config import default_config
from ...config.project import RENAMED, host_defaults


def add_config(cfg: CfgNode) -> None:
    """Add NEURODIFF and AUGMENTOR.SYNTHETIC with their defaults: the ``add_cfg_func`` of PyTC's ``load_cfg``.

    The tree then also takes the short forms, which yacs cannot type by itself: ``SYNTHETIC: True``, one path for a list
    of pairs, and whole numbers where a float goes.
    """
    ours = default_config()
    cfg.NEURODIFF = ours.NEURODIFF
    cfg.AUGMENTOR.SYNTHETIC = ours.AUGMENTOR.SYNTHETIC
    object.__setattr__(cfg, "__class__", _Tree)  # yacs takes a plain assignment for a key


class _Tree(CfgNode):  # type: ignore[misc]  # yacs has no types
    """PyTC's root node, which writes our short forms out before it merges."""

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        """Nested groups stay plain nodes: yacs compares their types."""
        return CfgNode._decode_cfg_value(value)

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        _let_untyped_stay_untyped(self, cfg_other)
        for key, new in RENAMED.items():
            group, name = key.split(".")
            if name in cfg_other.get(group, {}):
                super().merge_from_list([new, cfg_other[group][name]])
        super().merge_from_other_cfg(CfgNode(_written_out(self, cfg_other)))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        for key, text in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            *parents, leaf = key.split(".")
            if (
                key != "AUGMENTOR.SYNTHETIC"
                and parents[:1] != ["NEURODIFF"]
                and parents[:2] != ["AUGMENTOR", "SYNTHETIC"]
            ):
                super().merge_from_list([key, text])
                continue
            content: Any = {leaf: _value_of(text)}
            for name in reversed(parents):
                content = {name: content}
            self.merge_from_other_cfg(CfgNode(content))


#: Keys that PyTC gives no type (None), which two files of one project may therefore fill with different ones.
_UNTYPED = {key for key, default in host_defaults().items() if default is None}


def _let_untyped_stay_untyped(defaults: CfgNode, content: Mapping[str, Any], prefix: str = "") -> None:
    """yacs takes a key's first value for its type; SNEMI-Affinity-UNet-MER.yaml over its base fails by that."""
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), CfgNode):
            _let_untyped_stay_untyped(defaults[name], value, f"{prefix}{name}.")
        elif f"{prefix}{name}" in _UNTYPED:
            defaults[name] = None


def _value_of(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.lower() == "true" if text.lower() in ("true", "false") else text


def _written_out(defaults: CfgNode, content: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested keys with our short forms in full."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        default = defaults.get(name)
        where = (*path, name)
        if ".".join(where) in RENAMED:
            continue
        if where == ("AUGMENTOR", "SYNTHETIC") and isinstance(value, bool):
            value = {"ENABLED": value}
        if where == ("MODEL", "OUTPUT_ACT") and isinstance(value, str):
            value = [[value]]  # Distance-Transform-Quantized.yaml: one activation for the one loss
        if where == ("AUGMENTOR", "SYNTHETIC", "PAIRS") and isinstance(value, str):
            value = [value] if value else []
        if isinstance(value, Mapping) and isinstance(default, CfgNode):
            value = _written_out(default, value, where)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        found[name] = value
    return found
