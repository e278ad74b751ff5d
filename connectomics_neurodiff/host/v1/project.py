"""Running a project of PyTC v1's as it is: its YAML, its data, its trainer; with synthetic pairs if they are asked for.

What ``scripts/main.py`` of PyTC does, and between loading and training: the pairs are made, if none are named, by our
pipeline from the project's own training volume.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from connectomics.config import load_cfg
from yacs.config import CfgNode

from ...config import validate
from ...config.project import flat, read_settings, single_file
from ...errors import ConfigError, OutputExists, StaleArtifactError, UserError
from ...pipeline.pairs_stage import passed_pairs
from ...pipeline.run import discard_training, run_folder
from ...provenance import hash_of_file
from ...seeding import rng_for
from .checks import check_project, refusals
from .config import add_config, our_part
from .plugin import register, unregister
from .trainer import NeuroDiffTrainer, last_checkpoint, read_checkpoint

#: Where the pairs of a project are made, below its OUTPUT_PATH.
PAIRS_FOLDER = "neurodiff"
PAIR_STAGES = ("diffusion", "masks", "pairs")
#: What may change between two sessions of one training: how long, how watched, on what machine, what is predicted.
_FREE = (
    "SYSTEM.", "MONITOR.", "INFERENCE.", "NEURODIFF.", "AUGMENTOR.SYNTHETIC.", "DATASET.OUTPUT_PATH",
    "DATASET.INPUT_PATH", "DATASET.VAL_", "SOLVER.ITERATION_",
)  # fmt: skip


def load_project(
    config_file: str, *, base: str | None = None, overrides: Sequence[str] = (), inference: bool = False
) -> CfgNode:
    """The project's configuration as PyTC loads it, with our groups, not frozen.

    Raises
    ------
    ConfigError
        If a key or value is not one of PyTC's or ours.
    """
    read_settings(config_file, base=base, overrides=overrides)  # names the nearest key, and where the wrong one stands
    options = argparse.Namespace(
        config_file=config_file, config_base=base, opts=list(overrides), inference=inference, distributed=False
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Configs are mutable")  # so they must be: the pairs come in later
            cfg = load_cfg(options, freeze=False, add_cfg_func=add_config)
    except (KeyError, ValueError, AssertionError) as error:  # yacs raises all three
        raise ConfigError(f"{config_file}: {' '.join(str(error).split())}") from error
    return cfg


def run_project(
    cfg: CfgNode,
    *,
    inference: bool,
    checkpoint: str,
    force: bool,
    make_pairs: Callable[[CfgNode, Sequence[str]], object],
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
    force : bool
        Discard the training of other settings that OUTPUT_PATH holds, or the prediction.
    make_pairs : callable
        ``make_pairs(native_cfg, stages)``: our pipeline.

    Returns
    -------
    pathlib.Path
        The folder that was written to.

    Raises
    ------
    UserError
        As :func:`check_project`; if the folder is not a run's, another run works in it, it holds a training with other
        settings, or a prediction.
    """
    check_project(cfg, inference=inference, checkpoint=checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if inference:
        cfg.AUGMENTOR.SYNTHETIC.ENABLED = False
        cfg.freeze()
        with _registered(cfg):
            _predict(cfg, device, checkpoint, force=force)
        return Path(cfg.DATASET.OUTPUT_PATH)
    with run_folder(cfg) as folder:
        if cfg.AUGMENTOR.SYNTHETIC.ENABLED and not cfg.AUGMENTOR.SYNTHETIC.PAIRS:
            native = native_config(cfg)
            make_pairs(native, PAIR_STAGES)
            cfg.AUGMENTOR.SYNTHETIC.PAIRS = [str(path) for path in passed_pairs(native)]
        cfg.freeze()
        settings = training_settings(cfg)
        start = _start_of_training(folder, settings, checkpoint, force=force)
        with _registered(cfg, checkpoint=start):
            _train(cfg, device, start, settings)
    return folder


def describe_project(cfg: CfgNode, *, inference: bool, checkpoint: str) -> str:
    """What :func:`run_project` would do, for ``--dry-run``."""
    data, folder = cfg.DATASET, Path(cfg.DATASET.OUTPUT_PATH)
    lines = [f"project of pytorch_connectomics v1: {cfg.MODEL.ARCHITECTURE}, patches of {cfg.MODEL.INPUT_SIZE} voxels"]
    if inference:
        return "\n".join([*lines, f"predicts {data.IMAGE_NAME} with {checkpoint} -> {folder}"])
    synthetic = cfg.AUGMENTOR.SYNTHETIC
    if synthetic.ENABLED and not synthetic.PAIRS:
        native = native_config(cfg)
        count = native.NEURODIFF.REMODEL.COPIES
        lines.append(f"makes synthetic pairs ({', '.join(PAIR_STAGES)}: {count}) -> {native.DATASET.OUTPUT_PATH}")
    mixed = f", with synthetic pairs {synthetic.RATIO:g} : 1" if synthetic.ENABLED else ""
    last = checkpoint or last_checkpoint(folder)
    lines.append(f"trains on {data.IMAGE_NAME}{mixed}, {cfg.SOLVER.ITERATION_TOTAL} iterations -> {folder}")
    return "\n".join([*lines, f"goes on from {last}"] if last else lines)


def training_settings(cfg: CfgNode) -> dict[str, str]:
    """What a training's result depends on, by key, as text; the pairs by their content."""
    found = {key: repr(value) for key, value in flat(cfg, whole=()) if not key.startswith(_FREE)}
    synthetic = cfg.AUGMENTOR.SYNTHETIC
    if synthetic.ENABLED:
        found["AUGMENTOR.SYNTHETIC.RATIO"] = repr(synthetic.RATIO)
        found["AUGMENTOR.SYNTHETIC.PAIRS"] = " ".join(hash_of_file(path) for path in synthetic.PAIRS)
    return found | {"AUGMENTOR.SYNTHETIC.ENABLED": repr(synthetic.ENABLED), "NEURODIFF.SEED": repr(cfg.NEURODIFF.SEED)}


def _start_of_training(folder: Path, settings: Mapping[str, str], checkpoint: str, *, force: bool) -> str:
    """The checkpoint to go on from, or "" -- never one of a training with other settings."""
    last = last_checkpoint(folder)
    if last is None:
        return checkpoint
    try:
        _require_same_settings(last, settings)
    except UserError:
        if not force:
            raise
        if Path(checkpoint).parent.resolve() != folder.resolve():
            discard_training(folder)
        return checkpoint
    return checkpoint or str(last)


def _require_same_settings(checkpoint: Path, settings: Mapping[str, str]) -> None:
    before = read_checkpoint(checkpoint).get("neurodiff_settings", {})
    changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    if changed:
        key = changed[0]
        raise StaleArtifactError(
            f"{checkpoint} belongs to a training with other settings ({key}: {before.get(key)} -> {settings.get(key)}"
            f"{', ...' if len(changed) > 1 else ''}). Choose another DATASET.OUTPUT_PATH, or use --force to start anew."
        )


@contextmanager
def _registered(cfg: CfgNode, checkpoint: str = "") -> Iterator[None]:
    register(cfg, checkpoint=checkpoint)
    try:
        yield
    finally:
        unregister()


def _train(cfg: CfgNode, device: torch.device, checkpoint: str, settings: dict[str, str]) -> None:
    with refusals(), _seeded(cfg.NEURODIFF.SEED):
        trainer = NeuroDiffTrainer(cfg, device, "train", checkpoint=checkpoint or None)
    trainer.project_settings = settings
    first = trainer.start_iter
    if first >= cfg.SOLVER.ITERATION_TOTAL:
        print(f"nothing left to train: {checkpoint} is at iteration {first} of {cfg.SOLVER.ITERATION_TOTAL}")
        return
    if cfg.DATASET.DO_CHUNK_TITLE:
        with refusals():
            trainer.run_chunk("train")
        last = trainer.start_iter  # run_chunk moves it on; what is less than a chunk is left out
    else:
        trainer.train()
        last = cfg.SOLVER.ITERATION_TOTAL
    if last > first and last % cfg.SOLVER.ITERATION_SAVE:
        trainer.save_checkpoint(last - 1)  # PyTC saves on multiples only: the end would be lost


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block what PyTC draws from the global generators, as the first weights, follows from the seed."""
    state = random.getstate()
    rng = rng_for(seed, "host project")
    with torch.random.fork_rng():
        torch.manual_seed(int(rng.integers(2**62)))
        random.seed(int(rng.integers(2**62)))
        try:
            yield
        finally:
            random.setstate(state)


def _predict(cfg: CfgNode, device: torch.device, checkpoint: str, *, force: bool) -> None:
    with refusals():
        trainer = NeuroDiffTrainer(cfg, device, "test", checkpoint=checkpoint)
    if cfg.DATASET.DO_CHUNK_TITLE:
        trainer.run_chunk("test")  # leaves out the chunks that are there
    elif cfg.INFERENCE.DO_SINGLY:
        trainer.test_singly()
    else:
        target = Path(trainer.output_dir) / trainer.test_filename
        if target.exists() and not force:
            raise OutputExists(
                f"{target} exists; nothing was overwritten. Name another INFERENCE.OUTPUT_PATH or OUTPUT_NAME, or use "
                "--force."
            )
        trainer.test()


def native_config(cfg: CfgNode) -> CfgNode:
    """Configuration of the run that makes a project's pairs, from PyTC's keys and our groups.

    Raises
    ------
    ConfigError
        If the project's training volume is not one image file and one label file.
    """
    native = our_part(cfg)
    native.NEURODIFF.SPLIT.SCORED = False
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
