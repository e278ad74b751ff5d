"""bf16 convolutions on the CPU: their weight gradient is the float32 one, the rest is bf16, names stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from connectomics_neurodiff.convolution import keep_weight_gradients_in_float32


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.detach().bfloat16().float()


@pytest.mark.parametrize(
    "convolution",
    [
        lambda: nn.Conv3d(1, 5, (1, 5, 5), padding=(0, 2, 2)),
        lambda: nn.Conv3d(6, 4, 3, stride=(1, 2, 2), padding=1, bias=False),
        lambda: nn.Conv3d(6, 4, 1, groups=2),
        lambda: nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate"),
    ],
)
def test_the_weight_gradient_is_the_float32_one(convolution: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = convolution()  # type: ignore[operator]
        x = torch.randn(2, mixed.in_channels, 3, 10, 12)
    reference = copy.deepcopy(mixed)
    with torch.no_grad():
        reference.weight.copy_(rounded(reference.weight))
    keep_weight_gradients_in_float32(mixed)
    x_mixed, x_reference = x.clone().requires_grad_(), rounded(x).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(x_mixed)
    assert y.dtype == torch.bfloat16
    y_reference = reference(x_reference)
    torch.testing.assert_close(y.float(), y_reference, rtol=2e-2, atol=2e-2)
    direction = rounded(torch.linspace(-1, 1, y.numel())).reshape(y.shape)
    (y.float() * direction).sum().backward()
    (y_reference * direction).sum().backward()
    torch.testing.assert_close(mixed.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x_mixed.grad, x_reference.grad, rtol=3e-2, atol=3e-2)
    if mixed.bias is not None:
        torch.testing.assert_close(mixed.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-3)


def test_without_autocast_nothing_changes() -> None:
    plain = nn.Conv3d(2, 3, 3, padding=1)
    guarded = copy.deepcopy(plain)
    keep_weight_gradients_in_float32(guarded)
    x = torch.linspace(-1, 1, 2 * 2 * 4 * 6 * 8).reshape(2, 2, 4, 6, 8)
    assert torch.equal(plain(x), guarded(x))
    assert list(plain.state_dict()) == list(guarded.state_dict())
