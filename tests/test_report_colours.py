"""Colours: deterministic, distinct for neighbouring ids; matching shows splits and merges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import deltaE_cie76, rgb2lab

from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch
from connectomics_neurodiff.report import colourise, label_colours, match_segments, outlines, overlay


def test_consecutive_ids_are_clearly_different() -> None:
    lab = rgb2lab(label_colours(np.arange(1, 3000)))
    assert deltaE_cie76(lab[:-1], lab[1:]).min() > 30
    assert deltaE_cie76(lab, rgb2lab(np.zeros(3))).min() > 40, "no id is nearly black"


@given(st.integers(1, 2**64 - 1))
def test_colour_depends_on_the_id_alone(number: int) -> None:
    alone = label_colours(np.array([number], dtype=np.uint64))[0]
    among = label_colours(np.array([[7, 0], [number, 3]], dtype=np.uint64))
    np.testing.assert_array_equal(among[1, 0], alone)
    np.testing.assert_array_equal(among[0, 1], 0)
    assert ((alone >= 0) & (alone <= 1)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32, np.uint64])
def test_colour_does_not_depend_on_the_type(dtype: type) -> None:
    np.testing.assert_array_equal(label_colours(np.arange(9, dtype=dtype)), label_colours(np.arange(9)))


@pytest.mark.parametrize("bad", [np.array([0.5]), np.array([-1])])
def test_labels_must_be_natural_numbers(bad: np.ndarray) -> None:
    with pytest.raises(LabelTypeError, match="non-negative integers"):
        label_colours(bad)


def test_colourise_paints_each_voxel_with_its_ids_colour() -> None:
    label = np.random.default_rng(0).integers(0, 5, (3, 4, 6))
    picture = colourise(label)
    for index in np.ndindex(label.shape):
        np.testing.assert_array_equal(picture[index], label_colours(np.array(label[index])))


def test_overlay_tints_foreground_only() -> None:
    image = np.full((2, 2), 0.5, dtype=np.float32)
    label = np.array([[0, 4], [0, 0]])
    tinted = overlay(image, label, opacity=0.25)
    np.testing.assert_allclose(tinted[0, 0], 0.5)
    np.testing.assert_allclose(tinted[0, 1], 0.75 * 0.5 + 0.25 * label_colours(np.array(4)), atol=1e-6)
    with pytest.raises(ShapeMismatch):
        overlay(image, label[:1])


def test_outlines_by_hand() -> None:
    label = np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]])
    expected = [[False, True, False], [True, True, True], [False, False, False]]
    np.testing.assert_array_equal(outlines(label), expected)


def test_split_keeps_the_neurons_id_on_the_larger_part() -> None:
    truth = np.array([[[5, 5, 5, 5, 9, 9, 0]]])
    segments = np.array([[[1, 1, 1, 2, 3, 3, 8]]])
    matched = match_segments(segments, truth)[0, 0]
    assert matched[:3].tolist() == [5, 5, 5]
    assert matched[4:6].tolist() == [9, 9]
    assert matched[3] > 9, "the split-off part has an id that is no neuron's"
    assert matched[6] > 9, "so has a segment on background"
    assert matched[3] != matched[6]


def test_merge_shows_one_id_across_both_neurons() -> None:
    truth = np.array([[[5, 5, 5, 9, 9]]])
    assert match_segments(np.full_like(truth, 2), truth).tolist() == [[[5, 5, 5, 5, 5]]]


@given(st.integers(0, 2**32 - 1))
def test_matching_never_changes_the_partition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments, truth = rng.integers(0, 6, (2, 3, 4, 5))
    matched = match_segments(segments, truth)
    pairs = set(zip(segments.ravel().tolist(), matched.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert ((matched == 0) == (segments == 0)).all()
    for segment, new in pairs:  # brute force: an id that is a neuron's belongs to the neuron overlapped most
        if segment and new in np.unique(truth):
            overlaps = [np.sum((segments == segment) & (truth == n)) for n in range(6)]
            assert overlaps[new] == max(overlaps[1:])


def test_a_perfect_segmentation_takes_all_the_truths_ids() -> None:
    truth = np.random.default_rng(1).integers(0, 9, (2, 6, 8))
    np.testing.assert_array_equal(match_segments(np.where(truth > 0, truth + 2**60, 0), truth), truth)
