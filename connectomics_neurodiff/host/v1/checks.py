"""What is asked of a project of PyTC v1's before any work: files, network, numbers; and its refusals as one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from connectomics.model.build import MODEL_MAP, build_model
from yacs.config import CfgNode

from ...config.project import file_names
from ...errors import ConfigError, LabelTypeError, MissingInput, UnknownName, UserError, ValueRangeError, did_you_mean
from .plugin import register, unregister


def check_project(cfg: CfgNode, *, inference: bool, checkpoint: str) -> None:
    """Refuse what can be known to fail.

    Parameters
    ----------
    cfg : CfgNode
        PyTC's configuration with our groups.
    inference : bool
        Whether it is to predict; otherwise to train.
    checkpoint : str
        PyTC's checkpoint to start from; empty: none.

    Raises
    ------
    MissingInput
        If a file that is named is not there, or prediction is asked for without a checkpoint.
    ConfigError, UnknownName
        If a value cannot work or would be ignored, or PyTC refuses the network.
    """
    for name in ("ITERATION_TOTAL", "ITERATION_SAVE", "SAMPLES_PER_BATCH"):
        if cfg.SOLVER[name] < 1:
            raise ConfigError(f"SOLVER.{name} must be >= 1. Got {cfg.SOLVER[name]}.")
    if inference and cfg.SYSTEM.NUM_GPUS < 1:
        raise ConfigError("PyTC's inference needs SYSTEM.NUM_GPUS >= 1 (its batch size), on a CPU too. Got 0.")
    for key in ("LONG_RANGE", "SHAPE_SIGMA_NM"):
        if cfg.NEURODIFF.SEGMENTER[key]:
            raise ConfigError(
                f"NEURODIFF.SEGMENTER.{key} belongs to recipes; a project of PyTC's says in MODEL.TARGET_OPT what is "
                f"learnt. Got {cfg.NEURODIFF.SEGMENTER[key]}."
            )
    _require_files(cfg, inference=inference, checkpoint=checkpoint)
    _require_network(cfg)


@contextmanager
def refusals() -> Iterator[None]:
    """What PyTC fails at while it sets a trainer up is in the configuration or the data; its words, or place, are told.

    PyTC refuses with assertions, many without a word, or fails at the first line that cannot go on.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split()) or str(place.line)
        raise ConfigError(
            f"pytorch_connectomics refuses this configuration or its data: {type(error).__name__}: {said} "
            f"({Path(place.filename).name}, line {place.lineno})."
        ) from error


def check_dataset(dataset: Any) -> None:
    """Refuse a training dataset of PyTC's that can draw no sample.

    Raises
    ------
    LabelTypeError, ValueRangeError
        If it has labels that are no integers, or no volume as large as a sample.
    """
    size = np.array(dataset.sample_volume_size)
    if not any((size <= volume.shape[-3:]).all() for volume in dataset.volume):
        raise ValueRangeError(
            f"No volume is as large as a sample, {tuple(size.tolist())} voxels with the margin that the augmentation "
            "needs. Make MODEL.INPUT_SIZE smaller or DATASET.PAD_SIZE larger."
        )
    for label in dataset.label:
        if dataset.do_relabel and not np.issubdtype(label.dtype, np.integer):
            raise LabelTypeError(f"Labels must be of an integer type, for PyTC numbers them anew. Got {label.dtype}.")


def _require_files(cfg: CfgNode, *, inference: bool, checkpoint: str) -> None:
    """Lists in text files, tiles and patterns are PyTC's to read."""
    if inference and not checkpoint:
        raise MissingInput("Inference needs --checkpoint: a checkpoint_XXXXX.pth.tar of the training.")
    if not inference and not cfg.DATASET.LABEL_NAME:
        raise MissingInput("Training needs labels: DATASET.LABEL_NAME names none.")
    names = [cfg.DATASET.IMAGE_NAME] if inference else [cfg.DATASET[key] for key in _FILES]
    folders = file_names(cfg.DATASET.INPUT_PATH)
    for value in names:
        files = file_names(value)
        homes = folders * len(files) if len(folders) == 1 else folders
        for home, name in zip(homes, files, strict=False):
            path = Path(name if cfg.DATASET.IS_ABSOLUTE_PATH else Path(home) / name)
            if not path.exists():
                raise MissingInput(f"No file at {path}.")
    if checkpoint and not Path(checkpoint).is_file():
        raise MissingInput(f"No checkpoint at {checkpoint}.")


_FILES = ("IMAGE_NAME", "LABEL_NAME", "VALID_MASK_NAME", "VAL_IMAGE_NAME", "VAL_LABEL_NAME", "VAL_VALID_MASK_NAME")


def _require_network(cfg: CfgNode) -> None:
    """Build the network once, so that what PyTC refuses is told before the pairs are made."""
    cfg = cfg.clone()
    cfg.AUGMENTOR.SYNTHETIC.ENABLED = False
    register(cfg)
    name = cfg.MODEL.ARCHITECTURE
    try:
        if name not in MODEL_MAP:
            raise UnknownName(
                f"No MODEL.ARCHITECTURE '{name}'.{did_you_mean(name, MODEL_MAP)} Known: {', '.join(MODEL_MAP)}."
            )
        with refusals(), redirect_stdout(sys.stderr):  # it prints what it builds
            build_model(cfg, torch.device("cpu"))
    finally:
        unregister()
