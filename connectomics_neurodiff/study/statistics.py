"""What several seeds say: means and their errors, paired differences with an interval, and a verdict.

Glossary: s seeds, c columns of the test part. A score is an error (lower is better) except average precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ShapeMismatch

#: Scores of which more is better.
HIGHER_IS_BETTER = frozenset({"average_precision", "average_precision_columns"})
#: Resamples of the bootstrap.
RESAMPLES = 4000
#: Share of the resamples inside an interval.
COVERED = 0.95
#: More seeds than anybody would train.
MOST_SEEDS = 200


@dataclass(frozen=True)
class Difference:
    """How a score of an arm differs from the reference arm's, seed by seed.

    Attributes
    ----------
    mean : float
        Arm less reference.
    low, high : float or None
        Ends of the 95 % interval; None with fewer than two seeds, of which no spread can be told.
    seeds : int
        Pairs of trainings compared.
    is_clear : bool
        Whether the interval excludes 0 even as wide as several comparisons ask for.
    needed : int or None
        Seeds in all after which the difference would be clear if mean and spread stayed as they are; None where more
        seeds would not do: there is no difference, or it varies too much from column to column.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    is_clear: bool = False
    needed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As study.json has it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "seeds": self.seeds, "needed": self.needed}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a score over seeds and its standard error; None for a single seed."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def paired_interval(
    reference: np.ndarray, arm: np.ndarray, rng: np.random.Generator, comparisons: int = 1
) -> Difference:
    """Mean paired difference with a bootstrap interval over seeds and columns.

    Seeds and columns are drawn anew together: every resample has as many of each as there are, and the same columns
    for all of its seeds, as a column that is hard for one training is hard for all. A bootstrap of n seeds spreads by
    sqrt((n - 1) / n) too little (Efron and Tibshirani 1993, section 5.3) and takes the spread that it finds for the
    true one. Its resamples are therefore moved away from their centre by both, as Student's t makes up for the second:
    by a factor of 9.2 for 2 seeds, 2.7 for 3, 1.6 for 5. Intervals then hold the true difference in 93 % to all cases.

    Parameters
    ----------
    reference, arm : numpy.ndarray
        (s, c) scores of the same seeds and columns. NaN where a column has no score; (s, 1) for a score of the whole
        test part, which is then drawn over seeds alone.
    rng : numpy.random.Generator
        Where the resamples come from.
    comparisons : int
        How many differences a verdict rests on: each is called clear at a share of 5 % only (Bonferroni), so that
        chance alone gives a verdict in one of twenty studies at most.

    Raises
    ------
    ShapeMismatch
        If the two are not of one shape (s, c).
    """
    if reference.shape != arm.shape or reference.ndim != 2 or not reference.size:
        raise ShapeMismatch(f"Paired scores are (seeds, columns), both alike. Got {reference.shape} and {arm.shape}.")
    differences = arm - reference
    differences = differences[:, ~np.isnan(differences).any(axis=0)]
    seeds, columns = differences.shape
    if not columns:
        return Difference(math.nan, None, None, seeds)
    mean = float(differences.mean())
    if seeds < 2:
        return Difference(mean, None, None, seeds)
    drawn_seeds = rng.integers(seeds, size=(RESAMPLES, seeds))
    drawn_columns = rng.integers(columns, size=(RESAMPLES, columns))
    spread = differences[drawn_seeds[:, :, None], drawn_columns[:, None, :]].mean(axis=(1, 2)) - mean
    (low, high), (least, most) = (
        _interval(mean, spread, seeds, covered) for covered in (COVERED, _strict(comparisons))
    )
    needed = _seeds_needed(differences, mean, comparisons)
    return Difference(mean, low, high, seeds, bool(least > 0 or most < 0), needed)


def _strict(comparisons: int) -> float:
    return 1 - (1 - COVERED) / comparisons


def _interval(mean: float, spread: np.ndarray, seeds: int, covered: float) -> tuple[float, float]:
    """Share `covered` of the resamples around a mean, each moved away from it as the docstring above says."""
    from scipy.stats import norm

    factor = math.sqrt(seeds / (seeds - 1)) * _student(seeds, covered) / float(norm.ppf((1 + covered) / 2))
    low, high = np.quantile(mean + factor * spread, [(1 - covered) / 2, (1 + covered) / 2])
    return float(low), float(high)


def _seeds_needed(differences: np.ndarray, mean: float, comparisons: int) -> int | None:
    """Seeds after which a difference of this mean and spread would be clear; None if `MOST_SEEDS` would not do."""
    seeds, columns = differences.shape
    of_seeds = float(differences.mean(axis=1).var(ddof=1))
    # What is left of the spread over columns when that over seeds has been averaged away.
    of_columns = float(differences.mean(axis=0).var(ddof=1)) / columns if columns > 1 else 0.0
    covered = _strict(comparisons)
    for n in range(seeds + 1, MOST_SEEDS + 1):
        if _student(n, covered) * math.sqrt(of_seeds / n + of_columns) < abs(mean):
            return n
    return None


def _student(seeds: int, covered: float) -> float:
    """Standard errors that an interval of the mean of so many seeds spans to each side."""
    from scipy.stats import t

    return float(t.ppf((1 + covered) / 2, seeds - 1))


def is_gain(score: str, mean: float) -> bool:
    """Whether a difference of this sign is to the good."""
    return mean > 0 if score in HIGHER_IS_BETTER else mean < 0


def verdict_on(differences: dict[str, dict[str, Difference]]) -> str:
    """One of "helps", "harms" and "cannot tell".

    Parameters
    ----------
    differences : dict
        Method -> score -> difference, of the scores that decide. An arm helps if a clear difference is to the good and
        none to the bad; harms the other way round; what contradicts itself, and what is not clear, cannot be told.
    """
    clear = [
        is_gain(score, difference.mean)
        for scores in differences.values()
        for score, difference in scores.items()
        if difference.is_clear
    ]
    if not clear or len(set(clear)) > 1:
        return "cannot tell"
    return "helps" if clear[0] else "harms"
