"""Thresholds are chosen by the stated criterion."""

from __future__ import annotations

import numpy as np
import pytest

from connectomics_neurodiff.errors import UnknownName, ValueRangeError
from connectomics_neurodiff.metrics import evaluate, tune_threshold

TRUTH = np.array([1, 1, 1, 1, 1, 1, 2, 2])
MERGED = np.ones(8, int)
SPLIT = np.array([1, 1, 1, 2, 2, 2, 3, 3])
PERFECT = TRUTH + 4


def test_the_perfect_candidate_wins_and_all_scores_are_kept():
    result = tune_threshold(iter([(0.1, SPLIT), (0.3, PERFECT), (0.5, MERGED)]), TRUTH)
    assert result.threshold == 0.3
    assert list(result.scores) == [0.1, 0.3, 0.5]
    assert result.scores[0.5] == evaluate(MERGED, TRUTH)
    assert result.best.arand == 0.0


def test_criteria_can_disagree():
    # One neuron of 6, one of 2 voxels: merging them costs .81 bits, halving the large one .75 bits; in pairs it is
    # the other way round.
    candidates = [(0.2, SPLIT), (0.8, MERGED)]
    assert tune_threshold(candidates, TRUTH, criterion="voi").threshold == 0.2
    assert tune_threshold(candidates, TRUTH, criterion="arand").threshold == 0.8


def test_of_equally_good_thresholds_the_first_is_taken():
    assert tune_threshold([(0.4, PERFECT), (0.2, TRUTH)], TRUTH).threshold == 0.4


def test_no_candidates_and_unknown_criteria_are_refused():
    with pytest.raises(ValueRangeError, match="at least one threshold"):
        tune_threshold([], TRUTH)
    with pytest.raises(UnknownName, match=r"'arnd'.*Did you mean 'arand'\?.*voi"):
        tune_threshold([(0.1, TRUTH)], TRUTH, criterion="arnd")
