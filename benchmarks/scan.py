"""CPU time and memory of the selective scan, forward and backward, as ratios to mambapy's parallel scan.

    pip install -c constraints.txt mambapy
    python benchmarks/scan.py --json out.json

kernels are numba's, which run by default; blocks their twin in torch. Medians of --repeat processes, each of which
scans twice: the first scan also takes its memory from the system, the second finds it there, as those of a training
do. Memory is the peak above that of the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from cases import Measured, count, medians, parse, parser_for, peak_mib, timed, write

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


def measure(way: str, tokens: int, channels: int, states: int, threads: int) -> Measured:
    """Seconds of this process's second scan, forward and backward, and of its first; peak MiB above the start."""
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
    before = peak_mib()
    first, second = (timed(lambda: run(values)) for _ in range(2))
    return second | {"first_cpu_seconds": first["cpu_seconds"], "peak_mib": peak_mib() - before}


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__, repeat=5)
    sizes = {"tokens": 32768, "channels": 128, "states": 16, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    options = parse(parser)
    chosen = {name: getattr(options, name) for name in sizes}
    if options.case:
        print(json.dumps(measure(options.case, **chosen)))
        return
    rows = medians(WAYS, options.repeat)
    print(", ".join(f"{value} {name}" for name, value in chosen.items()))
    for way, row in rows.items():
        row |= {f"{key}_ratio": value / rows[WAYS[0]][key] for key, value in row.items()}
        print(
            f"{way:>8}  CPU {row['cpu_seconds']:7.3f} s x{row['cpu_seconds_ratio']:.4f}"
            f"  first {row['first_cpu_seconds']:7.3f} s x{row['first_cpu_seconds_ratio']:.4f}"
            f"  wall {row['wall_seconds']:7.3f} s x{row['wall_seconds_ratio']:.4f}"
            f"  {row['peak_mib']:6.0f} MiB x{row['peak_mib_ratio']:.3f}"
        )
    write(options.json, chosen | {"rows": rows})


if __name__ == "__main__":
    main()
