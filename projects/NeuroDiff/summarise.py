"""Scores of several runs, seed by seed, as a Markdown table; and what mixing changed, with its error.

The second table has the mean difference, mixed - real, over columns of the test part, and its standard error.

python projects/NeuroDiff/summarise.py outputs/fib-0 outputs/fib-1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from connectomics_neurodiff.report.verdict import compare, methods_of

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


def differences_of(runs: list[Path]) -> list[list[str]]:
    """One row per method and run: VOI split, VOI merge, VOI and ARAND, mixed - real, in columns of the test part."""
    rows = []
    for run in runs:
        scores, columns = (json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "columns"))
        metrics = scores | {"columns": columns}
        for method in methods_of(metrics):
            by_name = {row.name: row.columns_text for row in compare(metrics, method)}
            seed = str(metrics["provenance"]["seed"])
            rows.append([method, seed, *(by_name[name] for name in ("VOI split", "VOI merge", "VOI", "ARAND"))])
    return sorted(rows)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    runs = parser.parse_args().runs
    scores = ["VOI split", "VOI merge", "VOI", "ARAND"]
    print_table(["method", "trained on", "seed", *scores], rows_of(runs))
    print()
    print_table(["method", "seed", *(f"{name} in columns" for name in scores)], differences_of(runs))


if __name__ == "__main__":
    main()
