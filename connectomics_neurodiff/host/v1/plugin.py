"""``register`` and ``unregister``: all that this package puts into PyTC v1, put in together or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from yacs.config import CfgNode

from ...pipeline.networks import denoiser_options
from .compat import import_host, swapped
from .losses import NAME as LOSS_NAME
from .losses import NeuroDiffWeightedBCE
from .models import model_builders

_registered: ExitStack | None = None


def register(cfg: CfgNode) -> None:
    """Put our networks, loss, test-time augmentation and, if AUGMENTOR.SYNTHETIC is on, pairs into PyTC v1.

    Call it after loading the configuration (PyTC does not hand it to its models), before a trainer is made. Then
    MODEL.ARCHITECTURE knows ``neurodiff_superhuman`` and its like, MODEL.LOSS_OPTION ``NeuroDiffWeightedBCE``, and
    every training dataset, chunk mode included, draws synthetic and real patches in the exact ratio. A second call
    replaces the first; nothing is put in if anything is wrong.

    Parameters
    ----------
    cfg : CfgNode
        PyTC's configuration, loaded with ``add_cfg_func=add_config``.

    Raises
    ------
    MissingDependency
        If PyTC v1, or a package that it needs, is not there.
    UserError
        If the pairs are missing or do not fit.
    """
    global _registered
    import_host()
    from connectomics.data.dataset import dataset_tile
    from connectomics.engine import trainer as host_trainer
    from connectomics.model.build import MODEL_MAP
    from connectomics.model.loss.criterion import Criterion

    from .augmentation import AffinityTestAugmentor
    from .datasets import MixedVolumeDataset, load_synthetic, mixing_loader

    node = cfg.AUGMENTOR.SYNTHETIC
    synthetic = load_synthetic(cfg, node.PAIRS, cfg.NEURODIFF.VOXEL_NM) if node.ENABLED else None
    builders = model_builders(cfg.NEURODIFF.DIFFUSION.ARCHITECTURE, denoiser_options(cfg))
    unregister()
    stack = ExitStack()
    stack.enter_context(_added(MODEL_MAP, builders))
    stack.enter_context(swapped(host_trainer, TestAugmentor=AffinityTestAugmentor))
    stack.enter_context(_added(Criterion.loss_dict, {LOSS_NAME: NeuroDiffWeightedBCE}))
    if synthetic is not None:
        mixed = partial(MixedVolumeDataset, synthetic=synthetic)
        loader = mixing_loader(host_trainer.build_dataloader, synthetic)
        stack.enter_context(swapped(host_trainer, build_dataloader=loader))
        stack.enter_context(swapped(dataset_tile, VolumeDataset=mixed))
    _registered = stack


def unregister() -> None:
    """Take out again what :func:`register` put in; nothing happens if it was not called."""
    global _registered
    stack, _registered = _registered, None
    if stack is not None:
        stack.close()


@contextmanager
def _added(target: dict[str, Any], entries: Mapping[str, Any]) -> Iterator[None]:
    """Within the block a dictionary has more entries."""
    target.update(entries)
    try:
        yield
    finally:
        for name in entries:
            del target[name]
