"""The stage between diffusion and training: EM painted onto the remodelled masks, and the gate that judges it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..conditions import organelles, with_background
from ..config import as_dict
from ..errors import StaleArtifactError, UserError
from ..pairs import (
    VERDICT,
    MaskArrays,
    ReliabilityMap,
    grey_value_gate,
    judge_pair,
    match_grey_values,
    match_spectrum,
    write_pair,
)
from ..provenance import Provenance, hash_of_file, read_provenance, sidecar_of, write_json
from ..seeding import rng_for
from ..volume import Volume, open_array, open_volume
from . import networks
from .judging import RunGate, gate_limits
from .run import Run
from .unlabeled import PSEUDO_LABELS, MaskCopy, mask_copies, pseudo_labelled

logger = logging.getLogger("connectomics_neurodiff")

#: (masks, membrane, scratch folder, its key, the copy, number of the sample) -> image in [0, 1].
Painter = Callable[[Volume, np.ndarray, Path, str, MaskCopy, int], np.ndarray]


def make_pairs(run: Run) -> None:
    """Paint EM onto every remodelled mask -> pairs/copy_000.h5, ...; a volume that fails the gate is set aside."""
    from ..synthesis import discard_scratch

    cfg, node = run.cfg, run.cfg.NEURODIFF.DIFFUSION
    keys = {k: as_dict(node)[k] for k in networks.SAMPLING_KEYS}
    settings = keys | {name: cfg.NEURODIFF.PAIRS[name] for name in ("MATCH_GREY", "MATCH_SPECTRUM")}
    settings |= {"SAMPLES": cfg.NEURODIFF.PAIRS.SAMPLES} if cfg.NEURODIFF.PAIRS.SAMPLES > 1 else {}
    settings |= {"PRECISION": networks.device_and_precision(cfg)[1]}
    denoiser_hash = run.hash_of("diffusion/checkpoint.pt")
    paint: Painter | None = None
    gate = RunGate(run)
    verdicts = []
    for copy in mask_copies(cfg):
        masks = run.folder / "masks" / f"{copy.name}.h5"
        provenance = run.provenance(
            "pairs", settings | copy.settings, denoiser=denoiser_hash, masks=run.hash_of(f"masks/{copy.name}.h5")
        )
        target = run.folder / "pairs" / f"{copy.name}.h5"
        if not run.is_done(target, provenance):
            if not paint:
                gate.require_able()
                paint = _make_painter(run)
            _paint_pair(run, paint, masks, target, provenance, copy)
        # Also what a run left that was killed between the last two lines.
        for scratch in target.parent.glob(f".{target.stem}.*.unfinished"):
            discard_scratch(scratch)
        verdicts.append(_verdict_on(run, gate, target, copy))
    if not any(verdict["passed"] for verdict in verdicts):
        raise UserError(
            f"No synthetic volume passed the gate. {verdicts[-1]['reason']} If a number missed its limit, train the "
            "denoiser longer (NEURODIFF.DIFFUSION.ITERATIONS), or loosen that limit of NEURODIFF.PAIRS (docs/gate.md)."
        )


def _make_painter(run: Run) -> Painter:
    """Function that paints an image onto masks with the run's denoiser."""
    from ..checkpoints import load_checkpoint
    from ..synthesis import denoiser_from_checkpoint, grey_scale_for, guided, require_fitting_tile, synthesise

    node = run.cfg.NEURODIFF.DIFFUSION
    checkpoint = load_checkpoint(run.folder / "diffusion" / "checkpoint.pt", kind="denoiser")
    network, process = denoiser_from_checkpoint(checkpoint)
    network = guided(network, node.GUIDANCE, checkpoint, process.step_at(node.GUIDANCE_ABOVE))
    grey = grey_scale_for(checkpoint, run.parts["train"].volume.voxel_nm)
    arguments = networks.sampling_arguments(run.cfg)
    copies, samples = mask_copies(run.cfg), run.cfg.NEURODIFF.PAIRS.SAMPLES
    require_fitting_tile(checkpoint, node.TILE, node.MARGIN, run.parts["train"].box.shape, arguments["device"])

    def paint(masks: Volume, membrane: np.ndarray, scratch: Path, key: str, copy: MaskCopy, sample: int) -> np.ndarray:
        image = synthesise(
            network,
            process,
            with_background(membrane, masks.array("label")),
            organelles(masks.mito_array, masks.dark_array),
            masks.voxel_nm,
            seed=int(
                rng_for(run.cfg.NEURODIFF.SEED, "pairs", *copy.stream, *([sample] if sample else [])).integers(2**31)
            ),
            grey=grey,
            tile=tuple(node.TILE),
            overlap=tuple(node.OVERLAP),
            scratch=scratch,
            scratch_key=key,
            label=f"synthesis {copies.index(copy) * samples + sample + 1}/{len(copies) * samples}",
            **arguments,
        )
        return np.asarray(image)

    return paint


