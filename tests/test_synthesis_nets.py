"""The denoiser: published size, identity at the start, any shape, physical coordinates, switches."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectomics_neurodiff.convolution import Convolution
from connectomics_neurodiff.errors import ShapeMismatch, UnknownName, ValueRangeError
from connectomics_neurodiff.memory import peak_bytes
from connectomics_neurodiff.registry import Registry
from connectomics_neurodiff.synthesis import SYNTHESISERS, build_denoiser
from connectomics_neurodiff.synthesis.nets import Mamba
from connectomics_neurodiff.synthesis.nets.blocks import (
    Pointwise,
    ResidualBlock,
    join_pixels,
    part_pixels,
    resize_sections,
    time_embedding,
)
from connectomics_neurodiff.synthesis.nets.norm import NormSiLU
from connectomics_neurodiff.synthesis.nets.resolution import ResolutionEmbedding
from connectomics_neurodiff.synthesis.nets.rgm import physical_coordinates

TINY: dict[str, Any] = {
    "base_channels": 32,
    "pixels": 1,
    "multipliers": (1, 1, 1),
    "condition_channels": (32, 32),
    "rgm_reductions": (4,),
    "time_channels": 32,
}


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_denoiser("neurodiff", preset="small", **(TINY | options))


def awake(network: nn.Module) -> nn.Module:
    """Replace the zero initialisations, so that every branch contributes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(shape: tuple[int, int, int] = (3, 12, 20), b: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x_t": torch.randn(b, 1, *shape, generator=generator),
        "t": torch.arange(b) * 7,
        "condition": (torch.rand(b, 2, *shape, generator=generator) > 0.7).float(),
        "voxel_nm": torch.tensor([[29.0, 6.0, 6.0]]).repeat(b, 1),
    }


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 62_339_361),  # as published
        ({"checkpointing": True}, 62_339_361),
        ({"conditioning": "msc"}, 62_339_361 - 2 * 27 * 32),  # two channels less into the first convolution
        ({"resolution_embedding": True}, 62_339_361 + 4 * 256 + 257 * 256 + 256),  # two layers, the unknown size
        ({"learn_variance": True}, 62_339_361 + 27 * 32 + 1),  # one channel more out of the last convolution
    ],
)
def test_the_paper_preset_has_the_published_size(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert count(build_denoiser("neurodiff", **options)) == parameters


def test_the_paper_preset_has_ten_rgm_blocks_at_8_16_32_and_the_middle() -> None:
    with torch.device("meta"):
        network = build_denoiser("neurodiff")
    blocks = [name for name, module in network.named_modules() if isinstance(module, Mamba)]
    assert len(blocks) == 10
    assert sum(name.startswith("middle") for name in blocks) == 1


def test_the_paper_preset_runs_on_a_patch_smaller_than_its_strides() -> None:
    network = build_denoiser("neurodiff")
    with torch.no_grad():
        noise = network(**inputs((1, 20, 33), b=1))
    assert noise.shape == (1, 1, 1, 20, 33)


def test_a_fresh_network_predicts_zero_and_its_first_gradient_reaches_the_output() -> None:
    network = tiny()
    noise = network(**inputs())
    assert not noise.any()
    (noise - 1).square().mean().backward()
    assert network.out_conv.weight.grad.any()


def test_every_parameter_learns_once_the_zero_convolutions_are_awake() -> None:
    network = awake(tiny(scan_directions=2))
    network(**inputs()).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (5, 7, 9), (2, 33, 8), (6, 20, 28)])
@pytest.mark.parametrize("conditioning", ["msc", "concat"])
def test_any_shape_comes_back(shape: tuple[int, int, int], conditioning: str) -> None:
    network = awake(tiny(conditioning=conditioning))
    with torch.no_grad():
        noise = network(**inputs(shape))
    assert noise.shape == (2, 1, *shape)
    assert torch.isfinite(noise).all()


