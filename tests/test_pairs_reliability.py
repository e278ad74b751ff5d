"""Reliability maps: 1 where all images agree, 0 where chance rules; the same voxel by voxel as all at once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from connectomics_neurodiff.errors import ShapeMismatch, ValueRangeError
from connectomics_neurodiff.pairs import ReliabilityMap

SHAPE = (9, 40, 56)
ANISOTROPIC, ISOTROPIC = (50.0, 8.0, 8.0), (8.0, 8.0, 8.0)


def images(count: int = 4) -> list[np.ndarray]:
    """Left half: stripes that all share. Right half: each image has noise of its own with the same variance."""
    stripes = (np.indices(SHAPE).sum(0) // 6 % 2).astype(np.float32)
    found = []
    for k in range(count):
        noise = (ndimage.gaussian_filter(np.random.default_rng(k).standard_normal(SHAPE), 3) > 0).astype(np.float32)
        found.append(np.where(np.arange(SHAPE[2]) < 28, stripes, noise))
    return found


@pytest.mark.parametrize("voxel", [ANISOTROPIC, ISOTROPIC])
def test_agreement_is_reliable_and_chance_is_not(voxel: tuple[float, float, float]) -> None:
    found = np.asarray(ReliabilityMap(images(8), voxel))
    assert (found.shape, found.dtype) == (SHAPE, np.float32)
    assert found[..., :15].min() > 0.99
    assert found[..., 41:].mean() < 0.25
    assert 0 <= found.min() <= found.max() <= 1


def test_it_is_what_a_plain_computation_gives() -> None:
    given, sigma = images(3), np.array([0, 1, 1])
    smooth = np.stack([ndimage.gaussian_filter(image, sigma) for image in given])
    variance = ndimage.gaussian_filter(smooth.var(axis=0, ddof=1), 3 * sigma)
    np.testing.assert_allclose(
        np.asarray(ReliabilityMap(given, ANISOTROPIC)), np.clip(1 - variance / smooth.var(), 0, 1), atol=1e-5
    )


@pytest.mark.parametrize("voxel", [ANISOTROPIC, ISOTROPIC])
def test_parts_are_those_of_the_whole(voxel: tuple[float, float, float]) -> None:
    lazy = ReliabilityMap(images(3), voxel)
    whole = lazy[...]
    np.testing.assert_allclose(lazy[3:5, 10:31, 7], whole[3:5, 10:31, 7], atol=1e-5)
    np.testing.assert_allclose(lazy[-1], whole[-1], atol=1e-5)


def test_the_order_of_images_does_not_matter() -> None:
    given = images(3)
    np.testing.assert_allclose(
        np.asarray(ReliabilityMap(given, ISOTROPIC)), np.asarray(ReliabilityMap(given[::-1], ISOTROPIC)), atol=1e-5
    )


def test_equal_images_are_reliable_everywhere() -> None:
    image = images(1)[0]
    np.testing.assert_allclose(np.asarray(ReliabilityMap([image, image], ISOTROPIC)), 1)


def test_what_cannot_be_judged_is_refused() -> None:
    image = images(1)[0]
    with pytest.raises(ValueRangeError, match="at least two"):
        ReliabilityMap([image], ISOTROPIC)
    with pytest.raises(ShapeMismatch, match="one shape"):
        ReliabilityMap([image, image[1:]], ISOTROPIC)
    with pytest.raises(ValueRangeError, match="not constant"):
        ReliabilityMap([image * 0 + 0.3, image * 0 + 0.3], ISOTROPIC)
