"""The stage between diffusion and training: EM painted onto the remodelled masks, and the gate that judges it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..conditions import membrane_from_labels, with_background
from ..config import as_dict
from ..errors import UserError
from ..pairs import (
    MaskArrays,
    ReliabilityMap,
    grey_value_gate,
    match_grey_values,
    membrane_gate,
    membrane_visibility,
    write_pair,
)
from ..provenance import Provenance, hash_of_file, write_json
from ..seeding import rng_for
from ..volume import Volume, open_array, open_volume
from . import networks
from .run import Run

logger = logging.getLogger("connectomics_neurodiff")

#: (masks, membrane, scratch folder, its key, number of the copy, and of the sample) -> image in [0, 1].
Painter = Callable[[Volume, np.ndarray, Path, str, int, int], np.ndarray]


def make_pairs(run: Run) -> None:
    """Paint EM onto every remodelled mask -> pairs/copy_000.h5, ...; a volume with wrong grey values is set aside."""
    from ..synthesis import discard_scratch

    cfg, node = run.cfg, run.cfg.NEURODIFF.DIFFUSION
    keys = {k: as_dict(node)[k] for k in networks.SAMPLING_KEYS}
    settings = keys | {"MATCH_GREY": cfg.NEURODIFF.PAIRS.MATCH_GREY}
    settings |= {"SAMPLES": cfg.NEURODIFF.PAIRS.SAMPLES} if cfg.NEURODIFF.PAIRS.SAMPLES > 1 else {}
    settings |= {"PRECISION": networks.device_and_precision(cfg)[1]}
    denoiser_hash = run.hash_of("diffusion/checkpoint.pt")
    paint: Painter | None = None
    verdicts = []
    for copy in range(cfg.NEURODIFF.REMODEL.COPIES):
        masks = run.folder / "masks" / f"copy_{copy:03d}.h5"
        provenance = run.provenance(
            "pairs", settings | {"COPY": copy}, denoiser=denoiser_hash, masks=run.hash_of(f"masks/copy_{copy:03d}.h5")
        )
        target = run.folder / "pairs" / f"copy_{copy:03d}.h5"
        if not run.is_done(target, provenance):
            paint = paint or _make_painter(run)
            _paint_pair(run, paint, masks, target, provenance, copy)
        # Also what a run left that was killed between the last two lines.
        for scratch in target.parent.glob(f".{target.stem}.*.unfinished"):
            discard_scratch(scratch)
        verdicts.append(_judge_pair(run, target, target.with_suffix(".gate.json")))
    if not any(verdict["passed"] for verdict in verdicts):
        raise UserError(
            f"No synthetic volume passed the gate. {verdicts[-1]['reason']} Train the denoiser longer, or loosen "
            "NEURODIFF.PAIRS.GREY_LIMIT and LEAST_VISIBILITY."
        )


def _make_painter(run: Run) -> Painter:
    """Function that paints an image onto masks with the run's denoiser."""
    from ..checkpoints import load_checkpoint
    from ..synthesis import denoiser_from_checkpoint, guided, require_fitting_tile, synthesise

    node = run.cfg.NEURODIFF.DIFFUSION
    checkpoint = load_checkpoint(run.folder / "diffusion" / "checkpoint.pt", kind="denoiser")
    network, process = denoiser_from_checkpoint(checkpoint)
    network = guided(network, node.GUIDANCE, checkpoint)
    device, precision = networks.device_and_precision(run.cfg)
    samples = run.cfg.NEURODIFF.PAIRS.SAMPLES
    require_fitting_tile(checkpoint, node.TILE, node.MARGIN, run.parts["train"].box.shape, device)

    def paint(masks: Volume, membrane: np.ndarray, scratch: Path, key: str, copy: int, sample: int) -> np.ndarray:
        image = synthesise(
            network,
            process,
            with_background(membrane, masks.array("label")),
            masks.mito_array,
            masks.voxel_nm,
            seed=int(rng_for(run.cfg.NEURODIFF.SEED, "pairs", copy, *([sample] if sample else [])).integers(2**31)),
            sampler=node.SAMPLER,
            steps=node.SAMPLER_STEPS,
            tile=tuple(node.TILE),
            overlap=tuple(node.OVERLAP),
            margin=tuple(node.MARGIN),
            precision=precision,
            device=device,
            scratch=scratch,
            scratch_key=key,
            label=f"synthesis {copy * samples + sample + 1}/{run.cfg.NEURODIFF.REMODEL.COPIES * samples}",
        )
        return np.asarray(image)

    return paint


