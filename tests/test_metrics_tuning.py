"""Thresholds are chosen by the stated criterion, and never on the test split."""

from __future__ import annotations

import os

import numpy as np
import pytest

from connectomics_neurodiff.errors import UnknownName, UserError, ValueRangeError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.metrics import evaluate, require_disjoint, tune_threshold

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


TUNE = Box((0, 0, 0), (10, 64, 64))
TOUCHING = Box((10, 0, 0), (20, 64, 64))
OVERLAPPING = Box((9, 0, 60), (20, 64, 128))


def test_splits_that_only_touch_are_disjoint():
    require_disjoint(TUNE, TOUCHING)


@pytest.mark.parametrize("test_box", [OVERLAPPING, TUNE, Box((2, 2, 2), (3, 3, 3))])
def test_overlapping_splits_of_one_volume_are_refused(test_box):
    with pytest.raises(UserError, match="never tuned on the test split"):
        require_disjoint(TUNE, test_box)
    with pytest.raises(UserError, match="never tuned on the test split"):
        require_disjoint(TUNE, test_box, tune_file="a.h5::image", test_file="./a.h5::label")


def test_boxes_of_different_files_are_disjoint_but_a_link_is_the_same_file(tmp_path):
    volume, other, link = tmp_path / "a.h5", tmp_path / "b.h5", tmp_path / "link.h5"
    volume.touch()
    os.symlink(volume, link)
    require_disjoint(TUNE, OVERLAPPING, tune_file=volume, test_file=other)
    with pytest.raises(UserError, match="same volume"):
        require_disjoint(TUNE, OVERLAPPING, tune_file=volume, test_file=link)
