"""Inference speed and memory of every segmenter, as ratios to Superhuman's in the same run.

    python benchmarks/segmenters.py --json out.json

Medians of --repeat processes. Ratios are of CPU seconds; voxels per second are of wall time.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

from cases import Measured, count, medians, parse, parser_for, peak_mib, timed, write

NAMES = ["superhuman", "swin_unetr", "seg_mamba", "agq"]
BASELINE = ("superhuman", "contiguous", "fp32")


def measure(name: str, layout: str, precision: str, tile: list[int], forwards: int) -> Measured:
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
    before = peak_mib()
    low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    def run() -> None:
        for _ in range(forwards):
            network(image)

    with torch.inference_mode(), low:
        network(image)  # the first pass makes oneDNN's kernels
        seconds = timed(run)
    return {key: value / forwards for key, value in seconds.items()} | {"peak_mib": peak_mib() - before}


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, each in its own process, interleaved; medians, and ratios to the baseline."""
    cases = list(product(options.names, ["contiguous", "channels_last"], ["fp32", "bf16"]))
    found = medians([",".join(case) for case in {BASELINE: None} | dict.fromkeys(cases)], options.repeat)
    results = {tuple(case.split(",")): result for case, result in found.items()}
    voxels = options.tile[0] * options.tile[1] * options.tile[2]
    base = results[BASELINE]
    return [
        dict(zip(("segmenter", "layout", "precision"), case, strict=True))
        | {"voxels_per_second": voxels / result["wall_seconds"], "peak_mib": result["peak_mib"]}
        | {
            "cpu_ratio": result["cpu_seconds"] / base["cpu_seconds"],
            "memory_ratio": result["peak_mib"] / base["peak_mib"],
        }
        for case, result in results.items()
        if case in cases
    ]


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__, repeat=3)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tile", nargs=3, type=int, default=[16, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--forwards", type=count, default=2, help="timed forward passes per process")
    options = parse(parser)
    if options.case:
        print(json.dumps(measure(*options.case.split(","), options.tile, options.forwards)))
        return
    rows = run_all(options)
    print(f"tile {options.tile}; ratios to {', '.join(BASELINE)}")
    for row in rows:
        speed = row["voxels_per_second"] / 1e6
        print(
            f"{row['segmenter']:>11} {row['layout']:>13} {row['precision']}  {speed:6.3f} Mvoxel/s"
            f"  CPU x{row['cpu_ratio']:.2f}  {row['peak_mib']:6.0f} MiB  memory x{row['memory_ratio']:.2f}"
        )
    write(options.json, {"tile": options.tile, "rows": rows})


if __name__ == "__main__":
    main()
