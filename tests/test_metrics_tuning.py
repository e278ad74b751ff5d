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


def test_in_columns_one_merger_of_large_neurons_does_not_decide():
    # Nine columns with a neuron in each.
    truth = np.repeat(np.repeat(np.arange(1, 10).reshape(1, 3, 3), 8, axis=1), 8, axis=2)
    merged = np.where(truth <= 6, 1, truth)  # six neurons in one, each in a column of its own
    cut = truth.copy()
    cut[:, :, ::8] += 20  # an eighth of every neuron cut off
    candidates = [(0.3, merged), (0.6, cut)]
    whole = tune_threshold(candidates, truth, criterion="voi")
    assert whole.threshold == 0.6, "log2(6) bits in two thirds of the volume against .54 everywhere"
    assert whole.judged == {t: pytest.approx(evaluate(labels, truth).voi) for t, labels in candidates}
    result = tune_threshold(candidates, truth, criterion="voi", columns=(3, 3))
    assert result.threshold == 0.3, "what meets outside of a column is not merged in it"
    assert result.judged[0.3] == pytest.approx(0, abs=1e-12)
    assert result.judged[0.6] == pytest.approx(-np.log2(1 / 8) / 8 - 7 / 8 * np.log2(7 / 8))
    assert result.scores == whole.scores
