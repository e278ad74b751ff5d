"""Guidance: linear in its scale, exact at 1 and 0, and only for denoisers that know what no condition is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import awake_denoiser
from torch import Tensor, nn

from connectomics_neurodiff.checkpoints import Checkpoint
from connectomics_neurodiff.conditions import NULL_CONDITION
from connectomics_neurodiff.errors import CheckpointMismatch, ValueRangeError
from connectomics_neurodiff.synthesis import (
    DiffusionProcess,
    GuidedDenoiser,
    cosine_betas,
    guided,
    synthesise,
)


def arguments(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(1, 1, 3, 12, 20, generator=generator)
    condition = (torch.rand(1, 2, 3, 12, 20, generator=generator) < 0.3).float()
    return noisy, torch.tensor([7]), condition, torch.tensor([[29.0, 6.0, 6.0]])


@pytest.mark.parametrize("conditioning", ["msc", "concat", "both"])
def test_prediction_lies_on_the_line_between_with_and_without(conditioning: str) -> None:
    plain = awake_denoiser(conditioning=conditioning)
    noisy, t, condition, size = arguments()
    with torch.no_grad():
        with_masks = plain(noisy, t, condition, size)
        without = plain(noisy, t, torch.full_like(condition, NULL_CONDITION), size)
        assert (with_masks - without).abs().max() > 1e-3
        for scale in (0.0, 0.5, 1.0, 3.0):
            guide = GuidedDenoiser(plain, scale)
            expected = without + scale * (with_masks - without)
            torch.testing.assert_close(guide(noisy, t, condition, size), expected)
            hints = guide.encode_condition_path(condition)
            torch.testing.assert_close(guide(noisy, t, condition, size, hints=hints), expected)


def test_the_variance_is_that_with_condition() -> None:
    class TwoChannels(nn.Module):
        learns_variance = True

        def encode_condition_path(self, condition: Tensor) -> list[Tensor]:
            return []

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, size: Tensor, hints: Any = None) -> Tensor:
            return condition

    noisy, t, condition, size = arguments()
    guide = GuidedDenoiser(TwoChannels(), 3.0)
    assert guide.learns_variance
    predicted = guide(noisy, t, condition, size)
    torch.testing.assert_close(predicted[:, 0], 0.5 + 3 * (condition[:, 0] - 0.5))
    torch.testing.assert_close(predicted[:, 1], condition[:, 1])


def checkpoint(dropout: float | None) -> Checkpoint:
    extra = {} if dropout is None else {"condition_dropout": dropout}
    return Checkpoint("denoiser", "neurodiff", {}, {}, extra)


def test_only_a_denoiser_trained_with_dropout_can_be_guided() -> None:
    plain = awake_denoiser()
    assert guided(plain, 1.0, checkpoint(None)) is plain
    assert isinstance(guided(plain, 2.0, checkpoint(0.1)), GuidedDenoiser)
    for dropout in (None, 0.0):
        with pytest.raises(CheckpointMismatch, match="CONDITION_DROPOUT"):
            guided(plain, 2.0, checkpoint(dropout))
    for scale in (-0.1, 1e6, float("nan"), float("inf")):
        with pytest.raises(ValueRangeError, match="guidance"):
            guided(plain, scale, checkpoint(0.1))


def test_a_guided_denoiser_paints_and_its_scratch_is_its_own(tmp_path: Any) -> None:
    process = DiffusionProcess(cosine_betas(20))
    membrane = (np.random.default_rng(0).random((4, 20, 28)) < 0.3).astype(np.uint8)
    options: dict[str, Any] = {"seed": 1, "steps": 3, "tile": (4, 12, 16), "overlap": (0, 4, 4)}
    images = []
    for scale in (1.0, 4.0):
        guide = GuidedDenoiser(awake_denoiser(), scale)
        painted = synthesise(guide, process, membrane, None, (29, 6, 6), scratch=tmp_path, **options)
        images.append(np.asarray(painted))
    plain = synthesise(awake_denoiser(), process, membrane, None, (29, 6, 6), **options)
    # u + 1 (c - u) is c but for rounding, which three steps of so much noise enlarge: 1.1e-5 on a CPU without AMX.
    np.testing.assert_allclose(images[0], plain, atol=1e-4)
    assert np.abs(images[1] - images[0]).max() > 0.01


def test_below_its_first_step_guidance_is_off_and_costs_one_pass() -> None:
    plain = awake_denoiser()
    passes: list[int] = []
    plain.register_forward_hook(lambda *_: passes.append(1))
    guide = GuidedDenoiser(plain, 3.0, first=8)
    noisy, t, condition, size = arguments()
    with torch.no_grad():
        torch.testing.assert_close(guide(noisy, t, condition, size), plain(noisy, t, condition, size))
        assert len(passes) == 2
        whole = GuidedDenoiser(plain, 3.0)
        torch.testing.assert_close(guide(noisy, t + 1, condition, size), whole(noisy, t + 1, condition, size))
        assert len(passes) == 6
        assert not torch.allclose(guide(noisy, t + 1, condition, size), plain(noisy, t + 1, condition, size))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 7.0, 1e9])
def test_the_first_guided_step_is_the_least_noisy_of_its_level(level: float) -> None:
    process = DiffusionProcess(cosine_betas(250))
    noise = np.sqrt((1 - process.signal) / process.signal)
    first = process.step_at(level)
    assert (noise[first:] >= level).all()
    assert (noise[:first] < level).all()
