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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PUBLISHED_STEPS = 250
#: Volumes, in tiles along z, y and x.
SIZES = ((1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2))


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Paint one volume in this process: CPU and wall seconds, peak memory in MiB above the start, worst seam."""
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

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    if case["checkpoint"]:
        network, process = denoiser_from_checkpoint(load_checkpoint(case["checkpoint"], kind="denoiser"))
    else:
        network, process = build_denoiser("neurodiff", preset=case["preset"]), DiffusionProcess(cosine_betas(250))
    tile, overlap = case["tile"], case["overlap"]
    # So long that this many tiles cover each axis.
    shape = [t + (n - 1) * (t - o) for t, o, n in zip(tile, overlap, case["tiles"], strict=True)]
    membrane = np.random.default_rng(0).random(shape, dtype=np.float32) < 0.2
    options: dict[str, Any] = {"seed": 0, "sampler": case["sampler"], "tile": tile, "overlap": overlap}
    options |= {"precision": case["precision"], "hint_cache_bytes": case["hint_cache_bytes"]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        synthesise(network, process, membrane[: tile[0], : tile[1], : tile[2]], None, (30, 6, 6), steps=1, **options)
        cpu, wall = time.process_time(), time.perf_counter()
        image = synthesise(
            network, process, membrane, None, (30, 6, 6), steps=case["steps"], scratch=Path(folder), **options
        )
        seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found = seams(image, tile, overlap)
    worst = max((seam.ratio for seam in found.values()), key=lambda ratio: abs(ratio - 1), default=1.0)
    return seconds | {"peak_mib": peak, "voxels": float(np.prod(shape)), "worst_seam": worst}


def run(case: dict[str, Any], repeat: int) -> dict[str, float]:
    """Medians over processes."""
    results = []
    for _ in range(repeat):
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)  # the case has told why
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def straightness(voxels: list[float], seconds: list[float]) -> float:
    """R2 of the straight line through cost and size."""
    line = np.polyval(np.polyfit(voxels, seconds, 1), voxels)
    return float(1 - np.square(seconds - line).sum() / np.square(seconds - np.mean(seconds)).sum())


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All cases, and what follows from them."""
    ours = {name: getattr(options, name) for name in ("checkpoint", "preset", "threads", "tile", "overlap", "sampler")}
    ours |= {"steps": options.steps, "precision": options.precision, "hint_cache_bytes": 1 << 30}
    rows = [run(ours | {"tiles": tiles}, options.repeat) | {"tiles": list(tiles)} for tiles in SIZES]
    published = ours | {"precision": "fp32", "hint_cache_bytes": 0, "sampler": "ddpm"}
    published |= {"tiles": SIZES[0], "overlap": [0, 0, 0]}
    one, three = (run(published | {"steps": steps}, options.repeat) for steps in (1, 3))
    per_voxel = PUBLISHED_STEPS * (three["cpu_seconds"] - one["cpu_seconds"]) / 2 / one["voxels"]
    largest = rows[-1]
    return {
        "rows": rows,
        "linear_r2": straightness([row["voxels"] for row in rows], [row["cpu_seconds"] for row in rows]),
        "published_cpu_seconds": per_voxel * largest["voxels"],
        "times_cheaper": per_voxel * largest["voxels"] / largest["cpu_seconds"],
    }


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", help="of a denoiser with fresh weights (default: paper)")
    parser.add_argument("--checkpoint", metavar="C", help="trained denoiser, so that seams mean something")
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=_count, default=20)
    parser.add_argument("--tile", nargs=3, type=int, default=[8, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--overlap", nargs=3, type=int, default=[2, 16, 16], metavar=("Z", "Y", "X"))
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto")
    parser.add_argument("--threads", type=_count, default=1)
    parser.add_argument("--repeat", type=_count, default=1, help="processes per case")
    parser.add_argument("--json", metavar="FILE", help="write the results here; the file must not exist")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    if options.json and Path(options.json).exists():
        parser.error(f"{options.json} exists; nothing was overwritten")
    found = compare(options)
    for row in found["rows"]:
        print(
            f"{'x'.join(map(str, row['tiles']))} tiles  {row['voxels'] / 1e6:6.3f} Mvoxel"
            f"  CPU {row['cpu_seconds']:8.2f} s  {row['peak_mib']:6.0f} MiB  worst seam {row['worst_seam']:.4f}"
        )
    print(f"linear: R2 {found['linear_r2']:.5f}")
    print(f"published way: {found['published_cpu_seconds']:.0f} CPU s, {found['times_cheaper']:.1f} times ours")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
