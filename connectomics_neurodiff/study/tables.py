"""The table of a study: Markdown for a page, CSV with every number, LaTeX for a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import BOUNDARIES, PRECISION

#: Scores of an agglomeration that people are shown: key, heading, decimals.
SHOWN = (
    ("voi", "VOI, bits", 3),
    ("arand", "ARAND", 4),
    ("voi_columns", "VOI in columns, bits", 3),
    ("arand_columns", "ARAND in columns", 4),
)
#: The score of affinities.
PRECISION_SHOWN = ((PRECISION, "Average precision", 3),)
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """A score of a row as text: mean and standard error, and the interval of the difference where there is one."""

    mean: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.mean} {self.interval}".strip()


@dataclass(frozen=True)
class Row:
    """An arm under a condition, scored by one method."""

    name: str
    seeds: str
    cells: list[Cell]
    verdict: str


def groups_of(content: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[Row]]]:
    """Method, headings of its scores, and a row per arm and condition; affinities first."""
    methods = dict.fromkeys(method for scores in content["arms"].values() for method in scores)
    for method in sorted(methods, key=lambda name: name != BOUNDARIES):
        shown = PRECISION_SHOWN if method == BOUNDARIES else SHOWN
        rows = [_row(content, name, method, shown) for name in _names(content) if method in content["arms"][name]]
        yield method, [heading for _, heading, _ in shown], rows


def _names(content: Mapping[str, Any]) -> list[str]:
    """Rows: as the study file orders them."""
    return [name for name in content["rows"] if name in content["arms"]]


def _row(content: Mapping[str, Any], name: str, method: str, shown: Sequence[tuple[str, str, int]]) -> Row:
    scores = content["arms"][name][method]
    differences = content["differences"].get(name, {}).get(method, {})
    cells = [_cell(scores[score], differences.get(score), decimals) for score, _, decimals in shown]
    verdict = content["verdict"].get(name, "reference" if name in content["references"] else "")
    found = len(scores[shown[0][0]]["values"])
    lacking = len(content["missing"].get(name, {}))
    return Row(name, f"{found} of {found + lacking}" if lacking else str(found), cells, verdict)


def _cell(score: Mapping[str, Any], difference: Mapping[str, Any] | None, decimals: int) -> Cell:
    if not math.isfinite(score["mean"]):
        return Cell("\N{EM DASH}")
    mean = f"{score['mean']:.{decimals}f}"
    if score["se"] is not None:
        mean += f" ± {score['se']:.{decimals}f}"
    if not difference or difference["low"] is None:
        return Cell(mean)
    low, high = (f"{difference[end]:+.{decimals}f}".replace("-", _MINUS) for end in ("low", "high"))
    return Cell(mean, f"[{low}, {high}]")


def markdown_of(content: Mapping[str, Any]) -> str:
    """A table per method, and a sentence per arm."""
    blocks = []
    for method, headings, rows in groups_of(content):
        head = ["Trained on", "Seeds", *headings, "Verdict"]
        lines = [head, ["---"] * len(head), *([r.name, r.seeds, *map(str, r.cells), r.verdict] for r in rows)]
        blocks.append(f"**{method}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    blocks.append(
        f"Mean ± standard error over seeds; in brackets the 95 % interval of the paired difference from "
        f"'{content['reference']}', over the seeds that both have. Lower is better, except for average precision."
    )
    if content["sentences"] or content["missing"]:
        sentences = [*content["sentences"].values(), *missing_lines(content)]
        blocks.append("\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(blocks) + "\n"


def missing_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for every training without scores."""
    return [
        f"{name}, seed {seed}: no scores ({reason})"
        for name, seeds in content["missing"].items()
        for seed, reason in seeds.items()
    ]


def csv_of(content: Mapping[str, Any]) -> str:
    """A line per row, method and score, with every seed's value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "method", "score", "mean", "se", "difference", "low", "high", "verdict", "values"])
    for name in _names(content):
        for method, scores in content["arms"][name].items():
            for score, found in scores.items():
                difference = content["differences"].get(name, {}).get(method, {}).get(score, {})
                ends = [difference.get(key) for key in ("mean", "low", "high")]
                values = " ".join(f"{value:.9g}" for value in found["values"])
                verdict = content["verdict"].get(name, "")
                writer.writerow([name, method, score, found["mean"], found["se"], *ends, verdict, values])
    return text.getvalue()


def latex_of(content: Mapping[str, Any]) -> str:
    """A tabular per method, for the package booktabs."""
    lines = ["% needs \\usepackage{booktabs}"]
    for method, headings, rows in groups_of(content):
        lines += [
            f"% {method}",
            f"\\begin{{tabular}}{{lr{'r' * len(headings)}l}}",
            "\\toprule",
            _latex_row(["Trained on", "Seeds", *headings, "Verdict"]),
            "\\midrule",
            *(_latex_row([r.name, r.seeds, *map(str, r.cells), r.verdict]) for r in rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    replaced = {
        "\\": "\\textbackslash{}", "%": "\\%", "_": "\\_", "&": "\\&", "#": "\\#", "±": "$\\pm$", _MINUS: "$-$",
        "\N{EM DASH}": "---",
    }  # fmt: skip
    return " & ".join("".join(replaced.get(letter, letter) for letter in cell) for cell in cells) + " \\\\"
