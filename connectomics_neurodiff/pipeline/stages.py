"""The stages, in the data's order. Each makes its artefacts from those of earlier ones, or finds them made already."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..affinities import CONVENTION
from ..config import as_dict
from ..errors import UserError
from ..metrics import boundary_precision, column_slices, columns_of, evaluate, evaluate_columns
from ..pairs import open_pairs, read_reliability
from ..provenance import hash_of, hash_of_file, read_provenance, write_json
from ..seeding import rng_for
from ..volume import Volume, open_array, write_volume
from . import networks
from .judging import FollowingWatch, RunGate
from .pairs_stage import pair_paths
from .parts import hash_of_source
from .rounding import write_rounded_scores
from .run import Run, forget_other_training
from .segmentations_stage import QUERIES
from .selection import SelectionWatch
from .synthesis_metrics import synthesis_metrics
from .unlabeled import hash_of_pseudo_labels, load_pseudo_labelled, mask_copies, pseudo_labelled

if TYPE_CHECKING:
    import torch
    from yacs.config import CfgNode

    from ..engine import Loss, SampleSource
    from ..synthesis import DiffusionProcess

logger = logging.getLogger("connectomics_neurodiff")

#: Scores of a segmentation, as metrics.json and the tables name them.
SCORE_NAMES = ("voi_split", "voi_merge", "voi", "arand")


def make_diffusion(run: Run) -> None:
    """Train the denoiser on the train part, extra volumes, and unannotated tissue -> diffusion/checkpoint.pt.

    That tissue has the masks of the real arm's network if the pairs are painted onto them, or else none.
    """
    from ..checkpoints import save_checkpoint
    from ..synthesis import DiffusionCrops, DiffusionProcess, build_denoiser, cosine_betas, recorded_scales

    cfg, node = run.cfg, run.cfg.NEURODIFF.DIFFUSION
    settings = networks.diffusion_training_settings(cfg) | run.engine_settings()
    parents = {"train": run.parts["train"].identity}
    if run.extra:
        parents["extra"] = hash_of([part.identity for part in run.extra])
    labelled = "repainted" in cfg.AUGMENTOR.SYNTHETIC.SOURCE
    numbers = range(len(run.unlabeled))
    if labelled:
        parents["pseudo_labels"] = hash_of([hash_of_pseudo_labels(run, number) for number in numbers])
    elif run.unlabeled:
        parents["unlabeled"] = hash_of([part.identity for part in run.unlabeled])
    provenance = run.provenance("diffusion", settings, **parents)
    target = run.folder / "diffusion" / "checkpoint.pt"
    if run.is_done(target, provenance):
        return
    forget_other_training(run, target.parent, provenance.key)
    volumes = [part.load() for part in (run.parts["train"], *run.extra)]
    annotated = len(volumes)
    if labelled:
        volumes += [load_pseudo_labelled(run, number) for number in numbers]
    else:
        volumes += [part.load() for part in run.unlabeled]
    options = networks.denoiser_options(cfg)
    network = _built_with_seed(run, "denoiser", lambda: build_denoiser(node.ARCHITECTURE, **options))
    process = DiffusionProcess(cosine_betas(node.STEPS, node.COSINE_OFFSET), node.PREDICTION)
    crops = DiffusionCrops(
        volumes,
        tuple(node.PATCH),
        cfg.NEURODIFF.SEED,
        process,
        annotated=annotated,
        **networks.diffusion_crop_options(cfg),
    )
    gate, looks = RunGate(run), target.parent / "following.csv"
    gate.require_able()
    watch = FollowingWatch(run, gate.judge, process, crops.scales[0], looks) if gate.judge else None
    network = run.engine.fit(
        network,
        diffusion_loss(cfg, process),
        crops,
        networks.diffusion_fit_settings(cfg),
        target.parent,
        label="diffusion",
        key=provenance.key,
        watch=watch,
    )
    if watch:
        watch.conclude()
    extra = {
        "voxel_nm": [list(size) for size in dict.fromkeys(volume.voxel_nm for volume in volumes)],
        "process": {"steps": node.STEPS, "cosine_offset": node.COSINE_OFFSET, "prediction": node.PREDICTION},
        "grey_scales": recorded_scales(crops.scales, [volume.voxel_nm for volume in volumes]),
        "knows_dark": any(volume.dark is not None for volume in volumes),
        "patch": list(node.PATCH),
        "membrane_nm": cfg.NEURODIFF.MEMBRANE_NM,
        "condition_dropout": node.CONDITION_DROPOUT,
        "voxel_size_dropout": node.VOXEL_SIZE_DROPOUT,
    }
    save_checkpoint(
        target,
        kind="denoiser",
        architecture=node.ARCHITECTURE,
        options=options,
        state_dict=network.state_dict(),
        extra=extra,
    )
    run.finish(target, provenance)


def diffusion_loss(cfg: CfgNode, process: DiffusionProcess) -> Loss:
    """What the denoiser of a configuration is trained on."""
    from ..synthesis import VariationalBound, min_snr_weight, noise_loss, velocity_weight

    node = cfg.NEURODIFF.DIFFUSION
    weight = velocity_weight(process, node.LOSS) if node.PREDICTION == "image" else None
    if node.SNR_GAMMA:
        weight = min_snr_weight(process, node.SNR_GAMMA, node.LOSS)
    bound = VariationalBound(process) if node.LEARN_VARIANCE else None
    return partial(noise_loss, norm=node.LOSS, weight=weight, bound=bound)


def make_segmenter(run: Run) -> None:
    """Train the affinity network per arm -> segmenter/{real,mixed}/checkpoint.pt."""
    if "mixed" in run.arms:
        _require_pairs(run)
    for arm in run.arms:
        train_arm(run, arm)


def _require_pairs(run: Run) -> None:
    """All pairs of the run must be there before the first arm is trained, not only the second."""
    if not run.cfg.AUGMENTOR.SYNTHETIC.PAIRS:
        for copy in mask_copies(run.cfg):
            run.hash_of(f"pairs/{copy.name}.h5")
        for path in pseudo_labelled(run.cfg):
            run.hash_of(path.relative_to(run.folder).as_posix())
    if run.cfg.AUGMENTOR.SYNTHETIC.RATIO > 0 and not pair_paths(run):
        raise UserError("No synthetic volume passed the gate: there is nothing to mix in. See pairs/*.gate.json.")


def train_arm(run: Run, arm: str) -> None:
    """Train the affinity network of one arm -> segmenter/{arm}/checkpoint.pt."""
    from ..checkpoints import save_checkpoint
    from ..segmenters import build_segmenter

    cfg = run.cfg
    options = networks.segmenter_options(cfg)
    queries = cfg.MODEL.ARCHITECTURE == QUERIES
    weighted = cfg.NEURODIFF.SEGMENTER.RELIABILITY_WEIGHTS
    settings = {
        "MODEL": {
            "ARCHITECTURE": cfg.MODEL.ARCHITECTURE,
            "INPUT_SIZE": list(cfg.MODEL.INPUT_SIZE),
            **networks.segmenter_identity(options),
        },
        "LOSS": dict(zip(cfg.MODEL.LOSS_OPTION, cfg.MODEL.LOSS_WEIGHT, strict=True))
        | ({"PIXEL_DISCRIMINATION": cfg.NEURODIFF.SEGMENTER.PIXEL_DISCRIMINATION} if queries else {}),
        "SOLVER": networks.training_keys(cfg.SOLVER, ("ITERATION_SAVE",)),
        "AUGMENTOR": networks.training_keys(cfg.AUGMENTOR, ("SYNTHETIC",)),
        "LABEL_EROSION": cfg.NEURODIFF.SEGMENTER.LABEL_EROSION,
        "AUXILIARY": {name: cfg.NEURODIFF.SEGMENTER[name] for name in ("LONG_RANGE", "SHAPE_SIGMA_NM", "SHAPE_WEIGHT")},
        "PRECISION": networks.device_and_precision(cfg)[1],
        "RATIO": cfg.AUGMENTOR.SYNTHETIC.RATIO if arm == "mixed" else 0.0,
        **({"UNTIL": cfg.AUGMENTOR.SYNTHETIC.UNTIL} if cfg.AUGMENTOR.SYNTHETIC.UNTIL < 1 and arm == "mixed" else {}),
        **({"RELIABILITY_WEIGHTS": True} if weighted and arm == "mixed" else {}),
        **networks.world_size(cfg),
        **run.engine_settings(),
    }
    chosen_from = {}
    if cfg.NEURODIFF.SEGMENTER.CHECKPOINTS > 1:
        seen = {name: list(cfg.INFERENCE[name]) for name in ("INPUT_SIZE", "STRIDE")}
        settings["SELECTION"] = {"CHECKPOINTS": cfg.NEURODIFF.SEGMENTER.CHECKPOINTS, **seen}
        chosen_from["tune"] = run.parts["tune"].identity
    paths = pair_paths(run) if arm == "mixed" else []
    pair_hash = hash_of([hash_of_file(path) if path.is_file() else hash_of_source(str(path)) for path in paths])
    provenance = run.provenance(
        "segmenter", settings, train=run.parts["train"].identity, pairs=pair_hash, **chosen_from
    )
    target = run.folder / "segmenter" / arm / "checkpoint.pt"
    if run.is_done(target, provenance):
        return
    forget_other_training(run, target.parent, provenance.key)
    train = run.parts["train"].load()
    synthetic = [pair.load() for pair in open_pairs(paths, train)]
    reliability = [read_reliability(path) for path in paths] if weighted else []
    patches, loss = _samples_and_loss(cfg, train, synthetic, settings["RATIO"], reliability)
    network = _built_with_seed(run, "segmenter", lambda: build_segmenter(cfg.MODEL.ARCHITECTURE, **options))
    label = f"segmenter, {arm}"
    watch = SelectionWatch(run, target.parent, label) if chosen_from else None
    network = run.engine.fit(
        network,
        loss,
        patches,
        networks.segmenter_fit_settings(cfg),
        target.parent,
        label=label,
        key=provenance.key,
        watch=watch,
    )
    step, weights = watch.best() if watch else (cfg.SOLVER.ITERATION_TOTAL, network.state_dict())
    if watch:
        logger.info("%s: of %d, the network after %d iterations is kept", label, cfg.SOLVER.ITERATION_TOTAL, step)
    extra = {
        "voxel_nm": [list(train.voxel_nm)],
        "patch": list(cfg.MODEL.INPUT_SIZE),
        "affinities": CONVENTION,
        "arm": arm,
        "iterations": step,
        "auxiliary_channels": networks.auxiliary_targets(cfg).channels,
        "label_erosion": cfg.NEURODIFF.SEGMENTER.LABEL_EROSION,
    }
    save_checkpoint(
        target,
        kind="segmenter",
        architecture=cfg.MODEL.ARCHITECTURE,
        options=options,
        state_dict=weights,
        extra=extra,
    )
    run.finish(target, provenance)
    if watch:
        watch.forget()


def _samples_and_loss(
    cfg: CfgNode, train: Volume, synthetic: list[Volume], ratio: float, reliability: list[np.ndarray]
) -> tuple[SampleSource, Loss]:
    """What a segmenter learns from: affinities; or, if it tells neurons apart itself, instances too."""
    from ..training import AffinityPatches, AGQLossWeights, AugmentOptions, InstancePatches, affinity_loss, agq_loss

    common: dict[str, Any] = {
        "patch": tuple(cfg.MODEL.INPUT_SIZE),
        "seed": cfg.NEURODIFF.SEED,
        "ratio": ratio,
        "synthetic_until": networks.last_synthetic_sample(cfg) if ratio else None,
        "augment": AugmentOptions(**networks.augment_probabilities(cfg)),
        "label_erosion": cfg.NEURODIFF.SEGMENTER.LABEL_EROSION,
    }
    if cfg.MODEL.ARCHITECTURE == QUERIES:
        weights = AGQLossWeights(
            pixel_discrimination=cfg.NEURODIFF.SEGMENTER.PIXEL_DISCRIMINATION, affinity=cfg.MODEL.LOSS_WEIGHT[0]
        )
        return InstancePatches([train], synthetic, **common), partial(
            agq_loss, seed=cfg.NEURODIFF.SEED, weights=weights
        )
    auxiliary = networks.auxiliary_targets(cfg)
    terms = dict(zip(cfg.MODEL.LOSS_OPTION, cfg.MODEL.LOSS_WEIGHT, strict=True))
    patches = AffinityPatches([train], synthetic, auxiliary=auxiliary, reliability=reliability, **common)
    return patches, partial(affinity_loss, terms=terms, shape_weight=auxiliary.shape_weight)


def make_predictions(run: Run) -> None:
    """Affinities of the tune and test parts, per arm -> predictions/{arm}_{part}.h5."""
    for arm in run.arms:
        for name in ("tune", "test"):
            predict_part(run, arm, name)


def predict_part(run: Run, arm: str, name: str) -> Path:
    """Affinities of one part by an arm's network -> predictions/{arm}_{part}.h5."""
    from ..predict import predict_affinities

    node, part = run.cfg.INFERENCE, run.parts[name]
    settings = as_dict(node) | {"PRECISION": networks.device_and_precision(run.cfg)[1]}
    weights, weights_hash = run.segmenter_of(arm)
    provenance = run.provenance("predictions", settings, segmenter=weights_hash, image=part.identity)
    target = run.folder / "predictions" / f"{arm}_{name}.h5"
    if run.is_done(target, provenance):
        return target
    volume = part.load()
    affinities = predict_affinities(
        networks.load_segmenter(weights),
        volume.array("image"),
        flip_augmentation=node.FLIP_AUGMENTATION,
        label=f"affinities, {arm}, {name}",
        **networks.prediction_arguments(run.cfg),
    )
    write_volume(target, {"affinity": np.asarray(affinities)}, volume.voxel_nm, {"convention": CONVENTION})
    run.finish(target, provenance)
    return target


