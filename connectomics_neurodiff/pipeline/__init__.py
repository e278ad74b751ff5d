"""The main job: stages in the data's order, from a labelled volume to scored segmentations; done ones are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..errors import ConfigError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

SYNTHESIS_STAGES = ("diffusion", "masks", "pairs")
INFERENCE_STAGES = ("predictions", "segmentations", "metrics", "report")
#: Stages in order. Those before the segmenter's need AUGMENTOR.SYNTHETIC and no pairs made before; the first is for
#: pairs that are made of unannotated tissue.
STAGES = ("pseudo_labels", *SYNTHESIS_STAGES, "segmenter", *INFERENCE_STAGES)
NETWORK_STAGES = frozenset({"pseudo_labels", "diffusion", "pairs", "segmenter", "predictions"})


def choose_stages(cfg: CfgNode, names: Sequence[str] = (), *, inference: bool = False, arm: str = "") -> list[str]:
    """Stages to run: those asked for (all by default) that this configuration has, and the one arm if there is one.

    Raises
    ------
    UnknownName
        If a stage does not exist.
    ConfigError
        If a stage was asked for by name that this configuration does not have.
    """
    from .parts import makes_pairs, makes_pseudo_labels

    for name in names:
        if name not in STAGES:
            raise UnknownName(f"No stage '{name}'.{did_you_mean(name, STAGES)} Known: {', '.join(STAGES)}.")
    wanted = list(names or (INFERENCE_STAGES if inference else STAGES))
    synthetic = cfg.AUGMENTOR.SYNTHETIC
    synthesises = makes_pairs(cfg)
    idle = [name for name in names if name in SYNTHESIS_STAGES and not synthesises]
    if idle:
        raise ConfigError(f"The stage '{idle[0]}' makes synthetic pairs, but {_why_none(synthetic)}.")
    if "pseudo_labels" in names and not makes_pseudo_labels(cfg):
        raise ConfigError(f"The stage 'pseudo_labels' labels unannotated tissue, but {_why_none(synthetic)}.")
    scored = cfg.NEURODIFF.SPLIT.SCORED
    unscored = [name for name in (INFERENCE_STAGES if inference else names) if name in INFERENCE_STAGES and not scored]
    if unscored:
        raise ConfigError(f"The stage '{unscored[0]}' needs a tune and a test part, but NEURODIFF.SPLIT.SCORED is off.")
    left_out = {
        *(() if synthesises and (arm != "real" or names) else SYNTHESIS_STAGES),
        *(() if makes_pseudo_labels(cfg) and (arm != "real" or names) else ("pseudo_labels",)),
        *(() if scored else INFERENCE_STAGES),
    }
    return [name for name in STAGES if name in wanted and name not in left_out]


def _why_none(synthetic: CfgNode) -> str:
    """Why a stage before the segmenter's has nothing to do."""
    if not synthetic.ENABLED:
        return "AUGMENTOR.SYNTHETIC is off"
    if synthetic.PAIRS:
        return "AUGMENTOR.SYNTHETIC.PAIRS names pairs made before"
    return f"AUGMENTOR.SYNTHETIC.SOURCE is {list(synthetic.SOURCE)}"


