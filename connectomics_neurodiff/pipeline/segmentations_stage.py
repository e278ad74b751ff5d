"""The stage between predictions and scores: tuned agglomeration of the affinities, or the segmenter's own instances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..agglomerate import fragments_from_affinities, segment_image, segment_sweep
from ..errors import ConfigError
from ..metrics import columns_of, tune_threshold
from ..provenance import Provenance, write_json
from ..volume import open_array, write_volume
from . import networks
from .parts import Part
from .run import Run

if TYPE_CHECKING:
    from yacs.config import CfgNode

#: The segmenter that tells neurons apart by itself, and the method that takes its word.
QUERIES = "agq"


def make_segmentations(run: Run) -> None:
    """Tune on the tune part, segment the test part -> segmentations/{arm}_{method}.h5 and .tuning.json."""
    node = run.cfg.NEURODIFF.SEGMENT
    for arm in run.arms:
        pending = []
        for method in node.METHODS:
            if method == QUERIES:
                _segment_with_queries(run, arm)
                continue
            settings = {
                "METHOD": method,
                "CRITERION": node.CRITERION,
                "COLUMNS": list(columns_of(run.parts["tune"].box.shape)),
                "THRESHOLDS": node[f"{method.upper()}_THRESHOLDS"],
            }
            parents = {name: run.hash_of(f"predictions/{arm}_{name}.h5") for name in ("tune", "test")}
            provenance = run.provenance("segmentations", settings, truth=run.parts["tune"].identity, **parents)
            target = run.folder / "segmentations" / f"{arm}_{method}.h5"
            if not run.is_done(target, provenance):
                pending.append((method, target, provenance))
        if pending:
            _segment_arm(run, arm, pending)


def check_blocks(cfg: CfgNode, parts: Mapping[str, Part]) -> None:
    """Refuse, before any training, blocks of instances that could not be joined.

    Raises
    ------
    ConfigError
        If the test part is cut into blocks that do not overlap.
    """
    node = cfg.INFERENCE
    cut = [
        axis
        for axis, n, size, stride in zip("zyx", parts["test"].box.shape, node.INPUT_SIZE, node.STRIDE, strict=True)
        if n > size == stride
    ]
    if QUERIES in cfg.NEURODIFF.SEGMENT.METHODS and cut:
        raise ConfigError(
            f"The method agq joins blocks on the voxels that they share: INFERENCE.STRIDE must be below INPUT_SIZE "
            f"{list(node.INPUT_SIZE)} along {', '.join(cut)}, where the test part is larger. Got {list(node.STRIDE)}."
        )


def _segment_arm(run: Run, arm: str, pending: list[tuple[str, Path, Provenance]]) -> None:
    voxel_nm = run.parts["test"].volume.voxel_nm
    truth = run.parts["tune"].load().array("label")
    affinities = {
        name: np.asarray(open_array(run.folder / "predictions" / f"{arm}_{name}.h5", ("affinity",)))
        for name in ("tune", "test")
    }
    fragments = {name: fragments_from_affinities(array, voxel_nm) for name, array in affinities.items()}
    for method, target, provenance in pending:
        settings = provenance.settings
        sweep = segment_sweep(affinities["tune"], fragments["tune"], method, settings["THRESHOLDS"])
        tuning = tune_threshold(sweep, truth, criterion=settings["CRITERION"], columns=settings["COLUMNS"])
        ((_, label),) = segment_sweep(affinities["test"], fragments["test"], method, [tuning.threshold])
        write_json(
            target.with_suffix(".tuning.json"),
            {
                "threshold": tuning.threshold,
                "criterion": settings["CRITERION"],
                "judged": list(tuning.judged.items()),
                "scores": [[threshold, scores.as_dict()] for threshold, scores in tuning.scores.items()],
            },
        )
        write_volume(target, {"label": label}, voxel_nm, {"method": method, "threshold": tuning.threshold})
        run.finish(target, provenance)


def _segment_with_queries(run: Run, arm: str) -> None:
    """Instances of the test part, block by block, straight from the segmenter; there is nothing to tune."""
    from ..checkpoints import load_checkpoint

    node = run.cfg.INFERENCE
    device, precision = networks.device_and_precision(run.cfg)
    weights, weights_hash = run.segmenter_of(arm)
    test = run.parts["test"]
    checkpoint = load_checkpoint(weights, kind="segmenter")
    # Of the training, which need not be this run's; the configuration speaks for checkpoints older than the entry.
    erosion = networks.trained_erosion(checkpoint, run.cfg.NEURODIFF.SEGMENTER.LABEL_EROSION)
    growth = networks.label_growth(erosion, networks.trained_voxels(checkpoint, test.volume.voxel_nm)[0])
    settings = {
        "METHOD": QUERIES,
        "PRECISION": precision,
        "INPUT_SIZE": list(node.INPUT_SIZE),
        "STRIDE": list(node.STRIDE),
        "STITCH_FRACTION": run.cfg.NEURODIFF.SEGMENT.STITCH_FRACTION,
        **({"GROWTH": list(growth)} if any(growth) else {}),
    }
    provenance = run.provenance("segmentations", settings, segmenter=weights_hash, image=test.identity)
    target = run.folder / "segmentations" / f"{arm}_{QUERIES}.h5"
    if run.is_done(target, provenance):
        return
    volume = test.load()
    labels = segment_image(
        networks.trained_segmenter(checkpoint),
        volume.array("image"),
        block=node.INPUT_SIZE,
        overlap=networks.tile_overlap(run.cfg),
        precision=precision,
        device=device,
        growth=growth,
        min_fraction=run.cfg.NEURODIFF.SEGMENT.STITCH_FRACTION,
        scratch=target.parent,
        label=f"instances, {arm}",
    )
    write_volume(target, {"label": np.asarray(labels)}, volume.voxel_nm, {"method": QUERIES})
    run.finish(target, provenance)
