"""Choosing the agglomeration threshold, on a tune split that is proven to be disjoint from the test split."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import UnknownName, UserError, ValueRangeError, did_you_mean
from ..geometry import Box
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
        (z, y, x) labels of the tune split, 0 ignored. Never the test split: see :func:`require_disjoint`.
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


def _file_of(path: str | os.PathLike[str]) -> str:
    """Absolute path without links and without "::dataset": the datasets of one file show the same tissue."""
    return str(Path(os.fspath(path).split("::")[0]).resolve())


def require_disjoint(
    tune_box: Box,
    test_box: Box,
    *,
    tune_file: str | os.PathLike[str] = "",
    test_file: str | os.PathLike[str] = "",
) -> None:
    """Refuse a tune split that shares a voxel with the test split.

    Parameters
    ----------
    tune_box, test_box : Box
        The two splits, in voxels of the file each lies in.
    tune_file, test_file : path
        The files they lie in. Boxes of different files are disjoint; without paths both lie in one volume.

    Raises
    ------
    UserError
        If the splits overlap: a threshold tuned on test data makes the reported scores worthless.
    """
    if _file_of(tune_file) == _file_of(test_file) and tune_box.overlaps(test_box):
        raise UserError(
            "Thresholds are never tuned on the test split: tune and test must not share a voxel. Got tune "
            f"{tune_box.start} to {tune_box.stop} and test {test_box.start} to {test_box.stop} of the same volume."
        )
