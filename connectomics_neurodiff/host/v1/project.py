"""Running a project of PyTC v1's as it is: its YAML, its data, its trainer; with synthetic pairs if they are asked for.

What ``scripts/main.py`` of PyTC does, and between loading and training: the pairs are made, if none are named, by our
pipeline from the project's own training volume.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from connectomics.config import load_cfg, save_all_cfg
from connectomics.model.build import MODEL_MAP, build_model
from yacs.config import CfgNode

from ...config import default_config, validate
from ...config.project import single_file
from ...errors import ConfigError, MissingInput, UnknownName, did_you_mean
from ...pipeline.pairs_stage import passed_pairs
from .config import add_config
from .plugin import register, unregister
from .trainer import NeuroDiffTrainer, last_checkpoint

#: Where the pairs of a project are made, below its OUTPUT_PATH.
PAIRS_FOLDER = "neurodiff"
PAIR_STAGES = ("diffusion", "masks", "pairs")


def load_project(
    config_file: str, *, base: str | None = None, overrides: Sequence[str] = (), inference: bool = False
) -> CfgNode:
    """The project's configuration as PyTC loads it, with our groups, not frozen.

    Raises
    ------
    ConfigError
        If a key or value is not one of PyTC's or ours.
    """
    options = argparse.Namespace(
        config_file=config_file, config_base=base, opts=list(overrides), inference=inference, distributed=False
    )
    try:
        cfg = load_cfg(options, freeze=False, add_cfg_func=add_config)
    except (KeyError, ValueError, AssertionError) as error:  # yacs raises all three
        raise ConfigError(f"{config_file}: {' '.join(str(error).split())}") from error
    return cfg


def run_project(
    cfg: CfgNode, *, inference: bool, checkpoint: str, make_pairs: Callable[[CfgNode, Sequence[str]], object]
) -> Path:
    """Train, or with `inference` predict, with PyTC's trainer.

    Parameters
    ----------
    cfg : CfgNode
        As :func:`load_project` returns it.
    inference : bool
        Predict INFERENCE.IMAGE_NAME with a trained network; otherwise train.
    checkpoint : str
        A checkpoint of PyTC's to predict with, or to train on from; empty: a training goes on from the last one of
        OUTPUT_PATH, if there is one.
    make_pairs : callable
        ``make_pairs(native_cfg, stages)``: our pipeline.

    Returns
    -------
    pathlib.Path
        The folder that was written to.

    Raises
    ------
    MissingInput
        If a file that is named is not there, or prediction is asked for without a checkpoint.
    ConfigError
        If PyTC refuses the network or the data.
    """
    folder = Path(cfg.DATASET.OUTPUT_PATH)
    _require_files(cfg, inference=inference, checkpoint=checkpoint)
    _require_network(cfg)
    synthetic = cfg.AUGMENTOR.SYNTHETIC
    if synthetic.ENABLED and not synthetic.PAIRS and not inference:
        native = native_config(cfg)
        make_pairs(native, PAIR_STAGES)
        synthetic.PAIRS = [str(path) for path in passed_pairs(native)]
    if inference:
        synthetic.ENABLED = False
    cfg.freeze()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not inference:
        checkpoint = checkpoint or str(last_checkpoint(folder) or "")
    register(cfg, checkpoint=checkpoint)
    try:
        if inference:
            _predict(cfg, device, checkpoint)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_all_cfg(cfg, str(folder))
            _train(cfg, device, checkpoint)
    finally:
        unregister()
    return folder


def _train(cfg: CfgNode, device: torch.device, checkpoint: str) -> None:
    with _refusals():
        trainer = NeuroDiffTrainer(cfg, device, "train", checkpoint=checkpoint or None)
    first = trainer.start_iter
    if cfg.DATASET.DO_CHUNK_TITLE:
        trainer.run_chunk("train")
        last = trainer.start_iter  # run_chunk moves it on; what is less than a chunk is left out
    else:
        trainer.train()
        last = cfg.SOLVER.ITERATION_TOTAL
    if last > first and last % cfg.SOLVER.ITERATION_SAVE:
        trainer.save_checkpoint(last - 1)  # PyTC saves on multiples only: the end would be lost


def _predict(cfg: CfgNode, device: torch.device, checkpoint: str) -> None:
    with _refusals():
        trainer = NeuroDiffTrainer(cfg, device, "test", checkpoint=checkpoint)
    if cfg.DATASET.DO_CHUNK_TITLE:
        trainer.run_chunk("test")
    elif cfg.INFERENCE.DO_SINGLY:
        trainer.test_singly()
    else:
        trainer.test()


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
        with _refusals():
            build_model(cfg, torch.device("cpu"))
    finally:
        unregister()


@contextmanager
def _refusals() -> Iterator[None]:
    """PyTC refuses a configuration with assertions, many without a word; their text, or their place, is told."""
    try:
        yield
    except AssertionError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split()) or f"{place.line} ({Path(place.filename).name}:{place.lineno})"
        raise ConfigError(f"pytorch_connectomics refuses this configuration: {said}.") from error


def _require_files(cfg: CfgNode, *, inference: bool, checkpoint: str) -> None:
    """Refuse, before any work, what names a file that is not there; lists of tiles and patterns are PyTC's to read."""
    if inference and not checkpoint:
        raise MissingInput(
            f"Inference into {cfg.INFERENCE.OUTPUT_PATH} needs --checkpoint: a checkpoint_XXXXX.pth.tar of the "
            "training."
        )
    data = cfg.INFERENCE if inference else cfg.DATASET
    folder = Path(data.INPUT_PATH or cfg.DATASET.INPUT_PATH)
    names = [single_file(data.IMAGE_NAME)] + ([] if inference else [single_file(data.LABEL_NAME)])
    for path in [folder / name for name in names if name] + ([Path(checkpoint)] if checkpoint else []):
        if not path.exists():
            raise MissingInput(f"No file at {path}.")


def native_config(cfg: CfgNode) -> CfgNode:
    """Configuration of the run that makes a project's pairs, from PyTC's keys and our group.

    Raises
    ------
    ConfigError
        If the project's training volume is not one image file and one label file.
    """
    native = default_config()
    native.NEURODIFF = cfg.NEURODIFF.clone()
    native.NEURODIFF.SPLIT.SCORED = False
    native.AUGMENTOR.SYNTHETIC = cfg.AUGMENTOR.SYNTHETIC.clone()
    native.SYSTEM.NUM_GPUS = min(cfg.SYSTEM.NUM_GPUS, torch.cuda.device_count())
    native.SYSTEM.NUM_CPUS = cfg.SYSTEM.NUM_CPUS
    native.DATASET.INPUT_PATH = cfg.DATASET.INPUT_PATH
    native.DATASET.IMAGE_NAME = _one_file(cfg, "IMAGE_NAME")
    native.DATASET.LABEL_NAME = _one_file(cfg, "LABEL_NAME")
    native.DATASET.OUTPUT_PATH = str(Path(cfg.DATASET.OUTPUT_PATH) / PAIRS_FOLDER)
    validate(native)
    native.freeze()
    return native


def _one_file(cfg: CfgNode, key: str) -> str:
    file = single_file(cfg.DATASET[key])
    if not file or cfg.DATASET.DO_CHUNK_TITLE:
        raise ConfigError(
            f"Pairs are made from one volume; DATASET.{key} is {cfg.DATASET[key]!r}. Make them with 'neurodiff run "
            "--stages diffusion,masks,pairs' for each volume, and name the files in AUGMENTOR.SYNTHETIC.PAIRS."
        )
    return file
