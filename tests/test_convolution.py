"""Convolutions on the CPU: those in bf16 against float32, those by oneDNN against torch's own in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from connectomics_neurodiff.convolution import ONEDNN_THRESHOLD, Convolution, use_sound_convolutions, weight_gradient


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
def test_gradients_agree_with_float32(convolution: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = convolution()  # type: ignore[operator]
        x = torch.randn(2, mixed.in_channels, 3, 10, 12)
    reference = copy.deepcopy(mixed)
    with torch.no_grad():
        reference.weight.copy_(rounded(reference.weight))
    use_sound_convolutions(mixed)
    x_mixed, x_reference = x.clone().requires_grad_(), rounded(x).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(x_mixed)
    assert y.dtype == torch.bfloat16
    y_reference = reference(x_reference)
    torch.testing.assert_close(y.float(), y_reference, rtol=2e-2, atol=2e-2)
    direction = rounded(torch.linspace(-1, 1, y.numel())).reshape(y.shape)
    (y.float() * direction).sum().backward()
    (y_reference * direction).sum().backward()
    torch.testing.assert_close(mixed.weight.grad, reference.weight.grad, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(x_mixed.grad, x_reference.grad, rtol=3e-2, atol=3e-2)
    if mixed.bias is not None:
        torch.testing.assert_close(mixed.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 12, 16])
@pytest.mark.parametrize("shape", [(1, 17, 23), (1, 32, 32), (2, 17, 23)])
def test_thin_images_are_convolved_as_in_float32(channels: int, shape: tuple[int, ...]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sound = nn.Conv3d(channels, 16, 3, padding=1)
        x = rounded(torch.randn(1, channels, *shape))
    reference = copy.deepcopy(sound)
    with torch.no_grad():
        reference.weight.copy_(rounded(reference.weight))
    use_sound_convolutions(sound)
    with torch.autocast("cpu", torch.bfloat16):
        y = sound(x)
    torch.testing.assert_close(y.float(), reference(x), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(sound.weight.grad, reference.weight.grad, rtol=3e-2, atol=1.0)


@pytest.mark.parametrize("shape", [(1, 32, 3, 10, 12), (1, 32, 9, 80, 6), (2, 32, 3, 5, 6), (1, 32, 1, 6, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": (1, 2, 2)},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "padding_mode": "replicate", "bias": False},
    ],
)
def test_float32_of_any_size_agrees_with_float64(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        single = Convolution(32, 8, **options)
        x = torch.randn(shape)
    double = nn.Conv3d(32, 8, **options).double()
    double.load_state_dict(single.state_dict())
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    outputs = single(inputs[0]), double(inputs[1])
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
    direction = torch.linspace(-1, 1, outputs[0].numel()).reshape(outputs[0].shape)
    for y in outputs:
        (y * direction.to(y.dtype)).sum().backward()
    mine = [inputs[0].grad, *(parameter.grad for parameter in single.parameters())]
    theirs = [inputs[1].grad, *(parameter.grad for parameter in double.parameters())]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_small_image_stays_channels_last() -> None:
    x = torch.zeros(1, 32, 2, 6, 8).contiguous(memory_format=torch.channels_last_3d)
    convolution = Convolution(32, 8, 3, padding=1).to(memory_format=torch.channels_last_3d)
    assert x[..., 0].numel() <= ONEDNN_THRESHOLD
    assert convolution(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_a_network_made_sound_keeps_its_names_and_numbers() -> None:
    plain = nn.Conv3d(2, 3, 3, padding=1)
    guarded = copy.deepcopy(plain)
    use_sound_convolutions(guarded)
    x = torch.linspace(-1, 1, 2 * 2 * 4 * 6 * 8).reshape(2, 2, 4, 6, 8)
    torch.testing.assert_close(plain(x), guarded(x), rtol=1e-6, atol=1e-6)
    assert list(plain.state_dict()) == list(guarded.state_dict())
    x = x.double()
    assert torch.equal(plain.double()(x), guarded.double()(x))


def test_a_network_made_sound_can_be_pickled_and_copied() -> None:
    guarded = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1))
    use_sound_convolutions(guarded)
    x = torch.linspace(-1, 1, 2 * 2 * 4 * 6 * 8).reshape(2, 2, 4, 6, 8)
    expected = guarded(x)
    copies = pickle.loads(pickle.dumps(guarded)), copy.deepcopy(guarded)
    with torch.no_grad():
        guarded[0].weight.zero_()
    for one in copies:
        assert torch.equal(one(x), expected), "with weights of its own"


@given(
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    stride=st.tuples(*[st.sampled_from([1, 2])] * 3),
    shape=st.tuples(st.integers(5, 7), st.integers(5, 9), st.integers(5, 11)),
    padded=st.booleans(),
    batch=st.sampled_from([1, 2]),  # a single sample goes its own way
)
@settings(max_examples=80, deadline=None)
def test_the_weight_gradient_is_that_of_autograd(
    kernel: tuple, stride: tuple, shape: tuple, padded: bool, batch: int
) -> None:
    padding = tuple(k // 2 if padded else 0 for k in kernel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, *shape, generator=generator, dtype=torch.float64)
    weight = torch.zeros(4, 3, *kernel, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv3d(x, weight, None, stride, padding)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(gradient)
    found = weight_gradient(gradient, x, kernel, stride, padding)
    torch.testing.assert_close(found.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_a_large_sample_is_not_split() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 6, 240, 8, generator=generator)
    assert x[..., 0].numel() > ONEDNN_THRESHOLD
    weight = torch.zeros(2, 16, 3, 3, 3, requires_grad=True)
    y = torch.nn.functional.conv3d(x, weight, None, 1, 1)
    gradient = torch.randn(y.shape, generator=generator)
    y.backward(gradient)
    found = weight_gradient(gradient, x, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-3)
