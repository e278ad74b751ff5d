"""Scores in columns of a volume, and paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.metrics import evaluate, evaluate_columns, paired_difference


def two_neurons() -> np.ndarray:
    """(4, 6, 9): ids 1 and 2, one half of the rows each."""
    truth = np.ones((4, 6, 9), np.uint64)
    truth[:, 3:] = 2
    return truth


def test_a_merger_counts_in_its_column_alone() -> None:
    truth = two_neurons()
    segmentation = truth.copy()
    segmentation[:, :, 6:] = 7  # the last third of each row in one piece
    scores = evaluate_columns(segmentation, truth, (1, 3))
    assert [s.voi_merge if s else None for s in scores] == [0, 0, 1]
    assert [s.voi_split if s else None for s in scores] == [0, 0, 0]
    assert scores[2] == evaluate(segmentation[:, :, 6:], truth[:, :, 6:])


def test_what_meets_outside_a_column_is_two_neurons_in_it() -> None:
    """A horseshoe: one neuron in the volume, two legs in the right half; calling both legs one is a merger there."""
    truth = np.zeros((2, 5, 8), np.uint32)
    truth[:, 1] = truth[:, 3] = truth[:, 1:4, 0] = 5
    legs = np.where(truth > 0, 9, 0).astype(np.uint32)
    legs[:, 2] = 9  # joined along their whole length
    left, right = evaluate_columns(legs, truth, (1, 2))
    assert [scores.voi_merge for scores in (left, right) if scores] == [0, 1]


def test_columns_tile_the_volume_and_may_be_empty() -> None:
    truth = two_neurons()
    truth[:, :2] = 0
    found = evaluate_columns(truth, truth, (3, 2))
    assert [scores is None for scores in found] == [True, True, False, False, False, False]
    (whole,) = evaluate_columns(truth, truth, (1, 1))
    assert whole == evaluate(truth, truth)


@pytest.mark.parametrize("columns", [(0, 3), (7, 1), (1, 10), (3,), (3, 3, 3)])
def test_impossible_columns_are_refused(columns: tuple[int, ...]) -> None:
    with pytest.raises(ValueRangeError, match="6 x 9 pixels"):
        evaluate_columns(two_neurons(), two_neurons(), columns)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"\(4, 6, 9\).*\(4, 6, 8\)"):
        evaluate_columns(two_neurons(), two_neurons()[..., :8])
    with pytest.raises(ShapeMismatch):
        evaluate_columns(two_neurons()[0], two_neurons()[0])


@pytest.mark.parametrize("change", [lambda a: a + 0.5, lambda a: a > 1, lambda a: a.astype(int) - 2])
def test_what_is_no_label_is_refused_as_for_the_whole(change) -> None:
    for segmentation, truth in [(change(two_neurons()), two_neurons()), (two_neurons(), change(two_neurons()))]:
        with pytest.raises(LabelTypeError) as of_whole:
            evaluate(segmentation, truth)
        with pytest.raises(LabelTypeError) as of_columns:
            evaluate_columns(segmentation, truth)
        assert str(of_columns.value) == str(of_whole.value)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=20))
def test_the_error_is_scipys(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    mean, error = paired_difference(before, after)
    differences = [b - a for a, b in pairs]
    assert mean == pytest.approx(np.mean(differences), abs=1e-12)
    assert error == pytest.approx(stats.sem(differences), abs=1e-12)


def test_one_column_has_no_error() -> None:
    with pytest.raises(ValueRangeError, match="Got 1 and 1"):
        paired_difference([0.1], [0.2])
