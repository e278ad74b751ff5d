"""3D-FID: the distance against closed forms and scipy, its patches, and that it grows with what is wrong."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from connectomics_neurodiff.errors import ShapeMismatch, UnknownName, UserError, ValueRangeError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.metrics import FID3D, bootstrap_interval, fid3d, frechet_distance, patch_features
from connectomics_neurodiff.metrics.fid3d import _boxes
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.volume import grow_phantom


def whitened(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Sample with mean 0 and covariance 1 to the last digits."""
    sample = np.random.default_rng(seed).normal(size=(rows, columns))
    sample -= sample.mean(axis=0)
    return sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False).reshape(columns, columns)).T)


def distance_by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    """The formula as it is written."""
    cov_1, cov_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shift = first.mean(axis=0) - second.mean(axis=0)
    return float(shift @ shift + np.trace(cov_1 + cov_2 - 2 * np.real(sqrtm(cov_1 @ cov_2))))


# The Frechet distance.


def test_of_two_numbers_by_hand() -> None:
    # Samples 0, 2 and 1, 7: means 1 and 4, variances 2 and 18. (1 - 4)^2 + (sqrt 2 - sqrt 18)^2 = 9 + 8.
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [7.0]])) == pytest.approx(17)


def test_of_independent_features_by_hand() -> None:
    # With diagonal covariances: the sum over the features of (difference of means)^2 + (difference of deviations)^2.
    first = whitened(50, 3) * [1, 2, 5] + [0, 1, 0]
    second = whitened(70, 3, seed=1) * [4, 2, 1] + [0, 3, -1]
    assert frechet_distance(first, second) == pytest.approx(3**2 + 0 + 4**2 + 0 + 2**2 + 1)


@pytest.mark.parametrize("seed", range(5))
def test_is_the_formula_where_covariances_are_well_conditioned(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    second = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    assert frechet_distance(first, second) == pytest.approx(distance_by_sqrtm(first, second), rel=1e-7)


@hypothesis_settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 12), more=st.integers(2, 12), columns=st.integers(1, 16), seed=st.integers(0, 99))
def test_invariances_hold_with_few_samples_too(rows: int, more: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(rows, columns)), 3 * rng.normal(size=(more, columns))
    distance = frechet_distance(first, second)
    scale = np.square(first).sum() + np.square(second).sum() + 1
    assert distance >= 0
    assert frechet_distance(second, first) == distance
    assert frechet_distance(first, first[::-1]) < 1e-12 * scale
    turn = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(distance, abs=1e-12 * scale)
    shift = rng.normal(size=columns)
    assert frechet_distance(first, first + shift) == pytest.approx(shift @ shift, abs=1e-12 * scale)
    assert frechet_distance(2 * first, 2 * second) == pytest.approx(4 * distance, abs=1e-11 * scale)


