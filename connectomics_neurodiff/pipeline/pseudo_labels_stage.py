"""The stage before synthesis, where there is unannotated tissue: the real arm's network segments it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ..agglomerate import fragments_from_affinities, segment_sweep
from ..config import as_dict
from ..errors import UserError
from ..metrics import columns_of, tune_threshold
from ..predict import predict_affinities
from ..volume import open_array, write_volume
from . import networks
from .run import Run
from .segmentations_stage import QUERIES
from .stages import predict_part, train_arm
from .unlabeled import PSEUDO_LABELS, pseudo_labelled

#: Mean affinity below which voxels between neurons belong to none, where the train part's labels have gaps there.
GAP = 0.5


def make_pseudo_labels(run: Run) -> None:
    """Train the arm "real" on the train part, let it label the unannotated tissue -> pseudo_labels/tissue_000.h5, ...

    It is the method and the threshold that are best on the tune part, or on the train part where nothing is scored.
    """
    train_arm(run, "real")
    cfg, node = run.cfg, run.cfg.NEURODIFF.SEGMENT
    judged = "tune" if "tune" in run.parts else "train"
    settings = {
        "THRESHOLDS": {name: node[f"{name.upper()}_THRESHOLDS"] for name in node.METHODS if name != QUERIES},
        "CRITERION": node.CRITERION,
        "INFERENCE": as_dict(cfg.INFERENCE),
        "PRECISION": networks.device_and_precision(cfg)[1],
        "GAP": GAP if has_gaps(run.parts["train"].load().array("label")) else 0.0,
    }
    weights, weights_hash = run.segmenter_of("real")
    missing = {}
    for part, target in zip(run.unlabeled, pseudo_labelled(cfg), strict=True):
        parents = {"segmenter": weights_hash, "tissue": part.identity, "truth": run.parts[judged].identity}
        provenance = run.provenance(PSEUDO_LABELS, settings, **parents)
        if not run.is_done(target, provenance):
            missing[target] = part, provenance
    if not missing:
        return
    method, threshold = _best_on(run, judged, settings)
    network = networks.load_segmenter(weights)
    for number, (target, (part, provenance)) in enumerate(missing.items(), start=1):
        volume = part.load()
        affinities = np.asarray(
            predict_affinities(
                network,
                volume.array("image"),
                flip_augmentation=cfg.INFERENCE.FLIP_AUGMENTATION,
                label=f"affinities, unannotated {number}/{len(missing)}",
                **networks.prediction_arguments(cfg),
            )
        )
        fragments = fragments_from_affinities(affinities, volume.voxel_nm)
        ((_, label),) = segment_sweep(affinities, fragments, method, [threshold])
        if settings["GAP"]:
            label = np.where(gaps_between(affinities, label), 0, label)
        _require_neurons(label, target)
        arrays = {"image": volume.array("image"), "label": label}
        write_volume(target, arrays, volume.voxel_nm, {"method": method, "threshold": threshold})
        run.finish(target, provenance)
        del affinities, fragments, label  # before those of the next piece are made


def _best_on(run: Run, judged: str, settings: dict[str, Any]) -> tuple[str, float]:
    """Method and threshold that do best on annotated tissue."""
    part = run.parts[judged]
    affinities = np.asarray(open_array(predict_part(run, "real", judged), ("affinity",)))
    fragments = fragments_from_affinities(affinities, part.volume.voxel_nm)
    truth, columns = part.load().array("label"), columns_of(part.box.shape)
    found = []
    for method, thresholds in settings["THRESHOLDS"].items():
        sweep = segment_sweep(affinities, fragments, method, thresholds)
        tuning = tune_threshold(sweep, truth, criterion=settings["CRITERION"], columns=columns)
        found.append((tuning.judged[tuning.threshold], method, tuning.threshold))
    return min(found)[1:]


def gaps_between(affinities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Where edges look like a boundary, and lie between two neurons: not the granules and organelles inside of one.

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x).
    label : numpy.ndarray
        (z, y, x), every voxel of a neuron.

    Returns
    -------
    numpy.ndarray
        (z, y, x) bool: voxels with a mean affinity below `GAP`, of patches within a section that meet two labels.
    """
    in_section = np.zeros((3, 3, 3), bool)
    in_section[1] = True
    patch, count = ndimage.label(affinities.mean(axis=0) < GAP, in_section)
    numbers = np.arange(count + 1)
    least = ndimage.minimum(ndimage.minimum_filter(label, (1, 3, 3)), patch, numbers)
    most = ndimage.maximum(ndimage.maximum_filter(label, (1, 3, 3)), patch, numbers)
    between = np.asarray(least) != np.asarray(most)
    between[0] = False  # no patch
    found: np.ndarray = between[patch]
    return found


def has_gaps(label: np.ndarray) -> bool:
    """Whether neurons end at background rather than at one another, in most places within sections."""
    ends = touching = 0
    for before, after in ((label[:, :-1], label[:, 1:]), (label[:, :, :-1], label[:, :, 1:])):
        differ = before != after
        both = differ & (before > 0) & (after > 0)
        ends += int(np.count_nonzero(differ))
        touching += int(np.count_nonzero(both))
    return 2 * touching < ends


def _require_neurons(label: np.ndarray, target: Path) -> None:
    if not label.any():
        raise UserError(
            f"The real arm's network finds no neuron in {target.stem}: every edge looks like a boundary. Train it "
            "longer (SOLVER.ITERATION_TOTAL)."
        )
