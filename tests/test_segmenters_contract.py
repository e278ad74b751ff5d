"""What every segmenter promises, whatever its architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from connectomics_neurodiff.convolution import use_sound_convolutions
from connectomics_neurodiff.errors import CheckpointMismatch, ShapeMismatch, UnknownName, UserError, ValueRangeError
from connectomics_neurodiff.segmenters import (
    SEGMENTERS,
    build_segmenter,
    encoder_of,
    options_of,
    segmenter_from_checkpoint,
)
from connectomics_neurodiff.segmenters.levels import pad_to_multiple
from connectomics_neurodiff.segmenters.seg_mamba import TriOrientatedMamba, across_sections, along_sections
from connectomics_neurodiff.training import affinity_loss, agq_loss, weighted_bce
from connectomics_neurodiff.volume import grow_phantom

#: Every registered segmenter, small.
SMALL: dict[str, dict[str, Any]] = {
    "superhuman": {"filters": [6, 8, 10]},
    "swin_unetr": {"feature_size": 12},
    "seg_mamba": {"filters": [6, 8, 10]},
    "agq": {"filters": [6, 8, 10], "width": 8, "learned_queries": 4, "guided_queries": 4},
}
every_segmenter = pytest.mark.parametrize("name", sorted(SMALL))


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_segmenter(name, **(SMALL[name] | changes))


def image_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_every_registered_segmenter_is_under_contract() -> None:
    assert set(SMALL) == {name for name in SEGMENTERS if not name.startswith("unet")}


@every_segmenter
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 20), (5, 9, 70), (18, 33, 40)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_size_in_the_same_size_out(name: str, shape: tuple[int, ...], batch: int) -> None:
    network = build(name, in_channels=1, out_channels=5).eval()
    with torch.inference_mode():
        logits = network(image_of(batch, 1, *shape))
    assert logits.shape == (batch, 5, *shape)
    assert torch.isfinite(logits).all()


@every_segmenter
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    network = build(name).eval()
    images = image_of(2, 1, 4, 20, 24)
    with torch.inference_mode():
        together, alone = network(images), network(images[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@every_segmenter
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build(name)
    # The smallest patch that leaves more than one voxel on the coarsest level of the deepest of them, and no symmetry.
    image = image_of(2, 1, 33, 65, 65) if name == "swin_unetr" else image_of(2, 1, 6, 20, 24)
    target = (image_of(2, 3, *image.shape[2:], seed=1) > 0.4).float()
    batch = {"image": image, "affinity": target, "weight": torch.ones_like(target)}
    if name == "agq":  # its queries learn from neurons
        halves = torch.arange(image.shape[-1]).expand(image[:, 0].shape) // 12 + 1
        batch |= {"instances": halves, "known": torch.ones_like(halves, dtype=torch.bool), "number": torch.arange(2)}
    loss = agq_loss if name == "agq" else affinity_loss
    loss(network, batch)[0].backward()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@every_segmenter
def test_the_same_seed_gives_the_same_network_and_output(name: str) -> None:
    image = image_of(1, 1, 4, 20, 24)
    with torch.inference_mode():
        assert torch.equal(build(name).eval()(image), build(name).eval()(image))


@every_segmenter
def test_it_comes_back_from_a_checkpoint(name: str, tmp_path: Any) -> None:
    network = build(name).eval()
    options = SMALL[name] | {"in_channels": 1, "out_channels": 3}
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(
        path, kind="segmenter", architecture=name, options=options, state_dict=network.state_dict(), extra={}
    )
    back = segmenter_from_checkpoint(load_checkpoint(path, kind="segmenter"))
    image = image_of(1, 1, 4, 20, 24)
    with torch.inference_mode():
        assert torch.equal(network(image), back(image))
    other = next(other for other in SMALL if other != name)
    save_checkpoint(
        path, kind="segmenter", architecture=other, options=SMALL[other], state_dict=network.state_dict(), extra={}
    )
    with pytest.raises(UserError):
        segmenter_from_checkpoint(load_checkpoint(path, kind="segmenter"))


@every_segmenter
def test_bfloat16_stays_near_single_precision(name: str) -> None:
    network = build(name).eval()
    use_sound_convolutions(network)
    image = image_of(1, 1, 4, 20, 24)
    with torch.inference_mode():
        exact = network(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network(image).float()
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02


@every_segmenter
def test_the_deepest_features_are_what_the_decoder_starts_from(name: str) -> None:
    network = build(name).eval()
    image = image_of(2, 1, 5, 40, 70)
    # The first part of each decoder, and which of its inputs is the coarsest level.
    first = {
        "superhuman": lambda: network.up[0],
        "swin_unetr": lambda: network.network.decoder5,
        "seg_mamba": lambda: network.up[0],
        "agq": lambda: network.backbone.project[0],
    }[name]()
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        features = encoder_of(network).deepest_features(image)
        assert not seen  # nothing of the decoder is computed for them
        network(image)
    assert torch.equal(features, seen[0])
    assert features.ndim == 5
    assert len(features) == 2


@every_segmenter
def test_it_learns_one_crop(name: str) -> None:
    phantom = grow_phantom((6, 32, 40), (29, 6, 6), 0)
    image = torch.from_numpy(phantom.array("image")).float()[None, None]
    target = torch.from_numpy(affinities_from_labels(phantom.array("label"))).float()[None]
    network = build(name)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12 if name == "swin_unetr" else 40):
        optimizer.zero_grad()
        loss = weighted_bce(network(image), target, torch.ones_like(target))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@every_segmenter
def test_wrong_channels_and_options_are_one_line(name: str) -> None:
    with pytest.raises(ValueRangeError, match="out_channels"):
        build(name, out_channels=0)
    with pytest.raises(UnknownName, match="has no option"):
        build(name, filtres=[1])


@every_segmenter
@pytest.mark.parametrize("shape", [(1, 2, 4, 8, 8), (4, 8, 8), (1, 4, 8, 8), (0, 1, 4, 8, 8), (1, 1, 4, 0, 8)])
def test_what_is_no_batch_of_images_is_told(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match=r"images \(b, 1, z, y, x\)"):
        build(name).eval()(torch.zeros(shape))
    with pytest.raises(ShapeMismatch, match=r"images \(b, 1, z, y, x\)"):
        encoder_of(build(name).eval()).deepest_features(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("superhuman", {"filters": [8, 12.5]}, "a list of whole numbers for 'filters'"),
        ("superhuman", {"filters": 8}, "a list of whole numbers"),
        ("superhuman", {"norm": None}, "a word for 'norm'"),
        ("superhuman", {"in_channels": 1.5}, "a whole number for 'in_channels'"),
        ("superhuman", {"z_pool": [0, 1, 1, 1]}, "a list of true and false"),
        ("swin_unetr", {"feature_size": "24"}, "a whole number"),
        ("swin_unetr", {"checkpointing": 1}, "true or false"),
        ("seg_mamba", {"orientations": 3.0}, "a whole number"),
        ("agq", {"learned_queries": 2.5}, "a whole number"),
        ("agq", {"width": True}, "a whole number"),
        ("agq", {"component_prior": "6"}, "a number for 'component_prior'"),
        ("agq", {"position_length": True}, "a number for 'position_length'"),
    ],
)
def test_options_of_a_wrong_type_are_told(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueRangeError, match=words):
        build_segmenter(name, **options)


@pytest.mark.parametrize("auxiliary", ["x", -1, 2, 1.0])
def test_a_checkpoint_with_other_channels_than_it_says_is_told(auxiliary: Any) -> None:
    options = {"filters": [4, 6], "out_channels": 4}
    weights = build_segmenter("superhuman", **options).state_dict()
    checkpoint = Checkpoint("segmenter", "superhuman", options, weights, {"auxiliary_channels": auxiliary})
    with pytest.raises(CheckpointMismatch, match=f"beside {auxiliary!r} auxiliary ones. Got 1 to 4"):
        segmenter_from_checkpoint(checkpoint)


def test_options_that_a_segmenter_does_not_have_are_left_out() -> None:
    assert options_of("swin_unetr", {"filters": [1], "feature_size": 12}) == {"feature_size": 12}


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        counts = {
            (name, *options.values()): sum(p.numel() for p in build_segmenter(name, **options).parameters())
            for name, options in [("seg_mamba", {}), ("swin_unetr", {"feature_size": 12}), ("swin_unetr", {}),
                                  ("swin_unetr", {"feature_size": 48})]
        }  # fmt: skip
    assert counts[("seg_mamba",)] == 67_362_723  # 67.36 M
    assert [round(counts[key] / 1e6, 1) for key in [("swin_unetr", 12), ("swin_unetr",), ("swin_unetr", 48)]] == [
        4.1,
        15.7,
        62.2,
    ]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("swin_unetr", {"feature_size": 20}, ValueRangeError, "multiple of 12"),
        ("swin_unetr", {"z_pool": [True, False, True, True, True]}, ValueRangeError, "only the first may be false"),
        ("swin_unetr", {"z_pool": [False]}, ValueRangeError, "5 entries"),
        ("seg_mamba", {"filters": [8, 8]}, ValueRangeError, "three levels"),
        ("seg_mamba", {"filters": [8, 8, 8], "z_pool": [True]}, ValueRangeError, "one z_pool per halving, 2"),
        ("seg_mamba", {"orientations": 2}, ValueRangeError, "3 orientations"),
        ("seg_mama", {}, UnknownName, "Did you mean 'seg_mamba'"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_segmenter(name, **options)


# SwinUNETR's steps.


def test_swin_unetr_is_monais() -> None:
    from monai.networks.nets import SwinUNETR

    network = build("swin_unetr").eval()
    torch.manual_seed(0)
    theirs = SwinUNETR(1, 3, feature_size=12).eval()
    image = image_of(1, 1, 32, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(image), theirs(image))


def test_swin_unetr_for_thin_stacks_pads_sixteen_sections_to_sixteen() -> None:
    network = build("swin_unetr", z_pool=[False, True, True, True, True]).eval()
    seen = []
    network.network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    for shape in ((16, 64, 64), (3, 40, 70), (17, 64, 64)):
        image = image_of(1, 1, *shape)
        logits = network(image)
        assert logits.shape == (1, 3, *shape)
    assert seen == [(16, 64, 64), (16, 64, 96), (32, 64, 64)]
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# SegMamba's parts.


def test_tokens_across_sections_are_those_of_a_transposed_volume() -> None:
    volume = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (d, z, y, x)
    tokens = volume.flatten(1)[None]
    expected = volume.permute(0, 2, 3, 1).flatten(1)[None]
    assert torch.equal(across_sections(tokens, 3), expected)
    assert torch.equal(along_sections(expected, 3), tokens)


@pytest.mark.parametrize("orientations", [1, 3])
def test_the_orientations_are_scans_of_the_volume_turned_by_hand(orientations: int) -> None:
    torch.manual_seed(0)
    mamba = TriOrientatedMamba(6, orientations).double()
    z, y, x = 2, 3, 4
    tokens = torch.randn(1, z * y * x, 6, dtype=torch.float64)
    inner, gate = (t.transpose(1, 2) for t in mamba.in_proj(tokens).chunk(2, dim=-1))
    order = torch.arange(z * y * x)
    orders = [order, order.flip(0), order.reshape(z, y, x).permute(1, 2, 0).flatten()][:orientations]
    total = torch.zeros_like(inner)
    for direction, turned in zip(mamba.directions, orders, strict=True):
        total[..., turned] += direction.scan(inner[..., turned], gate[..., turned])
    torch.testing.assert_close(mamba(tokens, z), mamba.out_proj(total.transpose(1, 2)))


def test_only_the_published_variant_sees_later_tokens() -> None:
    """With one orientation and without the skip, the Mamba layer is causal in scan order; with three it is not."""
    image = torch.randn(1, 6, 24, dtype=torch.float64).transpose(1, 2)
    changed = image.clone()
    changed[:, -1] += 1
    for orientations, causal in ((1, True), (3, False)):
        torch.manual_seed(0)
        mamba = TriOrientatedMamba(6, orientations).double()
        difference = (mamba(image, 2) - mamba(changed, 2)).abs().amax(dim=(0, 2))
        assert bool((difference[:-1] == 0).all()) == causal


@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    multiple=st.tuples(*[st.integers(1, 6)] * 3),
    times=st.tuples(*[st.integers(1, 3)] * 3),
)
def test_padding_adds_at_the_far_end_and_no_more_than_needed(
    sizes: tuple[int, ...], multiple: tuple[int, ...], times: tuple[int, ...]
) -> None:
    image = image_of(1, 2, *sizes)
    least = tuple(m * t for m, t in zip(multiple, times, strict=True))
    padded = pad_to_multiple(image, multiple, least)
    for n, size, m, low in zip(padded.shape[2:], sizes, multiple, least, strict=True):
        assert n % m == 0
        assert n >= max(size, low)
        assert n - m < max(size, low)
    z, y, x = sizes
    assert torch.equal(padded[:, :, :z, :y, :x], image)
    assert torch.equal(padded[:, :, -1, -1, -1], image[:, :, -1, -1, -1])