def _paint_pair(
    run: Run, paint: Painter, masks_path: Path, target: Path, provenance: Provenance, copy: MaskCopy
) -> None:
    masks = open_volume(masks_path).load()
    membrane = np.asarray(open_array(masks_path, ("membrane",)))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratches = [target.with_name(f".{target.stem}.{i}.unfinished") for i in range(run.cfg.NEURODIFF.PAIRS.SAMPLES)]
    images = [paint(masks, membrane, at, provenance.key, copy, sample) for sample, at in enumerate(scratches)]
    image = images[0]
    real = run.parts["train"].load().array("image")
    raw = grey_value_gate(image, real, limit=1.0)
    if raw.passed and run.cfg.NEURODIFF.PAIRS.MATCH_SPECTRUM:
        image = match_spectrum(image, real, masks.voxel_nm)
    if raw.passed and run.cfg.NEURODIFF.PAIRS.MATCH_GREY:
        image = match_grey_values(image, real)
    arrays = MaskArrays(masks.array("label"), membrane, masks.mito_array)
    attributes = {"copy": copy.number, "grey_value_distance_before_matching": raw.distance}
    reliability = ReliabilityMap(images, masks.voxel_nm) if len(images) > 1 else None
    write_pair(target, np.clip(image, 0, 1), arrays, masks.voxel_nm, attributes, reliability)
    run.finish(target, provenance)


def _verdict_on(run: Run, gate: RunGate, target: Path, copy: MaskCopy) -> dict[str, Any]:
    """Verdict on a pair -> pairs/copy_000.gate.json; kept for as long as pair, judge and limits are the same."""
    report = target.with_suffix(VERDICT)
    judge = run.hash_of("judge/checkpoint.pt") if gate.judge else ""
    judged = {"pair": hash_of_file(target), "limits": asdict(gate.limits)}
    judged |= {"train": run.parts["train"].identity, "judge": judge}
    if report.exists():
        verdict: dict[str, Any] = json.loads(report.read_text())
        if {name: verdict.get(name) for name in judged} == judged:
            return verdict
    pair, annotated = open_volume(target).load(), gate.knows_mitochondria(copy)
    mito = pair.mito_array if annotated else None
    masks = MaskArrays(pair.array("label"), np.asarray(open_array(target, ("membrane",))), mito)
    found = judge_pair(pair.array("image"), masks, real=gate.real(annotated), judge=gate.judge, limits=gate.limits)
    verdict = {**found.as_dict(), **judged}
    write_json(report, verdict)
    if not found.passed:
        logger.warning("%s does not enter training: %s", target.name, found.reason)
    return verdict


def pair_paths(run: Run) -> list[Path]:
    """Pair files that the mixed arm trains on: the user's, or those of this run, as far as they passed the gate."""
    given = list(run.cfg.AUGMENTOR.SYNTHETIC.PAIRS)
    return [Path(path) for path in given] if given else own_pairs(run.cfg)


def painted_pairs(run: Run) -> list[Path]:
    """Of :func:`pair_paths`, those whose images are synthetic; pseudo-labelled ones are real tissue."""
    return [path for path in pair_paths(run) if (read_provenance(path) or {}).get("stage") != PSEUDO_LABELS]


def own_pairs(cfg: CfgNode) -> list[Path]:
    """What the mixed arm of the run with this configuration trains on, if it names no pairs made before."""
    pseudo = pseudo_labelled(cfg) if "pseudo" in cfg.AUGMENTOR.SYNTHETIC.SOURCE else []
    return [*passed_pairs(cfg), *(path for path in pseudo if sidecar_of(path).exists())]


def passed_pairs(cfg: CfgNode) -> list[Path]:
    """Pair files of the run with this configuration that passed the gate.

    Raises
    ------
    StaleArtifactError
        If a pair was painted anew, or a limit changed, since the gate judged.
    """
    folder, limits = Path(cfg.DATASET.OUTPUT_PATH) / "pairs", gate_limits(cfg)
    passed = []
    for pair in (folder / f"{copy.name}.h5" for copy in mask_copies(cfg)):
        report = pair.with_suffix(VERDICT)
        if not (pair.exists() and report.exists()):
            continue
        verdict = json.loads(report.read_text())
        judged, now = verdict.get("limits", {}), asdict(limits)
        if verdict.get("pair") != hash_of_file(pair) or {name: judged.get(name) for name in now} != now:
            raise StaleArtifactError(
                f"{report} is about another pair, or other limits of NEURODIFF.PAIRS: run the stage 'pairs' again, or "
                "in a study delete this file and give the same command again."
            )
        if verdict["passed"]:
            passed.append(pair)
    return passed
