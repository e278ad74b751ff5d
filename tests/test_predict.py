"""Tiled prediction and test-time augmentation."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.errors import ShapeMismatch, ValueRangeError
from connectomics_neurodiff.predict import predict_affinities

LABELS = 7


class Pointwise(nn.Module):
    """Receptive field of one voxel; each channel another function of the grey value."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image * 4 - 2, 1 - image * 3, image * image], dim=1)


class Perfect(nn.Module):
    """Reads the label from the grey value and returns its affinities as logits of +-30."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        label = np.rint(image[:, 0].numpy() * LABELS).astype(int)
        return torch.from_numpy(np.stack([affinities_from_labels(part) for part in label]) * 60.0 - 30.0).float()


def blobs(shape, seed=0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, LABELS + 1, [-(-n // 3) for n in shape])
    return np.kron(coarse, np.ones((3, 3, 3), int))[: shape[0], : shape[1], : shape[2]]


def shapes(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


@settings(max_examples=60, deadline=None)
@given(shapes(1, 14), shapes(1, 8), st.tuples(*[st.floats(0, 0.99)] * 3), st.integers(1, 4), st.booleans())
def test_tiling_does_not_change_a_local_network(shape, tile, overlap, batch, flips) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    shared = tuple(int(o * t) for o, t in zip(overlap, tile, strict=True))
    tiled = predict_affinities(Pointwise(), image, tile=tile, overlap=shared, batch=batch)
    expected = torch.sigmoid(Pointwise()(torch.from_numpy(image)[None, None]))[0].numpy()
    assert tiled.dtype == np.float32
    np.testing.assert_allclose(tiled, expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes(1, 13), shapes(2, 8), shapes(0, 10**6))
def test_edges_across_tiles_are_right(shape, tile, seeds) -> None:
    """Where tiles overlap by a voxel, the edge that leads into a tile comes from the tile before."""
    label = blobs(shape)
    overlap = tuple(1 + s % (t - 1) for s, t in zip(seeds, tile, strict=True))
    tiled = predict_affinities(Perfect(), label / LABELS, tile=tile, overlap=overlap)
    np.testing.assert_allclose(tiled, affinities_from_labels(label), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shapes(1, 11), shapes(2, 8))
def test_flip_augmentation_of_perfect_affinities_is_perfect(shape, tile) -> None:
    label = blobs(shape)
    overlap = tuple(1 for _ in tile)
    flipped = predict_affinities(Perfect(), label / LABELS, tile=tile, overlap=overlap, flip_augmentation=True)
    assert np.abs(flipped - affinities_from_labels(label)).max() < 1e-6


def test_flip_augmentation_averages_sixteen_different_predictions() -> None:
    class Directed(nn.Module):
        """Depends on the direction: the mean over all poses must not."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            slope = torch.linspace(-1, 1, image.shape[-1]).expand_as(image)
            return torch.cat([image + slope] * 3, dim=1)

    image = np.zeros((4, 6, 6), np.float32)
    result = predict_affinities(Directed(), image, tile=(4, 6, 6), overlap=(0, 0, 0), flip_augmentation=True)
    np.testing.assert_allclose(result[0, 1:], 0.5, atol=1e-6)
    np.testing.assert_allclose(result[1], result[2].swapaxes(1, 2), atol=1e-6)


def test_writes_into_hdf5_and_reads_one_tile_at_a_time(tmp_path) -> None:
    image = np.random.default_rng(0).random((9, 20, 28), dtype=np.float32)
    largest = []

    class Lazy:
        shape = image.shape

        def __getitem__(self, index):
            part = image[index]
            largest.append(part.size)
            return part

    with h5py.File(tmp_path / "a.h5", "w") as file:
        out = file.create_dataset("affinity", (3, 9, 20, 28), "f4", fillvalue=0.7)
        returned = predict_affinities(Pointwise(), Lazy(), tile=(4, 20, 10), overlap=(1, 4, 2), out=out, batch=3)
        assert returned is out
        memory = predict_affinities(Pointwise(), image, tile=(4, 20, 10), overlap=(1, 4, 2))
        assert np.array_equal(out[:], memory)
    assert max(largest) <= 4 * 20 * 28


def test_mode_is_restored_and_batch_norm_does_not_learn() -> None:
    network = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, 3, 1)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    predict_affinities(network, np.random.default_rng(0).random((3, 5, 7)), tile=(3, 5, 5), overlap=(0, 0, 2))
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_bf16_is_close() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 3, padding=1)
    image = np.random.default_rng(0).random((4, 12, 12), dtype=np.float32)
    arguments = {"tile": (4, 8, 8), "overlap": (0, 4, 4)}
    exact = predict_affinities(network, image, **arguments)
    half = predict_affinities(network, image, precision="bf16", **arguments)
    assert 0 < np.abs(exact - half).max() < 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.01, 1.5])
def test_bad_image_stops_before_any_work(bad) -> None:
    image = np.full((6, 8, 8), 0.5, np.float32)
    image[5, 7, 7] = bad

    class Untouched(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pytest.fail("the network ran on a bad image")

    with pytest.raises(ValueRangeError, match="finite and in"):
        predict_affinities(Untouched(), image, tile=(2, 8, 8), overlap=(0, 0, 0))


def test_bad_requests() -> None:
    image = np.full((6, 8, 8), 0.5, np.float32)
    fine = {"tile": (2, 8, 8), "overlap": (0, 0, 0)}
    for change in ({"overlap": (2, 0, 0)}, {"tile": (0, 8, 8)}, {"batch": 0}):
        with pytest.raises(ValueRangeError):
            predict_affinities(Pointwise(), image, **{**fine, **change})
    with pytest.raises(ShapeMismatch, match="three axes"):
        predict_affinities(Pointwise(), image[0], **fine)
    with pytest.raises(ShapeMismatch, match="3, 6, 8, 8"):
        predict_affinities(Pointwise(), image, out=np.zeros((3, 6, 8, 9)), **fine)
    with pytest.raises(ShapeMismatch, match="network must return"):
        predict_affinities(nn.Identity(), image, **fine)


def test_diverged_network_is_reported() -> None:
    network = nn.Conv3d(1, 3, 1)
    nn.init.constant_(network.weight, float("nan"))
    with pytest.raises(ValueRangeError, match="diverged"):
        predict_affinities(network, np.zeros((2, 4, 4), np.float32), tile=(2, 4, 4), overlap=(0, 0, 0))
