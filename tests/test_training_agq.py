"""Training of AGQ: targets, matching, the loss against the plain way, and one crop learnt by heart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.errors import ShapeMismatch, UserError, ValueRangeError
from connectomics_neurodiff.metrics import evaluate
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.segmenters.agq import AGQ, InstancePrediction
from connectomics_neurodiff.training import AffinityPatches, AGQLossWeights, AugmentOptions, InstancePatches, agq_loss
from connectomics_neurodiff.training.agq import (
    dice_of_pairs,
    instance_labels,
    mask_losses,
    match_queries,
    on_grid,
    pixel_discrimination,
)
from connectomics_neurodiff.volume import Volume, grow_phantom

SMALL: dict[str, Any] = {
    "filters": (4, 6, 8),
    "z_pool": (False, True),
    "width": 8,
    "learned_queries": 6,
    "guided_queries": 6,
    "smallest_component": 3,
    "heads": 2,
}
NO_AUGMENTATION = AugmentOptions.none()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(**changes: Any) -> AGQ:
    network = build_segmenter("agq", **(SMALL | changes))
    assert isinstance(network, AGQ)
    return network


def blocks(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 5, [-(-n // 4) for n in shape])
    return np.kron(coarse, np.ones((4, 4, 4), np.uint32))[: shape[0], : shape[1], : shape[2]].astype(np.uint32)


def batch_of(*labels: np.ndarray, known: Tensor | None = None) -> dict[str, Tensor]:
    affinity = torch.stack([torch.from_numpy(affinities_from_labels(label)).float() for label in labels])
    instances = torch.stack([torch.from_numpy(instance_labels(label, erosion=0)) for label in labels])
    return {
        "image": torch.rand(len(labels), 1, *labels[0].shape, generator=torch.Generator().manual_seed(1)),
        "affinity": affinity,
        "weight": torch.ones_like(affinity),
        "instances": instances,
        "known": torch.ones_like(instances, dtype=torch.bool) if known is None else known,
        "number": torch.arange(len(labels)),
    }


def prediction_of(stages: list[Tensor], size: tuple[int, int, int]) -> InstancePrediction:
    """A prediction of one sample from logits (1 + q, z, y, x), background first, on a grid of every voxel."""
    return InstancePrediction(
        affinity=torch.zeros(1, 3, *size),
        masks=[logits[None, 1:] for logits in stages],
        backgrounds=[logits[None, :1] for logits in stages],
        valid=torch.ones(1, len(stages[0]) - 1, dtype=torch.bool),
        features=functional.normalize(torch.randn(1, 4, *size), dim=1),
        stride=(1, 1, 1),
    )


# Targets.


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
def test_instances_are_the_connected_parts_of_each_neuron(seed: int, shape: tuple[int, int, int]) -> None:
    label = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint32)
    found = instance_labels(label, erosion=0)
    assert found.dtype == np.int64
    total = 0
    for neuron in (1, 2):
        parts, count = ndimage.label(label == neuron, structure=np.ones((3, 3, 3)))
        total += count
        pairs = {(int(a), int(b)) for a, b in zip(parts.ravel(), found.ravel(), strict=True) if a}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == count
    assert set(np.unique(found)) == set(range(total + 1)) - ({0} if (label > 0).all() else set())
    assert ((found > 0) == (label > 0)).all()


def test_a_neuron_that_enters_twice_is_two_and_contacts_lose_a_voxel() -> None:
    label = np.zeros((2, 5, 9), np.uint32)
    label[..., :4] = 1
    label[..., 4:6] = 2
    label[..., 6:] = 1
    found = instance_labels(label)
    assert (found[:, :, :3] == found[0, 0, 0]).all()
    assert (found[..., 7:] == found[0, 0, 8]).all()
    assert len({0, int(found[0, 0, 0]), int(found[0, 0, 8])}) == 3
    assert (found[..., 3:7] == 0).all()


def test_patches_are_pure_and_agree_with_those_for_affinities() -> None:
    rng = np.random.default_rng(3)
    volume = Volume(rng.random((7, 22, 26)).astype(np.float32), blocks((7, 22, 26)).astype(np.uint64), None, (29, 6, 6))
    make = lambda kind, **more: kind([volume], [], patch=(4, 16, 12), seed=4, ratio=0.0, **more)  # noqa: E731
    ours, plain = make(InstancePatches), make(AffinityPatches, label_erosion=1)
    for i in (5, 0, 2):
        item, again, other = ours[i], make(InstancePatches)[i], plain[i]
        for key in item:
            assert np.array_equal(item[key], again[key])
        for key in ("image", "affinity"):
            assert np.array_equal(item[key], other[key])
        assert np.array_equal(item["weight"] > 0, other["weight"] > 0)
        assert set(np.unique(item["weight"])) <= {0.0, 1.0}
        assert item["number"] == i
        assert item["instances"].shape == item["known"].shape == (4, 16, 12)
        # Inside the crop, an edge is an affinity exactly where both ends are one instance.
        inner = affinities_from_labels(item["instances"])
        assert np.array_equal(inner[0, 1:], item["affinity"][0, 1:])
        assert np.array_equal(inner[2][..., 1:], item["affinity"][2][..., 1:])
    assert not np.array_equal(ours[0]["image"], ours[1]["image"])


def test_patches_split_a_neuron_that_enters_twice() -> None:
    """A neuron in the shape of a U: the crop is too small to see the bend."""
    label = np.zeros((5, 30, 20), np.uint64)
    label[:, :, 2:6] = label[:, :, 12:16] = label[:, 27:, 2:16] = 9
    volume = Volume(np.zeros(label.shape, np.float32), label, None, (29, 6, 6))
    patches = InstancePatches([volume], [], patch=(4, 12, 19), seed=0, ratio=0.0, augment=NO_AUGMENTATION)
    counts = []
    for i in range(8):
        instances = patches[i]["instances"]
        # Two legs, or with the bend, one.
        joined = bool((instances[:, -1, 8] > 0).all())
        counts.append(1 if joined else 2)
        assert instances.max() == counts[-1]
    assert 2 in counts


def test_the_loader_makes_a_batch_that_the_loss_takes() -> None:
    phantom = grow_phantom((6, 24, 28), (29, 6, 6), 0)
    patches = InstancePatches([phantom], [], patch=(8, 16, 20), seed=0, ratio=0.0)  # deeper than the volume
    loader = torch.utils.data.DataLoader(patches, batch_sampler=[[0, 7], [3, 4]])  # type: ignore[arg-type]
    network = small()
    for batch in loader:
        assert batch["number"].tolist() in ([0, 7], [3, 4])
        assert not batch["known"].all()
        loss, _ = agq_loss(network, batch)
        assert torch.isfinite(loss)


# Matching and terms.


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), queries=st.integers(1, 4), neurons=st.integers(0, 5))
def test_matching_is_the_best_of_all(seed: int, queries: int, neurons: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(queries, 30, generator=generator)
    t = (torch.rand(neurons, 30, generator=generator) > 0.6).float()

    def dice(i: int, j: int) -> float:
        return float(2 * (p[i] * t[j]).sum() / ((p[i] ** 2).sum() + (t[j] ** 2).sum()))

    a, b = match_queries(p, t)
    assert len(a) == len(b) == min(queries, neurons)
    assert len(set(a.tolist())) == len(set(b.tolist())) == len(a)
    found = sum(dice(int(i), int(j)) for i, j in zip(a, b, strict=True))
    if queries >= neurons:
        best = max(sum(dice(i, j) for j, i in enumerate(order)) for order in permutations(range(queries), neurons))
    else:
        best = max(sum(dice(i, j) for i, j in enumerate(order)) for order in permutations(range(neurons), queries))
    assert found == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_dice_by_hand() -> None:
    p = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    t = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # 1 - 2/3 and 1 - 4/5
    assert float(dice_of_pairs(p, t)) == pytest.approx((1 / 3 + 1 / 5) / 2, abs=1e-4)
    assert float(dice_of_pairs(p[:0], t[:0])) == 0.0


def test_pixel_discrimination_by_loops() -> None:
    features = functional.normalize(torch.randn(5, 14, dtype=torch.float64), dim=0)
    instances = torch.tensor([0, 1, 1, 1, 2, 2, 0, 3, 2, 1, 0, 3, 3, 1])
    pixels = [i for i in range(14) if instances[i] > 0]
    total = 0.0
    for i in pixels:
        similarity = {j: float(features[:, i] @ features[:, j]) / 0.3 for j in pixels}
        whole = np.log(sum(np.exp(s) for s in similarity.values()))
        own = [j for j in pixels if instances[j] == instances[i]]
        total += -sum(similarity[j] - whole for j in own) / len(own)
    found = pixel_discrimination(features, instances, np.random.default_rng(0))
    assert float(found) == pytest.approx(total / len(pixels))


def test_pixel_discrimination_draws_from_its_generator() -> None:
    features = functional.normalize(torch.randn(5, 500), dim=0)
    instances = torch.randint(0, 4, (500,))

    def value(seed: int) -> float:
        return float(pixel_discrimination(features, instances, np.random.default_rng(seed), pixels=20))

    assert value(0) == value(0)
    assert value(0) != value(1)
    assert float(pixel_discrimination(features, 0 * instances, np.random.default_rng(0))) == 0.0
    # 20 voxels: no softmax over them is worse than the even one by much more than 2 / temperature.
    assert 0 < value(0) < np.log(20) + 2 / 0.3


def test_grid_targets_are_every_second_voxel() -> None:
    network = small(z_pool=(True, False)).eval()
    for size in ((3, 9, 12), (4, 10, 17), (1, 1, 2)):
        label = torch.arange(1, np.prod(size) + 1).reshape(size)
        prediction = network.predict_instances(torch.rand(1, 1, *size))
        grid = prediction.features.shape[2:]
        found = on_grid(label, prediction, 0).reshape(grid)
        z, y, x = label[::2, ::2, ::2].shape
        assert torch.equal(found[:z, :y, :x], label[::2, ::2, ::2])
        assert (found > 0).sum() == z * y * x


def plain_mask_losses(stages: list[Tensor], instances: Tensor, known: Tensor) -> tuple[float, float]:
    """Voxel by voxel, with the assignment found by trying all; queries at least as many as neurons."""
    ids = [int(i) for i in instances[known].unique() if i > 0]
    probabilities = [logits.flatten(1).softmax(0) for logits in stages]

    def dice(stage: int, query: int, neuron: int) -> float:
        p, t = probabilities[stage][query + 1] * known, ((instances == neuron) & known).float()
        return 1 - float(2 * (p * t).sum() / ((p**2).sum() + (t**2).sum()))

    queries = range(len(stages[0]) - 1)
    order = min(permutations(queries, len(ids)), key=lambda o: sum(dice(0, q, n) for q, n in zip(o, ids, strict=True)))
    channel = {0: 0} | {n: q + 1 for q, n in zip(order, ids, strict=True)}
    total_dice = total_entropy = 0.0
    for stage in range(len(stages)):
        total_dice += np.mean([dice(stage, q, n) for q, n in zip(order, ids, strict=True)])
        voxels = [v for v in range(len(known)) if known[v]]
        total_entropy -= np.mean([float(probabilities[stage][channel[int(instances[v])], v].log()) for v in voxels])
    return total_dice, total_entropy


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_mask_losses_the_plain_way(seed: int) -> None:
    """The matching of the first stage holds for the second, unknown voxels take no part."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, 3, 5)
    stages = [2 * torch.randn(5, *size, generator=generator) for _ in range(2)]
    instances = torch.randint(0, 4, size, generator=generator).flatten() * 7
    known = torch.rand(instances.shape, generator=generator) > 0.2
    dice, entropy = mask_losses(prediction_of(stages, size), 0, instances, known)
    expected = plain_mask_losses(stages, instances, known)
    assert (float(dice), float(entropy)) == pytest.approx(expected, rel=1e-3)


