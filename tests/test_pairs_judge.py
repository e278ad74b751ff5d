"""The judge: average precision against brute force, a pure function of the seed, honest about what it cannot judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from connectomics_neurodiff.checkpoints import save_checkpoint
from connectomics_neurodiff.conditions import membrane_from_labels
from connectomics_neurodiff.errors import CheckpointMismatch, ShapeMismatch, StaleArtifactError, ValueRangeError
from connectomics_neurodiff.pairs import Judge, JudgeSettings, load_judge, train_judge
from connectomics_neurodiff.pairs.boundary_network import BoundaryNetwork
from connectomics_neurodiff.pairs.judge import (
    PREVALENCE,
    JudgePatches,
    average_precision,
    cut_share,
    found_and_wrong,
    missing_at_worst,
    missing_share,
)
from connectomics_neurodiff.volume import Volume, grow_phantom

SHORT = JudgeSettings(steps=6)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return grow_phantom((6, 72, 100), (29.0, 6.0, 6.0), seed=3)


def trained(volume: Volume, folder: Path, seed: int = 0, key: str = "") -> Judge:
    return train_judge(volume, membrane_nm=25.0, seed=seed, folder=folder, key=key, settings=SHORT)


def scores_and_target(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random((3, 17, 23)) < rng.uniform(0.05, 0.6)
    scores = np.clip(rng.normal(400 + 150 * target, 120), 0, 1023).astype(np.uint16)
    return scores, target, rng.random(target.shape) < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_agrees_with_scikit_learn(seed: int) -> None:
    scores, target, counted = scores_and_target(seed)
    weight_of_others = (1 - PREVALENCE) / PREVALENCE * (target & counted).sum() / (~target & counted).sum()
    weights = np.where(target, 1, weight_of_others)[counted]
    wanted = average_precision_score(target[counted], scores[counted], sample_weight=weights)
    assert average_precision(*found_and_wrong(scores, target, counted)) == pytest.approx(wanted, abs=1e-9)


def test_average_precision_agrees_with_its_definition() -> None:
    scores, target, counted = scores_and_target(9)
    total, recall_before = 0.0, 0.0
    for level in sorted(set(scores[counted].tolist()), reverse=True):
        recall = (scores[counted & target] >= level).mean()
        false = (scores[counted & ~target] >= level).mean()
        total += (recall - recall_before) * PREVALENCE * recall / (PREVALENCE * recall + (1 - PREVALENCE) * false)
        recall_before = recall
    assert average_precision(*found_and_wrong(scores, target, counted)) == pytest.approx(total, abs=1e-9)


def test_the_ends_of_the_scale() -> None:
    target = np.zeros((2, 20, 20), bool)
    target[:, 5] = True
    counted = np.ones_like(target)
    perfect = found_and_wrong(np.where(target, 900, 100).astype(np.uint16), target, counted)
    assert (average_precision(*perfect), missing_share(*perfect)) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
    chance = found_and_wrong(np.full(target.shape, 500, np.uint16), target, counted)
    assert average_precision(*chance) == pytest.approx(PREVALENCE)
    assert np.isnan(average_precision(*found_and_wrong(np.zeros(target.shape, np.uint16), target & False, counted)))


def test_what_was_left_out_is_missing_by_half() -> None:
    rng = np.random.default_rng(0)
    target = rng.random((4, 60, 60)) < 0.3
    left_out = target & (rng.random(target.shape) < 0.4)
    noise = rng.integers(0, 200, target.shape)
    scores = (noise + 500 * (target & ~left_out)).astype(np.uint16)
    assert missing_share(*found_and_wrong(scores, target, np.ones_like(target))) == pytest.approx(0.2, abs=0.02)


def test_what_boundaries_cut_off_that_the_mask_lacks() -> None:
    label = np.ones((2, 20, 50), np.uint32)
    label[:, :, 40:] = 2
    target = np.zeros(label.shape, bool)
    target[:, :, 40] = True
    scores = np.where(target, 900, 100).astype(np.uint16)
    counted = np.ones_like(target)
    assert cut_share(scores, target, counted, label) == 0
    scores[:, 5:10, 5:10] = 900  # an organelle cuts off nothing
    scores[:, 6:9, 6:9] = 100  # but its lumen: 9 of 775 + 180 voxels
    assert cut_share(scores, target, counted, label) == pytest.approx(9 / (40 * 20 - 16 + 9 * 20))
    scores[0, :, 30] = 900  # through one of two sections: 9 columns of 20 beyond it
    area = 2 * (40 * 20 - 16 + 9 * 20) - 20
    assert cut_share(scores, target, counted, label) == pytest.approx((2 * 9 + 9 * 20) / area)
    scores[0, :10, 30] = 100  # half as long: the piece beyond is reached
    assert cut_share(scores, target, counted, label) == pytest.approx(2 * 9 / (area + 10))
    assert cut_share(scores, target & False, counted, label) == 0


@pytest.mark.parametrize("part", [np.s_[2], np.s_[:, 24:48, :20]])
def test_what_is_missing_in_one_place_is_seen_there(part: tuple[slice, ...]) -> None:
    rng = np.random.default_rng(0)
    target = rng.random((5, 72, 60)) < 0.3
    scores = (rng.integers(0, 200, target.shape) + 500 * target).astype(np.uint16)
    counted = np.ones_like(target)
    assert missing_at_worst(scores, target, counted) == pytest.approx(0.0, abs=1e-9)
    scores[part] = rng.integers(0, 200, target[part].shape)
    assert missing_at_worst(scores, target, counted) == pytest.approx(0.5, abs=0.08)
    assert missing_share(*found_and_wrong(scores, target, counted)) < 0.13
    # A soma there: membranes are few, and all else is as dark.
    target[:, 24:48, :20] &= rng.random((5, 24, 20)) < 0.1
    scores = (rng.integers(0, 200, target.shape) + 500 * target).astype(np.uint16)
    scores[:, 24:48, :20] = rng.integers(0, 200, (5, 24, 20))
    assert missing_share(*found_and_wrong(*(a[:, 24:48, :20] for a in (scores, target, counted)))) > 0.3
    assert missing_at_worst(scores, target, counted) < 0.1
    few = counted & False
    few[:, :4, :4] = True  # too few voxels to speak of
    assert missing_at_worst(scores, target, few) == 0


@pytest.mark.parametrize("context", [0, 2])
def test_the_network_takes_any_extent_and_sees_only_its_context(context: int) -> None:
    torch.manual_seed(0)
    network = BoundaryNetwork(context=context, channels=(8, 8, 12)).eval()
    image = torch.randn(2, 1, 3 + 2 * context, 21, 34)
    with torch.inference_mode():
        logits = network(image)
        assert logits.shape == (2, 1, 3, 21, 34)
        changed = image.clone()
        changed[:, :, 0] += torch.randn(21, 34)
        differs = (network(changed) != logits).flatten(3).any(dim=3)[0, 0]
    assert differs.tolist() == [True, False, False]


@pytest.mark.parametrize("context", [0, 3])
def test_a_patch_is_a_pure_function_of_seed_and_number(volume: Volume, context: int) -> None:
    membrane = membrane_from_labels(volume.array("label"), volume.voxel_nm) > 0
    first, again = (JudgePatches(volume, membrane, context=context, seed=5) for _ in range(2))
    for _ in range(2):
        for name, array in first[7].items():
            assert (array == again[7][name]).all()
    assert first[7]["image"].shape == (1, 2 * context + 1, 72, 72)
    assert first[7]["target"].shape == first[7]["counted"].shape == (1, 1, 72, 72)
    assert not (first[8]["image"] == first[7]["image"]).all()
    assert not (JudgePatches(volume, membrane, context=context, seed=6)[7]["image"] == first[7]["image"]).all()


def test_a_judge_is_a_pure_function_of_its_seed(volume: Volume, tmp_path: Path) -> None:
    first, again = (trained(volume, tmp_path / name) for name in "ab")
    assert first.real == again.real
    for name, weights in first.network.state_dict().items():
        assert torch.equal(weights, again.network.state_dict()[name])
    other = trained(volume, tmp_path / "c", seed=1)
    assert other.real != first.real
    with pytest.raises(StaleArtifactError):
        trained(volume, tmp_path / "a", key="another")


def test_a_judge_survives_the_disk(volume: Volume, tmp_path: Path) -> None:
    judge = replace(trained(volume, tmp_path), defect="")
    judge.save(tmp_path / "judge.pt")
    loaded = load_judge(tmp_path / "judge.pt")
    image, label = volume.array("image")[:, :50], volume.array("label")[:, :50]
    membrane = membrane_from_labels(label, volume.voxel_nm)
    assert judge.following(image, membrane, label) == loaded.following(image, membrane, label)
    assert (loaded.voxel_nm, loaded.membrane_nm) == (volume.voxel_nm, 25.0)
    with pytest.raises(ShapeMismatch, match="one shape"):
        judge.following(image, membrane[:, :-1], label)
    save_checkpoint(tmp_path / "bad.pt", kind="judge", architecture="boundary", options={}, state_dict={}, extra={})
    with pytest.raises(CheckpointMismatch, match="damaged"):
        load_judge(tmp_path / "bad.pt")


def test_the_grey_values_of_an_image_do_not_matter(volume: Volume, tmp_path: Path) -> None:
    judge = replace(trained(volume, tmp_path), defect="")
    image, label = volume.array("image"), volume.array("label")
    membrane = membrane_from_labels(label, volume.voxel_nm)
    own, darker = (judge.following(values, membrane, label) for values in (image, 0.2 + 0.4 * image))
    assert darker.image.average_precision == pytest.approx(own.image.average_precision, abs=0.01)


def test_a_judge_that_learnt_nothing_refuses(volume: Volume, tmp_path: Path) -> None:
    nothing = JudgeSettings(steps=1, learning_rate=1e-9)
    noise = np.random.default_rng(0).random(volume.shape, dtype=np.float32)
    blind = Volume(noise, volume.label, None, volume.voxel_nm)
    judge = train_judge(blind, membrane_nm=25.0, seed=0, folder=tmp_path, settings=nothing)
    assert judge.defect.startswith("Cannot judge whether images follow their masks: on held-out real tissue")
    with pytest.raises(ValueRangeError, match="Cannot judge"):
        judge.following(noise, np.asarray(volume.label) == 0, volume.array("label"))
    judge.save(tmp_path / "judge.pt")
    assert load_judge(tmp_path / "judge.pt").defect == judge.defect


@pytest.mark.parametrize("shape", [(6, 72, 40), (2, 12, 100)])
def test_a_part_too_small_to_be_cut_is_not_judged(shape: tuple[int, int, int], tmp_path: Path) -> None:
    label = np.ones(shape, np.uint64)
    label[:, shape[1] // 2 :] = 2
    tiny = Volume(np.full(shape, 0.5, np.float32), label, None, (60.0, 6.0, 6.0))
    tiny = tiny if shape[1] < 16 else Volume(tiny.image, np.ones(shape, np.uint64), None, tiny.voxel_nm)
    judge = train_judge(tiny, membrane_nm=25.0, seed=0, folder=tmp_path, settings=SHORT)
    assert "held out" in judge.defect
    assert str(shape) in judge.defect
    assert not list(tmp_path.iterdir())


def test_wide_background_round_the_held_out_part_is_told_before_the_training(tmp_path: Path) -> None:
    # In its last quarter two neurons touch, all of it within 75 nm of where nobody traced anything.
    label = np.zeros((4, 40, 200), np.uint64)
    label[:, :20, :140], label[:, 20:, :140] = 1, 2
    label[:, 15:20, 150:], label[:, 20:25, 150:] = 1, 2
    image = np.random.default_rng(0).random(label.shape, dtype=np.float32)
    judge = train_judge(
        Volume(image, label, None, (30.0, 6.0, 6.0)), membrane_nm=25.0, seed=0, folder=tmp_path, settings=SHORT
    )
    assert "more than 75 nm from wide background" in judge.defect
    assert not list(tmp_path.iterdir())