def run_pipeline(
    cfg: CfgNode,
    *,
    stages: Sequence[str] = (),
    inference: bool = False,
    checkpoint: str = "",
    force: bool = False,
    engine: str = "auto",
    arm: str = "",
) -> dict[str, Any]:
    """Run the main job, or go on where it stopped.

    Parameters
    ----------
    cfg : CfgNode
        As :func:`connectomics_neurodiff.config.load_config` returns it.
    stages : sequence of str
        Only these (default: all).
    inference : bool
        Only the stages after training.
    checkpoint : str
        Segmenter to use in place of the run's own; only with stages after the training.
    force : bool
        Make again what was made with other settings.
    engine : {"auto", "native", "host"}
        Whose training loop: ours, or that of pytorch_connectomics v1; auto: the host's if it is installed.
    arm : str
        The one arm to train and score, ``"real"`` or ``"mixed"`` (default: all that the configuration has).

    Returns
    -------
    dict
        The content of metrics.json, or an empty dict if that stage was not asked for and never ran.

    Raises
    ------
    UserError
        If input or settings are wrong; before any long work wherever it can be known.
    """
    from . import networks
    from . import parts as parts_of
    from .engines import choose_engine, load_engine
    from .report_stage import make_report
    from .run import Run, arms_of, logger, run_folder, timed
    from .unlabeled import open_unlabeled

    chosen = choose_stages(cfg, stages, inference=inference, arm=arm)
    if arm and checkpoint:
        raise ConfigError("--checkpoint says itself which arm it stands for; it does not go with --arm.")
    if arm and arm not in arms_of(cfg):
        raise ConfigError(f"This configuration trains {' and '.join(arms_of(cfg))}. Got the arm '{arm}'.")
    engine = choose_engine(engine)
    load_engine(engine)
    if NETWORK_STAGES & set(chosen):
        networks.check_networks(cfg)
    stands_for, given = "", None
    if checkpoint:
        trained = [name for name in chosen if name not in INFERENCE_STAGES]
        if trained:
            raise ConfigError(
                f"--checkpoint replaces the trained segmenter; it goes with --inference. Got {trained[0]}."
            )
        given = check_checkpoint(checkpoint, cfg.NEURODIFF.SEGMENT.METHODS)
        stands_for = "mixed" if given.extra.get("arm") == "mixed" else "real"
    _use_threads(cfg.SYSTEM.NUM_THREADS)
    parts = parts_of.open_parts(cfg)
    extra = parts_of.open_extra_volumes(cfg, parts)
    unlabeled = open_unlabeled(cfg, parts)
    parts_of.check_pairs(cfg, parts["train"].volume)
    from . import stages as made_by
    from .masks_stage import make_masks
    from .pairs_stage import make_pairs
    from .pseudo_labels_stage import make_pseudo_labels
    from .segmentations_stage import check_blocks, make_segmentations

    if "segmentations" in chosen:
        check_blocks(cfg, parts)

    makers: dict[str, Callable[[Run], None]] = {
        "pseudo_labels": make_pseudo_labels,
        "diffusion": made_by.make_diffusion,
        "masks": make_masks,
        "pairs": make_pairs,
        "segmenter": made_by.make_segmenter,
        "predictions": made_by.make_predictions,
        "segmentations": make_segmentations,
        "metrics": made_by.make_metrics,
        "report": make_report,
    }
    with run_folder(cfg) as folder:
        run = Run(cfg, folder, parts, force, checkpoint, stands_for, engine, extra, unlabeled, only=arm)
        if given and (told := networks.other_voxels(given, parts["test"].volume.voxel_nm)):
            logger.warning("The test part %s.", told)
        for name in chosen:
            logger.info("stage %s", name)
            with timed(run, name):
                makers[name](run)
        logger.info("done: %s", ", ".join(chosen))
        return run.metrics()


def check_checkpoint(path: str, methods: Sequence[str] = ()) -> Checkpoint:
    """Build the segmenter given by --checkpoint, so that a wrong file is told before any work.

    Raises
    ------
    ConfigError
        If one of the `methods` takes instances from the segmenter, and this one predicts affinities alone.
    MissingInput, CheckpointMismatch, UnknownName
        If there is no such file, or it holds no segmenter that can be built.

    Returns
    -------
    Checkpoint
        The content of the file.
    """
    from ..checkpoints import load_checkpoint
    from .networks import trained_segmenter

    found = load_checkpoint(path, kind="segmenter")
    trained_segmenter(found)
    if "agq" in methods and found.architecture != "agq":
        raise ConfigError(
            f"NEURODIFF.SEGMENT.METHODS has agq, which needs a segmenter 'agq'. {path} holds '{found.architecture}'."
        )
    return found


def _use_threads(count: int) -> None:
    import torch

    cores = len(os.sched_getaffinity(0))
    if count > cores:
        raise ConfigError(f"SYSTEM.NUM_THREADS may be at most {cores} on this machine (0: all of them). Got {count}.")
    torch.set_num_threads(count or cores)
