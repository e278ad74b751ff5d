"""From finished trainings to study.json: scores of every row, differences from the reference arm, verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..seeding import rng_for
from .plan import Study, Trial
from .statistics import Difference, is_gain, mean_and_error, paired_interval, verdict_on

#: Files that a scored training leaves.
SCORES = ("metrics.json", "columns.json", "boundaries.json")
#: Scores of the whole test part, by agglomeration; and what finds boundaries before any agglomeration.
WHOLE = ("voi_split", "voi_merge", "voi", "arand")
BOUNDARIES, PRECISION = "boundaries", "average_precision"
#: Scores that decide: means over columns, which no single edge moves by much.
DECIDING = ("voi_columns", "arand_columns")
#: Scores as sentences name them, with their unit.
NAMES = {
    "voi_columns": ("VOI in columns", " bits"),
    "arand_columns": ("ARAND in columns", ""),
}


@dataclass(frozen=True)
class Scored:
    """Scores of a trial: method -> score -> (columns,) values, one value for a score of the whole test part."""

    trial: Trial
    scores: dict[str, dict[str, np.ndarray]]


def is_scored(trial: Trial, waiting: Collection[str] = ()) -> bool:
    """Whether a trial has been trained and scored; what is yet to be done anew has not."""
    return name_of(trial) not in waiting and all((trial.folder / name).exists() for name in SCORES)


def name_of(trial: Trial) -> str:
    """The run of a trial: its folder, relative to the study's."""
    return "/".join(trial.folder.parts[-2:])


def read_scores(trial: Trial) -> Scored:
    """Scores that a finished training left."""
    metrics, columns, boundaries = (json.loads((trial.folder / name).read_text()) for name in SCORES)
    arm = "mixed" if trial.is_mixed else "real"
    scores: dict[str, dict[str, np.ndarray]] = {}
    for method, whole in metrics[arm].items():
        scores[method] = {name: np.array([whole[name]]) for name in WHOLE}
        for score in DECIDING:
            of_columns = [column[score.split("_")[0]] if column else math.nan for column in columns[arm][method]]
            scores[method][score] = np.array(of_columns)
    whole, of_columns = boundaries[arm][PRECISION], boundaries[arm]["columns"]
    scores[BOUNDARIES] = {
        PRECISION: np.array([whole], dtype=np.float64),  # None becomes NaN
        f"{PRECISION}_columns": np.array(of_columns, dtype=np.float64),
    }
    return Scored(trial, scores)


def summarise(
    study: Study, failed: Mapping[str, str] = MappingProxyType({}), waiting: Collection[str] = ()
) -> dict[str, Any]:
    """Content of study.json: what is there of the trainings, and what is not.

    Parameters
    ----------
    study : Study
        Whose folder is looked into.
    failed : mapping
        Folder of a training, relative to the study's -> why it failed.
    waiting : collection of str
        Folders of the trainings that are yet to be done.
    """
    rows = {
        (arm, condition): [read_scores(trial) for trial in study.row(arm, condition) if is_scored(trial, waiting)]
        for condition in study.conditions
        for arm in study.arms
    }
    rows = {key: scored for key, scored in rows.items() if scored}
    content: dict[str, Any] = {
        "reference": study.reference,
        "seeds": study.seeds,
        # JSON files are written with sorted keys; tables keep the order of the study file.
        "rows": [scored[0].trial.name for scored in rows.values()],
        "references": [scored[0].trial.name for (arm, _), scored in rows.items() if arm == study.reference],
        "missing": _missing(study, failed, waiting),
        "arms": {scored[0].trial.name: _means(scored) for scored in rows.values()},
        "differences": {},
        "verdict": {},
        "sentences": {},
        "curves": {},
    }
    for (arm, condition), scored in rows.items():
        name = scored[0].trial.name
        curves = [_curve(one.trial) for one in scored]
        if all(curves):
            content["curves"][name] = curves
        if arm == study.reference or (study.reference, condition) not in rows:
            continue
        found = _differences(rows[study.reference, condition], scored)
        if not found:
            continue
        deciding = {m: {s: d for s, d in scores.items() if s in DECIDING} for m, scores in found.items()}
        content["differences"][name] = {m: {s: d.as_dict() for s, d in scores.items()} for m, scores in found.items()}
        content["verdict"][name] = verdict_on(deciding)
        content["sentences"][name] = sentence_on(name, content["verdict"][name], deciding)
    return content


