"""CPU time, memory and loss of a segmenter's training, as ratios to those of another checkout in the same run.

    git worktree add ../before f17257b
    python benchmarks/training.py --against ../before --json out.json

Trains Superhuman in the sizes of two recipes with the engine that runs train with, on random images, --steps long. CPU
seconds are of a step, without the first two, which make oneDNN's kernels and Adam's averages; the least of --repeat
processes counts, as other work on the machine only ever adds to them. Peaks are of the whole process. The losses of
both are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from cases import Measured, count, parse, parser_for, peak_mib, runs, write

#: Options of the network, and a batch of patches.
RECIPES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    "NeuroDiff-FIB": ({"filters": [28, 36, 48, 64], "z_pool": [True] * 3}, (2, 16, 72, 72)),
    "NeuroDiff-AC4-CPU": ({"filters": [16, 24, 32, 40], "norm": "group"}, (2, 8, 80, 80)),
}
#: Steps before the clock starts.
WARMUP = 2


class RandomPatches:
    """Images and affinities of sample i; keeps when each sample was asked for."""

    def __init__(self, patch: tuple[int, ...]) -> None:
        self.patch = patch
        self.asked: dict[int, float] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        self.asked[index] = time.process_time()
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(1, *self.patch, generator=generator)
        return {"image": image, "affinities": (image > 0.5).float().expand(3, *self.patch)}


def loss(network: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Binary cross-entropy of the affinities."""
    import torch

    logits = network(batch["image"]).float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["affinities"]), {}


def measure(recipe: str, precision: str, checkout: str, options: argparse.Namespace) -> Measured:
    """Train in this process with the package of a checkout."""
    sys.path.insert(0, checkout)
    import torch

    import connectomics_neurodiff
    from connectomics_neurodiff.engine import FitSettings, fit, read_loss_curve
    from connectomics_neurodiff.segmenters import build_segmenter

    if not Path(connectomics_neurodiff.__file__ or "").is_relative_to(checkout):
        sys.exit(f"{checkout} is not a checkout: the package came from {connectomics_neurodiff.__file__}.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network_options, (batch, *patch) = RECIPES[recipe]
    network = build_segmenter("superhuman", **network_options)
    settings = FitSettings(options.steps, batch, learning_rate=1e-3, eps=1e-8, precision=precision, log_every=1)
    patches = RandomPatches(tuple(patch))
    with tempfile.TemporaryDirectory() as folder:
        fit(network, loss, patches, settings, Path(folder), label="training")
        curve = [value for _, value, _ in read_loss_curve(Path(folder) / "loss.csv")]
    first, last = WARMUP * batch, (options.steps - 1) * batch
    seconds = (patches.asked[last] - patches.asked[first]) / (options.steps - 1 - WARMUP)
    return {"cpu_seconds": seconds, "peak_mib": peak_mib()} | {f"loss_{i}": value for i, value in enumerate(curve)}


def least(results: list[Measured]) -> Measured:
    """The least of every number."""
    return {key: min(result[key] for result in results) for key in results[0]}


def compared(mine: Measured, before: Measured) -> dict[str, float]:
    """Ratios to the other checkout, and the largest difference of a loss."""
    losses = [key for key in mine if key.startswith("loss_")]
    return {
        "cpu_seconds": mine["cpu_seconds"],
        "cpu_seconds_before": before["cpu_seconds"],
        "cpu_ratio": mine["cpu_seconds"] / before["cpu_seconds"],
        "memory_ratio": mine["peak_mib"] / before["peak_mib"],
        "largest_loss_difference": max(abs(mine[key] - before[key]) for key in losses),
        "last_loss": mine[losses[-1]],
    }


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__, repeat=3)
    parser.add_argument("--against", metavar="FOLDER", required=True, help="another checkout of this project")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=count, default=12, help="at least 4")
    parser.add_argument("--threads", type=count, default=1)
    options = parse(parser)
    if options.steps < WARMUP + 2:
        parser.error(f"--steps must be at least {WARMUP + 2}. Got {options.steps}.")
    if options.case:
        print(json.dumps(measure(*options.case.split(","), options)))
        return
    here, before = (str(Path(folder).resolve()) for folder in (Path(__file__).parents[1], options.against))
    ways = list(product(options.recipes, options.precision))
    cases = {(*way, folder): ",".join((*way, folder)) for way in ways for folder in (here, before)}
    found = runs(list(cases.values()), options.repeat)
    best = {key: least(found[case]) for key, case in cases.items()}
    rows = []
    for recipe, precision in ways:
        row = compared(best[recipe, precision, here], best[recipe, precision, before])
        rows.append({"recipe": recipe, "precision": precision} | row)
        print(
            f"{recipe:>17} {precision}  CPU {row['cpu_seconds']:.3f} s of {row['cpu_seconds_before']:.3f}, "
            f"x{row['cpu_ratio']:.2f}  memory x{row['memory_ratio']:.2f}  "
            f"losses within {row['largest_loss_difference']:.1e} of each other, the last {row['last_loss']:.4f}"
        )
    write(options.json, {"steps": options.steps, "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
