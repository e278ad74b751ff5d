"""Deformation: no fold, no neuron lost or torn, as strong and as smooth as asked."""

from __future__ import annotations

from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import BSpline

from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.remodel import DisplacementField, elastic_deform, jacobian_minimum
from connectomics_neurodiff.remodel.elastic import mend_fragments
from connectomics_neurodiff.seeding import rng_for


def field_of(shape: tuple[int, int, int], voxel: tuple[float, float, float], seed: int = 0, **options: float):
    """Field with defaults for the two lengths."""
    lengths = {"sigma_nm": 24.0, "spacing_nm": 300.0, **options}
    return DisplacementField.random(shape, voxel, rng_for(seed, "field"), **lengths)


def dense(field: DisplacementField) -> np.ndarray:
    """Displacement in voxels, (c, z, y, x)."""
    return np.stack([field.section(z) for z in range(field.shape[0])], axis=1)


def pieces(label: np.ndarray) -> dict[int, int]:
    """Number of 26-connected pieces per label, by scipy, one label at a time."""
    cube = np.ones((3, 3, 3))
    return {int(n): ndimage.label(label == n, cube)[1] for n in np.unique(label) if n}


def cells(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """Dense labels: nearest of `count` random points, pieces apart relabelled."""
    rng = rng_for(seed, "cells")
    marks = np.zeros(shape, dtype=np.uint32)
    at = tuple(rng.integers(n, size=count) for n in shape)
    marks[at] = np.arange(1, count + 1)
    nearest = ndimage.distance_transform_edt(marks == 0, (3, 1, 1), return_distances=False, return_indices=True)
    return cc3d.connected_components(marks[tuple(nearest)], connectivity=26).astype(np.uint32)


def test_no_grid_is_finer_than_four_points_per_section() -> None:
    """More would not make sections more independent, and gigabytes of them."""
    field = DisplacementField.random((6, 30, 40), (1e5, 4, 4), rng_for(0), sigma_nm=2.0, spacing_nm=4.0)
    assert field.coefficients.shape[1] <= 4 * 6 + 4
    moved = np.stack([field.section(z)[0, 2:-2, 2:-2].ravel() for z in range(6)])
    assert np.abs(np.corrcoef(moved) - np.eye(6)).max() < 0.2


@pytest.mark.parametrize(("shape", "voxel"), [((6, 90, 140), (29, 6, 6)), ((40, 50, 60), (8, 8, 8))])
def test_displacement_has_the_amplitude_asked_for(shape, voxel) -> None:
    inner = []
    for seed in range(60):
        u = dense(field_of(shape, voxel, seed, sigma_nm=20.0, spacing_nm=60.0))
        inner.append(u[:, shape[0] // 2, shape[1] // 2, shape[2] // 2] * np.array(voxel)[-len(u) :])
    assert np.std(inner) == pytest.approx(20.0, rel=0.25)


@pytest.mark.parametrize(("shape", "voxel"), [((6, 40, 50), (29, 6, 6)), ((20, 24, 30), (8, 8, 8))])
def test_nothing_crosses_the_border(shape, voxel) -> None:
    field = field_of(shape, voxel, spacing_nm=80.0)
    u = dense(field)
    for component, axis in enumerate(field.moves):
        faces = np.moveaxis(u[component], axis, 0)[[0, -1]]
        assert np.abs(faces).max() < 1e-5
        assert np.abs(u[component]).max() > 0.1


@pytest.mark.parametrize(("shape", "voxel"), [((7, 90, 140), (29, 6, 6)), ((46, 50, 62), (8, 8, 8))])
def test_displacement_is_scipy_s_spline_away_from_the_border(shape, voxel) -> None:
    field = field_of(shape, voxel, seed=3, spacing_nm=70.0)
    bump = BSpline.basis_element(np.arange(-2, 3), extrapolate=False)
    weights = []
    for axis, pitch in zip(field.axes, voxel, strict=True):
        step = np.diff(axis.positions_nm)[0]
        at = np.arange(axis.even.shape[0])[:, None] * pitch
        weights.append(np.nan_to_num(bump((at - axis.positions_nm) / step)))
    expected = np.einsum("zk,yl,xm,cklm->czyx", *weights, field.coefficients)
    expected /= np.array(voxel)[list(field.moves)].reshape(-1, 1, 1, 1)
    # Mirrored control points reach two intervals far from a face; in thick sections they are not mirrored along z.
    far = [
        0 if field.moves == (1, 2) and i == 0 else int(np.ceil(a.reach_nm / v))
        for i, (a, v) in enumerate(zip(field.axes, voxel, strict=True))
    ]
    inner = (slice(None), *(slice(f, n - f) for f, n in zip(far, shape, strict=True)))
    assert dense(field)[inner].size > 500
    np.testing.assert_allclose(dense(field)[inner], expected[inner], rtol=1e-4, atol=1e-5)


def test_sections_move_alike_but_not_identically() -> None:
    u = dense(field_of((20, 60, 70), (29, 6, 6), spacing_nm=150.0))
    near = np.corrcoef(u[:, 9].ravel(), u[:, 10].ravel())[0, 1]
    far = np.corrcoef(u[:, 0].ravel(), u[:, 19].ravel())[0, 1]
    assert 0.9 < near < 0.9999
    assert far < 0.6


def test_thick_sections_stay_in_their_planes_and_cubes_move_in_3d() -> None:
    assert field_of((6, 20, 28), (29, 6, 6)).moves == (1, 2)
    assert field_of((12, 20, 28), (8, 8, 8)).moves == (0, 1, 2)
    assert field_of((1, 20, 28), (8, 8, 8)).moves == (1, 2)


def test_jacobian_agrees_with_numpy_gradient_where_both_are_exact() -> None:
    """A linear map has the same determinant everywhere, whatever the differences."""
    rng = np.random.default_rng(1)
    gradient = rng.uniform(-0.2, 0.2, (3, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, (4, 5, 6)), indexing="ij")).astype(float)
    u = np.einsum("ca,azyx->czyx", gradient, grid)
    assert jacobian_minimum(u) == pytest.approx(np.linalg.det(np.eye(3) + gradient))


def test_jacobian_notices_a_fold_that_central_differences_miss() -> None:
    u = np.zeros((2, 3, 9), dtype=np.float32)
    u[1, :, 1::2] = 1.2
    u[1, :, ::2] = -0.2
    central = 1 + np.gradient(u[1], axis=1)[:, 1:-1]
    assert central.min() > 0
    assert jacobian_minimum(u) < 0


@given(
    seed=st.integers(0, 1000),
    sigma=st.floats(0, 400),
    spacing=st.floats(20, 400),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 24), st.integers(1, 28)),
    isotropic=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_field_folds_however_strong(seed, sigma, spacing, shape, isotropic) -> None:
    voxel = (8, 8, 8) if isotropic else (29, 6, 6)
    field, minimum = field_of(shape, voxel, seed, sigma_nm=sigma, spacing_nm=spacing).without_folds(0.2)
    u = dense(field).astype(float)
    if len(u) == 2:
        u = np.concatenate([np.zeros_like(u[:1]), u])
    assert field.jacobian_minimum() == minimum >= 0.2
    assert brute_force_minimum(u) >= 0.2 - 1e-4


def brute_force_minimum(u: np.ndarray) -> float:
    """Smallest corner determinant by a loop over cells and corners."""
    lowest = 1.0
    shape = u.shape[1:]
    for p in np.ndindex(*shape):
        for signs in np.ndindex(2, 2, 2):
            step = 2 * np.array(signs) - 1
            other = np.array(p) + step
            if not all(0 <= o < n or n == 1 for o, n in zip(other, shape, strict=True)):
                continue
            matrix = np.eye(3)
            for axis in range(3):
                if shape[axis] > 1:
                    q = list(p)
                    q[axis] = other[axis]
                    matrix[:, axis] += step[axis] * (u[(slice(None), *q)] - u[(slice(None), *p)])
            lowest = min(lowest, float(np.linalg.det(matrix)))
    return lowest


def test_strong_field_is_scaled_not_given_up() -> None:
    field, minimum = field_of((4, 80, 90), (29, 6, 6), sigma_nm=200.0, spacing_nm=100.0).without_folds(0.2)
    assert 0.2 <= minimum < 0.5
    assert np.abs(dense(field)).max() > 1


def test_warp_of_a_known_shift() -> None:
    """Away from the border a constant displacement of 2 px moves labels by exactly 2 px."""
    field = field_of((3, 20, 28), (29, 6, 6))
    volume = np.arange(3 * 20 * 28, dtype=np.uint32).reshape(3, 20, 28)

    class Shift(DisplacementField):
        def section(self, z: int) -> np.ndarray:
            return np.stack([np.zeros((20, 28)), np.full((20, 28), 2.0)]).astype(np.float32)

    shifted = Shift(field.coefficients, field.axes, field.pitch_nm).warp(volume)
    assert np.array_equal(shifted[:, :, :26], volume[:, :, 2:])


def test_warp_elects_the_label_with_the_largest_weight() -> None:
    """Against brute force: one-hot linear interpolation by scipy, label by label."""
    label = cells((5, 24, 30), 12, seed=3)
    field = field_of(label.shape, (8, 8, 8), spacing_nm=80.0, sigma_nm=8.0)
    u = dense(field)
    at = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij")) + u
    weights = np.stack(
        [
            ndimage.map_coordinates((label == n).astype(float), at, order=1, mode="nearest")
            for n in range(label.max() + 1)
        ]
    )
    top = np.sort(weights, axis=0)
    clear = top[-1] - top[-2] > 1e-3
    assert clear.mean() > 0.9
    assert np.array_equal(field.warp(label)[clear], weights.argmax(axis=0)[clear])


def test_zero_field_changes_nothing() -> None:
    label = cells((6, 20, 28), 9, seed=0)
    result = elastic_deform(label, (29, 6, 6), rng_for(0), sigma_nm=0.0)
    assert np.array_equal(result.label, label)
    assert result.min_jacobian == 1


@pytest.mark.parametrize("voxel", [(29.0, 6.0, 6.0), (8.0, 8.0, 8.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_cell_is_lost_or_torn(voxel, seed) -> None:
    label = cells((10, 70, 90), 60, seed).astype(np.uint64) * 10**12
    result = elastic_deform(label, voxel, rng_for(seed), sigma_nm=30.0, spacing_nm=100.0)
    assert pieces(result.label) == pieces(label)
    assert result.min_jacobian >= 0.2
    assert 0.3 < (result.label == label).mean() < 0.98


def test_one_voxel_threads_survive() -> None:
    label = np.ones((6, 40, 60), dtype=np.uint8)
    for i, y in enumerate(range(4, 36, 4)):
        label[:, y, 2:58] = 2 + i
    result = elastic_deform(label, (29, 6, 6), rng_for(5), sigma_nm=40.0, spacing_nm=80.0)
    after, before = pieces(result.label), pieces(label)
    assert after.keys() == before.keys()
    assert all(after[n] <= before[n] for n in before)


def test_label_in_two_pieces_gets_no_third() -> None:
    label = np.zeros((6, 60, 80), dtype=np.uint8)
    label[:, 5:25, 5:30] = 3
    label[:, 35:55, 50:75] = 3
    label[:, 5:25, 50:75] = 4
    result = elastic_deform(label, (29, 6, 6), rng_for(1), sigma_nm=30.0, spacing_nm=100.0)
    assert pieces(result.label) == {3: 2, 4: 1}


def test_mending_gives_a_fragment_to_its_surroundings() -> None:
    label = np.full((4, 12, 16), 1, dtype=np.uint32)
    label[:, :, 8:] = 2
    label[1:3, 3:5, 12:14] = 1
    label[2, 9, 2] = 2
    expected = np.where(np.arange(16) < 8, 1, 2) * np.ones_like(label)
    assert np.array_equal(mend_fragments(label, np.array([0, 1, 1])), expected)
    assert np.array_equal(mend_fragments(label, np.array([0, 2, 2])), label)


def test_same_seed_same_bytes_and_another_seed_another_result() -> None:
    label = cells((6, 40, 50), 20, seed=4)
    first, again, other = (elastic_deform(label, (29, 6, 6), rng_for(s)).label for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("label", "options", "error"),
    [
        (np.ones((3, 4, 5)), {}, LabelTypeError),
        (-np.ones((3, 4, 5), dtype=np.int16), {}, LabelTypeError),
        (np.ones((4, 5), dtype=np.uint8), {}, ShapeMismatch),
        (np.ones((0, 4, 5), dtype=np.uint8), {}, ShapeMismatch),
        (np.ones((3, 4, 5), dtype=np.uint8), {"sigma_nm": -1.0}, ValueRangeError),
        (np.ones((3, 4, 5), dtype=np.uint8), {"sigma_nm": float("nan")}, ValueRangeError),
        (np.ones((3, 4, 5), dtype=np.uint8), {"spacing_nm": 0.0}, ValueRangeError),
        (np.ones((3, 4, 5), dtype=np.uint8), {"min_jacobian": 1.0}, ValueRangeError),
    ],
)
def test_bad_arguments_are_refused(label, options, error) -> None:
    with pytest.raises(error):
        elastic_deform(label, (29, 6, 6), rng_for(0), **options)


@pytest.mark.parametrize("name", ["vnc_sstem_train.h5", "fib_medulla_train.h5"])
def test_real_neurons_stay_whole(real_data: Path, name: str) -> None:
    with h5py.File(real_data / name) as file:
        label, voxel = file["label"][:40, :200, :220], file.attrs["resolution_nm"]
    label = cc3d.connected_components(label, connectivity=26)
    result = elastic_deform(label, voxel, rng_for(0))
    after = cc3d.connected_components(result.label.astype(np.uint32), connectivity=26)
    assert len(np.unique(result.label)) == len(np.unique(label))
    assert after.max() == label.max()
    assert result.min_jacobian >= 0.2
    assert (result.label == label).mean() < 0.95
