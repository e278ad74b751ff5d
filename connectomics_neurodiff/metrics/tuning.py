"""Choosing the agglomeration threshold on the tune split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UnknownName, ValueRangeError, did_you_mean
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
    """

    threshold: float
    scores: dict[float, Scores]

    @property
    def best(self) -> Scores:
        """Scores at the chosen threshold."""
        return self.scores[self.threshold]


def tune_threshold(
    candidates: Iterable[tuple[float, np.ndarray]],
    truth: np.ndarray,
    *,
    criterion: Literal["arand", "voi"] = "arand",
) -> TuneResult:
    """Choose the threshold whose segmentation has the lowest error on the tune split.

    Parameters
    ----------
    candidates : iterable of (threshold, segmentation)
        As :func:`connectomics_neurodiff.agglomerate.segment_sweep` yields them; one segmentation is held at a time.
    truth : numpy.ndarray
        (z, y, x) labels of the tune split, 0 ignored. Never the test split: its scores would be worthless.
    criterion : {"arand", "voi"}
        Which score to minimise.

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
    scores = {float(threshold): evaluate(segmentation, truth) for threshold, segmentation in candidates}
    if not scores:
        raise ValueRangeError("Tuning needs at least one threshold. Got none.")
    return TuneResult(min(scores, key=lambda threshold: getattr(scores[threshold], criterion)), scores)