def make_metrics(run: Run) -> None:
    """Score the test part, whole and in columns -> metrics.json, columns.json; its affinities -> boundaries.json."""
    truth = run.parts["test"].load().array("label")
    metrics: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    boundaries: dict[str, Any] = {}
    for arm in run.arms:
        for method in run.cfg.NEURODIFF.SEGMENT.METHODS:
            name = f"{arm}_{method}"
            run.hash_of(f"segmentations/{name}.h5")
            label = np.asarray(open_array(run.folder / "segmentations" / f"{name}.h5", ("label",)))
            metrics.setdefault(arm, {})[method] = evaluate(label, truth).as_dict()
            columns.setdefault(arm, {})[method] = [
                scores and scores.as_dict() for scores in evaluate_columns(label, truth)
            ]
            if method != QUERIES:
                tuning = json.loads((run.folder / "segmentations" / f"{name}.tuning.json").read_text())
                thresholds.setdefault(arm, {})[method] = tuning["threshold"]
        if not run.only:
            write_rounded_scores(run, arm, thresholds.get(arm, {}), truth)
        boundaries[arm] = _boundaries(run, arm, truth)
    if run.only:
        (run.folder / "rounding.json").unlink(missing_ok=True)  # of an arm that may be another now
        _keep_other_arms(run, metrics, columns, boundaries)
    metrics["synthesis"] = synthesis_metrics(run)
    metrics["seconds"] = run.seconds
    provenance = run.provenance("metrics", as_dict(run.cfg), **{n: p.identity for n, p in run.parts.items()})
    metrics["provenance"] = {
        "config_hash": hash_of(as_dict(run.cfg)),
        "seed": provenance.seed,
        "version": provenance.version,
        "parents": provenance.parents,
        "conventions": provenance.conventions | {"affinities": CONVENTION, "voi": "bits, ground-truth 0 ignored"},
        "thresholds": thresholds,
        "boxes": {name: [*part.box.start, *part.box.stop] for name, part in run.parts.items()},
    }
    write_json(run.folder / "columns.json", columns)
    write_json(run.folder / "boundaries.json", boundaries)
    write_json(run.folder / "metrics.json", metrics)