def test_unrelated_subspaces_add_their_variances() -> None:
    # Covariances that share no direction: the product is 0, the distance the sum of the traces. sqrtm fails here.
    first, second = np.zeros((9, 20)), np.zeros((9, 20))
    first[:, :4], second[:, 4:8] = whitened(9, 4), whitened(9, 4, seed=1)
    assert frechet_distance(first, second) == pytest.approx(8)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), ValueRangeError, "at least 2 samples. Got 1"),
        (np.zeros((5, 3)), np.zeros((5, 4)), ShapeMismatch, r"\(5, 3\) and \(5, 4\)"),
        (np.zeros(5), np.zeros(5), ShapeMismatch, r"\(n, d\)"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), ValueRangeError, "finite"),
    ],
)
def test_what_are_no_samples_is_told(
    first: np.ndarray, second: np.ndarray, error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        frechet_distance(first, second)


# The bootstrap.


def test_the_interval_is_as_wide_as_repeated_samples_scatter() -> None:
    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        return rng.normal(size=(200, 3)), rng.normal(loc=(2, 0, 0), size=(200, 3))

    repeated = [frechet_distance(*draw(seed)) for seed in range(200)]
    low, high = bootstrap_interval(*draw(0), 200, np.random.default_rng(0))
    assert low <= frechet_distance(*draw(0)) <= high
    spread = np.subtract(*np.quantile(repeated, [0.975, 0.025]))
    assert high - low == pytest.approx(spread, rel=0.35)


def test_the_interval_holds_the_distance_where_resamples_are_far_above_it() -> None:
    sample = np.random.default_rng(0).normal(size=(10, 30))
    low, high = bootstrap_interval(sample, sample, 50, np.random.default_rng(0))
    assert 0 == low <= frechet_distance(sample, sample) < high
    with pytest.raises(ValueRangeError, match="at least 1"):
        bootstrap_interval(sample, sample, 0, np.random.default_rng(0))


# Patches.

SHAPE = (8, 40, 52)
REQUEST: dict[str, Any] = {"patch": (4, 16, 20), "patches": 12, "resamples": 20}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_segmenter("superhuman", filters=[6, 8], z_pool=[False])


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return grow_phantom(SHAPE, (29, 6, 6), 0).array("image").astype(np.float32)


class MeanAndSquare(nn.Module):
    """An encoder that can be followed by hand: two features, grey value and its square."""

    def deepest_features(self, image: Tensor) -> Tensor:
        return torch.cat([image, image**2], dim=1)


def test_features_are_means_over_the_patch(image: np.ndarray) -> None:
    boxes = [Box((0, 3, 5), (4, 19, 25)), Box((4, 24, 32), (8, 40, 52)), Box((1, 0, 0), (5, 16, 20))] * 3
    found = patch_features(MeanAndSquare(), image, boxes)
    by_hand = [(image[box.slices].mean(), np.square(image[box.slices]).mean()) for box in boxes]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    assert found.dtype == np.float64


def test_the_distance_is_that_of_the_patches_features(image: np.ndarray) -> None:
    # Patches of a section each: the 8 sections fall into two halves. Which, is found by trying all.
    found = fid3d(MeanAndSquare(), image, [image / 2], **REQUEST | {"patch": (1, 99, 99), "patches": 9})
    features = np.array([[section.mean(), np.square(section).mean()] for section in image])
    matching = [
        half
        for half in map(list, combinations(range(8), 4))
        if frechet_distance(features[half], features[half] * [0.5, 0.25]) == pytest.approx(found.distance, rel=1e-4)
        and frechet_distance(features[half], np.delete(features, half, 0)) == pytest.approx(found.floor, rel=1e-2)
    ]
    assert len(matching) == 1
    assert (found.patches, found.features) == (4, 2)


@hypothesis_settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    size=st.tuples(*[st.integers(1, 7)] * 3),
    count=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_patches_lie_inside_at_different_places(
    shape: tuple[int, int, int], size: tuple[int, int, int], count: int, seed: int
) -> None:
    size = tuple(map(min, size, shape))  # type: ignore[assignment]
    places = np.prod([n - s + 1 for n, s in zip(shape, size, strict=True)])
    boxes = _boxes(np.zeros(shape), size, count, seed)
    assert len(boxes) == len({box.start for box in boxes}) == min(count, places)
    assert all(box.within(shape) and box.shape == size for box in boxes)
    assert boxes == _boxes(np.ones(shape), size, count, seed)


def test_it_grows_with_blur_and_noise(network: nn.Module, image: np.ndarray) -> None:
    noise = np.random.default_rng(0).normal(size=image.shape)

    def distance(changed: np.ndarray) -> float:
        return fid3d(network, image, [changed.astype(np.float32)], **REQUEST).distance

    blurred = [distance(gaussian_filter(image, (0, width, width))) for width in (0, 0.7, 1.5, 3)]
    noisy = [distance(np.clip(image + width * noise, 0, 1)) for width in (0, 0.05, 0.1, 0.2)]
    for distances in (blurred, noisy):
        assert distances[0] == pytest.approx(0, abs=1e-9)
        assert all(a < b for a, b in pairwise(distances))
    assert blurred[1] > 1e-6


def test_the_floor_is_between_other_patches_of_the_real_volume(network: nn.Module, image: np.ndarray) -> None:
    near = fid3d(network, image, [np.clip(image + 0.001, 0, 1)], **REQUEST)
    far = fid3d(network, image, [1 - image], **REQUEST)
    assert near.distance < near.floor == far.floor < far.distance
    assert far.interval[0] <= far.distance <= far.interval[1]


def test_the_same_seed_the_same_numbers_and_the_mode_is_restored(network: nn.Module, image: np.ndarray) -> None:
    network.train()
    runs = [fid3d(network, image, [image[:, ::-1]], **REQUEST, seed=seed) for seed in (0, 0, 1)]
    assert network.training
    assert runs[0] == runs[1] != runs[2]


def test_patches_are_shared_out_among_synthetic_volumes(network: nn.Module, image: np.ndarray) -> None:
    changed = np.clip(image + 0.1, 0, 1)
    one = fid3d(network, image, [changed], **REQUEST)
    three = fid3d(network, image, [changed] * 3, **REQUEST)
    assert three.patches == one.patches == 12
    assert three.distance == pytest.approx(one.distance, rel=1e-6)  # the same places, each in one of the three


class Counted:
    """An image that knows how much was read of it at once."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.most = values, values.shape, 0

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.values[index]
        self.most = max(self.most, part.size)
        return part


def test_volumes_of_any_size_a_patch_at_a_time(network: nn.Module, image: np.ndarray) -> None:
    real, small = Counted(image), Counted(image[:3, :30, :24])
    sizes = []
    handle = network.down[0].register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    try:
        found = fid3d(network, real, [small], **REQUEST)
    finally:
        handle.remove()
    assert found.patches == 12
    assert {(shape[2], shape[3], shape[4]) for shape in sizes} == {(3, 16, 20)}  # as thin as the thinner one
    assert max(shape[0] for shape in sizes) <= 4
    assert max(real.most, small.most) == 3 * 16 * 20


def test_too_few_patches_for_the_features_is_said(network: nn.Module, image: np.ndarray) -> None:
    assert fid3d(network, image, [image], **REQUEST).warning == ""
    few = fid3d(network, image, [image], **REQUEST | {"patches": 3})
    assert "3 patches of 8 features" in few.warning
    assert "\n" not in few.warning
    assert FID3D(1.5, (1.0, 2.0), 0.5, 8, 8).as_dict() == {
        "fid3d": 1.5,
        "fid3d_interval": [1.0, 2.0],
        "fid3d_floor": 0.5,
        "fid3d_patches": 8,
        "fid3d_features": 8,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": (99, 99, 99)}, r"4 places .* has 1 in \(8, 40, 52\)"),
        ({"patch": (8, 40, 50)}, r"has 3 in .*smaller patch"),
        ({"patch": (4, 16)}, "three sizes"),
        ({"patch": (4, 0, 16)}, "three sizes"),
        ({"patches": 1}, "at least 2 patches. Got 1"),
    ],
)
def test_impossible_requests_are_told(
    network: nn.Module, image: np.ndarray, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueRangeError, match=message) as caught:
        fid3d(network, image, [image], **REQUEST | changes)
    assert "\n" not in str(caught.value)


def test_bad_images_and_networks_are_told(network: nn.Module, image: np.ndarray) -> None:
    for bad in (np.full(SHAPE, np.nan, np.float32), image + 1):
        with pytest.raises(ValueRangeError, match=r"finite and in \[0, 1\]"):
            fid3d(network, image, [bad], **REQUEST)
    with pytest.raises(ShapeMismatch, match="three axes"):
        fid3d(network, image, [image[0]], **REQUEST)
    with pytest.raises(ValueRangeError, match="at least one synthetic"):
        fid3d(network, image, [], **REQUEST)
    with pytest.raises(UnknownName, match=r"Got Conv3d"):
        fid3d(nn.Conv3d(1, 3, 1), image, [image], **REQUEST)
    diverged = build_segmenter("superhuman", filters=[6, 8], z_pool=[False])
    nn.init.constant_(diverged.down[0].entry[0].weight, float("nan"))
    with pytest.raises(ValueRangeError, match="diverged"):
        fid3d(diverged, image, [image], **REQUEST)
