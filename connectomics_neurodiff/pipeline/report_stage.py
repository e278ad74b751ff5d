"""The last stage: figures from the run's artefacts, and the report around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import dump_config
from ..engine import read_loss_curve
from ..pairs import membrane_of_pair
from ..report import (
    following_figure,
    grey_value_figure,
    loss_figure,
    mask_quality_figure,
    scores_figure,
    sections_to_show,
    segmentation_figure,
    synthesis_figure,
    threshold_figure,
    write_report,
)
from ..volume import Volume, open_array, open_volume
from .judging import read_following
from .pairs_stage import painted_pairs, pair_paths
from .parts import makes_pairs
from .run import Run
from .unlabeled import mask_copies


def make_report(run: Run) -> None:
    """Draw what there is to draw -> figures/*.png, report.html."""
    drawers: dict[str, Callable[[Run, Path], bool]] = {
        "scores": _draw_scores,
        "synthesis": _draw_synthesis,
        "mask_quality": _draw_mask_quality,
        "following": _draw_following,
        "grey_values": _draw_grey_values,
        "losses": _draw_losses,
        "thresholds": _draw_thresholds,
        "segmentations": _draw_segmentations,
    }
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    figures = {}
    for name, draw in drawers.items():
        path = folder / f"{name}.png"
        if draw(run, path):
            figures[name] = path
    write_report(
        run.folder,
        title=f"{run.cfg.DATASET.IMAGE_NAME}, seed {run.cfg.NEURODIFF.SEED}",
        metrics=run.metrics() | {"columns": run.columns(), "rounding": run.rounding()},
        figures=figures,
        config_text=dump_config(run.cfg),
        notes=_notes(run),
    )


def _notes(run: Run) -> list[str]:
    sizes = {name: " x ".join(map(str, part.box.shape)) for name, part in run.parts.items()}
    voxel = " x ".join(f"{v:g}" for v in run.parts["train"].volume.voxel_nm)
    notes = [
        f"Train {sizes['train']}, tune {sizes['tune']}, test {sizes['test']} voxels of {voxel} nm (z, y, x), disjoint.",
        "Arms are trained for the same number of iterations; one seed is one sample: see docs/studies.md.",
    ]
    for arm, found in run.boundaries().items():
        if found["average_precision"] is not None:
            notes.append(f"Average precision of boundary edges, {arm}: {found['average_precision']:.3f}.")
    pseudo = len(pair_paths(run)) - len(painted_pairs(run)) if "mixed" in run.arms else 0
    if pseudo:
        notes.append(f"The mixed arm also saw unannotated tissue with pseudo-labels, {pseudo} of its volumes.")
    for name, path in _of_copies(run, "pairs", "gate").items():
        gate = json.loads(path.read_text())
        if not gate["passed"]:
            notes.append(f"{name} was kept out of training: {gate['reason']}")
    return notes


def _of_copies(run: Run, folder: str, suffix: str) -> dict[str, Path]:
    """Reports of the masks that this configuration makes, as far as they are there, by name."""
    names = [copy.name for copy in mask_copies(run.cfg)] if makes_pairs(run.cfg) else []
    paths = {name: run.folder / folder / f"{name}.{suffix}.json" for name in names}
    return {name: path for name, path in paths.items() if path.exists()}


def _draw_scores(run: Run, path: Path) -> bool:
    metrics = run.metrics()
    if metrics:
        scores_figure(path, metrics)
    return bool(metrics)


def _first_pair(run: Run) -> tuple[Path, Volume] | None:
    paths = painted_pairs(run) if "mixed" in run.arms else []
    return (paths[0], open_volume(paths[0]).load()) if paths else None


def _draw_synthesis(run: Run, path: Path) -> bool:
    pair = _first_pair(run)
    if pair is None:
        return False
    train = run.parts["train"].load()
    depth = min(train.shape[0], pair[1].shape[0])
    sections = sections_to_show(depth)
    synthesis_figure(
        path,
        train.array("image"),
        train.array("label"),
        pair[1].array("label"),
        membrane_of_pair(*pair, run.cfg.NEURODIFF.MEMBRANE_NM),
        pair[1].mito_array,
        pair[1].array("image"),
        sections,
        train.voxel_nm,
        _dark_of(run, pair[0]),
    )
    return True


def _dark_of(run: Run, path: Path) -> np.ndarray | None:
    """What else is dark in the mask that a pair of this run was painted on; the pair itself does not tell."""
    masks = run.folder / "masks" / path.name
    if path.parent != run.folder / "pairs" or not masks.exists():
        return None
    return open_volume(masks).dark_array


def _draw_mask_quality(run: Run, path: Path) -> bool:
    files = _of_copies(run, "masks", "quality")
    if files:
        mask_quality_figure(path, {name: json.loads(file.read_text()) for name, file in files.items()})
    return bool(files)


def _draw_following(run: Run, path: Path) -> bool:
    looks = read_following(run.folder / "diffusion" / "following.csv")
    if looks:
        following_figure(path, [(look.step, look.following) for look in looks], run.cfg.NEURODIFF.PAIRS.LEAST_FOLLOWING)
    return bool(looks)


def _draw_grey_values(run: Run, path: Path) -> bool:
    paths = painted_pairs(run) if "mixed" in run.arms else []
    if paths:
        synthetic = {pair.stem: open_volume(pair).array("image") for pair in paths[:4]}
        grey_value_figure(path, run.parts["train"].load().array("image"), synthetic)
    return bool(paths)


def _draw_losses(run: Run, path: Path) -> bool:
    files = {"diffusion": run.folder / "diffusion" / "loss.csv"}
    files |= {f"segmenter/{arm}": run.folder / "segmenter" / arm / "loss.csv" for arm in run.arms}
    curves = {name: [row[:2] for row in read_loss_curve(file)] for name, file in files.items()}
    curves = {name: rows for name, rows in curves.items() if rows}
    if curves:
        loss_figure(path, curves)
    return bool(curves)


def _tunings(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for arm in run.arms:
        for method in run.cfg.NEURODIFF.SEGMENT.METHODS:
            file = run.folder / "segmentations" / f"{arm}_{method}.tuning.json"
            if file.exists():
                found[arm, method] = json.loads(file.read_text())
    return found


def _of_whole(tuning: dict[str, Any], criterion: str) -> list[tuple[float, float]]:
    """What was minimised before thresholds were tuned by columns."""
    return [(threshold, scores[criterion]) for threshold, scores in tuning["scores"]]


def _draw_thresholds(run: Run, path: Path) -> bool:
    tunings = _tunings(run)
    criterion = run.cfg.NEURODIFF.SEGMENT.CRITERION
    if tunings:
        threshold_figure(
            path,
            {key: tuning.get("judged") or _of_whole(tuning, criterion) for key, tuning in tunings.items()},
            {key: tuning["threshold"] for key, tuning in tunings.items()},
            score=criterion.upper(),
        )
    return bool(tunings)


def _draw_segmentations(run: Run, path: Path) -> bool:
    keys = [(arm, method) for arm in run.arms for method in run.cfg.NEURODIFF.SEGMENT.METHODS]
    files = {key: run.folder / "segmentations" / f"{'_'.join(key)}.h5" for key in keys}
    labels = {key: np.asarray(open_array(file, ("label",))) for key, file in files.items() if file.exists()}
    if labels:
        test = run.parts["test"].load()
        section = sections_to_show(test.shape[0], 1)[0]
        segmentation_figure(path, test.array("image"), test.array("label"), labels, section, test.voxel_nm)
    return bool(labels)
