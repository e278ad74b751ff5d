"""``register`` and ``unregister``: all that this package puts into PyTC v1, put in together or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from ...config import validate
from ...errors import ConfigError
from ...pipeline.networks import denoiser_options, shared_options
from .compat import import_host, swapped
from .config import our_part
from .losses import NAME as LOSS_NAME
from .losses import NeuroDiffWeightedBCE
from .models import DENOISER, model_builders

_registered: ExitStack | None = None


def register(cfg: CfgNode, *, checkpoint: str | Path = "") -> None:
    """Put our networks, loss, test-time augmentation and, if AUGMENTOR.SYNTHETIC is on, pairs into PyTC v1.

    Call it after loading the configuration (PyTC does not hand it to its models), before a trainer is made. Then
    MODEL.ARCHITECTURE knows ``neurodiff_superhuman`` and its like, MODEL.LOSS_OPTION ``NeuroDiffWeightedBCE``, and
    every training dataset, chunk mode included, draws synthetic and real patches in the exact ratio. A second call
    replaces the first; nothing is put in if anything is wrong.

    Parameters
    ----------
    cfg : CfgNode
        PyTC's configuration, loaded with ``add_cfg_func=add_config``.
    checkpoint : path, optional
        PyTC's checkpoint that a training goes on from: it then goes on in the numbers of the samples, too, instead of
        drawing the first ones again.

    Raises
    ------
    MissingDependency
        If PyTC v1, or a package that it needs, is not there.
    UserError
        If our part of the configuration cannot work, somebody else has taken one of our names, the pairs are missing or
        do not fit, or the checkpoint cannot be read.
    """
    global _registered
    import_host()
    if "NEURODIFF" not in cfg or "SYNTHETIC" not in cfg.AUGMENTOR:
        raise ConfigError("The configuration lacks our groups: load it with add_cfg_func=v1.add_config.")
    validate(our_part(cfg))
    from connectomics.data.dataset import dataset_tile
    from connectomics.engine import trainer as host_trainer
    from connectomics.model.build import MODEL_MAP
    from connectomics.model.loss.criterion import Criterion

    from .augmentation import AffinityTestAugmentor
    from .datasets import load_synthetic, mixing_chunk, mixing_loader
    from .trainer import read_checkpoint

    node = cfg.AUGMENTOR.SYNTHETIC
    synthetic = load_synthetic(cfg, node.PAIRS, cfg.NEURODIFF.VOXEL_NM) if node.ENABLED else None
    resumed = checkpoint and not cfg.SOLVER.ITERATION_RESTART
    first_iteration = int(read_checkpoint(Path(checkpoint)).get("iteration", 0)) if resumed else 0
    builders = model_builders(cfg.NEURODIFF.DIFFUSION.ARCHITECTURE, denoiser_options(cfg), shared_options(cfg))
    with torch.device("meta"):
        builders[DENOISER]()  # neither memory nor numbers: whether it can be built
    unregister()
    with ExitStack() as stack:
        stack.enter_context(_added(MODEL_MAP, builders))
        stack.enter_context(_added(Criterion.loss_dict, {LOSS_NAME: NeuroDiffWeightedBCE}))
        stack.enter_context(swapped(host_trainer, TestAugmentor=AffinityTestAugmentor))
        if synthetic is not None:
            loader = mixing_loader(host_trainer.build_dataloader, synthetic, first_iteration)
            stack.enter_context(swapped(host_trainer, build_dataloader=loader))
            stack.enter_context(swapped(dataset_tile, VolumeDataset=mixing_chunk(synthetic)))
        _registered = stack.pop_all()


def unregister() -> None:
    """Take out again what :func:`register` put in; nothing happens if it was not called."""
    global _registered
    stack, _registered = _registered, None
    if stack is not None:
        stack.close()


@contextmanager
def _added(target: dict[str, Any], entries: Mapping[str, Any]) -> Iterator[None]:
    """Within the block a dictionary has more entries; somebody else's are not replaced."""
    taken = target.keys() & entries.keys()
    if taken:
        raise ConfigError(f"pytorch_connectomics knows '{min(taken)}' already, by somebody else; rename that one.")
    target.update(entries)
    try:
        yield
    finally:
        for name in entries:
            del target[name]