def _paint_pair(run: Run, paint: Painter, masks_path: Path, target: Path, provenance: Provenance, copy: int) -> None:
    masks = open_volume(masks_path).load()
    membrane = np.asarray(open_array(masks_path, ("membrane",)))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratches = [target.with_name(f".{target.stem}.{i}.unfinished") for i in range(run.cfg.NEURODIFF.PAIRS.SAMPLES)]
    images = [paint(masks, membrane, at, provenance.key, copy, sample) for sample, at in enumerate(scratches)]
    image = images[0]
    real = run.parts["train"].load().array("image")
    raw = grey_value_gate(image, real, limit=1.0)
    if run.cfg.NEURODIFF.PAIRS.MATCH_GREY and raw.passed:
        image = match_grey_values(image, real)
    arrays = MaskArrays(masks.array("label"), membrane, masks.mito_array)
    attributes = {"copy": copy, "grey_value_distance_before_matching": raw.distance}
    reliability = ReliabilityMap(images, masks.voxel_nm) if len(images) > 1 else None
    write_pair(target, np.clip(image, 0, 1), arrays, masks.voxel_nm, attributes, reliability)
    run.finish(target, provenance)


def _judge_pair(run: Run, target: Path, report: Path) -> dict[str, Any]:
    """Verdict of the gate -> pairs/copy_000.gate.json; kept for as long as pair and limits are the same."""
    node, train = run.cfg.NEURODIFF.PAIRS, run.parts["train"]
    limits = {"GREY_LIMIT": node.GREY_LIMIT, "LEAST_VISIBILITY": node.LEAST_VISIBILITY}
    judged = {"pair": hash_of_file(target), "train": train.identity, "limits": limits}
    if report.exists():
        verdict: dict[str, Any] = json.loads(report.read_text())
        if {name: verdict.get(name) for name in judged} == judged:
            return verdict
    pair, real = open_volume(target).load(), train.load()
    gate = grey_value_gate(pair.array("image"), real.array("image"), limit=node.GREY_LIMIT)
    membrane = np.asarray(open_array(target, ("membrane",)))
    visible = {
        "real": _visibility(
            real, membrane_from_labels(real.array("label"), real.voxel_nm, run.cfg.NEURODIFF.MEMBRANE_NM)
        ),
        "synthetic": _visibility(pair, membrane),
    }
    reason = gate.reason or membrane_gate(visible["synthetic"], visible["real"], least=node.LEAST_VISIBILITY)
    verdict = {**gate.__dict__, "passed": not reason, "reason": reason, "membrane_visibility": visible, **judged}
    write_json(report, verdict)
    if reason:
        logger.warning("%s does not enter training: %s", target.name, reason)
    return verdict


def _visibility(volume: Volume, membrane: np.ndarray) -> float:
    image, label = volume.array("image"), volume.array("label")
    return membrane_visibility(image, label, membrane, volume.mito_array, volume.voxel_nm)


def pair_paths(run: Run) -> list[Path]:
    """Pair files that the mixed arm trains on: the user's, or those of this run that passed the gate."""
    given = list(run.cfg.AUGMENTOR.SYNTHETIC.PAIRS)
    return [Path(path) for path in given] if given else passed_pairs(run.cfg)


def passed_pairs(cfg: CfgNode) -> list[Path]:
    """Pair files of the run with this configuration that passed the gate."""
    folder = Path(cfg.DATASET.OUTPUT_PATH) / "pairs"
    pairs = [folder / f"copy_{copy:03d}.h5" for copy in range(cfg.NEURODIFF.REMODEL.COPIES)]
    reports = {pair: pair.with_suffix(".gate.json") for pair in pairs}
    return [p for p, report in reports.items() if report.exists() and json.loads(report.read_text())["passed"]]