def test_a_perfect_prediction_costs_nothing() -> None:
    size = (2, 4, 6)
    instances = torch.from_numpy(instance_labels(blocks(size), erosion=0))
    order = torch.randperm(int(instances.max()) + 2)
    masks = torch.stack([(instances == i + 1).float() for i in order])
    logits = 60 * torch.cat([(instances == 0).float()[None], masks])
    known = torch.ones(instances.numel(), dtype=torch.bool)
    dice, entropy = mask_losses(prediction_of([logits], size), 0, instances.flatten(), known)
    assert float(dice) < 1e-3
    assert float(entropy) < 1e-3


def test_neurons_beyond_the_queries_count_as_nothing() -> None:
    """One query, two neurons: the loss is the one that remains after the unmatched neuron is made unknown."""
    size = (1, 2, 6)
    instances = torch.tensor([1, 1, 1, 0, 2, 2, 1, 1, 0, 0, 2, 2])
    logits = torch.randn(2, *size)
    logits[1] += 3 * (instances == 1).reshape(size)
    logits.requires_grad_()
    known = torch.ones(12, dtype=torch.bool)
    found = mask_losses(prediction_of([logits], size), 0, instances, known)
    expected = mask_losses(prediction_of([logits], size), 0, instances, instances != 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(sum(found), logits)
    flat = gradient.flatten(1)
    assert (flat[:, instances == 2] == 0).all()
    assert (flat[:, instances == 1] != 0).all()


# The whole loss.


def test_published_weights_and_their_sum() -> None:
    weights = AGQLossWeights()
    assert (weights.dice, weights.cross_entropy, weights.pixel_discrimination, weights.affinity) == (3.0, 0.3, 0.1, 1.0)
    network = small()
    loss, logs = agq_loss(network, batch_of(blocks((3, 12, 14)), blocks((3, 12, 14), 1)))
    expected = sum(getattr(weights, name) * value for name, value in logs.items())
    torch.testing.assert_close(loss.detach(), expected)
    assert set(logs) == set(vars(weights))


def test_every_parameter_learns() -> None:
    network = small()
    loss, _ = agq_loss(network, batch_of(blocks((4, 18, 22)), blocks((4, 18, 22), 1)))
    loss.backward()
    assert not [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("term", "used", "unused"),
    [
        ("affinity", "affinity_branch", "decoder"),
        ("pixel_discrimination", "mask_branch", "affinity_branch"),
        ("dice", "instance_branch", "affinity_branch"),
        ("cross_entropy", "decoder.predict.0.background", "affinity_branch"),
    ],
)
def test_each_term_teaches_its_part(term: str, used: str, unused: str) -> None:
    """Above all: no gradient reaches the affinities through the queries that they make."""
    network = small()
    only = AGQLossWeights(**{name: float(name == term) for name in vars(AGQLossWeights())})
    loss, _ = agq_loss(network, batch_of(blocks((4, 18, 22))), weights=only)
    loss.backward()
    moved = {k: p.grad is not None and bool(p.grad.abs().sum() > 0) for k, p in network.named_parameters()}
    assert all(value for key, value in moved.items() if key.startswith(used))
    assert not any(value for key, value in moved.items() if key.startswith(unused))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_empty_crops_have_a_finite_loss(known: bool, batch: int) -> None:
    """Nothing labelled, or nothing annotated at all."""
    empty = np.zeros((3, 12, 14), np.uint32)
    labels = [empty, blocks((3, 12, 14))][:batch]
    data = batch_of(*labels)
    data["known"][0] = known
    data["weight"][0] = float(known)
    network = small()
    loss, _ = agq_loss(network, data)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    decoder = [p.grad.abs().sum() > 0 for p in network.decoder.parameters() if p.grad is not None]
    assert any(decoder) == (known or batch == 2)


def test_unknown_voxels_make_no_difference() -> None:
    label, other = blocks((3, 12, 14)), blocks((3, 12, 14))
    other[:, 6:] = blocks((3, 6, 14), 5)
    known = torch.ones(1, 3, 12, 14, dtype=torch.bool)
    known[:, :, 6:] = False
    results = []
    for each in (label, other):
        data = batch_of(each, known=known)
        data["weight"][:] = known[:, None].float()
        data["weight"][:, 1, :, 5:7] = 0
        torch.manual_seed(0)
        network = small()
        results.append(agq_loss(network, data)[0])
    torch.testing.assert_close(results[0], results[1])


def test_the_loss_is_a_function_of_seed_and_sample_number() -> None:
    data = batch_of(blocks((4, 20, 24)), blocks((4, 20, 24), 1))

    def value(seed: int, numbers: list[int]) -> float:
        torch.manual_seed(0)
        network = small()
        state = torch.random.get_rng_state()
        loss = float(agq_loss(network, {**data, "number": torch.tensor(numbers)}, seed=seed, pixels=16)[0].detach())
        assert torch.equal(torch.random.get_rng_state(), state)
        return loss

    assert value(0, [3, 4]) == value(0, [3, 4])
    assert value(0, [3, 4]) != value(1, [3, 4])
    assert value(0, [3, 4]) != value(0, [5, 6])


def test_bfloat16_stays_near_single_precision() -> None:
    data = batch_of(blocks((4, 18, 22)), blocks((4, 18, 22), 1))
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        network = small(guided_queries=0)  # components of rounded affinities may be others
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _ = agq_loss(network, data)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
        values.append(float(loss.detach()))
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_a_diverged_network_has_a_loss_that_says_so() -> None:
    network = small()
    with torch.no_grad():
        network.learned.weight.fill_(torch.nan)
    loss, _ = agq_loss(network, batch_of(blocks((3, 12, 14))))
    assert torch.isnan(loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixels": 0}, ValueRangeError, "pixels must be >= 1"),
        ({"temperature": 0.0}, ValueRangeError, "temperature > 0"),
        ({"network": "superhuman"}, ValueRangeError, "trains the segmenter 'agq'. Got a Superhuman"),
        ({"known": torch.ones(1, 3, 12, 13, dtype=torch.bool)}, ShapeMismatch, "'known' must have the size"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], error: type[UserError], message: str) -> None:
    data = batch_of(blocks((3, 12, 14)))
    network: Any = small()
    if "network" in change:
        network = build_segmenter(change.pop("network"), filters=(4, 6))
    if "known" in change:
        data["known"] = change.pop("known")
    with pytest.raises(error, match=message):
        agq_loss(network, data, **change)
    with pytest.raises(ValueRangeError, match="weight of 'dice' must be >= 0"):
        AGQLossWeights(dice=-1.0)


def test_it_learns_one_crop_by_heart() -> None:
    """Neurons come out whole and apart, without a watershed."""
    shape = (5, 40, 48)
    phantom = grow_phantom(shape, (29, 6, 6), 1)
    item = InstancePatches([phantom], [], patch=shape, seed=0, ratio=0.0, augment=NO_AUGMENTATION)[0]
    assert item["instances"].max() == 21
    # Twice the same: torch's convolutions of a single small sample are four times slower.
    batch = {key: torch.stack([torch.as_tensor(value)] * 2) for key, value in item.items()}
    network = small(
        filters=(8, 12, 16), width=16, learned_queries=24, guided_queries=24, smallest_component=20, heads=4
    )
    steps = 120
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.006, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = agq_loss(network, batch, pixels=256)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        batch["number"] = batch["number"] + 2
    labels = network.segment(batch["image"], 10.0)
    assert torch.equal(labels[0], labels[1])
    assert losses[-1] < 0.3 * losses[0]
    assert evaluate(labels[0].numpy(), item["instances"]).arand < 0.03