def _keep_other_arms(run: Run, metrics: dict[str, Any], columns: dict[str, Any], boundaries: dict[str, Any]) -> None:
    """Keep the scores that an earlier run in this folder gave other arms, if they are of the same data."""
    before, before_columns, before_boundaries = run.metrics(), run.columns(), run.boundaries()
    parents = {name: part.identity for name, part in run.parts.items()}
    if (before.get("provenance") or {}).get("parents") != parents:
        return
    for arm in {"real", "mixed"} - set(metrics):
        if arm in before and _is_scored_network(run, arm):
            metrics[arm], columns[arm] = before[arm], before_columns[arm]
            boundaries[arm] = before_boundaries[arm]
            logger.info("the scores of the arm %s are those of an earlier run", arm)


def _is_scored_network(run: Run, arm: str) -> bool:
    """Whether the scores of an arm are those of its network: pseudo-labels may have trained another since."""
    checkpoint = run.folder / "segmenter" / arm / "checkpoint.pt"
    predicted = read_provenance(run.folder / "predictions" / f"{arm}_test.h5")
    if predicted is None or not checkpoint.exists():
        return True
    return bool(predicted["parents"]["segmenter"] == hash_of_file(checkpoint))


def _boundaries(run: Run, arm: str, truth: np.ndarray) -> dict[str, Any]:
    """Average precision of an arm's boundary edges, of the whole test part and of its columns; None without any."""
    run.hash_of(f"predictions/{arm}_test.h5")
    affinities = np.asarray(open_array(run.folder / "predictions" / f"{arm}_test.h5", ("affinity",)))
    voxel_nm = run.parts["test"].volume.voxel_nm
    everywhere: tuple[Any, ...] = (...,)
    found = [
        boundary_precision(affinities[part], truth[part], voxel_nm)
        for part in [everywhere, *column_slices(truth.shape[1:], columns_of(truth.shape))]
    ]
    whole, *in_columns = [None if math.isnan(value) else value for value in found]
    return {"average_precision": whole, "columns": in_columns}


def _built_with_seed(run: Run, purpose: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network whose initial weights depend on the run's seed alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(run.cfg.NEURODIFF.SEED, purpose).integers(2**31)))
        return build()
