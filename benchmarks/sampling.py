"""What painting a volume costs: against the published way of sampling, and against the volume's size.

    python benchmarks/sampling.py --preset paper --tile 8 128 128 --json out.json

The published way takes 250 steps in float32, encodes the masks anew in every step, and sets tiles side by side; here
with our network, which is faster than theirs (denoiser.py). All its steps cost the same: the cost of one is
measured, as the difference between a run of three and a run of one, and multiplied. Ours is measured whole, for volumes
of 1, 2, 4 and 8 tiles; their cost should be a straight line. Every case is a process of its own; CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cases import Measured, count, medians, parse, parser_for, peak_mib, timed, write

PUBLISHED_STEPS = 250
#: Volumes, in tiles along z, y and x.
SIZES = {"1": (1, 1, 1), "2": (1, 1, 2), "4": (1, 2, 2), "8": (2, 2, 2)}
#: Runs of the published way, and their steps.
PUBLISHED = {"published, 1 step": 1, "published, 3 steps": 3}


def measure(options: argparse.Namespace) -> Measured:
    """Paint one volume in this process."""
    import torch

    from connectomics_neurodiff.checkpoints import load_checkpoint
    from connectomics_neurodiff.metrics import seams
    from connectomics_neurodiff.synthesis import (
        DiffusionProcess,
        build_denoiser,
        cosine_betas,
        denoiser_from_checkpoint,
        synthesise,
    )

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.checkpoint:
        network, process = denoiser_from_checkpoint(load_checkpoint(options.checkpoint, kind="denoiser"))
    else:
        network, process = build_denoiser("neurodiff", preset=options.preset), DiffusionProcess(cosine_betas(250))
    published = options.case in PUBLISHED
    tiles = SIZES["1"] if published else SIZES[options.case]
    overlap = [0, 0, 0] if published else options.overlap
    # So long that this many tiles cover each axis.
    shape = [t + (n - 1) * (t - o) for t, o, n in zip(options.tile, overlap, tiles, strict=True)]
    membrane = np.random.default_rng(0).random(shape, dtype=np.float32) < 0.2
    how: dict[str, Any] = {"seed": 0, "tile": options.tile, "overlap": overlap}
    if published:
        how |= {"sampler": "ddpm", "precision": "fp32", "hint_cache_bytes": 0}
    else:
        how |= {"sampler": options.sampler, "precision": options.precision}
    first = tuple(slice(0, t) for t in options.tile)
    before = peak_mib()
    painted = []
    with tempfile.TemporaryDirectory() as folder:
        synthesise(network, process, membrane[first], None, (30, 6, 6), steps=1, **how)  # makes oneDNN's kernels
        how |= {"steps": PUBLISHED.get(options.case, options.steps), "scratch": Path(folder)}
        seconds = timed(lambda: painted.append(synthesise(network, process, membrane, None, (30, 6, 6), **how)))
        peak = peak_mib() - before
        found = seams(painted[0], options.tile, overlap)
    worst = max((seam.ratio for seam in found.values()), key=lambda ratio: abs(ratio - 1), default=1.0)
    return seconds | {"peak_mib": peak, "voxels": float(np.prod(shape)), "worst_seam": worst}


def straightness(voxels: list[float], seconds: list[float]) -> float:
    """R2 of the straight line through cost and size."""
    line = np.polyval(np.polyfit(voxels, seconds, 1), voxels)
    return float(1 - np.square(seconds - line).sum() / np.square(seconds - np.mean(seconds)).sum())


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All cases, and what follows from them."""
    found = medians([*SIZES, *PUBLISHED], options.repeat)
    rows = {name: found[name] for name in SIZES}
    one, three = (found[name] for name in PUBLISHED)
    largest = rows[max(SIZES, key=int)]
    step = (three["cpu_seconds"] - one["cpu_seconds"]) / 2
    published = PUBLISHED_STEPS * step * largest["voxels"] / one["voxels"]
    return {
        "rows": rows,
        "linear_r2": straightness(
            [row["voxels"] for row in rows.values()], [row["cpu_seconds"] for row in rows.values()]
        ),
        "published_cpu_seconds": published,
        "times_cheaper": published / largest["cpu_seconds"],
    }


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__, repeat=1)
    parser.add_argument("--preset", default="paper", help="of a denoiser with fresh weights (default: paper)")
    parser.add_argument("--checkpoint", metavar="C", help="trained denoiser, so that seams mean something")
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=count, default=20)
    parser.add_argument("--tile", nargs=3, type=int, default=[8, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--overlap", nargs=3, type=int, default=[2, 16, 16], metavar=("Z", "Y", "X"))
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto")
    parser.add_argument("--threads", type=count, default=1)
    options = parse(parser)
    if options.case:
        print(json.dumps(measure(options)))
        return
    found = compare(options)
    for name, row in found["rows"].items():
        print(
            f"{name} tiles  {row['voxels'] / 1e6:6.3f} Mvoxel  CPU {row['cpu_seconds']:8.2f} s"
            f"  {row['peak_mib']:6.0f} MiB  worst seam {row['worst_seam']:.4f}"
        )
    print(f"linear: R2 {found['linear_r2']:.5f}")
    print(f"published way: {found['published_cpu_seconds']:.0f} CPU s, {found['times_cheaper']:.1f} times ours")
    write(options.json, found)


if __name__ == "__main__":
    main()
