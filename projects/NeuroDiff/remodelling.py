"""Remodelled masks of real volumes, measured: what must hold of each, and what it costs.

    python projects/NeuroDiff/remodelling.py vnc.h5 fib.h5 phantom --seeds 10 --json remodelling.json
    python projects/NeuroDiff/remodelling.py fib.h5 --whole --seeds 1 --block-sections 40
    python projects/NeuroDiff/remodelling.py vnc.h5 --cost 20 1024 1024
    python projects/NeuroDiff/remodelling.py fib.h5 --picture sections.png

For every volume and seed: the numbers of the quality report, what the gate says, CPU seconds, and a hash of the bytes.
Labels in several pieces are told apart first (``--whole``), so that each must stay connected. "phantom" is the embedded
one. Rows that FILE.json holds already are not made again. ``--workers`` processes share the rows; the hashes are the
same for any number. ``--cost`` instead remodels a volume of that shape, mirrored or cropped, in a process of its own
and prints CPU seconds and the memory that came on top of the source, in multiples of its labels. ``--picture`` draws
ten sections of the first volume above ten of its mask of seed 0, in two bands.

``--block-sections`` makes the masks in blocks of so many sections; CPU seconds then include measuring the shapes,
writing and reading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cc3d
import cv2
import h5py
import numpy as np

from connectomics_neurodiff.conditions import membrane_from_labels
from connectomics_neurodiff.errors import UserError
from connectomics_neurodiff.provenance import write_json
from connectomics_neurodiff.remodel import (
    PAIRED,
    MaskLimits,
    RemodelledMask,
    SignatureLibrary,
    gather_libraries,
    mask_gate,
    quality_report,
    remodel,
    remodel_blockwise,
)
from connectomics_neurodiff.report import sections_to_show
from connectomics_neurodiff.report.figures import paint_mask
from connectomics_neurodiff.seeding import rng_for
from connectomics_neurodiff.volume import grow_phantom, open_volume

PHANTOM_SHAPE, PHANTOM_VOXEL_NM = (24, 384, 384), (29.0, 6.0, 6.0)


def source(name: str, whole: bool) -> tuple[np.ndarray, np.ndarray | None, tuple[float, ...]]:
    """Labels, mitochondria and voxel size of a file, or of the embedded phantom."""
    volume = grow_phantom(PHANTOM_SHAPE, PHANTOM_VOXEL_NM, 0) if name == "phantom" else open_volume(name).load()
    label = volume.array("label")
    if whole:
        label = cc3d.connected_components(label, connectivity=26)
    return label, volume.mito_array, tuple(volume.voxel_nm)


def in_blocks(
    label: np.ndarray, mito: np.ndarray | None, voxel_nm: tuple[float, ...], seed: int, sections: int
) -> RemodelledMask:
    """Mask made in blocks of so many sections, with shapes of the volume itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.h5"
        minimum = remodel_blockwise(path, label, mito, voxel_nm, rng_for(seed), sections=sections)
        with h5py.File(path) as file:
            return RemodelledMask(file["label"][:].astype(np.uint64), file["membrane"][:], file["mito"][:], minimum)


def row(name: str, seed: int, whole: bool, sections: int) -> dict[str, Any]:
    """Everything about one remodelled mask."""
    label, mito, voxel_nm = source(name, whole)
    library = None if sections else gather_libraries(label, mito, voxel_nm, [])
    start = time.process_time()
    if sections:
        mask = in_blocks(label, mito, voxel_nm, seed, sections)
    else:
        mask = remodel(label, mito, voxel_nm, rng_for(seed), library=library)
    seconds = time.process_time() - start
    report = quality_report(label, mito, mask, voxel_nm)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (mask.label, mask.membrane, mask.mito))).hexdigest()
    return {"reason": mask_gate(report, MaskLimits()), "cpu_seconds": seconds, "sha256": digest, **report}


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by name."""
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())
    blocks = f" in blocks of {options.block_sections}" if options.block_sections else ""
    asked = {
        f"{Path(volume).stem} {seed}{blocks}": (volume, seed, options.whole, options.block_sections)
        for volume in options.volumes
        for seed in range(options.seeds)
    }
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = {key: pool.submit(row, *job) for key, job in asked.items() if key not in rows}
        for key, job in jobs.items():
            rows[key] = job.result()
            if options.json:
                write_json(options.json, rows)
    return {key: rows[key] for key in asked}


def fitted(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Volume cropped, or mirrored at its ends, to a shape."""
    volume = volume[tuple(slice(n) for n in shape)]
    missing = [(0, n - have) for n, have in zip(shape, volume.shape, strict=True)]
    return np.ascontiguousarray(np.pad(volume, missing, mode="symmetric"))


