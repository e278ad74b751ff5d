"""Choosing the agglomeration threshold on the tune split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UnknownName, ValueRangeError, did_you_mean
from .columns import evaluate_columns
from .overlap import Scores, evaluate

#: Scores that a threshold can be chosen by; the lowest wins.
CRITERIA: tuple[str, ...] = ("arand", "voi")


@dataclass(frozen=True)
class TuneResult:
    """Outcome of :func:`tune_threshold`.

    Attributes
    ----------
    threshold : float
        The best threshold; of equally good ones, the first tried.
    scores : dict[float, Scores]
        Scores of every threshold, in the order they were tried.
    judged : dict[float, float]
        What was minimised, for every threshold.
    """

    threshold: float
    scores: dict[float, Scores]
    judged: dict[float, float]

    @property
    def best(self) -> Scores:
        """Scores at the chosen threshold."""
        return self.scores[self.threshold]


def tune_threshold(
    candidates: Iterable[tuple[float, np.ndarray]],
    truth: np.ndarray,
    *,
    criterion: Literal["arand", "voi"] = "arand",
    columns: Sequence[int] = (1, 1),
) -> TuneResult:
    """Choose the threshold whose segmentation has the lowest error on the tune split.

    In one piece, a merger of two large neurons decides; in columns it counts in those that it happens in.

    Parameters
    ----------
    candidates : iterable of (threshold, segmentation)
        As :func:`connectomics_neurodiff.agglomerate.segment_sweep` yields them; one segmentation is held at a time.
    truth : numpy.ndarray
        (z, y, x) labels of the tune split, 0 ignored. Never the test split: its scores would be worthless.
    criterion : {"arand", "voi"}
        Which score to minimise.
    columns : sequence of 2 ints
        How many along y and x; the mean of the score over those with labels is minimised. One: the score of the whole.

    Raises
    ------
    UnknownName
        If there is no such criterion.
    ValueRangeError
        If there are no candidates.
    """
    if criterion not in CRITERIA:
        raise UnknownName(
            f"No tuning criterion '{criterion}'.{did_you_mean(criterion, CRITERIA)} Known: {', '.join(CRITERIA)}."
        )
    scores, judged = {}, {}
    for threshold, segmentation in candidates:
        scores[float(threshold)] = whole = evaluate(segmentation, truth)
        parts = [whole] if tuple(columns) == (1, 1) else evaluate_columns(segmentation, truth, columns)
        judged[float(threshold)] = float(np.mean([getattr(part, criterion) for part in parts if part]))
    if not scores:
        raise ValueRangeError("Tuning needs at least one threshold. Got none.")
    return TuneResult(min(judged, key=lambda threshold: judged[threshold]), scores, judged)
