"""Training patches: purity, exact share, full use of the volume, correct affinities; and the loss."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest
import torch
from torch.nn import functional

from connectomics_neurodiff.errors import LabelTypeError, MissingInput, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.pairs import is_synthetic
from connectomics_neurodiff.training import AffinityPatches, AugmentOptions, affinity_loss, weighted_bce
from connectomics_neurodiff.training.patches import balanced_weights, erode_contacts
from connectomics_neurodiff.volume import Volume

VOXEL = (29.0, 6.0, 6.0)
ONLY_POSES = AugmentOptions(**{**vars(AugmentOptions.none()), "flip": 0.5, "transpose": 0.5, "rotate": 0.3})


def volume(image: np.ndarray, label: np.ndarray, voxel=VOXEL) -> Volume:
    return Volume(image.astype(np.float32), label.astype(np.uint64), None, voxel)


def random_volume(shape, seed=0, grey=(0.0, 1.0)) -> Volume:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 6, [-(-n // 3) for n in shape])
    label = np.kron(coarse, np.ones((3, 3, 3), int))[: shape[0], : shape[1], : shape[2]]
    return volume(rng.uniform(*grey, shape), label)


def numbered_volume(shape) -> Volume:
    """Grey value = voxel number, exactly representable, so that a sample tells where it comes from."""
    number = np.arange(np.prod(shape)).reshape(shape)
    coarse = np.random.default_rng(0).integers(0, 4, [-(-n // 2) for n in shape])
    label = np.kron(coarse, np.ones((2, 2, 2), int))[: shape[0], : shape[1], : shape[2]]
    return volume(number / 2**20, label)


def same(a, b) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in ("image", "affinity", "weight"))


def test_item_is_a_pure_function_of_seed_and_index() -> None:
    def make(seed: int) -> AffinityPatches:
        return AffinityPatches(
            [random_volume((9, 30, 28))], [random_volume((7, 20, 40), 1)], patch=(4, 16, 12), seed=seed, ratio=1.0
        )

    first = make(5)
    samples = [first[i] for i in range(24)]
    second = make(5)
    assert all(same(samples[i], second[i]) for i in reversed(range(24)))
    assert not same(samples[0], make(6)[0])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(map(same, pool.map(first.__getitem__, range(24)), samples))


def test_shapes_types_and_ranges() -> None:
    everything = AugmentOptions(**dict.fromkeys(vars(AugmentOptions()), 0.5))
    patches = AffinityPatches(
        [random_volume((9, 30, 28))], [], patch=(4, 16, 12), seed=0, ratio=0.0, augment=everything, label_erosion=1
    )
    for i in range(40):
        sample = patches[i]
        assert sample["image"].shape == (1, 4, 16, 12)
        assert sample["affinity"].shape == sample["weight"].shape == (3, 4, 16, 12)
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in sample.values())
        assert sample["image"].min() >= 0
        assert sample["image"].max() <= 1
        assert set(np.unique(sample["affinity"])) <= {0, 1}
        assert 0 <= sample["weight"].min() <= sample["weight"].max() <= 10


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0])
def test_share_of_synthetic_samples_is_exact(ratio) -> None:
    real, synthetic = random_volume((5, 9, 9), grey=(0.0, 0.4)), random_volume((5, 9, 9), grey=(0.6, 1.0))
    patches = AffinityPatches([real], [synthetic], patch=(2, 4, 4), seed=0, ratio=ratio, augment=AugmentOptions.none())
    count = sum(patches[i]["image"].mean() > 0.5 for i in range(2000))
    assert count in (int(2000 * ratio / (1 + ratio)), -int(-2000 * ratio // (1 + ratio)))


def test_volumes_are_drawn_in_proportion_to_their_size() -> None:
    small, large = random_volume((4, 8, 8), grey=(0.0, 0.4)), random_volume((8, 12, 8), grey=(0.6, 1.0))
    patches = AffinityPatches([small, large], [], patch=(2, 4, 4), seed=0, ratio=0, augment=AugmentOptions.none())
    share = np.mean([patches[i]["image"].mean() > 0.5 for i in range(1500)])
    assert share == pytest.approx(0.75, abs=0.04)


def test_positions_cover_every_voxel_uniformly() -> None:
    shape, patch = (5, 7, 9), (3, 4, 6)
    patches = AffinityPatches([numbered_volume(shape)], [], patch=patch, seed=0, ratio=0, augment=ONLY_POSES)
    starts, seen = {}, np.zeros(shape, int)
    for i in range(3000):
        numbers = np.rint(patches[i]["image"][0] * 2**20).astype(int)
        voxels = np.stack(np.unravel_index(numbers, shape))
        extent = tuple(np.ptp(axis) + 1 for axis in voxels)
        starts.setdefault(extent, []).append(tuple(axis.min() for axis in voxels))
        np.add.at(seen, tuple(voxels), 1)
    assert (seen > 0).all()
    assert set(starts) == {(3, 4, 6), (3, 6, 4)}
    for extent, found in starts.items():
        places, counts = np.unique(found, axis=0, return_counts=True)
        assert len(places) == np.prod([n - e + 1 for n, e in zip(shape, extent, strict=True)])
        assert counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize("seed", range(3))
def test_affinities_through_poses_against_brute_force(seed) -> None:
    """An edge is looked up in the volume by the two voxels it joins, wherever flips and transposes put them."""
    shape, patch = (5, 8, 7), (3, 4, 6)
    source = numbered_volume(shape)
    label = np.asarray(source.label)
    patches = AffinityPatches([source], [], patch=patch, seed=seed, ratio=0, augment=ONLY_POSES)
    steps = set()
    for i in range(60):
        sample = patches[i]
        numbers = np.rint(sample["image"][0] * 2**20).astype(int)
        voxels = np.stack(np.unravel_index(numbers, shape), axis=-1)
        for axis in range(3):
            step = np.take(voxels, 1, axis) - np.take(voxels, 0, axis)
            step = tuple(int(s) for s in step.reshape(-1, 3)[0])
            steps.add((axis, step))
            before = voxels - step
            exists = ((before >= 0) & (before < shape)).all(axis=-1)
            inside = before.clip(0, np.array(shape) - 1)
            here, there = label[tuple(np.moveaxis(voxels, -1, 0))], label[tuple(np.moveaxis(inside, -1, 0))]
            assert np.array_equal(sample["affinity"][axis][exists], ((here == there) & (here > 0))[exists])
            assert (sample["weight"][axis][~exists] == 0).all()
            assert (sample["weight"][axis][exists] > 0).all()
    assert len(steps) == 10  # z both ways; y and x of the patch both ways along y and x of the volume


def test_volume_smaller_than_the_patch() -> None:
    source = volume(np.full((2, 5, 30), 0.5), np.ones((2, 5, 30)))
    patches = AffinityPatches([source], [], patch=(4, 9, 8), seed=0, ratio=0, augment=ONLY_POSES)
    offsets = set()
    for i in range(80):
        weight = patches[i]["weight"]
        assert (patches[i]["image"] == 0.5).all()
        inside = np.argwhere(weight[0] > 0)  # a z edge needs two sections, so one plane of them
        assert np.ptp(inside[:, 0]) == 0
        assert len(inside) in (5 * 8, 5 * 9)  # the patch may lie along or across the volume
        assert (patches[i]["affinity"][0][weight[0] > 0] == 1).all()
        offsets.add(int(inside[0, 0]))
    assert offsets == {1, 2, 3}


def test_displaced_sections_keep_right_affinities_across_the_gap() -> None:
    """One neuron everywhere: wherever an edge has weight it must be 1, also across a displacement."""
    options = AugmentOptions(**{**vars(AugmentOptions.none()), "misalignment": 1.0})
    source = volume(np.random.default_rng(0).random((8, 40, 40)), np.ones((8, 40, 40)))
    patches = AffinityPatches([source], [], patch=(6, 32, 32), seed=0, ratio=0, augment=options)
    unknown = 0
    for i in range(20):
        sample = patches[i]
        assert (sample["affinity"][sample["weight"] > 0] == 1).all()
        unknown += (sample["weight"] == 0).any()
    assert unknown > 10


def test_weights_balance_the_classes() -> None:
    affinity = np.zeros((1, 1, 10, 10), np.float32)
    affinity[..., :8, :] = 1
    known = np.ones(affinity.shape, bool)
    known[..., 0, :] = False
    weight = balanced_weights(affinity, known, 10.0)
    assert weight[affinity == 1].sum() == pytest.approx(weight[affinity == 0].sum())
    assert weight.sum() == pytest.approx(known.sum())
    assert (weight[..., 0, :] == 0).all()
    assert balanced_weights(affinity, known, 1.5)[0, 0, 9, 0] == 1.5


def test_after_the_last_synthetic_sample_all_are_those_of_real_training() -> None:
    shape = (9, 30, 28)
    real, pair = random_volume(shape), numbered_volume(shape)
    options = {"patch": (5, 16, 12), "seed": 2, "augment": ONLY_POSES}
    mixed, ending, alone = (
        AffinityPatches([real], [pair], ratio=ratio, synthetic_until=until, **options)
        for ratio, until in ((1.0, None), (1.0, 6), (0.0, None))
    )
    for i in range(16):
        expected = (mixed if i < 6 else alone)[i]
        np.testing.assert_array_equal(ending[i]["image"], expected["image"])
        np.testing.assert_array_equal(ending[i]["affinity"], expected["affinity"])
    assert any((mixed[i]["image"] != alone[i]["image"]).any() for i in range(6, 16))


def test_reliability_weights_both_ends_of_every_edge() -> None:
    """The image numbers the voxels, so that a sample tells where each of its voxels comes from."""
    shape = (9, 30, 28)
    pair = numbered_volume(shape)
    reliable = np.random.default_rng(4).random(shape).astype(np.float32)

    def make(maps: list[np.ndarray | None]) -> AffinityPatches:
        options = {"patch": (5, 16, 12), "seed": 2, "ratio": 3.0, "augment": ONLY_POSES}
        return AffinityPatches([random_volume(shape)], [pair], reliability=maps, **options)

    plain, weighted, half = make([]), make([reliable]), make([np.full(shape, 0.5, np.float32)])
    for i in range(24):
        sample, without = weighted[i], plain[i]
        np.testing.assert_array_equal(sample["affinity"], without["affinity"])
        if not is_synthetic(i, 3.0):
            np.testing.assert_array_equal(sample["weight"], without["weight"])
            continue
        np.testing.assert_allclose(half[i]["weight"], without["weight"] / 2)
        at = reliable.ravel()[np.rint(sample["image"][0] * 2**20).astype(int)]
        for axis in range(3):
            later, before = (np.moveaxis(at, axis, 0)[part] for part in (slice(1, None), slice(None, -1)))
            weights = [np.moveaxis(s["weight"][axis], axis, 0)[1:] for s in (sample, without)]
            np.testing.assert_allclose(weights[0], np.minimum(later, before) * weights[1], rtol=1e-5)


def test_reliability_must_fit_its_volumes() -> None:
    pair = random_volume((9, 30, 28))
    for maps, reason in (([np.ones((9, 30, 27), np.float32)], "must agree"), ([None, None], "as many maps")):
        with pytest.raises(ShapeMismatch, match=reason):
            AffinityPatches([pair], [pair], reliability=maps, patch=(4, 8, 8), seed=0, ratio=1.0)


@pytest.mark.parametrize("in_plane", [True, False])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_erosion_against_brute_force(width, in_plane) -> None:
    label = np.random.default_rng(0).choice([0, 3, 5], (3, 9, 8), p=[0.1, 0.45, 0.45]).astype(np.uint32)
    label[:, 4:] = np.where(label[:, 4:] == 0, 0, 5)
    expected = label.copy()
    for z, y, x in np.ndindex(label.shape):
        deep = slice(z, z + 1) if in_plane else slice(max(0, z - width), z + width + 1)
        near = label[deep, max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        if ((near != 0) & (near != label[z, y, x])).any():
            expected[z, y, x] = 0
    assert np.array_equal(erode_contacts(label, width, in_plane=in_plane), expected)


def test_an_erosion_that_leaves_no_neuron_is_refused() -> None:
    label = np.kron(np.array([[[1, 2], [3, 4]]]), np.ones((4, 6, 6), int))
    image = np.zeros(label.shape)
    options = {"patch": (4, 6, 6), "seed": 0, "ratio": 0.0}
    AffinityPatches([volume(image, label)], [], label_erosion=5, **options)
    with pytest.raises(ValueRangeError, match="must leave something of the neurons"):
        AffinityPatches([volume(image, label)], [], label_erosion=6, **options)
    AffinityPatches([volume(image, 0 * label)], [], label_erosion=6, **options)


def test_erosion_is_in_the_plane_for_thick_sections_only() -> None:
    label = np.ones((6, 12, 12), int)
    label[3:] = 2
    for voxel, expected in ((VOXEL, 1), ((8.0, 8.0, 8.0), 3)):
        source = volume(np.full(label.shape, 0.5), label, voxel)
        patches = AffinityPatches(
            [source], [], patch=(6, 6, 6), seed=0, ratio=0, augment=AugmentOptions.none(), label_erosion=1
        )
        sample = patches[0]
        assert (sample["affinity"][0, 1:, 3, 3] == 0).sum() == expected


def test_bad_input() -> None:
    good = random_volume((5, 9, 9))
    fine = {"patch": (2, 4, 4), "seed": 0, "ratio": 0.0}
    with pytest.raises(MissingInput, match="real volume"):
        AffinityPatches([], [good], **fine)
    with pytest.raises(MissingInput, match="synthetic volumes"):
        AffinityPatches([good], [], **{**fine, "ratio": 1.0})
    with pytest.raises(MissingInput, match="image and a label"):
        AffinityPatches([Volume(good.image, None, None, VOXEL)], [], **fine)
    with pytest.raises(LabelTypeError, match="float"):
        AffinityPatches([Volume(good.image, np.zeros((5, 9, 9)), None, VOXEL)], [], **fine)
    for bad in (np.nan, 255.0):
        image = np.asarray(good.image).copy()
        image[0, 0, 0] = bad
        with pytest.raises(ValueRangeError, match="finite and in"):
            AffinityPatches([Volume(image, good.label, None, VOXEL)], [], **fine)
    for change in (
        {"patch": (2, 4)},
        {"patch": (0, 4, 4)},
        {"ratio": -1.0},
        {"label_erosion": -1},
        {"largest_weight": 0.5},
    ):
        with pytest.raises(ValueRangeError):
            AffinityPatches([good], [], **{**fine, **change})


def test_a_full_sample_is_fast() -> None:
    source = random_volume((40, 200, 200))
    patches = AffinityPatches([source], [], patch=(16, 96, 96), seed=0, ratio=0)
    patches[0]
    seconds = []
    for i in range(30):
        start = time.process_time()
        patches[i]
        seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.03  # about 0.003 s; a loaded machine gets room


def test_loss_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    logits, affinity, weight = (torch.from_numpy(a).float() for a in rng.random((3, 2, 3, 2, 4, 5)))
    affinity = (affinity > 0.5).float()
    p = 1 / (1 + np.exp(-logits.numpy().astype(float)))
    each = -np.where(affinity.numpy() > 0, np.log(p), np.log(1 - p))
    assert weighted_bce(logits, affinity, weight).item() == pytest.approx(np.average(each, weights=weight), rel=1e-5)
    assert weighted_bce(logits, affinity, 3 * weight).item() == pytest.approx(
        np.average(each, weights=weight), rel=1e-5
    )
    assert weighted_bce(logits, affinity, 0 * weight).item() == 0
    weight[0] = 0
    only = (
        functional.binary_cross_entropy_with_logits(logits[1], affinity[1], weight[1], reduction="sum")
        / weight[1].sum()
    )
    assert weighted_bce(logits, affinity, weight).item() == pytest.approx(only.item(), rel=1e-5)
    assert weighted_bce(logits.bfloat16(), affinity, weight).dtype == torch.float32


def test_affinity_loss_can_be_minimised() -> None:
    torch.manual_seed(0)
    label = np.kron(np.random.default_rng(0).integers(1, 9, (3, 5, 5)), np.ones((2, 4, 4), int))
    image = 1.0 - 0.8 * (erode_contacts(label.astype(np.uint32), 1, in_plane=True) == 0)
    patches = AffinityPatches(
        [volume(image, label)], [], patch=(4, 12, 12), seed=0, ratio=0, augment=AugmentOptions.none(), label_erosion=1
    )
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ELU(), torch.nn.Conv3d(8, 3, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for i in range(60):
        batch = {key: torch.from_numpy(value)[None] for key, value in patches[i].items()}
        loss, logs = affinity_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert logs["WeightedBCEWithLogitsLoss"].item() == loss.item()
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert logs["accuracy"] > 0.85
