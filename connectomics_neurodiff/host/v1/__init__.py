"""The plugin for PyTC v1 (yacs): ``register`` for scripts that use PyTC's own trainer, ``fit`` for our pipeline.

In a script of PyTC's, two lines more:

    from connectomics_neurodiff.host import v1
    cfg = load_cfg(args, add_cfg_func=v1.add_config); v1.register(cfg)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import add_config
from .models import provide_host_networks
from .plugin import register, unregister

if TYPE_CHECKING:
    from .augmentation import AffinityTestAugmentor as AffinityTestAugmentor
    from .trainer import NeuroDiffTrainer as NeuroDiffTrainer

__all__ = ["AffinityTestAugmentor", "NeuroDiffTrainer", "add_config", "provide_host_networks", "register", "unregister"]

_HOMES = {"AffinityTestAugmentor": "augmentation", "NeuroDiffTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    """What derives from PyTC's classes, loaded on first use: their import takes seconds and may need fixes."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from .compat import import_host

    import_host()
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