@pytest.mark.parametrize("conditioning", ["msc", "concat", "both", "none"])
def test_cached_hints_change_nothing(conditioning: str) -> None:
    network = awake(tiny(conditioning=conditioning))
    batch = inputs((3, 13, 20))
    with torch.no_grad():
        hints = network.encode_condition_path(batch["condition"])
        assert torch.equal(network(**batch, hints=hints), network(**batch))
    assert len(hints) == (3 if conditioning in ("msc", "both") else 0)


@pytest.mark.parametrize(
    ("options", "changed", "matters"),
    [
        ({"conditioning": "msc"}, "condition", True),
        ({"conditioning": "concat"}, "condition", True),
        ({"conditioning": "none"}, "condition", False),
        ({}, "voxel_nm", True),
        ({"rpge": False}, "voxel_nm", False),
        ({"rgm": False}, "voxel_nm", False),
        ({"scan_directions": 2}, "voxel_nm", True),
        ({}, "t", True),
    ],
)
def test_what_an_input_changes(options: dict[str, Any], changed: str, matters: bool) -> None:
    network = awake(tiny(**options))
    batch = inputs()
    other = batch | {changed: 1 - batch[changed] if changed == "condition" else batch[changed] * 2 + 1}
    with torch.no_grad():
        assert (not torch.equal(network(**batch), network(**other))) == matters


