"""The first stage of synthesis: remodelled masks, and the gate that draws a bad one again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
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
from .unlabeled import MaskCopy, hash_of_pseudo_labels, load_pseudo_labelled, mask_copies

logger = logging.getLogger("connectomics_neurodiff")


def make_masks(run: Run) -> None:
    """Remodel the masks of the train part, or of unannotated tissue -> masks/copy_000.h5, copy_000.quality.json, ..."""
    node = run.cfg.NEURODIFF.REMODEL
    settings = networks.training_keys(node, ("COPIES", "LIBRARY")) | {
        "MEMBRANE_NM": run.cfg.NEURODIFF.MEMBRANE_NM,
        **networks.dark_settings(run.cfg),
    }
    libraries = library_paths(run.cfg)
    library = {"library": hash_of_file(libraries[0])} if libraries else {}
    missing: dict[MaskCopy, tuple[Path, Provenance]] = {}
    for copy in mask_copies(run.cfg):
        provenance = run.provenance("masks", settings | copy.settings, **_parents(run, copy), **library)
        target = run.folder / "masks" / f"{copy.name}.h5"
        if not run.is_done(target, provenance):
            missing[copy] = target, provenance
    for tissue, copies in groupby(missing, key=lambda copy: copy.tissue):
        _make_copies(run, tissue, {copy: missing[copy] for copy in copies})


def _parents(run: Run, copy: MaskCopy) -> dict[str, str]:
    """What a mask is made from, as its provenance names it."""
    if copy.tissue < 0:
        return {"train": run.parts["train"].identity}
    return {"tissue": hash_of_pseudo_labels(run, copy.tissue)}


def _make_copies(run: Run, tissue: int, missing: Mapping[MaskCopy, tuple[Path, Provenance]]) -> None:
    """All masks of one piece of tissue."""
    source = run.parts["train"].load() if tissue < 0 else load_pseudo_labelled(run, tissue)
    workers = workers_that_fit(source.array("label").size, len(missing), run.cfg.SYSTEM.NUM_CPUS or 1)
    job = partial(_make_copy, run.cfg, run.folder, source, _library(run, source))
    for copy, rejections in in_processes(job, list(missing), workers):
        for attempt, reason in enumerate(rejections, start=1):
            logger.warning("Remodelled mask %s, attempt %d, is rejected: %s", copy.name, attempt, reason)
        run.finish(*missing[copy])


def _make_copy(
    cfg: CfgNode, folder: Path, source: Volume, library: SignatureLibrary | None, copy: MaskCopy
) -> list[str]:
    """Write one mask and its report; returns why those before it were rejected."""
    mask, report, rejections = _passing_mask(cfg, source, library, copy)
    target = folder / "masks" / f"{copy.name}.h5"
    arrays = mask_arrays(mask)
    write_volume(target, arrays, source.voxel_nm, {"seed": cfg.NEURODIFF.SEED, "copy": copy.number})
    write_json(target.with_suffix(".quality.json"), report)
    return rejections


def _library(run: Run, source: Volume) -> SignatureLibrary | None:
    """Shapes of mitochondria of the tissue and of the file that the configuration names; None without either."""
    if not run.cfg.NEURODIFF.REMODEL.MITOCHONDRIA:
        return None
    return gather_libraries(source.array("label"), source.mito_array, source.voxel_nm, library_paths(run.cfg))


def _passing_mask(
    cfg: CfgNode, source: Volume, library: SignatureLibrary | None, copy: MaskCopy
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
            source.array("label"),
            source.mito_array,
            source.voxel_nm,
            rng_for(cfg.NEURODIFF.SEED, "remodel", *copy.stream, *([attempt] if attempt else [])),
            dark=source.dark_array,
            elastic=node.ELASTIC,
            place_mitochondria=node.MITOCHONDRIA,
            library=library,
            mito_fraction=mito_fraction,
            mito_count=node.MITO_COUNT or None,
            elastic_sigma_nm=node.SIGMA_NM,
            elastic_spacing_nm=node.SPACING_NM,
            candidate_fraction=node.CANDIDATE_FRACTION,
            membrane_thickness_nm=membrane_nm,
        )
        # Mitochondria that only move along are the source's own, less what is clipped; without shapes none are placed.
        source_mito = source.mito_array if library is not None else None
        report = quality_report(
            source.array("label"), source_mito, mask, source.voxel_nm, membrane_nm, source_dark=source.dark_array
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
