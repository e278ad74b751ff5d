"""Segmenters: the published size, any shape, options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from connectomics_neurodiff.errors import UnknownName, ValueRangeError
from connectomics_neurodiff.segmenters import SEGMENTERS, build_segmenter
from connectomics_neurodiff.segmenters.superhuman import DepthwiseUpsampling

SMALL = (4, 6, 8)


def test_published_parameter_count() -> None:
    network = build_segmenter("superhuman", in_channels=1, out_channels=3)
    assert sum(p.numel() for p in network.parameters()) == 1_555_471


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 20), (4, 16, 32), (5, 7, 33)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_pool": (False, True)},
        {"norm": "group"},
        {"norm": "instance", "upsample": "trilinear"},
        {"norm": "none", "upsample": "trilinear", "skip": "sum"},
    ],
)
def test_any_shape_in_same_shape_out(shape, options) -> None:
    torch.manual_seed(0)
    network = build_segmenter("superhuman", in_channels=2, out_channels=5, filters=SMALL, **options).eval()
    with torch.inference_mode():
        logits = network(torch.rand(2, 2, *shape))
    assert logits.shape == (2, 5, *shape)
    assert torch.isfinite(logits).all()


def test_padding_is_cropped_from_the_far_end() -> None:
    torch.manual_seed(0)
    network = build_segmenter("superhuman", filters=SMALL).eval()
    image = torch.rand(1, 1, 3, 10, 14)
    padded = torch.nn.functional.pad(image, (0, 2, 0, 2, 0, 0), mode="replicate")
    with torch.inference_mode():
        assert torch.equal(network(image), network(padded)[..., :10, :14])


def test_without_z_pool_sections_mix_only_through_convolutions() -> None:
    """Two 3D convolutions per module, 2 levels down and 1 up: nothing reaches farther than 6 sections."""
    torch.manual_seed(0)
    network = build_segmenter("superhuman", filters=(4, 6)).eval()
    image = torch.rand(1, 1, 16, 8, 8)
    changed = image.clone()
    changed[:, :, 0] = 0
    with torch.inference_mode():
        difference = (network(image) - network(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[0] > 1e-4
    assert (difference[7:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"norm": "none", "skip": "sum", "upsample": "trilinear"}])
def test_every_parameter_gets_a_gradient(options) -> None:
    torch.manual_seed(0)
    network = build_segmenter("superhuman", filters=SMALL, **options)
    network(torch.rand(1, 1, 4, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filter": SMALL}, UnknownName, "Did you mean 'filters'"),
        ({"norm": "bacth"}, UnknownName, "Did you mean 'batch'"),
        ({"upsample": "cubic"}, UnknownName, "Known: transposed, trilinear"),
        ({"skip": "add"}, UnknownName, "Known: concat, sum"),
        ({"filters": (8,)}, ValueRangeError, "two levels"),
        ({"filters": SMALL, "z_pool": (True,)}, ValueRangeError, "one z_pool per pooling, 2"),
        ({"out_channels": 0}, ValueRangeError, "out_channels"),
    ],
)
def test_bad_options(options, error, message) -> None:
    with pytest.raises(error, match=message):
        build_segmenter("superhuman", **options)


def test_unknown_segmenter_gets_a_suggestion() -> None:
    assert "superhuman" in SEGMENTERS
    with pytest.raises(UnknownName, match="Did you mean 'superhuman'"):
        build_segmenter("superhumn")


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2)])
def test_depthwise_upsampling_is_the_transposed_convolution(factor: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    ours = DepthwiseUpsampling(5, 5, factor, stride=factor, groups=5).double()
    x = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, *(n * f for n, f in zip(x.shape[2:], factor, strict=True)), dtype=torch.float64)
    results = []
    for forward in (ours.forward, lambda value: nn.ConvTranspose3d.forward(ours, value)):
        x.grad = None
        ours.zero_grad()
        y = forward(x)
        (y * direction).sum().backward()
        results.append([y.detach(), x.grad.clone(), ours.weight.grad.clone(), ours.bias.grad.clone()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
