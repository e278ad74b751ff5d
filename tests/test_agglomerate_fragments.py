"""Fragments stay inside neurons, however thin and however close those are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.agglomerate import fragments, fragments_from_affinities
from connectomics_neurodiff.metrics import evaluate

SECTIONS = (29.0, 6.0, 6.0)
ISOTROPIC = (8.0, 8.0, 8.0)


def touching_cells(shape: tuple[int, int, int], count: int, rng: np.random.Generator, flat: bool) -> np.ndarray:
    """Dense cells without any gap: each voxel belongs to the nearest of some random points; `flat`: as columns."""
    points = rng.random((count, 3)) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    offsets = grid[..., None, :] - points
    if flat:
        offsets = offsets[..., 1:]
    return (np.linalg.norm(offsets, axis=-1).argmin(axis=-1) + 1).astype(np.uint32)


def alone(label: np.ndarray, in_plane: bool) -> np.ndarray:
    """Voxels none of whose face neighbours (in their section) has their label: to affinities these are background."""
    padded = np.pad(label, 1)
    axes = (1, 2) if in_plane else (0, 1, 2)
    neighbours = [np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] for axis in axes for step in (-1, 1)]
    return np.all([neighbour != label for neighbour in neighbours], axis=0)


def components_by_search(affinities: np.ndarray, minimum: float, inside: np.ndarray) -> np.ndarray:
    """Plain flood fill along strong edges."""
    found = np.zeros(inside.shape, int)
    for start in zip(*np.nonzero(inside), strict=True):
        if found[start]:
            continue
        stack, found[start] = [start], found.max() + 1
        while stack:
            here = stack.pop()
            for axis in range(inside.ndim):
                for step in (-1, 1):
                    other = tuple(i + step * (k == axis) for k, i in enumerate(here))
                    if min(other) < 0 or any(o >= n for o, n in zip(other, inside.shape, strict=True)):
                        continue
                    edge = affinities[(axis, *max(here, other))]
                    if inside[other] and not found[other] and edge >= minimum:
                        found[other] = found[here]
                        stack.append(other)
    return found


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6)])
@given(seed=st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_strong_components_match_a_flood_fill(shape, seed):
    rng = np.random.default_rng(seed)
    affinities = rng.random((len(shape), *shape)).astype(np.float32)
    inside = rng.random(shape) > 0.2
    ours = fragments._strong_components(affinities, 0.5, inside)
    expected = components_by_search(affinities, 0.5, inside)
    pairs = set(zip(ours.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert ((ours > 0) == inside).all()


@pytest.mark.parametrize(("voxel_nm", "flat"), [(SECTIONS, True), (ISOTROPIC, False)])
@given(seed=st.integers(0, 2**20))
@settings(max_examples=15, deadline=None)
def test_no_fragment_crosses_a_perfect_boundary_between_touching_cells(voxel_nm, flat, seed):
    label = touching_cells((6, 20, 28), 9, np.random.default_rng(seed), flat)
    ours = fragments_from_affinities(affinities_from_labels(label), voxel_nm)
    assert evaluate(ours, np.where(alone(label, in_plane=flat), 0, label)).voi_merge == 0.0


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("voxel_nm", [SECTIONS, ISOTROPIC])
def test_thin_neurites_survive(width, axis, voxel_nm):
    label = np.ones((4, 40, 50), np.uint32)
    index: list[slice] = [slice(None)] * 3
    index[axis] = slice(18, None)
    label[tuple(index)] = 3
    index[axis] = slice(18, 18 + width)
    label[tuple(index)] = 2
    ours = fragments_from_affinities(affinities_from_labels(label), voxel_nm)
    assert evaluate(ours, label).voi_merge == 0.0
    assert not np.isin(ours[label == 2], ours[label != 2]).any()


def test_the_published_flooding_does_cross_them():
    """What edge_weight is for: without it the smoothed landscape leaks over a boundary one voxel thick."""
    label = touching_cells((2, 60, 60), 12, np.random.default_rng(0), flat=True)
    affinities = affinities_from_labels(label)
    published = evaluate(fragments_from_affinities(affinities, SECTIONS, edge_weight=0.0), label)
    ours = evaluate(fragments_from_affinities(affinities, SECTIONS), label)
    assert ours.voi_merge == 0.0 < 0.05 < published.voi_merge


def test_sections_are_separate_in_anisotropic_volumes_only():
    label = np.ones((5, 30, 30), np.uint32)
    affinities = affinities_from_labels(label)
    by_section = fragments_from_affinities(affinities, SECTIONS)
    for above, below in pairwise(by_section):
        assert not np.isin(above, below).any()
    in_3d = fragments_from_affinities(affinities, ISOTROPIC)
    assert np.isin(in_3d[0], in_3d[-1]).all()


def test_a_voxel_cut_off_in_its_section_goes_with_its_own_neurite():
    label = np.ones((3, 30, 30), np.uint32)
    label[1:, 10:20, 10:20] = 2
    label[0, 15, 15] = 2  # the tip: one voxel in the section above
    ours = fragments_from_affinities(affinities_from_labels(label), SECTIONS)
    assert ours[0, 15, 15] == ours[1, 15, 15]
    assert evaluate(ours, label).voi_merge == 0.0


def test_ids_are_one_to_n_and_every_voxel_has_one():
    rng = np.random.default_rng(3)
    ours = fragments_from_affinities(rng.random((3, 6, 20, 28), dtype=np.float32), SECTIONS)
    assert ours.dtype == np.uint64
    assert np.unique(ours).tolist() == list(range(1, int(ours.max()) + 1))


@pytest.mark.parametrize("voxel_nm", [SECTIONS, ISOTROPIC])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (2, 3, 1), (6, 20, 28)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_uniform_volumes_of_any_shape_are_filled_inside_the_mask(voxel_nm, shape, value):
    affinities = np.full((3, *shape), value, np.float32)
    mask = np.random.default_rng(1).random(shape) > 0.4
    assert (fragments_from_affinities(affinities, voxel_nm) > 0).all()
    np.testing.assert_array_equal(fragments_from_affinities(affinities, voxel_nm, mask=mask) > 0, mask)


def test_small_loose_fragments_are_dissolved():
    rng = np.random.default_rng(5)
    noisy = np.clip(0.8 + 0.2 * rng.standard_normal((3, 2, 64, 64)), 0, 1).astype(np.float32)
    kept, raw = (fragments_from_affinities(noisy, SECTIONS, min_size=size).astype(int) for size in (100, 0))
    small_kept, small_raw = ((np.bincount(ids.ravel())[1:] < 100).sum() for ids in (kept, raw))
    assert small_kept < 0.5 * small_raw
    assert (kept > 0).all()


def test_the_pieces_of_a_thin_neurite_do_not_vanish_together():
    label = np.ones((1, 60, 80), np.uint32)
    label[:, 22:25, 10:60] = 2
    for bead in range(10, 60, 15):
        label[:, 19:28, bead : bead + 9] = 2  # each bead is a maximum of the distance, and smaller than min_size
    affinities = affinities_from_labels(label)
    pieces = fragments_from_affinities(affinities, SECTIONS, min_size=0)
    whole = fragments_from_affinities(affinities, SECTIONS, min_size=150)
    assert len(np.unique(pieces[label == 2])) > len(np.unique(whole[label == 2])) == 1
    assert evaluate(whole, label).voi_merge == 0.0


def test_input_and_repetition():
    rng = np.random.default_rng(2)
    affinities = rng.random((3, 4, 30, 40), dtype=np.float32)
    before = affinities.copy()
    first = fragments_from_affinities(affinities, SECTIONS)
    np.testing.assert_array_equal(first, fragments_from_affinities(affinities, SECTIONS))
    np.testing.assert_array_equal(affinities, before)


def test_bytes_and_floats_give_the_same_fragments():
    label = touching_cells((3, 30, 40), 8, np.random.default_rng(1), flat=True)
    binary = affinities_from_labels(label)
    expected = fragments_from_affinities(binary, SECTIONS)
    for same in (binary * np.uint8(255), binary.astype(np.float16), binary.astype(np.float64)):
        np.testing.assert_array_equal(fragments_from_affinities(same, SECTIONS), expected)
