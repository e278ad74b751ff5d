"""The grey scale of a volume inside the diffusion model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from connectomics_neurodiff.checkpoints import Checkpoint
from connectomics_neurodiff.errors import CheckpointMismatch, ValueRangeError
from connectomics_neurodiff.synthesis import GreyScale, grey_scale_for, grey_scale_of, recorded_scales


def checkpoint(**extra: Any) -> Checkpoint:
    return Checkpoint("denoiser", "neurodiff", {}, {}, extra)


def test_a_volume_becomes_centred_with_unit_variance() -> None:
    image = np.random.default_rng(0).beta(2, 5, (3, 40, 50)).astype(np.float32)
    values = grey_scale_of(image).to_model(image)
    assert values.dtype == np.float32
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(values.std()) == pytest.approx(1, abs=1e-5)


def test_every_grey_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.float32) / 255
    scale = GreyScale(0.43, 0.11)
    back = np.rint(255 * scale.to_grey(scale.to_model(levels)))
    np.testing.assert_array_equal(back, np.arange(256))


def test_limits_are_black_and_white_and_the_default_is_the_published_scale() -> None:
    scale = GreyScale(0.25, 0.5)
    assert scale.limits == (-0.5, 1.5)
    np.testing.assert_allclose(scale.to_grey(np.array([-9.0, *scale.limits, 9.0])), [0, 0, 1, 1])
    assert GreyScale().limits == (-1, 1)


@pytest.mark.parametrize("image", [np.zeros((2, 3, 4)), np.full((2, 3, 4), 0.4)])
def test_a_constant_image_has_no_scale(image: np.ndarray) -> None:
    with pytest.raises(ValueRangeError, match="must show something"):
        grey_scale_of(image)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.0), (0.5, -1.0), (float("nan"), 1.0), (0.5, float("inf"))])
def test_a_scale_must_be_one(mean: float, std: float) -> None:
    with pytest.raises(ValueRangeError, match="finite"):
        GreyScale(mean, std)


def test_the_scale_of_the_nearest_voxel_size_is_taken_and_of_equals_the_first() -> None:
    scales = [GreyScale(0.1, 0.2), GreyScale(0.3, 0.4), GreyScale(0.5, 0.6)]
    kept = checkpoint(grey_scales=recorded_scales(scales, [(8, 8, 8), (50, 4.6, 4.6), (8, 8, 8)]))
    assert grey_scale_for(kept, (30, 6, 6)) == scales[1]
    assert grey_scale_for(kept, (10, 10, 10)) == scales[0]


def test_of_an_unknown_voxel_size_the_train_parts_scale_is_taken() -> None:
    scales = [GreyScale(0.1, 0.2), GreyScale(0.3, 0.4)]
    kept = checkpoint(grey_scales=recorded_scales(scales, [(50, 4.6, 4.6), (8, 8, 8)]))
    assert grey_scale_for(kept, None) == scales[0]
    with pytest.raises(ValueRangeError, match="oxel size"):
        grey_scale_for(kept, (30, 0, 6))


def test_a_checkpoint_of_an_older_version_is_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="older version"):
        grey_scale_for(checkpoint(), (30, 6, 6))


@pytest.mark.parametrize(
    "entry", [{"mean": 0.5}, {"mean": 0.5, "std": 0, "voxel_nm": [1, 1, 1]}, {"mean": 1, "std": 1, "voxel_nm": [1]}, 3]
)
def test_a_damaged_scale_is_refused(entry: object) -> None:
    with pytest.raises(CheckpointMismatch, match="damaged"):
        grey_scale_for(checkpoint(grey_scales=[entry]), (30, 6, 6))
