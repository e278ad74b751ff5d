"""Boxes, tiles and blending: every voxel is covered, overlaps are kept, weights never vanish."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics_neurodiff.errors import ValueRangeError
from connectomics_neurodiff.geometry import Box, blend_window, is_anisotropic, tile_starts, tiles, voxel_size


@given(st.data())
def test_what_a_box_has_beside_another_is_covered_once(data: st.DataObject) -> None:
    def box() -> Box:
        start = data.draw(st.tuples(*[st.integers(0, 5)] * 3))
        a, b, c = (n + data.draw(st.integers(1, 4)) for n in start)
        return Box(start, (a, b, c))

    one, other = box(), box()
    found = np.zeros((10, 10, 10), int)
    wanted = found.copy()
    for left in one.without(other):
        found[left.slices] += 1
    wanted[one.slices] = 1
    wanted[other.slices] = 0
    assert np.array_equal(found, wanted)


@given(size=st.integers(1, 200), tile=st.integers(1, 50), data=st.data())
def test_tiles_cover_an_axis_and_overlap_enough(size: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    starts = tile_starts(size, tile, overlap)
    covered = np.zeros(size, bool)
    for start in starts:
        covered[start : start + tile] = True
    assert covered.all()
    assert starts[0] == 0
    if size > tile:
        assert starts[-1] + tile == size
        assert all(b - a <= tile - overlap for a, b in pairwise(starts))


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 40)),
    tile=st.tuples(st.integers(2, 6), st.integers(4, 12), st.integers(4, 16)),
)
def test_blending_a_constant_gives_the_constant(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    total, weight = np.zeros(shape), np.zeros(shape)
    for box in tiles(shape, tile, [t // 2 for t in tile]):
        window = blend_window(box.shape)
        assert window.min() > 0
        assert window.max() <= 1
        total[box.slices] += 3.5 * window
        weight[box.slices] += window
    np.testing.assert_allclose(total / weight, 3.5, rtol=1e-6)


def test_boxes_know_what_they_share() -> None:
    first, second = Box((0, 0, 0), (4, 20, 28)), Box((4, 0, 0), (6, 20, 28))
    assert not first.overlaps(second)
    assert first.overlaps(Box((3, 19, 27), (9, 40, 50)))
    assert first.within((4, 20, 28))
    assert not second.within((5, 20, 28))
    assert np.zeros((6, 20, 28))[second.slices].shape == second.shape == (2, 20, 28)


@pytest.mark.parametrize("stop", [(0, 5, 5), (2, -1, 5)])
def test_an_empty_box_is_refused(stop: tuple[int, int, int]) -> None:
    with pytest.raises(ValueRangeError, match="stop > start"):
        Box((0, 0, 0), stop)


@pytest.mark.parametrize(
    "values", [(0.029, 0.006, 0.006), (29, 6), (29, 6, 0), (29, 6, -1), (29, 6, float("nan")), 6.0]
)
def test_a_bad_voxel_size_is_refused(values: object) -> None:
    with pytest.raises(ValueRangeError, match="three positive numbers"):
        voxel_size(values)  # type: ignore[arg-type]


def test_anisotropy_is_judged_by_section_thickness() -> None:
    assert is_anisotropic((29, 6, 6))
    assert not is_anisotropic((8, 8, 8))
    assert not is_anisotropic((6, 29, 6))
