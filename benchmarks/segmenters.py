"""Inference speed and memory of every segmenter, as ratios to Superhuman's in the same run.

    python benchmarks/segmenters.py --json out.json

Every case is a process of its own, so that its peak memory is its own; cases are interleaved `--repeat` times, for
machines are noisy, and medians are taken. Ratios are of CPU seconds; voxels per second are of wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

NAMES = ["superhuman", "swin_unetr", "seg_mamba", "agq"]
BASELINE = ("superhuman", "contiguous", "fp32")


def measure(name: str, layout: str, precision: str, tile: list[int], forwards: int) -> dict[str, float]:
    """Run one case in this process: CPU and wall seconds per forward pass, peak memory in MiB above the start."""
    import torch

    from connectomics_neurodiff.convolution import use_sound_convolutions
    from connectomics_neurodiff.segmenters import build_segmenter

    torch.manual_seed(0)
    network = build_segmenter(name).eval()
    use_sound_convolutions(network)
    image = torch.rand(1, 1, *tile)
    if layout == "channels_last":
        network = network.to(memory_format=torch.channels_last_3d)
        image = image.contiguous(memory_format=torch.channels_last_3d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), low:
        network(image)  # the first pass makes oneDNN's kernels
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(forwards):
            network(image)
    return {
        "cpu_seconds": (time.process_time() - cpu) / forwards,
        "wall_seconds": (time.perf_counter() - wall) / forwards,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, each in its own process, interleaved; medians, and ratios to the baseline."""
    cases = list(product(options.names, ["contiguous", "channels_last"], ["fp32", "bf16"]))
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in [BASELINE, *cases]}
    for _ in range(options.repeat):
        for case, results in found.items():
            command = [sys.executable, __file__, "--case", *case, "--forwards", str(options.forwards), "--tile"]
            done = subprocess.run([*command, *map(str, options.tile)], stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        case: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for case, results in found.items()
    }
    voxels = options.tile[0] * options.tile[1] * options.tile[2]
    base = medians[BASELINE]
    return [
        dict(zip(("segmenter", "layout", "precision"), case, strict=True))
        | {"voxels_per_second": voxels / result["wall_seconds"], "peak_mib": result["peak_mib"]}
        | {
            "cpu_ratio": result["cpu_seconds"] / base["cpu_seconds"],
            "memory_ratio": result["peak_mib"] / base["peak_mib"],
        }
        for case, result in medians.items()
        if case in cases
    ]


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tile", nargs=3, type=int, default=[16, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--forwards", type=_count, default=2, help="timed forward passes per process")
    parser.add_argument("--repeat", type=_count, default=3, help="processes per case")
    parser.add_argument("--json", metavar="FILE", help="write the results here; the file must not exist")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case, options.tile, options.forwards)))
        return
    if options.json and Path(options.json).exists():
        parser.error(f"{options.json} exists; nothing was overwritten")
    rows = run_all(options)
    print(f"tile {options.tile}; ratios to {', '.join(BASELINE)}")
    for row in rows:
        speed = row["voxels_per_second"] / 1e6
        print(
            f"{row['segmenter']:>11} {row['layout']:>13} {row['precision']}  {speed:6.3f} Mvoxel/s"
            f"  CPU x{row['cpu_ratio']:.2f}  {row['peak_mib']:6.0f} MiB  memory x{row['memory_ratio']:.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"tile": options.tile, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