def cost(name: str, shape: tuple[int, ...], seed: int) -> dict[str, float]:
    """CPU seconds, and peak memory beyond the source in multiples of its labels; peaks only grow: once per process."""
    label, mito, voxel_nm = source(name, whole=False)
    label = fitted(label, shape)
    mito = None if mito is None else fitted(mito, shape)
    library: SignatureLibrary | None = gather_libraries(label, mito, voxel_nm, [])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    remodel(label, mito, voxel_nm, rng_for(seed), library=library)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu_seconds": seconds, "label_mb": label.nbytes / 2**20, "memory": (peak - before) * 1024 / label.nbytes}


def draw(name: str, path: Path) -> None:
    """Ten sections of a volume and of its remodelled mask: two bands, the source above the mask in each."""
    label, mito, voxel_nm = source(name, whole=False)
    mask = remodel(label, mito, voxel_nm, rng_for(0))
    membrane = membrane_from_labels(label, voxel_nm)
    sections = sections_to_show(len(label), 10)
    gap = np.ones((label.shape[1], 6, 3))

    def strip(volumes: tuple[np.ndarray, np.ndarray, np.ndarray], chosen: list[int]) -> np.ndarray:
        parts = [part for z in chosen for part in (paint_mask(*(volume[z] for volume in volumes)), gap)]
        return np.pad(np.concatenate(parts[:-1], axis=1), ((0, 6), (0, 0), (0, 0)), constant_values=1)

    marked = np.zeros(label.shape, np.uint8) if mito is None else mito
    real, made = (label, membrane, marked), (mask.label, mask.membrane, mask.mito)
    bands = [strip(volumes, chosen) for chosen in (sections[:5], sections[5:]) for volumes in (real, made)]
    cv2.imwrite(str(path), np.rint(255 * np.concatenate(bands)).astype(np.uint8)[..., ::-1])


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    """A line per row: mask / source for the paired numbers, then the others."""
    for key, values in rows.items():
        print(f"{key}: {values['reason'] or 'passes'} ({values['cpu_seconds']:.1f} CPU s)")
        print("    " + ", ".join(f"{name} {values[name]:.4g} / {values[f'source_{name}']:.4g}" for name in PAIRED))
        single = [n for n in values if n not in PAIRED and not n.startswith("source_") and isinstance(values[n], float)]
        print("    " + ", ".join(f"{name} {values[name]:.3g}" for name in single if name != "cpu_seconds"))


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", nargs="+", help="HDF5 files with label and mito, or 'phantom'")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="0 to N - 1")
    parser.add_argument("--whole", action="store_true", help="tell the pieces of disconnected labels apart first")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows; those that are there are not made again")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="ten sections, real and remodelled")
    parser.add_argument("--block-sections", type=int, default=0, metavar="N", help="make the masks in blocks")
    parser.add_argument("--cost", type=int, nargs=3, metavar=("Z", "Y", "X"), help="time and memory at that shape")
    options = parser.parse_args()
    if options.block_sections and (options.picture or options.cost):
        parser.error("--block-sections makes masks without pictures or costs; give it alone.")
    if options.block_sections < 0:
        parser.error(f"--block-sections must be >= 0. Got {options.block_sections}.")
    return options


def main() -> None:
    """Print a table."""
    options = parse()
    try:
        if options.picture:
            draw(options.volumes[0], options.picture)
            return
        if not options.cost:
            print_rows(measure(options))
            return
        for name in options.volumes:
            with ProcessPoolExecutor(1) as pool:
                found = pool.submit(cost, name, tuple(options.cost), 0).result()
            print(name, ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
