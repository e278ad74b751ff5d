"""Normalisation and an activation in one against torch's modules one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from connectomics_neurodiff import normalisation
from connectomics_neurodiff.normalisation import BatchNormELU, GroupNormELU, InstanceNormELU
from connectomics_neurodiff.synthesis.nets.norm import NormSiLU

WAYS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch, ELU": (BatchNormELU, lambda channels: nn.Sequential(nn.BatchNorm3d(channels), nn.ELU())),
    "one group, ELU": (lambda c: GroupNormELU(1, c), lambda c: nn.Sequential(nn.GroupNorm(1, c), nn.ELU())),
    "groups, ELU": (lambda c: GroupNormELU(4, c), lambda c: nn.Sequential(nn.GroupNorm(4, c), nn.ELU())),
    "instance, ELU": (
        lambda c: InstanceNormELU(c, affine=True),
        lambda c: nn.Sequential(nn.InstanceNorm3d(c, affine=True), nn.ELU()),
    ),
    "one group, SiLU": (lambda c: NormSiLU(c, 1), lambda c: nn.Sequential(nn.GroupNorm(1, c), nn.SiLU())),
    "groups, SiLU": (lambda c: NormSiLU(c, 4), lambda c: nn.Sequential(nn.GroupNorm(4, c), nn.SiLU())),
    "instance, SiLU": (lambda c: NormSiLU(c, c), lambda c: nn.Sequential(nn.GroupNorm(c, c), nn.SiLU())),
}


def pair(way: str, channels: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same weights, in double precision."""
    ours, theirs = (make(channels).double() for make in WAYS[way])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs[0].load_state_dict(ours.state_dict())  # type: ignore[index]
    return ours, theirs


def value_and_gradients(module: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], direction)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("piece", [normalisation.PIECE, 100])
def test_values_and_gradients_are_those_of_torch(
    way: str, layout: torch.memory_format, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalisation, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = pair(way, 12, generator)
    x = 3 + 2 * torch.randn(2, 12, 3, 5, 7, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)  # channels first: any layout may come
    kept = x.clone()
    for one, other in zip(
        value_and_gradients(ours, x, direction), value_and_gradients(theirs, x, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert torch.equal(x, kept), "the image is not overwritten"
    for name, value in theirs[0].state_dict().items():  # type: ignore[index]
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-10)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_stays_near_double_precision(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, _ = pair(way, 32, generator)
    x = (1 + torch.randn(2, 32, 4, 16, 32, generator=generator)).bfloat16()
    direction = torch.randn(x.shape, generator=generator).bfloat16()
    wanted = value_and_gradients(ours, x.double(), direction.double())
    found = value_and_gradients(copy.deepcopy(ours).float(), x, direction)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_other_devices_compute_by_torch() -> None:
    x = torch.empty(1, 8, 2, 4, 6, device="meta")
    for module in (BatchNormELU(8), GroupNormELU(4, 8), NormSiLU(8, 4)):
        assert module.to("meta")(x).shape == x.shape


def test_an_image_far_from_zero_loses_no_more_digits_than_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (module.float() for module in pair("batch, ELU", 8, generator))
    x = 1000 + torch.randn(2, 8, 8, 24, 24, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    direction = torch.randn(x.shape, generator=generator)
    for one, other in zip(
        value_and_gradients(ours, x, direction), value_and_gradients(theirs, x, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_lone_value_per_channel_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormELU(4)(torch.randn(1, 4, 1, 1, 1))
