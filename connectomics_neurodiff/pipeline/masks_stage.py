"""The first stage of synthesis: remodelled masks, and the gate that draws a bad one again."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UserError
from ..provenance import hash_of_file, write_json
from ..remodel import (
    MaskLimits,
    RemodelledMask,
    SignatureLibrary,
    gather_libraries,
    mask_gate,
    quality_report,
    remodel,
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
    settings = networks.training_keys(node, ("COPIES", "LIBRARY")) | {"MEMBRANE_NM": run.cfg.NEURODIFF.MEMBRANE_NM}
    parents = {"train": run.parts["train"].identity}
    libraries = library_paths(run.cfg)
    if libraries:
        parents["library"] = hash_of_file(libraries[0])
    train: Volume | None = None
    library: SignatureLibrary | None = None
    for copy in range(node.COPIES):
        provenance = run.provenance("masks", settings | {"COPY": copy}, **parents)
        target = run.folder / "masks" / f"copy_{copy:03d}.h5"
        if run.is_done(target, provenance):
            continue
        if train is None:
            train = run.parts["train"].load()
            library = _library(run, train)
        mask, report = _passing_mask(run, train, library, copy)
        arrays = {"label": mask.label, "membrane": mask.membrane, "mito": mask.mito}
        write_volume(target, arrays, train.voxel_nm, {"seed": run.cfg.NEURODIFF.SEED, "copy": copy})
        write_json(target.with_suffix(".quality.json"), report)
        run.finish(target, provenance)


def _library(run: Run, train: Volume) -> SignatureLibrary | None:
    """Shapes of mitochondria of the train part and of the file that the configuration names; None without either."""
    if not run.cfg.NEURODIFF.REMODEL.MITOCHONDRIA:
        return None
    return gather_libraries(train.array("label"), train.mito_array, train.voxel_nm, library_paths(run.cfg))


def _passing_mask(
    run: Run, train: Volume, library: SignatureLibrary | None, copy: int
) -> tuple[RemodelledMask, dict[str, Any]]:
    """First mask that passes the gate, and its report; each attempt has random numbers of its own."""
    node, membrane_nm = run.cfg.NEURODIFF.REMODEL, run.cfg.NEURODIFF.MEMBRANE_NM
    limits = MaskLimits(**{name.lower(): value for name, value in node.LIMITS.items()})
    reason = ""
    for attempt in range(node.ATTEMPTS):
        mask = remodel(
            train.array("label"),
            train.mito_array,
            train.voxel_nm,
            rng_for(run.cfg.NEURODIFF.SEED, "remodel", copy, *([attempt] if attempt else [])),
            elastic=node.ELASTIC,
            place_mitochondria=node.MITOCHONDRIA,
            library=library,
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
        # Mitochondria that only move along are the source's own, less what is clipped.
        source_mito = train.mito_array if node.MITOCHONDRIA else None
        report = quality_report(train.array("label"), source_mito, mask, train.voxel_nm, membrane_nm)
        reason = mask_gate(report, limits)
        if not reason:
            return mask, {"attempt": attempt, "limits": dict(node.LIMITS), **report}
        logger.warning("Remodelled mask %d, attempt %d, is rejected: %s", copy, attempt + 1, reason)
    raise UserError(
        f"No remodelled mask passed in {node.ATTEMPTS} attempts (NEURODIFF.REMODEL.ATTEMPTS). {reason} "
        "See NEURODIFF.REMODEL.LIMITS."
    )