def _means(scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, Any]]]:
    """Method -> score -> mean over seeds, standard error, and the values; columns are averaged first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method, scores in scored[0].scores.items():
        for score in scores:
            values = [_finite_mean(one.scores[method][score]) for one in scored]
            mean, error = mean_and_error(values)
            found.setdefault(method, {})[score] = {"mean": mean, "se": error, "values": values}
    return found


def _finite_mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else math.nan


def _differences(reference: Sequence[Scored], arm: Sequence[Scored]) -> dict[str, dict[str, Difference]]:
    """Method -> score -> difference, over the seeds that both have."""
    by_seed = {one.trial.seed: one for one in reference}
    pairs = [(by_seed[one.trial.seed], one) for one in arm if one.trial.seed in by_seed]
    found: dict[str, dict[str, Difference]] = {}
    if not pairs:
        return found
    methods = [method for method in pairs[0][0].scores if method in pairs[0][1].scores]
    comparisons = len(DECIDING) * len([method for method in methods if method != BOUNDARIES])
    for method in methods:
        for score in pairs[0][0].scores[method]:
            before, after = (np.stack([pair[i].scores[method][score] for pair in pairs]) for i in (0, 1))
            rng = rng_for(0, "study", method, score)
            found.setdefault(method, {})[score] = paired_interval(before, after, rng, max(comparisons, 1))
    return found


def _missing(study: Study, failed: Mapping[str, str], waiting: Collection[str]) -> dict[str, dict[str, str]]:
    """Row -> seed -> why there is no score of it."""
    found: dict[str, dict[str, str]] = {}
    for trial in study.trials:
        if not is_scored(trial, waiting):
            found.setdefault(trial.name, {})[str(trial.seed)] = failed.get(name_of(trial), "not trained yet")
    return found


def _curve(trial: Trial) -> list[list[float]]:
    """[iterations, average precision on the tune part] of a training; empty where only its end was tried."""
    from ..pipeline.selection import read_tuning

    arm = "mixed" if trial.is_mixed else "real"
    rows = read_tuning(trial.folder / "segmenter" / arm / "tuning.csv")
    return [[float(step), found] for step, found in rows]


def sentence_on(name: str, verdict: str, differences: dict[str, dict[str, Difference]]) -> str:
    """One plain sentence on an arm, and how many more seeds would tell what cannot be told."""
    listed = [(method, score, one) for method, scores in differences.items() for score, one in scores.items()]
    told = [item for item in listed if item[2].is_clear]
    if verdict != "cannot tell":
        gained = ", ".join(_clause(*item) for item in told)
        return f"{name} {verdict}: {gained}."
    if told:
        good = ", ".join(_clause(*item) for item in told if is_gain(item[1], item[2].mean))
        bad = ", ".join(_clause(*item) for item in told if not is_gain(item[1], item[2].mean))
        return f"{name}: cannot tell, the scores contradict one another: better {good}; worse {bad}."
    if all(one.low is None for _, _, one in listed):
        return f"{name}: cannot tell; that takes two seeds at least that both arms have."
    waiting = [item for item in listed if item[2].needed is not None]
    if not waiting:
        return (
            f"{name}: cannot tell, and more seeds would not: the differences are small, or vary from column to column "
            "of the test part. A larger test part would."
        )
    method, score, nearest = min(waiting, key=lambda item: (item[2].needed or 0, item[0], item[1]))
    more = (nearest.needed or 0) - nearest.seeds
    return (
        f"{name}: cannot tell. Nearest is {_clause(method, score, nearest)}; if mean and spread stay as they are, "
        f"{more} more seed{'s' if more > 1 else ''} would tell."
    )


def _clause(method: str, score: str, difference: Difference) -> str:
    label, unit = NAMES[score]
    interval = f" [{difference.low:+.3f}, {difference.high:+.3f}]" if difference.low is not None else ""
    return f"{label} {difference.mean:+.3f}{interval}{unit} with {method}".replace("-", "\N{MINUS SIGN}")


def write_results(
    study: Study, failed: Mapping[str, str] = MappingProxyType({}), waiting: Collection[str] = ()
) -> dict[str, Any]:
    """Write study.json, table.md, table.csv, table.tex and study.html: the same bytes for the same scores.

    Parameters are those of :func:`summarise`.
    """
    from ..provenance import atomic_write, write_json
    from .page import write_page
    from .tables import csv_of, latex_of, markdown_of

    content = summarise(study, failed, waiting)
    write_json(study.output / "study.json", content)
    for suffix, make in (("md", markdown_of), ("csv", csv_of), ("tex", latex_of)):
        target: Path = study.output / f"table.{suffix}"
        with atomic_write(target) as temporary:
            temporary.write_text(make(content), encoding="utf-8")
    write_page(study.output, study.output.name, content)
    return content
