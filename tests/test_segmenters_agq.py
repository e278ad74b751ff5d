"""AGQ: the published size, queries from affinities, independence of the batch, labels from masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from connectomics_neurodiff.errors import ShapeMismatch, UnknownName, UserError, ValueRangeError
from connectomics_neurodiff.segmenters import AGQ, build_segmenter
from connectomics_neurodiff.segmenters.agq import masks as masks_module
from connectomics_neurodiff.segmenters.agq.backbone import Backbone, Fusion, with_coordinates
from connectomics_neurodiff.segmenters.agq.decoder import KernelUpdate, QueryAttention, QueryDecoder, QueryHead
from connectomics_neurodiff.segmenters.agq.labelling import enlarge, labels_from_masks
from connectomics_neurodiff.segmenters.agq.masks import QueryMasks
from connectomics_neurodiff.segmenters.agq.network import PositionCode
from connectomics_neurodiff.segmenters.agq.queries import (
    affinity_components,
    agglomerated_components,
    component_masks,
    guided_queries,
    largest_components,
    mean_features,
    padded_queries,
)

SMALL: dict[str, Any] = {
    "filters": (4, 6, 8),
    "z_pool": (False, True),
    "width": 8,
    "learned_queries": 5,
    "guided_queries": 6,
    "smallest_component": 3,
    "heads": 2,
}
#: Options by which queries know where they come from.
PLACED: dict[str, Any] = {"component_prior": 3.0, "position_length": 4.0}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(**changes: Any) -> AGQ:
    network = build_segmenter("agq", **(SMALL | changes))
    assert isinstance(network, AGQ)
    return network


def stripes(*shape: int, period: int = 6) -> Tensor:
    """Image (1, 1, z, y, x) of bright bands along y with a little noise."""
    x = torch.arange(shape[2]) % period > 1
    return (0.8 * x + 0.1 * torch.rand(shape))[None, None]


class Brightness(nn.Module):
    """An affinity branch that says the brightness of the image, which it is told by a hook."""

    image: Tensor

    def remember(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        self.image = arguments[0]

    def forward(self, features: Tensor) -> Tensor:
        z, y, x = features.shape[2:]
        return 8 * self.image[..., ::2, ::2][..., :z, :y, :x].expand(-1, 3, -1, -1, -1)


def with_clear_affinities(network: AGQ) -> AGQ:
    """The network with components that are the bright bands."""
    branch = Brightness()
    network.affinity_branch = branch  # type: ignore[assignment]
    network.backbone.register_forward_pre_hook(branch.remember)
    return network


# The whole network.


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        network = build_segmenter("agq", in_channels=1, out_channels=3)
    assert sum(p.numel() for p in network.parameters()) == 4_743_919


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 20), (4, 16, 31), (7, 5, 45)])
@pytest.mark.parametrize(
    "options", [{}, {"z_pool": (True, True)}, {"filters": (4, 6), "z_pool": (False,)}, {"centred": True} | PLACED]
)
@pytest.mark.parametrize("training", [False, True])
def test_any_shape(shape: tuple[int, int, int], options: dict[str, Any], training: bool) -> None:
    network = small(in_channels=2, **options).train(training)
    image = torch.rand(2, 2, *shape)
    prediction = network.predict_instances(image)
    assert network(image).shape == prediction.affinity.shape == (2, 3, *shape)
    assert torch.isfinite(prediction.affinity).all()
    assert len(prediction.masks) == len(prediction.backgrounds) == 3
    label = network.segment(image)
    assert label.shape == (2, *shape)
    assert label.dtype == torch.int64
    assert network.training == training


def test_forward_is_the_affinity_of_the_whole_prediction_and_features_have_unit_length() -> None:
    network = small().eval()
    image = torch.rand(2, 1, 4, 18, 25)
    prediction = network.predict_instances(image)
    assert torch.equal(network(image), prediction.affinity)
    length = prediction.features.norm(dim=1)
    torch.testing.assert_close(length, torch.ones_like(length))


def test_centred_features_have_no_common_direction() -> None:
    plain, centred = small(), small(centred=True)
    assert [p.shape for p in plain.parameters()] == [p.shape for p in centred.parameters()]
    centred.train()
    features = centred.predict_instances(torch.cat([stripes(4, 30, 31), stripes(4, 30, 31)])).features.detach()
    assert torch.allclose(features.norm(dim=1), torch.ones_like(features[:, 0]), atol=1e-5)
    assert float(features.mean(dim=(0, 2, 3, 4)).norm()) < 0.2
    # In evaluation the statistics are those of training: a block does not depend on what else is in it.
    centred.eval()
    assert not torch.equal(centred.centre.running_mean, torch.zeros_like(centred.centre.running_mean))


@settings(deadline=None, max_examples=25)
@given(size=st.tuples(st.integers(1, 6), st.integers(1, 24), st.integers(1, 24)))
def test_padding_is_a_replicated_far_border(size: tuple[int, int, int]) -> None:
    """Padding by hand to what the strides divide leads to the same features on the grid that both have."""
    network = small().eval()
    image = torch.rand(1, 1, *size)
    z, y, x = (max(-(-(n - 1) // m) * m, least) + 1 for n, m, least in zip(size, (2, 4, 4), (0, 4, 4), strict=True))
    padded = functional.pad(image, (0, x - size[2], 0, y - size[1], 0, z - size[0]), mode="replicate")
    with torch.inference_mode():
        ours, by_hand = (network._features(each)[:, :-3] for each in (image, padded))
    z, y, x = ours.shape[2:]
    torch.testing.assert_close(ours, by_hand[..., :z, :y, :x])
    for n, grid, step in zip(size, (z, y, x), network.stride, strict=True):
        assert (grid - 1) * step + 1 >= n  # covers the image
        assert (grid - 2) * step + 1 < n or grid == 2  # and no more than that


def test_any_grey_value_is_brought_to_the_scale_of_the_paper() -> None:
    """The backbone sees (image - .5) / .5."""
    network = small().eval()
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network(torch.linspace(0, 1, 5 * 5).reshape(1, 1, 1, 5, 5))
    assert seen[0].min() == -1
    assert seen[0].max() == 1


@pytest.mark.parametrize(("batched", "options"), [(2, {}), (3, {}), (3, PLACED)])
def test_a_sample_does_not_depend_on_its_batch(batched: int, options: dict[str, Any]) -> None:
    """Samples with different numbers of components, padded in a batch, give what they give alone."""
    network = with_clear_affinities(small(**options)).eval()
    images = [stripes(4, 20, 28), torch.full((1, 1, 4, 20, 28), 0.5), stripes(4, 20, 28, period=14)][:batched]
    with torch.inference_mode():
        together = network.predict_instances(torch.cat(images))
        labels = network.segment(torch.cat(images), 2.0)
        counts = together.valid.sum(1).tolist()
        assert len(set(counts)) == batched
        assert counts[1] == SMALL["learned_queries"]
        for i, image in enumerate(images):
            alone = network.predict_instances(image)
            count = counts[i]
            assert alone.valid.shape == (1, count)
            for stage in range(3):
                torch.testing.assert_close(
                    together.masks[stage][i, :count], alone.masks[stage][0], rtol=1e-4, atol=1e-4
                )
                assert (together.masks[stage][i, count:] == -torch.inf).all()
                torch.testing.assert_close(together.backgrounds[stage][i], alone.backgrounds[stage][0])
            assert (labels[i] == network.segment(image, 2.0)[0]).float().mean() > 0.999


def test_without_components_only_learned_queries() -> None:
    network = small(smallest_component=10**6).eval()
    prediction = network.predict_instances(torch.rand(2, 1, 3, 12, 14))
    assert prediction.valid.shape == (2, SMALL["learned_queries"])
    assert prediction.valid.all()


def test_components_beyond_the_limit() -> None:
    """Evaluation takes the largest whatever the generator; training follows the generator; none is global."""
    network = with_clear_affinities(small(guided_queries=2))
    image = stripes(3, 20, 40)

    def masks(seed: int | None) -> Tensor:
        rngs = None if seed is None else [np.random.default_rng(seed)]
        state = torch.random.get_rng_state()
        found = network.predict_instances(image, rngs)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert found.valid.shape == (1, SMALL["learned_queries"] + 2)
        return found.masks[0].detach()

    network.eval()
    assert torch.equal(masks(0), masks(1))
    assert torch.equal(masks(0), masks(None))
    network.train()
    assert torch.equal(masks(0), masks(0))
    assert any(not torch.equal(masks(0), masks(seed)) for seed in range(1, 5))
    with pytest.raises(ShapeMismatch, match=r"1 samples need as many generators\. Got 2"):
        network.predict_instances(image, [np.random.default_rng(0)] * 2)


def test_the_same_seed_gives_the_same_labels_and_state_dict_brings_them_back() -> None:
    image = stripes(4, 20, 28)
    first = small()
    for _ in range(3):  # batch statistics that are not the initial ones
        first.predict_instances(image)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    labels = first.segment(image, 1.0)
    assert torch.equal(first.segment(image, 1.0), labels)
    torch.manual_seed(99)
    second = small()
    assert not torch.equal(second(image), first(image))
    second.load_state_dict(state)
    assert torch.equal(second.segment(image, 1.0), labels)
    assert labels.max() > 0


def test_labels_come_from_the_last_stage() -> None:
    network = with_clear_affinities(small()).train()
    image = stripes(3, 17, 29)
    for _ in range(5):
        network.predict_instances(image)
    network.eval()
    prediction = network.predict_instances(image)
    logits = torch.cat([prediction.backgrounds[-1], prediction.masks[-1]], dim=1)
    # 17 x 29 is 2n + 1: grid points are every second voxel, and there the interpolation is exact.
    expected = logits.softmax(1)[0].argmax(0)
    found = network.segment(image, 0.0)[0, :, ::2, ::2]
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 2


def test_bfloat16_stays_near_single_precision() -> None:
    network = small()
    image = stripes(4, 18, 22)
    for _ in range(5):
        network.predict_instances(image)
    network.eval()
    with torch.inference_mode():
        exact = network.predict_instances(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network.predict_instances(image)
            assert network.segment(image).shape == (1, 4, 18, 22)
    assert (rounded.affinity.float() - exact.affinity).abs().mean() < 0.05 * exact.affinity.abs().mean() + 0.02
    first_exact, first = exact.masks[0], rounded.masks[0].float()
    assert first.shape == first_exact.shape
    assert (first - first_exact).abs().mean() < 0.1 * first_exact.abs().mean() + 0.05


def test_bfloat16_trains() -> None:
    network = small().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = network.predict_instances(stripes(4, 18, 22))
    torch.stack([m.float()[prediction.valid].square().mean() for m in prediction.masks]).sum().backward()
    gradients = [p.grad for p in network.decoder.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filter": (4, 6)}, UnknownName, "Did you mean 'filters'"),
        ({"filters": (8,)}, ValueRangeError, "two levels"),
        ({"filters": (8, 0)}, ValueRangeError, ">= 1"),
        ({"z_pool": (True,)}, ValueRangeError, "one z_pool per step between levels, 2 for 3"),
        ({"heads": 3}, ValueRangeError, "divides its width of 8. Got 3"),
        ({"heads": 0}, ValueRangeError, "heads >= 1"),
        ({"width": 0}, ValueRangeError, "width >= 1"),
        ({"learned_queries": 1}, ValueRangeError, "learned_queries >= 2. Got 1"),
        ({"guided_queries": -1}, ValueRangeError, "guided_queries >= 0"),
        ({"smallest_component": -1}, ValueRangeError, "smallest_component >= 0"),
        ({"iterations": -1}, ValueRangeError, "iterations >= 0"),
        ({"component_prior": -0.5}, ValueRangeError, "component_prior >= 0. Got -0.5"),
        ({"component_prior": float("nan")}, ValueRangeError, "component_prior >= 0. Got nan"),
        ({"component_prior": float("inf")}, ValueRangeError, "component_prior >= 0. Got inf"),
        ({"position_length": -1.0}, ValueRangeError, "position_length >= 0"),
        ({"position_length": 0.01}, ValueRangeError, "position_length = 0, or at least 1 voxel. Got 0.01"),
        ({"position_length": 4.0, "width": 9, "heads": 3}, ValueRangeError, "even width. Got 9"),
        ({"out_channels": 0}, ValueRangeError, "out_channels"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], error: type[UserError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        small(**options)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueRangeError, match="smallest_area >= 0"):
        small().segment(torch.rand(1, 1, 2, 8, 8), -1.0)


def test_empty_options_mean_the_published_ones() -> None:
    with torch.device("meta"):
        published, empty = build_segmenter("agq"), build_segmenter("agq", filters=[], z_pool=[])
        deeper = build_segmenter("agq", filters=(4, 4, 4, 4, 4, 4), width=8)
    assert {k: v.shape for k, v in published.state_dict().items()} == {
        k: v.shape for k, v in empty.state_dict().items()
    }
    assert published.reach == (4, 16, 16)
    assert deeper.reach == (8, 32, 32)


# Backbone.


def test_levels_stay_aligned() -> None:
    """2n + 1 voxels become n + 1, and a resized level has its own values at its own voxels."""
    backbone = Backbone(1, (4, 6, 8), [(1, 2, 2), (2, 2, 2)])
    levels = backbone(torch.rand(1, 1, 5, 17, 33))
    assert [tuple(level.shape[1:]) for level in levels] == [(4, 5, 17, 33), (6, 5, 9, 17), (8, 3, 5, 9)]
    enlarged = enlarge(levels[2], (2, 2, 2), (5, 9, 17))
    torch.testing.assert_close(enlarged[..., ::2, ::2, ::2], levels[2])


def test_a_strided_lateral_is_the_resized_convolution() -> None:
    """The finest level is convolved only where shrinking with aligned corners would look."""
    fusion = Fusion((3, 5), 4, (1, 2, 2))
    levels = [torch.rand(1, 3, 4, 9, 17), torch.rand(1, 5, 4, 5, 9)]
    weight = fusion.lateral[0].weight
    padded = functional.pad(levels[0], (1, 1, 1, 1, 0, 0), mode="replicate")
    dense = functional.conv3d(padded, weight)
    shrunk = functional.interpolate(dense, size=(4, 5, 9), mode="trilinear", align_corners=True)
    expected = fusion.merge(shrunk + fusion.lateral[1](levels[1]))
    torch.testing.assert_close(fusion(levels), expected, rtol=1e-4, atol=1e-5)


def test_coordinates() -> None:
    z, y, x = with_coordinates(torch.zeros(2, 4, 3, 5, 2))[1, 4:]
    torch.testing.assert_close(z[:, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(y[1, :, 1], torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    torch.testing.assert_close(x[2, 3], torch.tensor([-1.0, 1.0]))


# Queries.


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), smallest=st.integers(0, 12), most=st.integers(0, 4))
def test_components_are_those_of_scipy(seed: int, smallest: int, most: int) -> None:
    affinity = ndimage.gaussian_filter(np.random.default_rng(seed).random((3, 4, 9, 11)), (0, 0.6, 1, 1))
    mean = affinity.mean(axis=0)
    parts, count = ndimage.label(mean > affinity.mean(), structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(np.ones(parts.shape), parts, range(1, count + 1))
    large = [i + 1 for i in range(count) if sizes[i] > smallest]
    largest = sorted((sizes[i - 1] for i in large), reverse=True)[:most]
    components = affinity_components(affinity)
    found = largest_components(components, smallest=smallest, most=most)
    assert sorted(np.unique(found[found > 0])) == list(range(1, len(largest) + 1))
    assert sorted(np.bincount(found.ravel())[1:], reverse=True) == largest
    for number in range(1, len(largest) + 1):
        (part,) = np.unique(parts[found == number])
        assert part in large
        assert (parts == part).sum() == (found == number).sum()
    drawn = largest_components(components, smallest=smallest, most=most, rng=np.random.default_rng(seed))
    again = largest_components(components, smallest=smallest, most=most, rng=np.random.default_rng(seed))
    assert np.array_equal(drawn, again)
    assert drawn.max(initial=0) == len(largest)


def test_constant_affinities_have_no_component() -> None:
    assert not affinity_components(np.full((3, 2, 5, 5), 0.5, np.float32)).any()


def halves_with_a_gap(affinity_of_the_gap: float) -> np.ndarray:
    """Two neurons of 5 x 14 x 8 and 5 x 14 x 9 voxels behind a membrane with a hole of 2 x 2 voxels."""
    affinity = np.full((3, 5, 14, 17), 0.995, np.float32)
    affinity[:, :, :, 8] = 0.02
    affinity[:, 2:4, 6:8, 8] = affinity_of_the_gap
    return affinity


def test_a_gap_in_a_membrane_joins_connected_components_and_not_agglomerated_ones() -> None:
    affinity = halves_with_a_gap(0.97)
    joined = affinity_components(affinity)
    assert joined[2, 7, 2] == joined[2, 7, 14] > 0
    apart = agglomerated_components(affinity, 0.5)
    left, right = (np.unique(part) for part in (apart[:, :, :7], apart[:, :, 9:]))
    assert len(left) == len(right) == 1
    assert 0 < left[0] != right[0] > 0
    assert np.array_equal(agglomerated_components(affinity, 0.5), apart)


def test_agglomerated_components_merge_what_the_mean_affinity_says() -> None:
    affinity = halves_with_a_gap(0.02)
    affinity[:, :, :, 8] = 0.6  # 1 - 0.6: between the two thresholds
    assert len(np.unique(agglomerated_components(affinity, 0.3)[:, :, [2, 14]])) == 2
    assert len(np.unique(agglomerated_components(affinity, 0.5)[:, :, [2, 14]])) == 1


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, math.inf, "x"])
def test_thresholds_of_components_are_told(value: object) -> None:
    with pytest.raises(ValueRangeError, match="component_threshold"):
        small(component_threshold=value)


def test_components_of_waterz_need_three_affinities() -> None:
    with pytest.raises(ValueRangeError, match="out_channels = 3"):
        small(component_threshold=0.3, out_channels=4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (1, 5, 6), (4, 1, 1), (3, 9, 1)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_agglomerated_components_of_volumes_without_depth(shape: tuple[int, int, int], value: float) -> None:
    found = agglomerated_components(np.full((3, *shape), value, np.float32), 0.3)
    assert found.shape == shape
    assert len(np.unique(found)) <= found.size


def test_guided_queries_are_means_and_learn_from_features_only() -> None:
    affinity = torch.zeros(1, 3, 2, 4, 8)
    affinity[..., :3] = 1.0
    affinity[..., 5:] = 1.0
    affinity.requires_grad_()
    features = torch.randn(1, 7, 2, 4, 8, requires_grad=True)
    ((queries, _),) = guided_queries(affinity, features, smallest=0, most=10)
    expected = torch.stack([features[0, ..., :3].flatten(1).mean(1), features[0, ..., 5:].flatten(1).mean(1)])
    torch.testing.assert_close(queries, expected)
    queries.sum().backward()
    assert affinity.grad is None
    assert features.grad is not None
    assert (features.grad[..., 3:5] == 0).all()
    assert (features.grad[..., 0] > 0).all()


def test_mean_features_of_more_voxels_than_are_taken_at_once() -> None:
    shape = (3, 55, 61)
    assert math.prod(shape) > masks_module.VOXELS_AT_ONCE
    features = torch.randn(5, *shape)
    components = torch.randint(0, 4, shape)
    expected = [features[:, components == number].mean(1) for number in (1, 2, 3)]
    torch.testing.assert_close(mean_features(features, components), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_no_component_no_query() -> None:
    assert mean_features(torch.rand(7, 2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)).shape == (0, 7)


def test_padded_queries() -> None:
    learned, own = torch.rand(3, 4), [torch.rand(2, 4), torch.rand(0, 4)]
    queries, valid = padded_queries(learned, own)
    torch.testing.assert_close(queries[0], torch.cat([learned, own[0]]))
    torch.testing.assert_close(queries[1], torch.cat([learned, torch.zeros(2, 4)]))
    assert valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    learned=st.integers(1, 3),
)
def test_component_masks_by_loops(seed: int, size: tuple[int, int, int], counts: list[int], learned: int) -> None:
    rng = np.random.default_rng(seed)
    components = [torch.from_numpy(rng.integers(0, count + 1, size)) for count in counts]
    _, valid = padded_queries(torch.zeros(learned, 2), [torch.zeros(count, 2) for count in counts])
    found = component_masks(components, valid, learned, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*valid.shape, *size)
    for i, component in enumerate(components):
        for q in range(valid.shape[1]):
            own = component == q - learned + 1 if q >= learned else torch.zeros(size, dtype=torch.bool)
            assert torch.equal(found[i, q].bool(), own)


# Position code.


def test_products_of_position_codes_are_a_gaussian_of_the_distance_in_voxels() -> None:
    channels, length, stride = 8192, 5.0, (1, 2, 2)
    code = PositionCode(channels, length, stride)(torch.zeros(1, channels, 6, 4, 7))[0].flatten(1)
    product = code.t() @ code / (channels / 2)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (6, 4, 7)), indexing="ij"), -1).flatten(0, 2)
    distance = torch.cdist(grid * torch.tensor(stride), grid * torch.tensor(stride))
    expected = torch.exp(-(distance**2) / (2 * length**2))
    assert (product - expected).abs().max() < 0.05  # 4096 frequencies: a standard error of .011 at most


def test_position_code_is_added_and_depends_on_no_seed_and_on_no_size() -> None:
    features = torch.rand(2, 6, 3, 4, 5)
    first = PositionCode(6, 3.0, (1, 2, 2))
    torch.manual_seed(7)
    second = PositionCode(6, 3.0, (1, 2, 2))
    assert not list(first.parameters())
    torch.testing.assert_close(first(features), second(features), rtol=0, atol=0)
    code = first(features) - features
    torch.testing.assert_close(code[0], code[1])
    torch.testing.assert_close(first(torch.zeros(1, 6, 2, 4, 3))[0], code[0, :, :2, :, :3])


# Decoder.


def test_prior_is_added_to_the_logits_of_every_stage() -> None:
    plain, placed = QueryDecoder(6, 1, 2).eval(), QueryDecoder(6, 1, 2, component_prior=2.5).eval()
    assert plain.prior is None
    assert {k: v.shape for k, v in placed.state_dict().items() if k != "prior"} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    queries, valid = torch.rand(1, 4, 6), torch.tensor([[True, True, True, False]])
    features = torch.rand(1, 6, 2, 3, 5)
    components = torch.zeros(1, 4, 2, 3, 5)
    components[0, 1, :, 1] = 1.0
    nothing = torch.zeros_like(components)
    with_prior, without = (placed(queries, valid, features, features, c)[0] for c in (components, nothing))
    difference = (with_prior[0] - without[0])[valid]
    torch.testing.assert_close(difference, 2.5 * components[valid])
    assert (with_prior[0][~valid] == -torch.inf).all()
    with_prior[-1][valid].exp().sum().backward()
    assert (placed.prior.grad != 0).all()
    with pytest.raises(ValueRangeError, match="needs the components"):
        placed(queries, valid, features, features)


def test_with_a_strong_prior_the_masks_of_an_untrained_network_are_its_components() -> None:
    network = with_clear_affinities(small(component_prior=100)).eval()
    label = network.segment(stripes(4, 21, 31), 1.0)[0, :, ::2, ::2]
    bands = (torch.arange(31) % 6 > 1)[::2].expand(4, 11, -1)
    parts = affinity_components(bands.float().numpy()[None].repeat(3, 0))
    components = largest_components(parts, smallest=3, most=6)
    assert components.max() > 3
    for number in range(1, components.max() + 1):
        assert len(label[torch.from_numpy(components == number)].unique()) == 1
    assert len(label[bands].unique()) == components.max()


def test_kernel_update_is_the_equation() -> None:
    update = KernelUpdate(6).double()
    features, queries = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)

    def normalised(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (6,))

    a = features @ update.from_features.weight.t() + update.from_features.bias
    b = queries @ update.from_query.weight.t() + update.from_query.bias
    common = a[..., :6] * b[..., :6]
    gates = [
        torch.sigmoid(normalised(common @ gate[0].weight.t() + gate[0].bias))
        for gate in (update.feature_gate, update.query_gate)
    ]
    mixed = gates[0] * normalised(a[..., 6:]) + gates[1] * normalised(b[..., 6:])
    expected = normalised(mixed @ update.out[0].weight.t() + update.out[0].bias).clamp_min(0)
    torch.testing.assert_close(update(features, queries), expected)


def test_attention_is_torch_s() -> None:
    ours = QueryAttention(8, 2).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    with torch.no_grad():
        for target, source in [
            (theirs.self_attn.in_proj_weight, ours.to_qkv.weight), (theirs.self_attn.in_proj_bias, ours.to_qkv.bias),
            (theirs.self_attn.out_proj.weight, ours.from_heads.weight),
            (theirs.self_attn.out_proj.bias, ours.from_heads.bias),
            (theirs.linear1.weight, ours.mlp[0].weight), (theirs.linear1.bias, ours.mlp[0].bias),
            (theirs.linear2.weight, ours.mlp[2].weight), (theirs.linear2.bias, ours.mlp[2].bias),
        ]:  # fmt: skip
            target.copy_(source)
    queries = torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, expected = ours(queries, valid), theirs(queries, src_key_padding_mask=~valid)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_padding_does_not_move_the_batch_statistics() -> None:
    """A head in training mode sees the valid rows only: their normalisation is that of the rows alone."""
    features = functional.normalize(torch.randn(2, 6, 2, 3, 5), dim=1)
    queries = torch.randn(2, 4, 6)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    head = QueryHead(6).train()
    masks, background = head(queries, valid, features)
    rows = (queries @ head.kernel.weight.t())[valid]
    kernels = (rows - rows.mean(0)) / torch.sqrt(rows.var(0, unbiased=False) + 1e-5)
    sample = valid.nonzero()[:, 0]
    logits = torch.einsum("nc,nczyx->nzyx", kernels, features[sample])
    expected = (logits - logits.mean()) / torch.sqrt(logits.var(unbiased=False) + 1e-5)
    torch.testing.assert_close(masks[valid], expected, rtol=1e-4, atol=1e-4)
    assert (masks[~valid] == -torch.inf).all()
    assert background.shape == (2, 1, 2, 3, 5)
    torch.testing.assert_close(head.mask_norm.running_mean, 0.1 * logits.mean()[None], rtol=1e-3, atol=1e-4)


def test_voxels_are_shared_out_without_the_background() -> None:
    """With a first stage that gives all voxels to one query, that query gathers the sum of all features."""
    decoder = QueryDecoder(6, 1, 2).eval()
    gathered = []
    decoder.update[0].register_forward_pre_hook(lambda _, arguments: gathered.append(arguments[0]))
    chosen = torch.zeros(1, 3, 2, 3, 4)
    chosen[:, 1] = 100.0
    decoder.predict[0].forward = lambda *_: (chosen, torch.full((1, 1, 2, 3, 4), 1000.0))
    features = torch.rand(1, 6, 2, 3, 4)
    decoder(torch.rand(1, 3, 6), torch.ones(1, 3, dtype=torch.bool), features, features)
    expected = torch.zeros(3, 6)
    expected[1] = features.sum((0, 2, 3, 4))
    torch.testing.assert_close(gathered[0][0], expected)


def settled(network: AGQ, image: Tensor, times: int = 5) -> AGQ:
    """Batch statistics that are not the initial ones, in evaluation mode."""
    network.train()
    for _ in range(times):
        network.predict_instances(image)
    return network.eval()


@pytest.mark.parametrize("options", [{}, {"component_prior": 3.0}, {"iterations": 0}, {"guided_queries": 0}])
def test_masks_in_pieces_are_those_of_the_whole_prediction(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "VOXELS_AT_ONCE", 37)
    image = torch.cat([stripes(3, 17, 29), stripes(3, 17, 29).flip(-1)])
    network = settled(with_clear_affinities(small(**options)), image)
    made = []
    monkeypatch.setattr(network.decoder, "last_masks", lambda *given: made.append(last_masks(*given)) or made[-1])
    last_masks = type(network.decoder).last_masks.__get__(network.decoder)
    with torch.no_grad():
        whole = network.predict_instances(image)
    network.segment(image)
    assert len(made) == 2
    for sample, masks in enumerate(made):
        logits = whole.masks[-1][sample][whole.valid[sample]]
        assert len(logits) > 2 or options == {"guided_queries": 0}
        found = torch.cat([masks.logits(piece) for piece in masks.pieces()])
        torch.testing.assert_close(found.t(), logits.flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(masks.background, whole.backgrounds[-1][sample, 0], rtol=1e-4, atol=1e-4)
        box = (slice(1, 3), slice(0, 4), slice(5, 9))
        for query in range(len(logits)):
            torch.testing.assert_close(masks.logits_of(query, box), logits[query][box], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("area", [0.0, 37.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_labels_are_those_of_all_masks_at_once(
    area: float, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain way on the working grid, where interpolation is exact; under autocast masks stay float32."""
    monkeypatch.setattr(masks_module, "VOXELS_AT_ONCE", 23)
    image = torch.cat([stripes(3, 17, 29), stripes(3, 17, 29).flip(-1)])
    network = settled(with_clear_affinities(small(component_prior=2.0)), image)
    given_out = []
    logits_of_pieces = QueryMasks.logits
    monkeypatch.setattr(
        QueryMasks, "logits", lambda *given: given_out.append(logits_of_pieces(*given)) or given_out[-1]
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        found = network.segment(image, area)[:, :, ::2, ::2]
    assert {logits.dtype for logits in given_out} == {torch.float32}
    if precision == torch.bfloat16:  # the features behind them are rounded
        return
    with torch.no_grad():
        whole = network.predict_instances(image)
    for sample, label in enumerate(found):
        logits = torch.cat([whole.backgrounds[-1][sample], whole.masks[-1][sample][whole.valid[sample]]])
        probabilities = logits.softmax(0)
        kept = probabilities.flatten(1).sum(1) >= area
        kept[0] = True
        assert kept.all() == (area == 0)
        expected = probabilities[kept].argmax(0)
        assert (label == expected).float().mean() > 0.99  # but for ties
        assert len(expected.unique()) > 2


def test_masks_in_pieces_need_evaluation_mode() -> None:
    decoder = QueryDecoder(6, 1, 2)
    with pytest.raises(ValueRangeError, match="evaluation mode only"):
        decoder.last_masks(torch.rand(3, 6), torch.rand(6, 2, 3, 4), torch.rand(6, 2, 3, 4))


# Labels from masks.


def masks_of(logits: Tensor, background: Tensor) -> QueryMasks:
    """Masks whose logits are those given, (q, z, y, x) and (1, z, y, x)."""
    return QueryMasks(torch.eye(len(logits)), torch.tensor(0.0), logits.flatten(1).t().contiguous(), background[0])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 40),
    size=st.tuples(st.integers(1, 4), st.integers(1, 11), st.integers(1, 11)),
    area=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_labels_are_the_argmax_of_what_is_large(
    seed: int, queries: int, size: tuple[int, int, int], area: float
) -> None:
    """Against the plain way: enlarge everything, zero what is small, take the largest of those that win nearby."""
    generator = torch.Generator().manual_seed(seed)
    grid = [-(-(n - 1) // step) + 1 for n, step in zip(size, (1, 2, 2), strict=True)]
    logits = 3 * torch.randn(queries + 1, *grid, generator=generator)
    probabilities = logits.softmax(0)
    kept = [0] + [i for i in range(1, queries + 1) if probabilities[i].sum() >= area]
    full = [grid[0], 2 * grid[1] - 1, 2 * grid[2] - 1]
    enlarged = functional.interpolate(probabilities[None], size=full, mode="trilinear", align_corners=True)[0]
    z, y, x = size
    values = enlarged[kept][:, :z, :y, :x]
    won = functional.one_hot(probabilities[kept].argmax(0), len(kept)).permute(3, 0, 1, 2).float()
    nearby = functional.interpolate(won[None], size=full, mode="trilinear", align_corners=True)[0][:, :z, :y, :x] > 0
    expected = values.masked_fill(~nearby, -1).amax(0)
    found = labels_from_masks(masks_of(logits[1:], logits[:1]), (1, 2, 2), size, area)
    assert found.shape == size
    chosen = values.gather(0, found[None])[0]
    assert (chosen >= expected - 1e-6).all()  # interpolated values may tie but for rounding
    assert (won.flatten(1).sum(1)[found.unique()] > 0).all()
    certain = values.argmax(0)
    clear = nearby.gather(0, certain[None])[0] & (
        values.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-6 if len(kept) > 1 else True
    )
    assert (found == certain)[clear].all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["mask", "background"])
def test_a_logit_that_is_not_finite_is_an_error(value: float, where: str) -> None:
    masks, background = torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    (masks if where == "mask" else background)[0, 1, 2, 3] = value
    made = QueryMasks(torch.ones(2, 1), torch.tensor(0.0), masks[0].reshape(-1, 1), background[0])
    with pytest.raises(ValueRangeError, match="must be finite"):
        labels_from_masks(made, (1, 1, 1), (2, 3, 4), 0.0)


def test_a_small_mask_is_dropped_and_the_next_best_takes_over() -> None:
    background = torch.zeros(1, 2, 4, 4)
    masks = torch.full((2, 2, 4, 4), -9.0)
    masks[0, 0, 0, 0] = 9.0  # soft area about 1
    masks[1] = 3.0
    assert labels_from_masks(masks_of(masks, background), (1, 1, 1), (2, 4, 4), 0.5)[0, 0, 0] == 1
    label = labels_from_masks(masks_of(masks, background), (1, 1, 1), (2, 4, 4), 2.0)
    assert (label == 1).all()  # renumbered
    assert (labels_from_masks(masks_of(masks, background), (1, 1, 1), (2, 4, 4), 1000.0) == 0).all()
