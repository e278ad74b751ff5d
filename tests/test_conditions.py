"""Membranes against brute force, and the condition's contract."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from connectomics_neurodiff.conditions import (
    NULL_CONDITION,
    OrganelleMask,
    check_masks,
    encode_condition,
    membrane_from_labels,
    organelles,
    with_background,
)
from connectomics_neurodiff.errors import (
    LabelTypeError,
    ShapeMismatch,
    UserError,
    ValueRangeError,
    VolumeFormatError,
)
from connectomics_neurodiff.volume import grow_phantom

SHAPE = (6, 20, 28)
ANISOTROPIC, ISOTROPIC, UNEVEN = (29.0, 6.0, 6.0), (8.0, 8.0, 8.0), (9.0, 5.0, 7.0)


def brute_force(label: np.ndarray, voxel: np.ndarray, thickness: float, max_gap: float) -> np.ndarray:
    """The three rules of the docstring, voxel by voxel, in as many axes as `label` has."""
    voxels = list(np.ndindex(label.shape))
    at = np.array(voxels)
    flat = np.array([label[v] for v in voxels])
    between = (((at[:, None] - at[None]) * voxel) ** 2).sum(-1) ** 0.5
    background = flat == 0
    thin = np.zeros(len(flat), bool)
    if background.any() and not background.all():
        fits = np.array([not (between[i][~background] <= max_gap / 2 + 1e-3).any() for i in range(len(flat))])
        opened = np.array([(between[i][fits] <= max_gap / 2 + 1e-3).any() for i in range(len(flat))])
        thin = background & ~opened
    grown = dict(zip(voxels, flat.tolist(), strict=True))
    todo = [v for v, is_thin in zip(voxels, thin, strict=True) if is_thin]
    while True:
        step = {}
        for v in todo:
            for axis, sign in product(range(label.ndim), (-1, 1)):
                neighbour = tuple(c + sign * (a == axis) for a, c in enumerate(v))
                if grown.get(neighbour, 0):
                    step[v] = grown[neighbour]
                    break
        if not step:
            break
        grown.update(step)
        todo = [v for v in todo if v not in step]
    dense = np.array([grown[v] for v in voxels])
    reach = np.maximum((thickness + voxel) / 2, voxel)
    scaled = (((at[:, None] - at[None]) * voxel / reach) ** 2).sum(-1) ** 0.5 <= 1 + 1e-4
    near = (scaled & (dense[:, None] != dense[None])).any(axis=1)
    return (thin | near).reshape(label.shape).astype(np.uint8)


def expected(label: np.ndarray, voxel: tuple[float, ...], thickness: float, max_gap: float) -> np.ndarray:
    size = np.array(voxel)
    if voxel[0] >= 2 * max(voxel[1:]):
        return np.stack([brute_force(section, size[1:], thickness, max_gap) for section in label])
    return brute_force(label, size, thickness, max_gap)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint32, st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)), elements=st.integers(0, 2)),
    st.sampled_from([ANISOTROPIC, ISOTROPIC, UNEVEN]),
    st.sampled_from([1.0, 13.0, 30.0, 41.0]),
    st.sampled_from([0.0, 12.0, 25.0, 60.0]),
)
def test_membranes_are_as_defined(
    label: np.ndarray, voxel: tuple[float, float, float], thickness: float, max_gap: float
) -> None:
    np.testing.assert_array_equal(
        membrane_from_labels(label, voxel, thickness, max_gap), expected(label, voxel, thickness, max_gap)
    )


@pytest.mark.parametrize("voxel", [ANISOTROPIC, ISOTROPIC])
def test_membranes_of_a_phantom_are_as_defined(voxel: tuple[float, float, float]) -> None:
    label = np.asarray(grow_phantom((4, 16, 18), voxel, seed=1).label)
    np.testing.assert_array_equal(membrane_from_labels(label, voxel), expected(label, voxel, 25.0, 80.0))


@pytest.mark.parametrize(
    ("voxel", "thickness", "columns"),
    [
        (6.0, 30.0, range(7, 13)),  # 3 voxels either side: centres at 3, 9, 15 nm from the surface
        (6.0, 29.0, range(8, 12)),
        (8.0, 30.0, range(8, 12)),
        (40.0, 30.0, range(9, 11)),  # at least the voxel on either side
        (6.0, 1.0, range(9, 11)),
    ],
)
@pytest.mark.parametrize("anisotropic", [True, False])
def test_dense_labels_get_a_band_of_the_thickness(
    voxel: float, thickness: float, columns: range, anisotropic: bool
) -> None:
    label = np.ones(SHAPE, np.uint64)
    label[..., 10:] = 2**40
    size = (5 * voxel if anisotropic else voxel, voxel, voxel)
    want = np.zeros(SHAPE, np.uint8)
    want[..., list(columns)] = 1
    np.testing.assert_array_equal(membrane_from_labels(label, size, thickness), want)


@pytest.mark.parametrize(
    ("gap", "columns"),
    [
        (2, range(8, 14)),  # 12 nm gap: widened to 36 nm around its middle, column 11
        (6, range(10, 16)),  # 36 nm gap: as it is
        (8, range(10, 18)),  # 48 nm gap: wholly membrane
    ],
)
def test_thin_gaps_are_wholly_membrane_and_no_thicker_than_need_be(gap: int, columns: range) -> None:
    label = np.ones(SHAPE, np.uint32)
    label[..., 10 : 10 + gap] = 0
    label[..., 10 + gap :] = 2
    want = np.zeros(SHAPE, np.uint8)
    want[..., list(columns)] = 1
    np.testing.assert_array_equal(membrane_from_labels(label, ANISOTROPIC, 30.0), want)


def test_wide_background_is_only_outlined() -> None:
    label = np.ones((2, 40, 60), np.uint32)
    label[..., 30:] = 0
    membrane = membrane_from_labels(label, ANISOTROPIC, 30.0)
    np.testing.assert_array_equal(np.unique(np.nonzero(membrane)[2]), np.arange(27, 33))


def test_sections_are_independent_only_if_anisotropic() -> None:
    label = np.ones((8, 5, 5), np.uint32)
    label[4:] = 2
    assert not membrane_from_labels(label, ANISOTROPIC).any()
    assert np.unique(np.nonzero(membrane_from_labels(label, ISOTROPIC))[0]).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("value", [0, 5])
def test_one_label_has_no_membrane(value: int) -> None:
    assert not membrane_from_labels(np.full(SHAPE, value), ISOTROPIC).any()


def test_input_is_left_alone() -> None:
    label = np.asarray(grow_phantom((4, 20, 24)).label)
    before = label.copy()
    membrane_from_labels(label[:, ::2], ANISOTROPIC)
    np.testing.assert_array_equal(label, before)


@pytest.mark.parametrize(
    ("label", "options", "error"),
    [
        (np.zeros((4, 5), int), {}, VolumeFormatError),
        (np.zeros(SHAPE), {}, LabelTypeError),
        (np.zeros(SHAPE, int), {"thickness_nm": 0}, ValueRangeError),
        (np.zeros(SHAPE, int), {"thickness_nm": np.nan}, ValueRangeError),
        (np.zeros(SHAPE, int), {"thickness_nm": 201.0}, ValueRangeError),
        (np.zeros(SHAPE, int), {"max_gap_nm": -1}, ValueRangeError),
        (np.zeros(SHAPE, int), {"voxel_nm": (1, 2)}, ValueRangeError),
    ],
)
def test_wrong_labels_and_lengths(label: np.ndarray, options: dict, error: type[UserError]) -> None:
    with pytest.raises(error):
        membrane_from_labels(label, **{"voxel_nm": ISOTROPIC, **options})


def test_experts_agree(real_data: Path) -> None:
    """Expert-drawn membranes of real tissue are found, except where they lie flat in a section; glia is not."""
    with h5py.File(real_data / "vnc_sstem_train.h5") as h5:
        label, drawn, glia = h5["label"][:3], h5["membrane"][:3] > 0, h5["glia"][:3] > 0
        membrane = membrane_from_labels(label, h5.attrs["resolution_nm"]) > 0
    assert (membrane & drawn).sum() / drawn.sum() > 0.7
    assert (membrane & drawn).sum() / membrane.sum() > 0.8
    assert membrane[glia].mean() < 0.03


def test_condition_channels() -> None:
    rng = np.random.default_rng(0)
    membrane, mito = rng.integers(0, 2, SHAPE).astype(np.uint8), rng.random(SHAPE)
    condition = encode_condition(membrane, mito)
    assert condition.shape == (2, *SHAPE)
    assert condition.dtype == np.float32
    np.testing.assert_array_equal(condition[0], membrane)
    np.testing.assert_allclose(condition[1], mito, atol=1e-7)
    assert not encode_condition(membrane, None)[1].any()


@pytest.mark.parametrize(
    ("membrane", "mito", "error"),
    [
        (np.full(SHAPE, 255, np.uint8), None, ValueRangeError),
        (np.full(SHAPE, np.nan), None, ValueRangeError),
        (np.zeros(SHAPE), np.full(SHAPE, -0.1), ValueRangeError),
        (np.zeros(SHAPE), np.zeros((6, 20, 27)), ShapeMismatch),
        (np.zeros((20, 28)), None, VolumeFormatError),
    ],
)
def test_condition_refuses(membrane: np.ndarray, mito: np.ndarray | None, error: type[UserError]) -> None:
    with pytest.raises(error):
        encode_condition(membrane, mito)


ONES, MASK = np.ones(SHAPE, np.uint64), np.zeros(SHAPE, np.uint8)


@pytest.mark.parametrize("mito", [None, MASK, MASK.astype(bool)])
def test_good_masks_pass(mito: np.ndarray | None) -> None:
    check_masks(ONES, MASK, mito)


@pytest.mark.parametrize(
    ("label", "membrane", "mito", "error"),
    [
        (ONES.astype(float), MASK, None, LabelTypeError),
        (-ONES.astype(int), MASK, None, LabelTypeError),
        (ONES * 0, MASK, None, ValueRangeError),
        (ONES, MASK.astype(np.float32), None, LabelTypeError),
        (ONES, MASK + 2, None, ValueRangeError),
        (ONES, MASK, MASK + 255, ValueRangeError),
        (ONES, MASK, MASK.astype(np.int8) - 1, ValueRangeError),
        (ONES, MASK[1:], None, ShapeMismatch),
        (ONES, MASK, MASK[:, 1:], ShapeMismatch),
        (ONES[0], MASK[0], None, VolumeFormatError),
    ],
)
def test_bad_masks_do_not(
    label: np.ndarray, membrane: np.ndarray, mito: np.ndarray | None, error: type[UserError]
) -> None:
    with pytest.raises(error) as caught:
        check_masks(label, membrane, mito)
    assert "\n" not in str(caught.value)


def test_organelles_tell_mitochondria_from_what_else_is_dark() -> None:
    mito, dark = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    mito[0, 1] = 1
    dark[:, 1:] = 1
    inside = organelles(mito, dark)
    assert inside is not None
    levels = {"none": inside[0, 0, 0], "mito": inside[0, 1, 0], "dark": inside[1, 2, 3], "unknown": NULL_CONDITION}
    assert len(set(levels.values())) == 4
    assert levels["none"] == 0
    assert levels["mito"] == 1
    assert (inside[0, 1] == 1).all()  # both: a mitochondrion
    assert (inside[dark > mito] == levels["dark"]).all()
    assert organelles(mito, None) is mito
    assert organelles(None, None) is None
    alone = organelles(None, dark)
    assert alone is not None
    assert set(np.unique(alone)) == {0, levels["dark"]}
    lazy = OrganelleMask(mito, dark)
    np.testing.assert_array_equal(lazy[0:1, :, 1:3], inside[0:1, :, 1:3])
    np.testing.assert_array_equal(encode_condition(dark, np.asarray(lazy[...]))[1], inside)
    with pytest.raises(ShapeMismatch):
        OrganelleMask(mito, dark[:1])


def test_with_background_marks_all_that_is_outside_neurons() -> None:
    label = np.zeros((3, 24, 40), np.uint32)
    label[:, :8], label[:, 16:] = 3, 7  # a gap of 8 voxels, 240 nm: wide, so only outlined as membrane
    membrane = membrane_from_labels(label, (40, 30, 30))
    assert not membrane[:, 11:13].any()
    outside = with_background(membrane, label)
    assert outside.dtype == np.uint8
    assert outside[:, 8:16].all()
    np.testing.assert_array_equal(outside[label > 0], membrane[label > 0])
    dense = np.where(label == 0, 5, label)
    np.testing.assert_array_equal(with_background(membrane, dense), membrane)
    with pytest.raises(ShapeMismatch, match="one shape"):
        with_background(membrane[1:], label)
