"""Scores of several runs, seed by seed, as a Markdown table.

python projects/NeuroDiff/summarise.py outputs/fib-0 outputs/fib-1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SCORES = ("voi_split", "voi_merge", "voi", "arand")
ARMS = {"real": "real only", "mixed": "real + synthetic"}


def rows_of(runs: list[Path]) -> list[list[str]]:
    """One row per method, arm and run, and a row of means per method and arm."""
    metrics = {run: json.loads((run / "metrics.json").read_text()) for run in runs}
    rows = []
    for method in sorted({name for content in metrics.values() for name in content["real"]}):
        for arm, title in ARMS.items():
            scored = [
                (content["provenance"]["seed"], content[arm][method]) for content in metrics.values() if arm in content
            ]
            for seed, scores in scored:
                rows.append([method, title, str(seed), *(f"{scores[name]:.4f}" for name in SCORES)])
            if len(scored) > 1:
                means = [sum(scores[name] for _, scores in scored) / len(scored) for name in SCORES]
                rows.append([method, title, "mean", *(f"**{mean:.4f}**" for mean in means)])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    header = ["method", "trained on", "seed", "VOI split", "VOI merge", "VOI", "ARAND"]
    for row in [header, ["---"] * len(header), *rows_of(parser.parse_args().runs)]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
