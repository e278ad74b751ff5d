"""Long-range affinities and local shape descriptors: against loops over voxels, and on their way through a training."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_patches import ONLY_POSES, random_volume
from tiny import settings as tiny_settings

from connectomics_neurodiff.checkpoints import load_checkpoint, save_checkpoint
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import CheckpointMismatch, ConfigError, ValueRangeError
from connectomics_neurodiff.pipeline import run_pipeline
from connectomics_neurodiff.segmenters import build_segmenter, segmenter_from_checkpoint
from connectomics_neurodiff.training import AffinityPatches, AugmentOptions, AuxiliaryTargets, affinity_loss
from connectomics_neurodiff.training.auxiliary import long_range_affinities, shape_descriptors
from connectomics_neurodiff.training.losses import shape_loss
from connectomics_neurodiff.volume import open_array

PUBLISHED = ((2, 0, 0), (3, 0, 0), (0, 3, 0), (0, 9, 0), (0, 0, 3), (0, 0, 9))


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    offset=st.tuples(*[st.integers(0, 7)] * 3).filter(lambda o: sum(o) > 1),
    seed=st.integers(0, 99),
)
def test_long_range_affinities_against_a_loop(shape, offset, seed) -> None:
    rng = np.random.default_rng(seed)
    label, known = rng.integers(0, 3, shape), rng.random(shape) < 0.8
    affinity, usable = long_range_affinities(label, known, [offset])
    for v in product(*map(range, shape)):
        before = tuple(a - b for a, b in zip(v, offset, strict=True))
        inside = min(before) >= 0
        assert affinity[(0, *v)] == (inside and label[v] == label[before] > 0)
        assert usable[(0, *v)] == (inside and known[v] and known[before])


def descriptors_by_hand(label: np.ndarray, voxel_nm, sigma_nm: float) -> np.ndarray:
    """Weighted sums over all voxels of the same neuron within three sigma on every axis, voxel by voxel."""
    position = np.stack(np.nonzero(label >= 0), axis=1) * np.array(voxel_nm) / sigma_nm  # in sigma
    flat = label.ravel()
    found = np.zeros((10, label.size))
    radius = np.array([int(3 * sigma_nm / nm + 0.5) for nm in voxel_nm])  # scipy's truncation
    index = np.stack(np.nonzero(label >= 0), axis=1)
    total = np.prod(
        [
            np.exp(-0.5 * (np.arange(-r, r + 1) * nm / sigma_nm) ** 2).sum()
            for r, nm in zip(radius, voxel_nm, strict=True)
        ]
    )
    for v in np.nonzero(flat)[0]:
        near = (np.abs(index - index[v]) <= radius).all(1) & (flat == flat[v])
        offset = position[near] - position[v]
        weight = np.exp(-0.5 * (offset**2).sum(1))
        mean = (weight[:, None] * offset).sum(0) / weight.sum()
        moment = (weight[:, None, None] * (offset[:, :, None] * offset[:, None, :])).sum(0) / weight.sum()
        covariance = moment - np.outer(mean, mean)
        found[:3, v] = 0.5 + 0.5 * mean
        found[3:6, v] = np.diag(covariance)
        for channel, (i, j) in enumerate(((0, 1), (0, 2), (1, 2)), start=6):
            spread = np.sqrt(covariance[i, i] * covariance[j, j])
            found[channel, v] = 0.5 + 0.5 * covariance[i, j] / max(spread, 1e-4)
        found[9, v] = weight.sum() / total
    return found.clip(0, 1).reshape(10, *label.shape)


@settings(max_examples=15)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 8)), seed=st.integers(0, 99))
def test_descriptors_of_small_neighbourhoods_are_exact(shape, seed) -> None:
    label = np.random.default_rng(seed).integers(0, 3, shape) * 7
    voxel, sigma = (29.0, 6.0, 9.0), 16.0
    expected = descriptors_by_hand(label, voxel, sigma)
    assert np.abs(shape_descriptors(label, voxel, sigma) - expected).max() < 2e-3


def test_descriptors_of_large_neighbourhoods_are_close() -> None:
    label = np.zeros((6, 40, 44), dtype=np.uint32)
    z, y, x = np.ogrid[:6, :40, :44]
    label[(y - x + 0 * z > -6) & (y - x + 0 * z < 5)] = 3
    label[(y < 9) & (x > 24) & (z > 1)] = 2**31
    voxel, sigma = (30.0, 6.0, 6.0), 48.0  # eight pixels: taken on a grid of every other one
    found, expected = shape_descriptors(label, voxel, sigma), descriptors_by_hand(label, voxel, sigma)
    error = np.abs(found - expected)[:, label > 0]
    assert error.mean() < 0.01
    assert error.max() < 0.2  # correlations at the tips
    assert not found[:, label == 0].any()


def test_descriptors_say_what_the_shape_is() -> None:
    label = np.zeros((3, 41, 41), dtype=np.uint8)
    label[:, 20, :] = 1  # a thread along x
    label[:, 30:, :] = 2  # a half space
    found = shape_descriptors(label, (40.0, 8.0, 8.0), 24.0)
    thread, border = found[:, 1, 20, 20], found[:, 1, 30, 20]
    assert thread[:3] == pytest.approx([0.5, 0.5, 0.5], abs=1e-3)
    assert thread[4] < 0.01 < thread[5]  # no extent along y, much along x
    assert border[1] > 0.7  # the mass of a half space lies sqrt(2 / pi) sigma beyond its border
    assert thread[9] < border[9] < found[9, 1, 38, 20]


def test_nearest_affinities_do_not_change() -> None:
    def make(auxiliary: AuxiliaryTargets) -> AffinityPatches:
        return AffinityPatches(
            [random_volume((9, 30, 28))],
            [],
            patch=(4, 16, 14),
            seed=3,
            ratio=0.0,
            augment=ONLY_POSES,
            label_erosion=1,
            auxiliary=auxiliary,
        )

    auxiliary = AuxiliaryTargets(PUBLISHED, shape_sigma_nm=30.0)
    plain, more = make(AuxiliaryTargets()), make(auxiliary)
    assert auxiliary.channels == 16
    for i in range(10):
        a, b = plain[i], more[i]
        assert np.array_equal(a["image"], b["image"])
        assert b["affinity"].shape == b["weight"].shape == (9, 4, 16, 14)
        assert np.array_equal(a["affinity"], b["affinity"][:3])
        assert np.array_equal(a["weight"], b["weight"][:3])
        assert b["shape"].shape == (10, 4, 16, 14)
        assert np.array_equal(b["shape_weight"][0] > 0, b["shape"][9] > 0)
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in b.values())
        # The first two edges over three rows lead out of what was read, one row more than the patch; and the third,
        # where that row lies outside the volume.
        assert not b["weight"][5, :, :2].any()
        assert b["weight"][5, :, 3:].all()


def test_a_patch_of_the_first_sections_has_no_longer_edges() -> None:
    patches = AffinityPatches(
        [random_volume((4, 9, 9))],
        [],
        patch=(4, 9, 9),
        seed=0,
        ratio=0.0,
        augment=AugmentOptions.none(),
        auxiliary=AuxiliaryTargets(((2, 0, 0),)),
    )
    weight = patches[0]["weight"][3]
    assert not weight[:2].any()
    assert weight[2:].all()


def test_loss_of_descriptors_by_hand() -> None:
    logits = torch.zeros(1, 10, 1, 1, 2)
    shape = torch.tensor([1.0, 0.0]).expand(1, 10, 1, 1, 2)
    assert float(shape_loss(logits, shape, torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2))) == 0.25
    assert float(shape_loss(logits, shape, torch.zeros(1, 1, 1, 1, 2))) == 0


def test_channels_of_the_output_are_told_apart() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.output

    affinity = (torch.rand(2, 4, 2, 3, 3) > 0.5).float()
    shape = torch.rand(2, 10, 2, 3, 3)
    network = Fixed()
    network.output = torch.cat([40 * affinity - 20, torch.logit(shape)], dim=1)
    batch = {
        "image": torch.zeros(2, 1, 2, 3, 3),
        "affinity": affinity,
        "weight": torch.ones_like(affinity),
        "shape": shape,
        "shape_weight": torch.ones(2, 1, 2, 3, 3),
    }
    loss, logs = affinity_loss(network, batch, shape_weight=5.0)
    assert float(loss) < 1e-6
    assert float(logs["accuracy"]) == 1
    batch["shape"] = 1 - shape
    worse, logs = affinity_loss(network, batch, shape_weight=5.0)
    assert float(worse) == pytest.approx(5 * float(((1 - 2 * shape) ** 2).mean()), rel=1e-4)


def test_a_trained_network_predicts_affinities_alone(tmp_path) -> None:
    options = {"filters": [4, 6], "out_channels": 3 + 16}
    torch.manual_seed(0)
    network = build_segmenter("superhuman", **options).eval()
    common = {"kind": "segmenter", "architecture": "superhuman", "options": options}
    for name, extra in (("told", {"auxiliary_channels": 16}), ("untold", {})):
        save_checkpoint(tmp_path / f"{name}.pt", state_dict=network.state_dict(), extra=extra, **common)
    alone = segmenter_from_checkpoint(load_checkpoint(tmp_path / "told.pt", kind="segmenter"))
    image = torch.rand(1, 1, 3, 20, 17)
    with torch.inference_mode():
        assert torch.equal(alone(image), network(image)[:, :3])
    assert not alone.training
    with pytest.raises(CheckpointMismatch, match="Got 1 to 19"):
        segmenter_from_checkpoint(load_checkpoint(tmp_path / "untold.pt", kind="segmenter"))


def test_a_recipe_trains_with_both_and_predicts(tmp_path) -> None:
    run = tmp_path / "run"
    changes = {
        "AUGMENTOR__SYNTHETIC": "False",
        "NEURODIFF__SEGMENTER__LONG_RANGE": "[[2, 0, 0], [0, 3, 0], [0, 0, 9]]",
        "NEURODIFF__SEGMENTER__SHAPE_SIGMA_NM": "40",
        "SOLVER__ITERATION_TOTAL": "4",
    }
    run_pipeline(load_config(overrides=tiny_settings(run, **changes)), stages=["segmenter", "predictions"])
    weights = load_checkpoint(run / "segmenter" / "real" / "checkpoint.pt", kind="segmenter")
    assert weights.options["out_channels"] == 16
    affinity = np.asarray(open_array(run / "predictions" / "real_test.h5", ("affinity",)))
    assert affinity.shape == (3, 7, 72, 88)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LONG_RANGE": "[[0, 0, 1]]"}, "beyond the direct neighbour"),
        ({"LONG_RANGE": "[[0, 3]]"}, "distances"),
        ({"LONG_RANGE": "[3]"}, "distances"),
        ({"LONG_RANGE": "[[0, -3, 0]]"}, "distances"),
        ({"LONG_RANGE": "[[0, 2.5, 0]]"}, "distances"),
        ({"LONG_RANGE": "[[6, 0, 0]]"}, r"below MODEL.INPUT_SIZE \[6, 32, 40\]"),
        ({"SHAPE_SIGMA_NM": "-1.0"}, ">= 0"),
        ({"SHAPE_WEIGHT": "-1.0"}, ">= 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes, words, tmp_path) -> None:
    keys = {f"NEURODIFF__SEGMENTER__{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=tiny_settings(tmp_path, **keys))


def test_agq_learns_neurons_instead(tmp_path) -> None:
    changes = {"MODEL__ARCHITECTURE": "agq", "NEURODIFF__SEGMENTER__SHAPE_SIGMA_NM": "40.0"}
    with pytest.raises(ConfigError, match="agq, which learns neurons"):
        load_config(overrides=tiny_settings(tmp_path, **changes))


@pytest.mark.parametrize("offset", [(0, 0, 1), (0, -2, 0), (1, 2), (0, 2.0, 0)])
def test_targets_refuse_what_is_no_long_range(offset) -> None:
    with pytest.raises(ValueRangeError, match=r"such as \[0, 9, 0\]"):
        AuxiliaryTargets((offset,))


def test_targets_refuse_negative_numbers() -> None:
    for wrong in ({"shape_sigma_nm": -1.0}, {"shape_sigma_nm": float("nan")}, {"shape_weight": -0.5}):
        with pytest.raises(ValueRangeError, match=next(iter(wrong))):
            AuxiliaryTargets(**wrong)
