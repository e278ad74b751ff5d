"""Augmentations: range, what may change, and that labels follow the image."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import numpy as np
import pytest

from connectomics_neurodiff.errors import ValueRangeError
from connectomics_neurodiff.training import AugmentOptions, augmentation
from connectomics_neurodiff.training.pose import Pose, apply_pose, draw_pose

SHAPE = (6, 20, 28)
PIXELWISE = [function for function, _ in augmentation._PIXELWISE]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


@pytest.mark.parametrize("function", PIXELWISE, ids=lambda f: f.__name__)
def test_grey_value_changes_stay_in_range_and_leave_the_input_alone(function, image) -> None:
    before = image.copy()
    changed = 0
    for seed in range(20):
        result = function(image, np.random.default_rng(seed))
        assert result.shape == SHAPE
        assert result.dtype == np.float32
        assert result.min() >= 0
        assert result.max() <= 1
        assert np.array_equal(result, function(image, np.random.default_rng(seed)))
        changed += not np.array_equal(result, image)
    assert np.array_equal(image, before)
    assert changed >= 18


@pytest.mark.parametrize("function", PIXELWISE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (1, 40, 5)])
def test_tiny_patches_do_not_break(function, shape) -> None:
    assert function(np.full(shape, 0.5, np.float32), np.random.default_rng(0)).shape == shape


def test_lost_sections_are_inside() -> None:
    image = np.full(SHAPE, 0.5, np.float32)
    for seed in range(30):
        result = augmentation.missing_section(image, np.random.default_rng(seed))
        lost = (result != image).any(axis=(1, 2))
        assert 1 <= lost.sum() <= 2
        assert not lost[0]
        assert not lost[-1]


def test_section_changes_are_constant_within_a_section() -> None:
    image = np.full(SHAPE, 0.5, np.float32)
    result = augmentation.section_grayscale(image, np.random.default_rng(1))
    assert np.ptp(result, axis=(1, 2)).max() == 0
    assert np.ptp(result[:, 0, 0]) > 0


def pattern() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every voxel its own label and grey value."""
    label = np.arange(1, np.prod(SHAPE) + 1, dtype=np.uint32).reshape(SHAPE)
    return (label / label.size).astype(np.float32), label, np.ones(SHAPE, bool)


@pytest.mark.parametrize("seed", range(12))
def test_label_follows_the_image_when_sections_move(seed) -> None:
    image, label, known = pattern()
    moved_image, moved_label, moved_known = augmentation.misalignment(image, label, known, np.random.default_rng(seed))
    assert (moved_label > 0).sum() == moved_known.sum()
    np.testing.assert_allclose(moved_image[moved_known] * label.size, moved_label[moved_known], rtol=1e-5)
    # Sections stay sections; the first does not move; what moves, moves as a whole.
    assert np.array_equal(moved_label[0], label[0])
    for z in range(1, len(label)):
        offset = moved_label[z][moved_known[z]].astype(int) - label[z][moved_known[z]]
        assert np.ptp(offset) == 0


def test_misalignment_slips_one_section_or_all_behind() -> None:
    image, label, known = pattern()
    moved = []
    for seed in range(40):
        result = augmentation.misalignment(image, label, known, np.random.default_rng(seed))[1]
        moved.append(tuple(np.flatnonzero((result != label).any(axis=(1, 2)))))
    assert (2,) in moved
    assert (2, 3, 4, 5) in moved


def test_elastic_makes_no_new_labels_and_moves_labels_with_the_image() -> None:
    label = np.kron(np.arange(1, 36, dtype=np.uint32).reshape(5, 7), np.ones((8, 8), np.uint32))[None].repeat(3, 0)
    image = (label / 40).astype(np.float32)
    warped, warped_label, known = augmentation.elastic(
        image, label, np.ones(label.shape, bool), np.random.default_rng(0), std=2.0
    )
    assert set(np.unique(warped_label)) <= {0, *range(1, 36)}
    assert (warped_label != label).mean() > 0.02
    assert ((warped_label == 0) == ~known).all()
    # Away from borders between labels, image and label agree exactly.
    agree = np.abs(warped * 40 - warped_label)[known] < 1e-3
    assert agree.mean() > 0.7


def test_quarter_turn_and_pose_algebra() -> None:
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    turned = draw_pose(np.random.default_rng(0), flip=0.0, transpose=0.0, rotate=1.0)
    assert np.array_equal(apply_pose(array, turned), np.rot90(array, axes=(1, 2)))
    assert np.array_equal(apply_pose(array, Pose(True, (True, False, True))), array.swapaxes(1, 2)[::-1, :, ::-1])
    for seed in range(20):
        both = draw_pose(np.random.default_rng(seed), flip=0.5, transpose=0.5, rotate=1.0)
        plain = draw_pose(np.random.default_rng(seed), flip=0.5, transpose=0.5, rotate=0.0)
        assert np.array_equal(apply_pose(array, both), np.rot90(apply_pose(array, plain), axes=(1, 2)))


def test_all_sixteen_poses_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert len({draw_pose(rng, flip=0.5, transpose=0.5, rotate=0.0) for _ in range(300)}) == 16


@pytest.mark.parametrize("name", [field.name for field in fields(AugmentOptions)])
def test_options_are_probabilities(name) -> None:
    assert getattr(AugmentOptions(**{name: 1.0}), name) == 1.0
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueRangeError, match=name):
            AugmentOptions(**{name: bad})


def test_none_switches_everything_off_and_each_option_switches_itself_on(image) -> None:
    label = np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint32)
    known = np.ones(SHAPE, bool)
    run = partial(augmentation.augment, image, label, known)
    same = run(np.random.default_rng(0), AugmentOptions.none())
    assert np.array_equal(same[0], image)
    assert np.array_equal(same[1], label)
    assert same[2].all()
    for name in set(vars(AugmentOptions())) - {"flip", "transpose", "rotate"}:
        options = AugmentOptions(**{**vars(AugmentOptions.none()), name: 1.0})
        assert not np.array_equal(run(np.random.default_rng(3), options)[0], image), name
