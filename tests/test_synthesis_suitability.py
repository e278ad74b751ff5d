"""Whether a denoiser suits a volume: memory of a tile, and a voxel size far from the training's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from connectomics_neurodiff.checkpoints import Checkpoint
from connectomics_neurodiff.errors import ValueRangeError
from connectomics_neurodiff.memory import available_bytes, peak_bytes
from connectomics_neurodiff.synthesis import (
    require_fitting_tile,
    suitability,
    tile_bytes,
    warn_of_voxel_size,
    warn_of_what_is_dark,
)

CPU = torch.device("cpu")
NONE = (0, 0, 0)


def checkpoint(**extra: Any) -> Checkpoint:
    return Checkpoint("denoiser", "neurodiff", {"preset": "small"}, {}, extra)


def test_peak_is_what_lives_at_once() -> None:
    """Two convolutions: while the second runs, its input and output live; the input of the first lives throughout."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.Conv3d(8, 2, 1))
        image = torch.zeros(1, 1, 4, 10, 20)
    assert peak_bytes(network, image) == (8 + 2) * 800 * 4
    assert peak_bytes(network, image, *()) == peak_bytes(nn.Sequential(*network, nn.Identity()), image)


def test_memory_is_in_proportion_to_the_voxels() -> None:
    assert tile_bytes(checkpoint(), (8, 256, 256)) == pytest.approx(8 * tile_bytes(checkpoint(), (4, 128, 128)))


def test_a_tile_that_does_not_fit_is_refused_with_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    free = tile_bytes(checkpoint(), (8, 128, 128)) + 1
    monkeypatch.setattr(suitability, "available_bytes", lambda device: free)
    require_fitting_tile(checkpoint(), (8, 128, 128), NONE, (100, 1000, 1000), CPU)
    require_fitting_tile(checkpoint(), (64, 4096, 4096), NONE, (8, 100, 120), CPU)  # no tile is larger than its volume
    with pytest.raises(ValueRangeError, match=r"A tile of \(8, 128, 128\) fits") as caught:
        require_fitting_tile(checkpoint(), (8, 512, 512), NONE, (100, 1000, 1000), CPU)
    assert "GiB are free on cpu" in str(caught.value)
    with pytest.raises(ValueRangeError, match=r"\(256, 16, 16\) fits"):
        require_fitting_tile(checkpoint(), (512, 32, 32), NONE, (1000, 1000, 1000), CPU)
    monkeypatch.setattr(suitability, "available_bytes", lambda device: 0)
    with pytest.raises(ValueRangeError, match="No tile fits"):
        require_fitting_tile(checkpoint(), (8, 128, 128), NONE, (100, 1000, 1000), CPU)


@pytest.mark.parametrize(
    ("shape", "reaching"),
    [
        ((100, 1000, 1000), (9, 132, 136)),  # at one face of the volume
        ((8, 1000, 128), (10, 132, 144)),  # the tile is as deep and as wide as the volume: at both faces
    ],
)
def test_what_a_tile_reaches_beyond_the_volume_counts(
    shape: tuple[int, int, int], reaching: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tile, margin, needed = (8, 128, 128), (1, 4, 8), tile_bytes(checkpoint(), reaching)
    monkeypatch.setattr(suitability, "available_bytes", lambda device: needed + 1)
    require_fitting_tile(checkpoint(), tile, margin, shape, CPU)
    monkeypatch.setattr(suitability, "available_bytes", lambda device: needed - 1)
    with pytest.raises(ValueRangeError, match=r"A tile of \(8, 64, 64\) fits"):
        require_fitting_tile(checkpoint(), tile, margin, shape, CPU)


def test_memory_of_this_machine_is_known() -> None:
    assert 1 << 20 < available_bytes(CPU) < 1 << 50


@pytest.mark.parametrize(
    ("size", "axis"),
    [
        ((50, 4.6, 4.6), ""),
        ((8, 8, 8), ""),
        ((79, 4.6, 8), ""),
        ((501, 8, 8), "z"),
        ((50, 0.45, 8), "y"),
        ((50, 8, 81), "x"),
    ],
)
def test_a_voxel_size_ten_times_off_is_told(size: Any, axis: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="connectomics_neurodiff"):
        warn_of_voxel_size(checkpoint(voxel_nm=[[50, 4.6, 4.6], [8, 8, 8]]), size)
    assert [record.args[1] for record in caplog.records if record.args] == ([axis] if axis else [])
    assert not axis or "to" in caplog.text


def test_a_checkpoint_that_does_not_say_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_voxel_size(checkpoint(), (8, 8, 8))
    assert not caplog.records


NOTHING, SOMETHING = np.zeros((2, 3, 4), np.uint8), np.ones((2, 3, 4), np.uint8)


@pytest.mark.parametrize(
    ("learnt", "mito", "dark", "warning"),
    [
        (True, SOMETHING, None, "these masks do not tell"),
        (True, None, None, "these masks do not tell"),
        (True, NOTHING, NOTHING, "these masks do not tell"),
        (True, None, NOTHING, "these masks do not tell"),
        (True, SOMETHING, NOTHING, ""),  # tissue with mitochondria and nothing else
        (True, NOTHING, SOMETHING, ""),
        (False, SOMETHING, None, ""),
        (False, SOMETHING, SOMETHING, "was not trained with masks of what is dark"),
    ],
)
def test_masks_that_tell_less_or_more_than_was_learnt_are_told_of(
    learnt: bool,
    mito: np.ndarray | None,
    dark: np.ndarray | None,
    warning: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_what_is_dark(checkpoint(knows_dark=learnt), mito, dark)
    assert warning in caplog.text
    assert len(caplog.records) == (1 if warning else 0)
