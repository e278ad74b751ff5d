"""The first stage of synthesis: remodelled masks, and the gate that draws a bad one again."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..errors import UserError
from ..provenance import Provenance, hash_of_file, write_json
from ..remodel import (
    MaskLimits,
    RemodelledMask,
    SignatureLibrary,
    gather_libraries,
    in_processes,
    mask_arrays,
    mask_gate,
    quality_report,
    remodel,
    workers_that_fit,
)
from ..seeding import rng_for
from ..volume import Volume, write_volume
from . import networks
from .parts import library_paths
from .run import Run

logger = logging.getLogger("connectomics_neurodiff")


def make_masks(run: Run) -> None:
    """Remodel the train part's masks -> masks/copy_000.h5, copy_000.quality.json, ..."""
    node = run.cfg.NEURODIFF.REMODEL
    settings = networks.training_keys(node, ("COPIES", "LIBRARY")) | {
        "MEMBRANE_NM": run.cfg.NEURODIFF.MEMBRANE_NM,
        **networks.dark_settings(run.cfg),
    }
    parents = {"train": run.parts["train"].identity}
    libraries = library_paths(run.cfg)
    if libraries:
        parents["library"] = hash_of_file(libraries[0])
    missing: dict[int, tuple[Path, Provenance]] = {}
    for copy in range(node.COPIES):
        provenance = run.provenance("masks", settings | {"COPY": copy}, **parents)
        target = run.folder / "masks" / f"copy_{copy:03d}.h5"
        if not run.is_done(target, provenance):
            missing[copy] = target, provenance
    if not missing:
        return
    train = run.parts["train"].load()
    workers = workers_that_fit(train.array("label").size, len(missing), run.cfg.SYSTEM.NUM_CPUS or 1)
    job = partial(_make_copy, run.cfg, run.folder, train, _library(run, train))
    for copy, rejections in in_processes(job, list(missing), workers):
        for attempt, reason in enumerate(rejections, start=1):
            logger.warning("Remodelled mask %d, attempt %d, is rejected: %s", copy, attempt, reason)
        run.finish(*missing[copy])


def _make_copy(cfg: CfgNode, folder: Path, train: Volume, library: SignatureLibrary | None, copy: int) -> list[str]:
    """Write one mask and its report; returns why those before it were rejected."""
    mask, report, rejections = _passing_mask(cfg, train, library, copy)
    target = folder / "masks" / f"copy_{copy:03d}.h5"
    arrays = mask_arrays(mask)
    write_volume(target, arrays, train.voxel_nm, {"seed": cfg.NEURODIFF.SEED, "copy": copy})
    write_json(target.with_suffix(".quality.json"), report)
    return rejections


def _library(run: Run, train: Volume) -> SignatureLibrary | None:
    """Shapes of mitochondria of the train part and of the file that the configuration names; None without either."""
    if not run.cfg.NEURODIFF.REMODEL.MITOCHONDRIA:
        return None
    return gather_libraries(train.array("label"), train.mito_array, train.voxel_nm, library_paths(run.cfg))


def _passing_mask(
    cfg: CfgNode, train: Volume, library: SignatureLibrary | None, copy: int
) -> tuple[RemodelledMask, dict[str, Any], list[str]]:
    """First mask that passes the gate, its report, and why those before it did not.

    Each attempt has random numbers of its own.
    """
    node, membrane_nm = cfg.NEURODIFF.REMODEL, cfg.NEURODIFF.MEMBRANE_NM
    limits = MaskLimits(**{name.lower(): value for name, value in node.LIMITS.items()})
    if node.MITO_COUNT:
        limits = replace(limits, mito_height_p=0.0)
    mito_fraction = node.MITO_FRACTION or None
    rejections: list[str] = []
    for attempt in range(node.ATTEMPTS):
        mask = remodel(
            train.array("label"),
            train.mito_array,
            train.voxel_nm,
            rng_for(cfg.NEURODIFF.SEED, "remodel", copy, *([attempt] if attempt else [])),
            dark=train.dark_array,
            elastic=node.ELASTIC,
            place_mitochondria=node.MITOCHONDRIA,
            library=library,
            mito_fraction=mito_fraction,
            mito_count=node.MITO_COUNT or None,
            elastic_sigma_nm=node.SIGMA_NM,
            elastic_spacing_nm=node.SPACING_NM,
            candidate_fraction=node.CANDIDATE_FRACTION,
            membrane_thickness_nm=membrane_nm,
            membrane_spread=node.MEMBRANE_SPREAD,
            rearrange=node.REARRANGE,
            neuron_spread_nm=node.NEURON_SPREAD_NM,
            grown_fraction=node.GROWN_FRACTION,
            grown_radius_nm=node.GROWN_RADIUS_NM,
            section_jump_nm=node.SECTION_JUMP_NM,
            section_drift_nm=node.SECTION_DRIFT_NM,
        )
        # Mitochondria that only move along are the source's own, less what is clipped; without shapes none are placed.
        source_mito = train.mito_array if library is not None else None
        report = quality_report(
            train.array("label"), source_mito, mask, train.voxel_nm, membrane_nm, source_dark=train.dark_array
        )
        reason = mask_gate(report, limits, mito_fraction)
        if not reason:
            used = {name.upper(): value for name, value in asdict(limits).items()}
            return mask, {"attempt": attempt, "limits": used, **report}, rejections
        rejections.append(reason)
    raise UserError(
        f"No remodelled mask passed in {node.ATTEMPTS} attempts (NEURODIFF.REMODEL.ATTEMPTS). {rejections[-1]} "
        "See NEURODIFF.REMODEL.LIMITS."
    )
