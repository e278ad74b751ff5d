"""Segmenters: the published size, any shape, options."""

from __future__ import annotations

import pytest
import torch

from connectomics_neurodiff.errors import UnknownName, ValueRangeError
from connectomics_neurodiff.segmenters import SEGMENTERS, build_segmenter
from connectomics_neurodiff.segmenters.superhuman import projected_upsampling

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


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (2, 3, 1)])
def test_projected_upsampling_is_the_two_layers_one_after_the_other(factor: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 5, 3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    upsample = torch.nn.ConvTranspose3d(5, 5, factor, stride=factor, groups=5).double()
    project = torch.nn.Conv3d(5, 3, 1).double()
    values = [coarse, *upsample.parameters(), *project.parameters()]
    mine, theirs = projected_upsampling(coarse, upsample, project), project(upsample(coarse))
    torch.testing.assert_close(mine, theirs)
    assert mine.is_contiguous(memory_format=torch.channels_last_3d)
    direction = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, values, direction) for y in (mine, theirs))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_parameters_are_named_as_in_older_checkpoints(norm: str) -> None:
    names = set(build_segmenter("superhuman", filters=[4, 6], norm=norm).state_dict())
    normed = {"entry.0", "branch.0", "branch.3", *(["entry.1", "branch.1", "exit.0"] if norm != "none" else [])}
    assert {name.removeprefix("down.0.").rpartition(".")[0] for name in names if name.startswith("down.0.")} == normed
    assert {"up.0.upsample.bias", "up.0.project.weight", "embed.0.weight", "head.2.bias"} <= names