def test_samples_of_a_batch_do_not_mix() -> None:
    network = awake(tiny())
    batch = inputs(b=2)
    batch["voxel_nm"] = torch.tensor([[29.0, 6.0, 6.0], [8.0, 8.0, 8.0]])
    with torch.no_grad():
        together = network(**batch)
        alone = torch.cat([network(**{k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_is_close_to_float32() -> None:
    network = awake(tiny())
    batch = inputs()
    with torch.no_grad():
        exact = network(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(**batch).float()
    assert float((rough - exact).square().mean().sqrt()) < 0.05 * float(exact.square().mean().sqrt())


def test_the_fast_parts_are_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's convolutions and norms, contiguous in memory, everything out of place."""
    network = awake(tiny(base_channels=64)).to(memory_format=torch.channels_last_3d)
    batch = inputs((3, 24, 40), b=1)
    with torch.no_grad():
        hints = network.encode_condition_path(batch["condition"])
        overwriting = network(**batch)
    fast = network(**batch)
    with_hints = network(**batch, hints=hints)
    found = torch.autograd.grad(fast.square().sum(), list(network.parameters()))
    monkeypatch.setattr(Convolution, "_conv_forward", nn.Conv3d._conv_forward)
    monkeypatch.setattr(Pointwise, "forward", nn.Conv3d.forward)
    monkeypatch.setattr(
        NormSiLU, "forward", lambda norm, x, over=False: nn.functional.silu(nn.GroupNorm.forward(norm, x))
    )
    network.to(memory_format=torch.contiguous_format)
    plain = network(**batch)
    for one in (fast, with_hints, overwriting):
        torch.testing.assert_close(one, plain, rtol=0, atol=1e-5 * float(plain.detach().abs().max()))
    wanted = torch.autograd.grad(plain.square().sum(), list(network.parameters()))
    for (name, _), one, other in zip(network.named_parameters(), found, wanted, strict=True):
        near = {"rtol": 1e-4, "atol": 1e-5 * float(other.abs().max())}
        torch.testing.assert_close(one, other, **near, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient_and_keeps_less(precision: torch.dtype) -> None:
    found, kept = [], []
    for checkpointing in (False, True):
        network = awake(tiny(checkpointing=checkpointing, scan_directions=2))
        bytes_kept = 0

        def count_bytes(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision == torch.bfloat16),
        ):
            loss = network(**inputs()).float().square().mean()
        kept.append(bytes_kept)
        loss.backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert list(found[0]) == list(found[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert kept[1] < 0.5 * kept[0]


def test_coordinates_are_physical_centred_and_in_raster_order() -> None:
    got = physical_coordinates((2, 1, 3), torch.tensor([[30.0, 48.0, 64.0]]))[0] * 1000
    by_hand = [[-15, 0, -64], [-15, 0, 0], [-15, 0, 64], [15, 0, -64], [15, 0, 0], [15, 0, 64]]
    np.testing.assert_allclose(got.numpy(), by_hand, atol=1e-4)


def test_rgm_sees_the_pitch_of_its_level() -> None:
    """At 4x down a voxel of 6 nm is 24 nm wide; z is never reduced."""
    network = tiny()
    seen = []
    network.middle[0].rgm.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    with torch.no_grad():
        network(**inputs(b=1))
    assert seen[0].tolist() == [[29.0, 24.0, 24.0]]


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_coordinates_do_not_drown_the_features(scale: float) -> None:
    """Published code: the encoding is 400 times the features, and replacing all of them changes 0.8 to 10 %."""
    rgm = tiny().middle[0].rgm
    seen = []
    rgm.mamba.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    pitch = torch.tensor([[29.0, 48.0, 48.0]])
    with torch.no_grad():
        for seed in (0, 1):
            features = scale * torch.randn(1, 32, 8, 64, 64, generator=torch.Generator().manual_seed(seed))
            rgm(features, pitch)
    changed = (seen[0] - seen[1]).square().mean().sqrt() / seen[0].square().mean().sqrt()
    assert changed > 1.0


def test_mamba_has_the_parameters_of_mamba_ssm() -> None:
    shapes = {name: tuple(p.shape) for name, p in Mamba(40).named_parameters()}
    assert shapes == {
        "A_log": (80, 16),
        "D": (80,),
        "in_proj.weight": (160, 40),
        "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,),
        "x_proj.weight": (3 + 32, 80),
        "dt_proj.weight": (80, 3),
        "dt_proj.bias": (80,),
        "out_proj.weight": (40, 80),
    }


def test_mamba_starts_as_mamba_ssm_does() -> None:
    torch.manual_seed(0)
    mamba = Mamba(64)
    steps = nn.functional.softplus(mamba.dt_proj.bias.detach())
    assert 1e-3 * 0.99 <= float(steps.min()) < 3e-3
    assert 3e-2 < float(steps.max()) <= 1e-1 * 1.01
    torch.testing.assert_close(-torch.exp(mamba.A_log.detach()), -torch.arange(1.0, 17).repeat(128, 1))
    assert float(mamba.dt_proj.weight.detach().abs().max()) <= 4**-0.5
    assert (mamba.D == 1).all()


@pytest.mark.parametrize(("directions", "looks_ahead"), [(1, False), (2, True)])
def test_one_direction_is_causal(directions: int, looks_ahead: bool) -> None:
    torch.manual_seed(0)
    mamba = Mamba(8, directions=directions)
    tokens = torch.randn(1, 30, 8)
    later = tokens.clone()
    later[:, 20:] += 1
    with torch.no_grad():
        difference = (mamba(tokens) - mamba(later)).abs().amax((0, 2))
    assert bool(difference[:20].max() > 1e-6) == looks_ahead
    assert difference[20:].max() > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("groups", [1, 2, 6, 10, 30])
def test_norm_and_silu_over_their_input(layout: torch.memory_format, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 30, 3, 5, 7, generator=generator).contiguous(memory_format=layout)
    norm = NormSiLU(30, groups)
    norm.weight.data, norm.bias.data = torch.randn(2, 30, generator=generator)
    with torch.no_grad():
        wanted = nn.functional.silu(nn.functional.group_norm(x, groups, norm.weight, norm.bias))
        found = norm(x, over=True)
    assert (found is x) == (groups > 2), "with one or two groups it would save nothing"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("in_channels", "spent", "gradients", "overwritten"),
    [(8, True, False, True), (8, False, False, False), (8, True, True, False), (4, True, False, False)],
    ids=["spent", "not spent", "a gradient needs it", "the skip connection needs it"],
)
def test_a_residual_block_overwrites_only_a_spent_image(
    in_channels: int, spent: bool, gradients: bool, overwritten: bool
) -> None:
    block = awake(ResidualBlock(in_channels, 4, 6, groups=4))
    x, time = torch.randn(1, in_channels, 3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.ones(1, 6)
    before = x.clone()
    wanted = block(x, time)
    with torch.set_grad_enabled(gradients):
        found = block(x, time, spent=spent)
    assert torch.equal(x, before) is not overwritten
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_widest_image_alone_is_overwritten_and_that_saves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = build_denoiser("neurodiff", preset="paper")
    image = {name: tensor.to("meta") for name, tensor in inputs((4, 256, 256), b=1).items()}
    overwriting = []
    plain = NormSiLU.forward

    def watched(norm: NormSiLU, x: Tensor, *, over: bool = False) -> Tensor:
        overwriting.extend([x.numel()] if over else [])
        return plain(norm, x, over=over)

    def never(norm: NormSiLU, x: Tensor, *, over: bool = False) -> Tensor:
        return plain(norm, x)

    monkeypatch.setattr(NormSiLU, "forward", watched)
    least = peak_bytes(network, *image.values())
    network(**image)
    assert overwriting == [96 * 4 * 256 * 256], "64 channels from below, 32 from the encoder"
    monkeypatch.setattr(NormSiLU, "forward", never)
    assert least < 0.95 * peak_bytes(network, *image.values())


def test_a_matrix_product_over_the_voxels_is_a_convolution() -> None:
    mine = Pointwise(6, 5).double()
    x = torch.randn(2, 6, 3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    plain = nn.functional.conv3d(x, mine.weight, mine.bias)
    torch.testing.assert_close(mine(x), plain)
    values = [x, mine.weight, mine.bias]
    got = torch.autograd.grad(mine(x).square().sum(), values)
    for one, other in zip(got, torch.autograd.grad(plain.square().sum(), values), strict=True):
        torch.testing.assert_close(one, other)


def test_images_stay_channels_last_through_the_network_and_back() -> None:
    network = awake(tiny()).to(memory_format=torch.channels_last_3d)
    strides = {}

    def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        strides[module, "forward"] = output.stride(1)
        output.register_hook(lambda gradient: strides.update({(module, "backward"): gradient.stride(1)}))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d) and not name.startswith("condition"):
            module.register_forward_hook(watch)
    network(**inputs((3, 16, 24), b=1)).square().sum().backward()
    assert [module for module, stride in strides.items() if stride != 1 and module[0] is not network.out_conv] == []


@pytest.mark.parametrize(("size", "mode"), [((8, 12), "trilinear"), ((2, 3), "area")])
def test_sections_are_resized_as_volumes_with_z_kept(size: tuple[int, int], mode: str) -> None:
    x = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_sections(x, size), nn.functional.interpolate(x, size=(5, *size), mode=mode))


def test_time_embedding_by_hand() -> None:
    got = time_embedding(torch.tensor([0, 3]), 4)
    by_hand = [[1, 1, 0, 0], [np.cos(3), np.cos(3 / 1000**0.5), np.sin(3), np.sin(3 / 1000**0.5)]]
    np.testing.assert_allclose(got.numpy(), by_hand, atol=1e-6)


def test_options_survive_json_and_rebuild_the_network() -> None:
    network = tiny(conditioning="msc", scan_directions=2, resolution_embedding=True, learn_variance=True)
    again = build_denoiser("neurodiff", preset="paper", **json.loads(json.dumps(network.options)))
    again.load_state_dict(network.state_dict())
    assert again.options == network.options


@pytest.mark.parametrize(
    ("name", "options", "error", "hint"),
    [
        ("neurodif", {}, UnknownName, "neurodiff"),
        ("neurodiff", {"preset": "smal"}, UnknownName, "small"),
        ("neurodiff", {"conditionig": "msc"}, UnknownName, "conditioning"),
        ("neurodiff", {"conditioning": "concatt"}, UnknownName, "concat"),
        ("neurodiff", {"scan_directions": 3}, ValueRangeError, "1 or 2"),
        ("neurodiff", {"blocks": 0}, ValueRangeError, "positive"),
        ("neurodiff", {"rgm_reductions": (3,)}, ValueRangeError, "rgm_reductions"),
        ("neurodiff", {"time_features": 63}, ValueRangeError, "even"),
        ("neurodiff", {"multipliers": ()}, ValueRangeError, "level"),
    ],
)
def test_wrong_names_and_options(name: str, options: dict[str, Any], error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint) as caught:
        build_denoiser(name, **options)
    assert "\n" not in str(caught.value)


def test_without_a_voxel_size_there_is_no_rpge() -> None:
    """A batch of a known and an unknown size against networks of the same weights with and without RPGE."""
    network, without = awake(tiny()), tiny(rpge=False)
    without.load_state_dict(network.state_dict(), strict=False)
    batch = inputs()
    batch["voxel_nm"][1] = 0
    with torch.no_grad():
        got = network(**batch)
        expected = [network(**inputs())[0], without(**inputs())[1]]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert (got[1] - network(**inputs())[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "size", [[-29.0, 6.0, 6.0], [29.0, 0.0, 6.0], [float("nan"), 6.0, 6.0], [float("inf"), 6.0, 6.0], [0.0, 0.0, -1.0]]
)
def test_voxel_sizes_that_are_neither_known_nor_unknown(size: list[float]) -> None:
    batch = inputs()
    batch["voxel_nm"][1] = torch.tensor(size)
    with pytest.raises(ValueRangeError, match="or three zeros where it is unknown") as caught:
        tiny()(**batch)
    assert "\n" not in str(caught.value)


def test_the_resolution_embedding_starts_as_nothing() -> None:
    plain, told = awake(tiny()), tiny(resolution_embedding=True)
    missing = told.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"resolution"}
    with torch.no_grad():
        assert torch.equal(plain(**inputs()), told(**inputs()))


@pytest.mark.parametrize("other", [[29.0, 7.0, 6.0], [29.0, 6.0, 7.0], [40.0, 6.0, 6.0], [0.0, 0.0, 0.0]])
def test_the_resolution_embedding_reaches_the_finest_level(other: list[float]) -> None:
    """Without RGM nothing else reads the voxel size: the very first block differs, of that sample alone."""
    network = awake(tiny(resolution_embedding=True, rgm=False))
    seen = []
    network.encoder[0][0].register_forward_hook(lambda module, args, output: seen.append(output))
    batch = inputs()
    with torch.no_grad():
        network(**batch)
        batch["voxel_nm"][1] = torch.tensor(other)
        network(**batch)
    assert torch.equal(seen[0][0], seen[1][0])
    assert (seen[0][1] - seen[1][1]).abs().max() > 1e-4


def test_the_embedding_of_ten_nanometres_by_hand() -> None:
    embedding = ResolutionEmbedding(4)
    with torch.no_grad():
        embedding.known[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]))
        embedding.known[0].bias.zero_()
        embedding.known[2].weight.copy_(torch.eye(4))
        embedding.unknown.fill_(3)
        got = embedding(torch.tensor([[10.0, 20.0, 5.0], [0.0, 0.0, 0.0]]))
    a, b = np.log(2), -np.log(2)
    np.testing.assert_allclose(got, [[0, a / (1 + np.exp(-a)), b / (1 + np.exp(-b)), 0], [3, 3, 3, 3]], atol=1e-6)


def test_every_parameter_learns_with_all_options() -> None:
    network = awake(tiny(resolution_embedding=True, learn_variance=True))
    batch = inputs()
    batch["voxel_nm"][1] = 0
    network(**batch).square().sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_learned_variance_is_a_second_channel_and_leaves_the_first_alone() -> None:
    plain, two = awake(tiny()), tiny(learn_variance=True)
    state = plain.state_dict()
    for name in ("out_conv.weight", "out_conv.bias"):
        state[name] = torch.cat([state[name], 2 * state[name]])
    two.load_state_dict(state)
    with torch.no_grad():
        one, both = plain(**inputs()), two(**inputs())
    assert both.shape == (2, 2, 3, 12, 20)
    assert (plain.learns_variance, two.learns_variance) == (False, True)
    torch.testing.assert_close(both, torch.cat([one, 2 * one], dim=1))


@pytest.mark.parametrize("wrong", ["x_t", "t", "condition", "voxel_nm"])
def test_inputs_that_do_not_belong_together(wrong: str) -> None:
    batch = inputs()
    batch[wrong] = batch[wrong][:1] if wrong != "x_t" else batch[wrong][:, 0]
    with pytest.raises(ShapeMismatch, match="Got"):
        tiny()(**batch)


def test_the_registry_lists_neurodiff() -> None:
    assert isinstance(SYNTHESISERS, Registry)
    assert "neurodiff" in SYNTHESISERS.names()


def test_joined_pixels_are_the_squares_of_the_image_and_part_again() -> None:
    x = torch.arange(2 * 3 * 2 * 4 * 6, dtype=torch.float32).view(2, 3, 2, 4, 6)
    joined = join_pixels(x, 2)
    assert joined.shape == (2, 12, 2, 2, 3)
    for channel in range(3):
        for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            assert torch.equal(joined[:, 4 * channel + i], x[:, channel, :, row::2, column::2])
    assert torch.equal(part_pixels(joined, 2), x)
    assert join_pixels(x, 1) is x


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 16, 33), (2, 40, 24)])
def test_joined_pixels_take_every_shape(shape: tuple[int, int, int]) -> None:
    network = build_denoiser("neurodiff", preset="small", flat_levels=1).eval()
    assert network.settings.reductions == (2, 4, 8)
    x, condition = torch.randn(2, 1, *shape), torch.zeros(2, 2, *shape)
    with torch.no_grad():
        out = network(x, torch.tensor([3, 200]), condition, torch.tensor([[30.0, 6, 6], [8, 8, 8]]))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_flat_levels_do_not_see_other_sections() -> None:
    """With every level flat and no scan, a section's output depends on that section alone; deeper levels join them."""
    shape = (1, 1, 4, 16, 16)
    condition, size = torch.zeros(1, 2, *shape[2:]), torch.tensor([[30.0, 6, 6]])
    moved = {}
    for flat in (3, 2):
        torch.manual_seed(0)
        network = build_denoiser("neurodiff", preset="small", flat_levels=flat, rgm=False, groups=1).eval()
        for module in network.modules():
            if isinstance(module, NormSiLU):  # whose statistics are of all sections
                module.forward = lambda image, over=False: F.silu(image)  # type: ignore[method-assign]
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x = torch.randn(shape)
        other = x.clone()
        other[:, :, 0] += 1
        with torch.no_grad():
            a, b = (network(image, torch.tensor([9]), condition, size) for image in (x, other))
        moved[flat] = (a - b).abs().amax(dim=(0, 1, 3, 4))
    assert moved[3][0] > 0
    assert not moved[3][1:].any()
    assert (moved[2] > 0).all()


@pytest.mark.parametrize("options", [{"pixels": 3}, {"pixels": 0}, {"flat_levels": -1}])
def test_pixels_and_flat_levels_that_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueRangeError, match="Got"):
        build_denoiser("neurodiff", preset="small", **options)
