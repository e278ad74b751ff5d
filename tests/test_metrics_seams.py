"""Seams: absent in noise, found where tiles were put side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics_neurodiff.geometry import tiles
from connectomics_neurodiff.metrics import even_inside, seams, tile_borders

SHAPE, TILE, OVERLAP = (20, 60, 84), (8, 24, 32), (2, 6, 8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_borders_are_where_tiles_begin_and_end(data: st.DataObject) -> None:
    size, tile = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    overlap = data.draw(st.integers(0, tile - 1))
    boxes = tiles((1, 1, size), (1, 1, tile), (0, 0, overlap))
    members = [[b.start[2] <= v < b.stop[2] for b in boxes] for v in range(size)]
    assert tile_borders(size, tile, overlap) == [v for v in range(1, size) if members[v] != members[v - 1]]


def test_white_noise_has_none() -> None:
    found = seams(np.random.default_rng(0).random(SHAPE), TILE, OVERLAP)
    assert list(found) == ["z", "y", "x"]
    for one in found.values():
        assert abs(one.ratio - 1) < 3 * one.standard_error < 0.05


@pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
def test_the_ratio_is_that_of_a_plain_loop(share: float) -> None:
    image = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    counts = np.random.default_rng(2).random(SHAPE) < share
    found = seams(image, TILE, OVERLAP, None if share == 1 else counts)
    for axis, name in enumerate("zyx"):
        at, elsewhere = [], []
        borders = tile_borders(SHAPE[axis], TILE[axis], OVERLAP[axis])
        planes, counted = np.moveaxis(image.astype(float), axis, 0), np.moveaxis(counts, axis, 0)
        for v in range(1, SHAPE[axis]):
            both = counted[v] & counted[v - 1]
            if both.any():
                (at if v in borders else elsewhere).append(((planes[v] - planes[v - 1]) ** 2)[both].mean())
        assert found[name].ratio == pytest.approx(np.mean(at) / np.mean(elsewhere), rel=1e-9)
        assert found[name].borders == len(at)


def test_where_the_image_is_of_one_kind() -> None:
    outside = np.zeros((3, 20, 24), np.uint8)
    outside[1, 9, 11] = 1
    inside = even_inside(outside, 2)
    assert inside[0].all()
    assert not inside[1, 7:12, 9:14].any()
    assert inside.sum() == inside.size - 25


def test_nothing_counts() -> None:
    image = np.random.default_rng(5).random(SHAPE)
    assert seams(image, TILE, OVERLAP, np.zeros(SHAPE, bool)) == {}


def test_tiles_side_by_side_show() -> None:
    """Every tile has a brightness of its own, and the last one painted wins."""
    rng = np.random.default_rng(2)
    image = rng.random(SHAPE) * 0.2
    for box in tiles(SHAPE, TILE, OVERLAP):
        image[box.slices] = rng.random(box.shape) * 0.2 + rng.random()
    for one in seams(image, TILE, OVERLAP).values():
        assert one.ratio > 1.5


def test_blurred_borders_are_seams_too() -> None:
    image = np.random.default_rng(3).random(SHAPE)
    for v in tile_borders(SHAPE[2], TILE[2], OVERLAP[2]):
        image[..., v] = image[..., v - 1] = (image[..., v] + image[..., v - 1]) / 2
    found = seams(image, TILE, OVERLAP)
    assert found["x"].ratio < 0.1
    assert found["y"].ratio == pytest.approx(1, abs=0.1)


def test_axes_with_one_tile_have_no_borders() -> None:
    image = np.random.default_rng(4).random((8, 20, 84))
    assert list(seams(image, TILE, OVERLAP)) == ["x"]
    assert seams(image[..., :32], TILE, OVERLAP) == {}
    assert seams(image[:1, :1, :1], TILE, OVERLAP) == {}
