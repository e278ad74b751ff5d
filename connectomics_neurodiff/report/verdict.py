"""What the scores say: relative changes, the better arm of each, and one honest sentence.

Everything is computed from the numbers of metrics.json; nothing here knows which outcome was hoped for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..metrics import paired_difference

#: Scores in the order in which they are shown: key, name, unit, decimals. Lower is better for all.
SCORES: tuple[tuple[str, str, str, int], ...] = (
    ("arand", "ARAND", "", 4),
    ("voi", "VOI", "bits", 3),
    ("voi_split", "VOI split", "bits", 3),
    ("voi_merge", "VOI merge", "bits", 3),
)

#: Standard errors that a difference must exceed to be called one.
_CLEAR = 2.0
#: The typographic minus, as wide as a plus.
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Comparison:
    """One score of one method, real only beside real + synthetic.

    Attributes
    ----------
    name, unit : str
        The score's name and unit.
    real, mixed : str
        The values as text; an em dash where one is missing.
    change : float or None
        Relative change in percent from real to mixed, negative = better; None where it is undefined (a score is
        missing or not finite, or the baseline is 0).
    best : str
        ``"real"``, ``"mixed"``, or ``""`` where they are equal or one is missing.
    in_columns : tuple of (float, float, int) or None
        Mean difference, mixed - real, over columns of the test part, its standard error, and the number of columns;
        None where these were not scored.
    difference : float
        mixed - real, 0 where one is missing.
    by_rounding : float
        How far rounding of the affinities alone moves the value of an arm; 0 where that was not tried.
    """

    name: str
    unit: str
    real: str
    mixed: str
    change: float | None
    best: str
    in_columns: tuple[float, float, int] | None = None
    by_rounding: float = 0.0
    difference: float = 0.0

    @property
    def change_text(self) -> str:
        """The change with a sign, ``"-12.1 %"``, or an em dash."""
        if self.change is None:
            return "—"
        if _rounds_to_zero(self.change):
            return "0.0 %"
        return f"{'+' if self.change > 0 else _MINUS}{abs(self.change):.1f} %"

    @property
    def columns_text(self) -> str:
        """The mean difference in columns with its error, ``"-0.009 ± 0.012"``, or an em dash."""
        if self.in_columns is None:
            return "—"
        mean, error, _ = self.in_columns
        return f"{_MINUS if mean < 0 else '+'}{abs(mean):.3f} ± {error:.3f}"

    @property
    def is_clear(self) -> bool:
        """Whether the mean difference in columns is more than twice its standard error."""
        return self.in_columns is not None and abs(self.in_columns[0]) > _CLEAR * self.in_columns[1]

    @property
    def is_contradicted(self) -> bool:
        """Whether columns clearly show something else than the whole test part, where one large neuron may decide."""
        if self.in_columns is None or not self.is_clear:
            return False
        return self.in_columns[0] * (self.change or 0.0) <= 0

    @property
    def is_told(self) -> bool:
        """Whether one run tells this change: clear in columns, not contradicted, and more than rounding can undo."""
        return self.is_clear and not self.is_contradicted and abs(self.difference) > self.by_rounding

    @property
    def judgement(self) -> str:
        """``"better"``, ``"worse"``, ``"unchanged"``, or ``""`` where there is no change to speak of."""
        if self.change is None:
            return ""
        return "unchanged" if _rounds_to_zero(self.change) else "better" if self.change < 0 else "worse"


@dataclass(frozen=True)
class Verdict:
    """The finding in one sentence.

    Attributes
    ----------
    sentence : str
        For example ``"Synthetic pairs lowered ARAND by 12.0 % and VOI by 5.1 % with waterz, and raised ..."``: of the
        changes that one run tells, or that it tells none. Without scores in columns, of all of them.
    tone : str
        ``"better"`` if every one of these fell, ``"worse"`` if every one rose, ``"divided"`` if some did, or if the
        columns clearly show the contrary of a change; ``"unchanged"`` if there is none, or ``"open"`` where nothing can
        be compared.
    certainty : str
        By what these changes are clear, and which contradict the columns or are lost to rounding; empty where columns
        were not scored.
    """

    sentence: str
    tone: str
    certainty: str = ""


def _rounds_to_zero(change: float) -> bool:
    return abs(change) < 0.05


def methods_of(metrics: Mapping[str, Any]) -> list[str]:
    """Agglomeration methods that any arm was scored with, in order of appearance."""
    return list(dict.fromkeys(method for arm in ("real", "mixed") for method in metrics.get(arm) or {}))


def compare(metrics: Mapping[str, Any], method: str) -> list[Comparison]:
    """The four scores of one method in both arms.

    Parameters
    ----------
    metrics : mapping
        ``{"real": {method: {"voi_split", "voi_merge", "voi", "arand"}}, "mixed": {...}}``; an arm may be absent. With
        ``"columns": {arm: {method: [scores or None, ...]}}`` differences come with an error.
    method : str
        ``"waterz"`` or ``"multicut"``.
    """
    real = (metrics.get("real") or {}).get(method) or {}
    mixed = (metrics.get("mixed") or {}).get(method) or {}
    return [
        replace(
            _compare_one(real.get(key), mixed.get(key), name, unit, n, _in_columns(metrics, method, key)),
            by_rounding=_by_rounding(metrics, method, key),
        )
        for key, name, unit, n in SCORES
    ]


def _by_rounding(metrics: Mapping[str, Any], method: str, key: str) -> float:
    """The largest distance between the scores of an arm whose affinities were moved as rounding moves them."""
    spans = [0.0]
    for arm in ("real", "mixed"):
        values = [scores[key] for scores in ((metrics.get("rounding") or {}).get(arm) or {}).get(method) or []]
        whole = ((metrics.get(arm) or {}).get(method) or {}).get(key)
        if values and whole is not None:
            spans.append(max(*values, whole) - min(*values, whole))
    return max(spans)


def _in_columns(metrics: Mapping[str, Any], method: str, key: str) -> tuple[float, float, int] | None:
    columns = metrics.get("columns") or {}
    arms = [(columns.get(arm) or {}).get(method) or [] for arm in ("real", "mixed")]
    pairs = [(real[key], mixed[key]) for real, mixed in zip(*arms, strict=False) if real and mixed]
    if len(pairs) < 2:
        return None
    return (*paired_difference(*zip(*pairs, strict=True)), len(pairs))


def _compare_one(
    real: float | None,
    mixed: float | None,
    name: str,
    unit: str,
    decimals: int,
    in_columns: tuple[float, float, int] | None,
) -> Comparison:
    def text(value: float | None) -> str:
        if value is None:
            return "—"
        return f"{value:.{decimals}f}" if math.isfinite(value) else "not finite"

    change, best, difference = None, "", 0.0
    if real is not None and mixed is not None and math.isfinite(real) and math.isfinite(mixed):
        change = 100 * (mixed - real) / real if real else (0.0 if mixed == real else None)
        best = "real" if real < mixed else "mixed" if mixed < real else ""
        difference = mixed - real
    return Comparison(name, unit, text(real), text(mixed), change, best, in_columns, difference=difference)


def verdict_of(metrics: Mapping[str, Any]) -> Verdict:
    """What synthetic pairs did to ARAND and VOI, method by method, in one sentence.

    Parameters
    ----------
    metrics : mapping
        Contents of metrics.json; see :func:`compare`.
    """
    if not metrics.get("real") and not metrics.get("mixed"):
        return Verdict("Nothing to compare yet: no segmenter has been scored.", "open")
    for arm, what in (("real", "trained on real data only"), ("mixed", "trained on real and synthetic data")):
        if not metrics.get(arm):
            return Verdict(f"Nothing to compare yet: the segmenter {what} has not been scored.", "open")
    rows = {method: [r for r in compare(metrics, method)[:2] if r.change is not None] for method in methods_of(metrics)}
    rows = {method: pair for method, pair in rows.items() if pair}
    if not rows:
        return Verdict("Nothing to compare: no method has finite scores in both arms.", "open")
    tested = [(method, row) for method, pair in rows.items() for row in pair if row.in_columns]
    if tested:
        rows = {method: [row for row in pair if row.is_told] for method, pair in rows.items()}
        rows = {method: pair for method, pair in rows.items() if pair}
    sentence = _sentence(rows) if rows else "One run cannot tell whether synthetic pairs help."
    moved = {row.judgement for pair in rows.values() for row in pair} - {"unchanged"}
    tone = "unchanged" if not moved else moved.pop() if len(moved) == 1 else "divided"
    if rows and any(row.is_contradicted for _, row in tested):
        tone = "divided"
    return Verdict(sentence, tone, _certainty(tested))


def _sentence(rows: Mapping[str, list[Comparison]]) -> str:
    clauses = [f"{_clause(pair)} with {method}" for method, pair in rows.items()]
    return f"Synthetic pairs {', and '.join(clauses)}."


def _certainty(tested: list[tuple[str, Comparison]]) -> str:
    """Which of these changes exceed twice their standard error over the columns of the test part, and rounding."""
    if not tested:
        return ""
    columns = max(row.in_columns[2] for _, row in tested if row.in_columns)
    over = f"more than twice its standard error over {columns} columns of the test part"
    if not any(row.is_clear for _, row in tested):
        return f"No change of VOI or ARAND is {over}: this may all be chance."
    sentences = []
    for what, chosen in (
        (f"Each change is {over}", lambda row: row.is_told),
        ("In the columns clearly otherwise than in the whole", lambda row: row.is_contradicted),
        (
            "Clear in the columns, but rounding of the affinities alone moves the whole by as much",
            lambda row: row.is_clear and not row.is_contradicted and not row.is_told,
        ),
    ):
        names = ", ".join(f"{row.name} with {method} ({row.columns_text})" for method, row in tested if chosen(row))
        if names:
            sentences.append(f"{what}: {names}.")
    return " ".join(sentences)


def _clause(rows: list[Comparison]) -> str:
    """``"lowered ARAND by 12.0 % and VOI by 5.1 %"``, ``"lowered ARAND by 2.0 % but raised VOI by 1.0 %"``."""
    verbs = {"better": "lowered", "worse": "raised", "unchanged": "left"}
    text, before = "", ""
    for row in rows:
        by = "unchanged" if row.judgement == "unchanged" else f"by {abs(row.change or 0):.1f} %"
        if not text:
            text = f"{verbs[row.judgement]} {row.name} {by}"
        elif row.judgement == before == "unchanged":
            text = f"left {rows[0].name} and {row.name} unchanged"
        elif row.judgement == before:
            text += f" and {row.name} {by}"
        else:
            text += f" but {verbs[row.judgement]} {row.name} {by}"
        before = row.judgement
    return text
