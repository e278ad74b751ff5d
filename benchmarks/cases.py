"""What the benchmarks share: every case in a process of its own, so that its peak memory is its own, and medians."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Measured = dict[str, float]


def count(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def parser_for(documentation: str | None, *, repeat: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=count, default=repeat, help="processes per case")
    parser.add_argument("--json", metavar="FILE", help="write the results here; the file must not exist")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; an output file that exists is refused before anything is measured."""
    options = parser.parse_args()
    if options.json and Path(options.json).exists():
        parser.error(f"{options.json} exists; nothing was overwritten")
    return options


def peak_mib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(run: Callable[[], object]) -> Measured:
    """CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def runs(cases: Sequence[str], repeat: int) -> dict[str, list[Measured]]:
    """Run this program again for every case, with ``--case`` added; interleaved, for machines are noisy."""
    found: dict[str, list[Measured]] = {case: [] for case in cases}
    for _ in range(repeat):
        for case, results in found.items():
            done = subprocess.run([sys.executable, *sys.argv, "--case", case], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)  # the case has told why
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def medians(cases: Sequence[str], repeat: int) -> dict[str, Measured]:
    """The median of every number over the runs of a case."""
    return {
        case: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for case, results in runs(cases, repeat).items()
    }


def write(path: str | None, result: dict[str, Any]) -> None:
    """The results as JSON, if a file is named."""
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=2)
