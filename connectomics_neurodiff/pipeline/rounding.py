"""How far rounding alone moves the scores of a run: the same affinities, agglomerated with noise of its size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..agglomerate import fragments_from_affinities, segment_sweep
from ..metrics import evaluate
from ..provenance import write_json
from ..seeding import rng_for
from ..volume import open_array
from .run import Run
from .segmentations_stage import QUERIES

#: Half the range of the noise: a step of bfloat16 below 1, four of an affinity of 10 bits. Another number of threads
#: moves affinities less, other tiles move them more.
ROUNDING = 2.0**-8
#: Times that the affinities are moved.
REPEATS = 3


def write_rounded_scores(run: Run, arm: str, thresholds: dict[str, float], truth: np.ndarray) -> None:
    """Score the test part by every method `REPEATS` times -> rounding.json; kept while nothing changes.

    Parameters
    ----------
    run : Run
        Its predictions are used.
    arm : str
        Whose.
    thresholds : dict of str to float
        The tuned one of every method.
    truth : numpy.ndarray
        (z, y, x) labels of the test part.
    """
    path = run.folder / "rounding.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    made_from = {
        "affinities": run.hash_of(f"predictions/{arm}_test.h5"),
        "test": run.parts["test"].identity,
        "thresholds": thresholds,
        "seed": run.cfg.NEURODIFF.SEED,
    }
    if kept.get(arm, {}).get("made_from") != made_from:
        kept[arm] = {"made_from": made_from, "scores": _scores(run, arm, thresholds, truth)}
        write_json(path, kept)


def _scores(run: Run, arm: str, thresholds: dict[str, float], truth: np.ndarray) -> dict[str, list[dict[str, float]]]:
    affinities = np.asarray(open_array(run.folder / "predictions" / f"{arm}_test.h5", ("affinity",)), np.float32)
    voxel_nm = run.parts["test"].volume.voxel_nm
    found: dict[str, list[dict[str, float]]] = {method: [] for method in thresholds if method != QUERIES}
    for repeat in range(REPEATS if found else 0):
        rng = rng_for(run.cfg.NEURODIFF.SEED, "rounding", repeat)
        noise = rng.uniform(-ROUNDING, ROUNDING, affinities.shape).astype(np.float32)
        moved = np.clip(affinities + noise, 0, 1)
        fragments = fragments_from_affinities(moved, voxel_nm)
        for method, of_method in found.items():
            ((_, label),) = segment_sweep(moved, fragments, method, [thresholds[method]])
            of_method.append(evaluate(label, truth).as_dict())
    return found
