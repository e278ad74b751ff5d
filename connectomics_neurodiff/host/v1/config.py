"""Our configuration groups in PyTC v1's tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from ...config import default_config
from ...config.load import nested, value_of, written_out
from ...config.project import OWN, RENAMED, host_defaults


def add_config(cfg: CfgNode) -> None:
    """Add NEURODIFF and AUGMENTOR.SYNTHETIC with their defaults: the ``add_cfg_func`` of PyTC's ``load_cfg``.

    The tree then also takes the short forms, which yacs cannot type by itself: ``SYNTHETIC: True``, one path for a list
    of pairs, and whole numbers where a float goes.
    """
    ours = default_config()
    cfg.NEURODIFF = ours.NEURODIFF
    cfg.AUGMENTOR.SYNTHETIC = ours.AUGMENTOR.SYNTHETIC
    object.__setattr__(cfg, "__class__", _Tree)  # yacs takes a plain assignment for a key


def our_part(cfg: CfgNode) -> CfgNode:
    """Our configuration with the groups that PyTC's has from us."""
    native = default_config()
    native.NEURODIFF = cfg.NEURODIFF.clone()
    native.AUGMENTOR.SYNTHETIC = cfg.AUGMENTOR.SYNTHETIC.clone()
    native.DATASET.IMAGE_NAME = str(cfg.DATASET.IMAGE_NAME)
    return native


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
        super().merge_from_other_cfg(CfgNode(_all_written_out(self, cfg_other)))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        for key, text in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            if not key.startswith(OWN):
                super().merge_from_list([key, text])
                continue
            self.merge_from_other_cfg(CfgNode(nested(key, value_of(text))))


#: Keys that PyTC gives no type (None), which two files of one project may therefore fill with different ones.
_UNTYPED = {key for key, default in host_defaults().items() if default is None}


def _let_untyped_stay_untyped(defaults: CfgNode, content: Mapping[str, Any], prefix: str = "") -> None:
    """yacs takes a key's first value for its type; SNEMI-Affinity-UNet-MER.yaml over its base fails by that."""
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), CfgNode):
            _let_untyped_stay_untyped(defaults[name], value, f"{prefix}{name}.")
        elif f"{prefix}{name}" in _UNTYPED:
            defaults[name] = None


def _all_written_out(defaults: CfgNode, content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with our short forms in full."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        default = defaults.get(name)
        key = f"{prefix}{name}"
        if key in RENAMED:
            continue
        value = written_out(key, value)
        if key == "MODEL.OUTPUT_ACT" and isinstance(value, str):
            value = [[value]]  # Distance-Transform-Quantized.yaml: one activation for the one loss
        if isinstance(value, Mapping) and isinstance(default, CfgNode):
            value = _all_written_out(default, value, f"{key}.")
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        found[name] = value
    return found
