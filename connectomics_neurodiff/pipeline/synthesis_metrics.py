"""How far the synthetic volumes are from the real one: the part of metrics.json that is called synthesis."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..conditions import with_background
from ..config import as_dict
from ..errors import UserError
from ..metrics import even_inside, fid3d, seams
from ..metrics.fid3d import NAMES
from ..pairs import VERDICT, open_pairs
from ..provenance import write_json
from ..volume import open_array, open_volume
from . import networks
from .pairs_stage import painted_pairs
from .parts import hash_of_source
from .run import Run

logger = logging.getLogger("connectomics_neurodiff")

#: The numbers of the synthetic pairs, and the distance of real tissue from elsewhere to judge theirs by.
_FID_NAMES = (*NAMES, "fid3d_test")


def synthesis_metrics(run: Run) -> dict[str, Any]:
    """3D-FID, its numbers null where there is none; grey values, number and seams of the run's own pairs."""
    paths = painted_pairs(run) if "mixed" in run.arms else []
    found = _fid3d_or_null(run, paths)
    # Pairs that the user names were judged, and painted in tiles, by another run.
    paths = [] if run.cfg.AUGMENTOR.SYNTHETIC.PAIRS else paths
    reports = [path.with_suffix(VERDICT) for path in paths]
    gates = [json.loads(path.read_text()) for path in reports if path.exists()]
    if gates:
        found |= _means_of_checks(gates)
        found["pairs"] = len(gates)
        found["seams"] = _seams(run, [path for path, report in zip(paths, reports, strict=True) if report.exists()])
    return found


#: Numbers of the gate that metrics.json has, by their names there.
_CHECKS = {
    "grey_value_distance": "grey",
    "following": "following",
    "missing_at_worst": "missing at worst",
    "cut_off": "cut off",
    "dark_share": "dark",
    "dark_share_in_mitochondria": "dark in mitochondria",
    "dark_share_outside_mitochondria": "dark outside mitochondria",
    "dark_piece_nm": "size of dark pieces, nm",
    "dark_pieces_per_um2": "dark pieces per um2",
    "grain": "grain",
}


def _means_of_checks(gates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the pairs of what the gate measured, as far as it could."""
    found = {}
    for name, check in _CHECKS.items():
        checks = [gate.get("checks", {}).get(check, {}) for gate in gates]
        numbers = [one["got"] for one in checks if one.get("got") is not None]
        if numbers:
            found[name] = float(np.mean(numbers))
    return found


def _seams(run: Run, paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Per axis with more than one tile, gradient energy on their borders over elsewhere: mean over pairs, its error."""
    node = run.cfg.NEURODIFF.DIFFUSION
    measured = []
    for path in paths:
        pair = open_volume(path).load()
        outside = with_background(np.asarray(open_array(path, ("membrane",))), pair.array("label"))
        if pair.mito_array is not None:
            outside = np.maximum(outside, pair.mito_array)
        measured.append(seams(pair.array("image"), node.TILE, node.OVERLAP, even_inside(outside)))
    found = {}
    for axis in sorted({axis for pair in measured for axis in pair}):
        ones = [pair[axis] for pair in measured if axis in pair]
        error = math.sqrt(sum(one.standard_error**2 for one in ones)) / len(ones)
        found[axis] = {"ratio": float(np.mean([one.ratio for one in ones])), "standard_error": error}
    return found


def _fid3d_or_null(run: Run, paths: Sequence[Path]) -> dict[str, Any]:
    """The 3D-FID; null, with the reason in the log, where it cannot be had: the scores do not depend on it."""
    reason = ""
    if run.cfg.NEURODIFF.FID.PATCHES == 0:
        reason = "NEURODIFF.FID.PATCHES is 0"
    elif not paths or "real" not in run.arms:
        reason = "it compares synthetic pairs with real data, by the segmenter of the arm 'real'; this run has not both"
    else:
        try:
            return _kept_fid3d(run, paths)
        except UserError as error:
            reason = str(error)
    logger.warning("no 3D-FID: %s", reason)
    return dict.fromkeys(_FID_NAMES)


def _kept_fid3d(run: Run, paths: Sequence[Path]) -> dict[str, Any]:
    """The 3D-FID -> fid3d.json; kept for as long as all that it depends on is the same."""
    node, train, test = run.cfg.NEURODIFF.FID, run.parts["train"], run.parts["test"]
    device, precision = networks.device_and_precision(run.cfg)
    segmenter, segmenter_hash = run.segmenter_of("real")
    judged = {
        "settings": as_dict(node) | {"PRECISION": precision, "SEED": run.cfg.NEURODIFF.SEED},
        "segmenter": segmenter_hash,
        "train": train.identity,
        "test": test.identity,
        "pairs": [hash_of_source(str(path)) for path in paths],
    }
    kept = run.folder / "fid3d.json"
    if kept.exists():
        content: dict[str, Any] = json.loads(kept.read_text())
        if {name: content.get(name) for name in judged} == judged:
            return {name: content[name] for name in _FID_NAMES}
    real = train.load()
    compare = partial(
        fid3d,
        networks.load_segmenter(segmenter),
        real.array("image"),
        patches=node.PATCHES,
        seed=run.cfg.NEURODIFF.SEED,
        resamples=node.BOOTSTRAP,
        precision=precision,
        device=device,
    )
    pairs = [pair.array("image") for pair in open_pairs(paths, real)]
    # Both distances are of patches of one size, which all the volumes can hold.
    patch = np.min([node.PATCH, test.box.shape, real.shape, *(pair.shape for pair in pairs)], axis=0).tolist()
    found = compare(pairs, patch=patch)
    if found.warning:
        logger.warning(found.warning)
    elsewhere = compare([test.load().array("image")], patch=patch, label="3D-FID of the test part")
    numbers = found.as_dict() | {"fid3d_test": elsewhere.distance}
    write_json(kept, numbers | judged)
    return numbers
