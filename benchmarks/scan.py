"""CPU time and memory of the selective scan, forward and backward, as ratios to mambapy's parallel scan.

    pip install -c constraints.txt mambapy
    python benchmarks/scan.py --json out.json

kernels are numba's, which run by default; blocks their twin in torch. Every case is a process of its own, so that its
peak memory is its own; cases are interleaved `--repeat` times, for machines are noisy, and medians are taken.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ["mambapy", "kernels", "blocks"]


def scan_of(way: str) -> Callable[..., Any]:
    """The scan of that name: y (b, d, l) from u, delta (b, d, l), A (d, n), B and C (b, n, l)."""
    if way == "kernels":
        from connectomics_neurodiff.synthesis.nets.scan_kernel import scan_in_kernels

        return scan_in_kernels
    if way == "blocks":
        from connectomics_neurodiff.synthesis.nets.scan_blocks import scan_in_blocks

        return scan_in_blocks
    try:
        from mambapy.pscan import pscan
    except ImportError:
        sys.exit("The baseline needs mambapy: pip install -c constraints.txt mambapy")

    def parallel(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        step, values = delta.mT[..., None], u.mT[..., None]
        states = pscan((step * A).exp(), step * B.mT[:, :, None] * values)
        return (states @ C.mT[..., None])[..., 0].mT

    return parallel


def measure(way: str, tokens: int, channels: int, states: int, threads: int) -> dict[str, float]:
    """One case in this process: CPU and wall seconds of forward and backward, peak memory in MiB above the start."""
    import torch

    torch.set_num_threads(threads)
    scan = scan_of(way)

    def arguments(count: int) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        u, delta, gate = (torch.randn(1, count, channels, generator=generator).mT for _ in range(3))
        B, C = (torch.randn(1, count, states, generator=generator).mT for _ in range(2))
        A = -torch.arange(1.0, states + 1).repeat(channels, 1)
        return [*(t.requires_grad_() for t in (u, 0.1 * delta.abs(), A, B, C)), gate]

    def run(values: list[Any]) -> None:
        torch.autograd.grad(scan(*values[:-1]), values[:-1], values[-1])

    run(arguments(256))  # compiles or loads the kernels, starts the threads
    values = arguments(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    run(values)
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 32768, "channels": 128, "states": 16, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=_count, default=default)
    parser.add_argument("--repeat", type=_count, default=5, help="processes per case")
    parser.add_argument("--json", metavar="FILE", help="write the results here; the file must not exist")
    parser.add_argument("--case", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in sizes}
    if options.case:
        print(json.dumps(measure(options.case, **chosen)))
        return
    if options.json and Path(options.json).exists():
        parser.error(f"{options.json} exists; nothing was overwritten")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeat):
        for way, results in found.items():
            arguments = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--case", way, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)  # the case has told why
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        way: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for way, results in found.items()
    }
    print(", ".join(f"{value} {name}" for name, value in chosen.items()))
    for way, row in rows.items():
        row |= {f"{key}_ratio": row[key] / rows[WAYS[0]][key] for key in ("cpu_seconds", "wall_seconds", "peak_mib")}
        print(
            f"{way:>8}  CPU {row['cpu_seconds']:7.3f} s x{row['cpu_seconds_ratio']:.4f}"
            f"  wall {row['wall_seconds']:7.3f} s x{row['wall_seconds_ratio']:.4f}"
            f"  {row['peak_mib']:6.0f} MiB x{row['peak_mib_ratio']:.3f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(chosen | {"rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
