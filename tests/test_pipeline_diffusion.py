"""The diffusion stage: several volumes of different voxel size, what is refused, what makes a checkpoint stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import settings

from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.conditions import dark_bodies, membrane_from_labels
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import (
    ConfigError,
    MissingInput,
    StaleArtifactError,
    UserError,
    ValueRangeError,
)
from connectomics_neurodiff.pipeline import networks, run_pipeline
from connectomics_neurodiff.pipeline.judging import FollowingWatch, _place_to_look_at, judge_of, read_following
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.pipeline.plan import describe_plan
from connectomics_neurodiff.pipeline.run import Run
from connectomics_neurodiff.pipeline.synthesis_metrics import _means_of_checks
from connectomics_neurodiff.synthesis import DiffusionProcess, GreyScale, cosine_betas, denoiser_from_checkpoint
from connectomics_neurodiff.volume import Volume, grow_phantom, open_volume, write_volume

EXTRA = "NEURODIFF__DIFFUSION__EXTRA_VOLUMES"
SHORT = {"NEURODIFF__DIFFUSION__ITERATIONS": "4", "NEURODIFF__DIFFUSION__PATCH": "[2, 16, 24]"}


def run(folder: Path, **changes: str) -> None:
    run_pipeline(load_config(overrides=settings(folder, **SHORT, **changes)), stages=["diffusion"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes beside the embedded one: isotropic, and one that is smaller than a patch is deep."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, shape, voxel_nm in (("fib.h5", (12, 40, 44), (8, 8, 8)), ("thin.h5", (1, 24, 30), (50, 4.6, 4.6))):
        volume = grow_phantom(shape, voxel_nm, 1)
        write_volume(folder / name, volume.arrays, volume.voxel_nm, {})
    return folder


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run on three voxel sizes with every option of the training on."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    changes = {
        "DATASET__INPUT_PATH": str(inputs),
        EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "BOX": [0, 0, 0, 1, 24, 28]}]),
        "NEURODIFF__DIFFUSION__VOLUME_SHARE": "equal",
        "NEURODIFF__DIFFUSION__RESOLUTION_EMBEDDING": "True",
        "NEURODIFF__DIFFUSION__LEARN_VARIANCE": "True",
        "NEURODIFF__DIFFUSION__NOISE_SPREAD": "0",
        "NEURODIFF__DIFFUSION__CONDITION_DROPOUT": "0.1",
        "NEURODIFF__DIFFUSION__VOXEL_SIZE_DROPOUT": "0.1",
        "NEURODIFF__DIFFUSION__SNR_GAMMA": "5",
        "NEURODIFF__DIFFUSION__PREDICTION": "velocity",
    }
    run(folder, **changes)
    return folder, changes


def test_a_checkpoint_says_what_it_was_trained_on(trained: tuple[Path, dict[str, str]]) -> None:
    checkpoint = load_checkpoint(trained[0] / "diffusion" / "checkpoint.pt", kind="denoiser")
    assert checkpoint.extra["voxel_nm"] == [[29.0, 6.0, 6.0], [8.0, 8.0, 8.0], [50.0, 4.6, 4.6]]
    assert (checkpoint.extra["condition_dropout"], checkpoint.extra["voxel_size_dropout"]) == (0.1, 0.1)
    network, process = denoiser_from_checkpoint(checkpoint)
    assert process.prediction == "velocity"
    image = torch.zeros(1, 1, 2, 8, 8)
    with torch.no_grad():
        out = network(image, torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 2, 8, 8), torch.zeros(1, 3))
    assert out.shape == (1, 2, 2, 8, 8)
    # It starts at zero behind two other zero layers, each of which takes a step to wake.
    assert network.state_dict()["resolution.known.2.weight"].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"NEURODIFF__DIFFUSION__SNR_GAMMA": "0"}, "SNR_GAMMA: 5.0 -> 0.0"),
        ({"NEURODIFF__DIFFUSION__FLIPS": "False"}, "FLIPS: True -> False"),
        ({"NEURODIFF__DIFFUSION__INTENSITY_JITTER": "0.1"}, "INTENSITY_JITTER: 0.02 -> 0.1"),
        ({"NEURODIFF__DARK_BODIES": "False"}, "DARK_LEVEL: 0.75 -> 0.0"),
        ({"NEURODIFF__DIFFUSION__LOSS": "l1"}, "LOSS: l2 -> l1"),
        ({"NEURODIFF__DIFFUSION__NOISE_MEAN": "0.3"}, "NOISE_MEAN: 1.2 -> 0.3"),
        ({"NEURODIFF__DIFFUSION__CONDITION_DROPOUT": "0.2"}, "CONDITION_DROPOUT: 0.1 -> 0.2"),
        ({EXTRA: "['fib.h5']"}, "extra: "),
        ({EXTRA: "[]"}, "extra: .* -> absent"),
        ({EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "BOX": [0, 0, 0, 1, 24, 27]}])}, "extra: "),
        ({EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "VOXEL_NM": [40, 5, 5]}])}, "extra: "),
    ],
)
def test_what_makes_a_denoiser_stale(trained: tuple[Path, dict[str, str]], change: dict[str, str], named: str) -> None:
    with pytest.raises(StaleArtifactError, match=named):
        run(trained[0], **{**trained[1], **change})


def test_how_images_are_painted_does_not_make_a_denoiser_stale(tmp_path: Path) -> None:
    """Its sidecar holds the settings of the training, all of them and no others."""
    run(tmp_path / "run")
    sidecar = json.loads((tmp_path / "run" / "diffusion" / "checkpoint.pt.provenance.json").read_text())
    assert set(sidecar["settings"]) == {
        "ARCHITECTURE", "PRESET", "STEPS", "COSINE_OFFSET", "PREDICTION", "CONDITIONING", "RGM", "RPGE",
        "SCAN_DIRECTIONS", "PATCH", "ITERATIONS", "BATCH", "ACCUMULATE", "LEARNING_RATE", "WARMUP", "SCHEDULE",
        "CLIP_NORM", "EMA_DECAY", "MEMBRANE_NM", "PRECISION", "DARK_LEVEL", "LOSS", "NOISE_MEAN", "NOISE_SPREAD",
        "FLAT_LEVELS", "RESOLUTION_EMBEDDING", "LEARN_VARIANCE", "CHECKPOINTING", "VOLUME_SHARE", "FLIPS", "TRANSPOSE",
        "INTENSITY_JITTER", "CONDITION_DROPOUT", "VOXEL_SIZE_DROPOUT", "SNR_GAMMA",
    }  # fmt: skip
    assert set(sidecar["parents"]) == {"train"}


def test_a_missing_extra_volume_is_listed_and_refused(tmp_path: Path, inputs: Path) -> None:
    changes = {"DATASET__INPUT_PATH": str(inputs), EXTRA: "['fib.h5', {'IMAGE_NAME': 'a.h5', 'LABEL_NAME': 'b.h5'}]"}
    cfg = load_config(overrides=settings(tmp_path / "out", **changes))
    plan = describe_plan(cfg, ["diffusion"])
    assert [f"missing: {inputs / name}" in plan for name in ("fib.h5", "a.h5", "b.h5")] == [False, True, True]
    with pytest.raises(MissingInput, match=r"a\.h5, .*b\.h5"):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_extra_volumes(tmp_path: Path, inputs: Path) -> None:
    changes = {"DATASET__INPUT_PATH": str(inputs), EXTRA: "fib.h5", "NEURODIFF__DIFFUSION__CHECKPOINTING": "True"}
    plan = describe_plan(load_config(overrides=settings(tmp_path / "out", **changes)), ["diffusion"])
    assert f"EXTRA_VOLUMES[0]: {inputs / 'fib.h5'} (0, 0, 0)-(12, 40, 44), (8.0, 8.0, 8.0) nm" in plan


def test_extra_volumes_are_not_asked_for_where_no_denoiser_is_trained(tmp_path: Path) -> None:
    changes = {"AUGMENTOR__SYNTHETIC": "False", EXTRA: "nowhere.h5"}
    assert "missing" not in describe_plan(load_config(overrides=settings(tmp_path / "out", **changes)), ["segmenter"])


@pytest.mark.parametrize("copied", [False, True])
def test_voxels_of_the_test_part_are_refused_also_from_a_copy(tmp_path: Path, inputs: Path, copied: bool) -> None:
    for name in ("fib.h5", "thin.h5"):
        shutil.copy(inputs / name, tmp_path / name)
    name = "copy.h5" if copied else "fib.h5"
    shutil.copy(inputs / "fib.h5", tmp_path / "copy.h5")
    changes = {
        "DATASET__INPUT_PATH": str(tmp_path),
        "DATASET__IMAGE_NAME": "fib.h5",
        "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 4, 40, 44]",
        "NEURODIFF__SPLIT__TUNE__BOX": "[4, 0, 0, 6, 40, 44]",
        "NEURODIFF__SPLIT__TEST__BOX": "[8, 0, 0, 12, 40, 44]",
    }

    def extra(z0: int, z1: int) -> str:
        return str(["thin.h5", {"IMAGE_NAME": name, "BOX": [z0, 0, 0, z1, 40, 44]}])

    key = r"NEURODIFF\.DIFFUSION\.EXTRA_VOLUMES\[1\]\.BOX"
    for z0, z1, part in ((5, 7, "tune"), (7, 9, "test")):
        with pytest.raises(ConfigError, match=rf"EXTRA_VOLUMES\[1\] and {part} must not share voxels.*{key}") as caught:
            run(tmp_path / "out", **changes, **{EXTRA: extra(z0, z1)})
        assert "\n" not in str(caught.value)
    cfg = load_config(overrides=settings(tmp_path / "out", **changes, **{EXTRA: extra(6, 8)}))
    assert "EXTRA_VOLUMES[1]" in describe_plan(cfg, ["diffusion"])  # between the two there is nothing to refuse


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"IMAGE_NAME": "fib.h5", "BOX": [0, 0, 0, 13, 40, 44]}, ValueRangeError, r"EXTRA_VOLUMES\[0\]\.BOX must lie"),
        ({"IMAGE_NAME": "fib.h5", "MITO_NAME": "thin.h5"}, UserError, "shape|mito"),
    ],
)
def test_extra_volumes_that_cannot_be_used(
    tmp_path: Path, inputs: Path, entry: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(tmp_path / "out", DATASET__INPUT_PATH=str(inputs), **{EXTRA: str([entry])})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_denoiser_learns_the_dark_bodies_of_a_train_part_without_mitochondria(tmp_path: Path) -> None:
    """Its masks then hold them as mitochondria, and a volume with masks of its own keeps these."""
    volume = grow_phantom((8, 72, 88), (29, 6, 6), 2)
    found = dark_bodies(volume.array("image"), volume.array("label"), volume.voxel_nm)
    assert found.any()
    for name, arrays in (
        ("bare.h5", {"image": volume.array("image"), "label": volume.array("label")}),
        ("masked.h5", {**volume.arrays, "mito": np.zeros(volume.shape, np.uint8)}),
    ):
        write_volume(tmp_path / name, arrays, volume.voxel_nm, {})
        boxes = {f"NEURODIFF__SPLIT__{part}__BOX": "[]" for part in ("TRAIN", "TUNE", "TEST")}
        scored = {
            "NEURODIFF__SPLIT__SCORED": "False",
            "DATASET__INPUT_PATH": str(tmp_path),
            "DATASET__IMAGE_NAME": name,
        }
        cfg = load_config(overrides=settings(tmp_path / "out", **boxes, **scored))
        mito = open_parts(cfg)["train"].load().mito_array
        assert mito is not None
        np.testing.assert_array_equal(mito, found if name == "bare.h5" else 0)
        dark = open_parts(cfg)["train"].load().array("dark")
        assert not dark[mito > 0].any()
        assert not dark[membrane_from_labels(volume.array("label"), volume.voxel_nm) > 0].any()
        off = load_config(overrides=settings(tmp_path / "out", **boxes, **scored, NEURODIFF__DARK_BODIES="False"))
        assert (open_parts(off)["train"].load().mito_array is None) == (name == "bare.h5")
        assert open_parts(off)["train"].load().dark is None


def test_the_checkpoint_keeps_the_grey_scale_of_every_volume(
    trained: tuple[Path, dict[str, str]], inputs: Path
) -> None:
    kept = load_checkpoint(trained[0] / "diffusion" / "checkpoint.pt", kind="denoiser").extra["grey_scales"]
    assert [entry["voxel_nm"] for entry in kept] == [[29, 6, 6], [8, 8, 8], [50, 4.6, 4.6]]
    image = open_volume(inputs / "fib.h5").array("image")
    assert kept[1]["mean"] == pytest.approx(float(image.mean()), abs=1e-5)
    assert kept[1]["std"] == pytest.approx(float(image.std()), abs=1e-5)


def test_several_volumes_are_told_apart_by_their_voxel_size(tmp_path: Path) -> None:
    for extra, embedded in (("[]", False), ("['fib.h5']", True)):
        cfg = load_config(overrides=settings(tmp_path / "out", **{EXTRA: extra}))
        assert networks.denoiser_options(cfg)["resolution_embedding"] == embedded


WATCHED = {"NEURODIFF__PAIRS__LEAST_FOLLOWING": "0.9", "NEURODIFF__PAIRS__JUDGE_ITERATIONS": "150"}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose denoiser was looked at, and its log."""
    folder = tmp_path_factory.mktemp("runs") / "watched"
    run(folder, **WATCHED)
    return folder, (folder / "run.log").read_text()


def test_a_training_is_watched_and_its_following_recorded(watched: tuple[Path, str], tmp_path: Path) -> None:
    looks = read_following(watched[0] / "diffusion" / "following.csv")
    assert [look.step for look in looks] == [1, 2, 3, 4]
    for look in looks:
        assert 0 < look.average_precision < 1
        assert look.real > look.null
        assert look.following < 0.9
    assert "does not follow its masks" in watched[1]  # after four iterations
    run(tmp_path / "alone")
    states = [
        load_checkpoint(folder / "diffusion" / "checkpoint.pt", kind="denoiser").state_dict
        for folder in (watched[0], tmp_path / "alone")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # looking changes nothing


@pytest.fixture
def denoiser(watched: tuple[Path, str]) -> torch.nn.Module:
    checkpoint = load_checkpoint(watched[0] / "diffusion" / "checkpoint.pt", kind="denoiser")
    return denoiser_from_checkpoint(checkpoint)[0]


@pytest.fixture
def watch(watched: tuple[Path, str], tmp_path: Path) -> Callable[..., FollowingWatch]:
    """A watch of that run's judge with other settings, writing to a file of the test."""

    def make(**changes: str) -> FollowingWatch:
        cfg = load_config(
            overrides=settings(watched[0], **{**SHORT, **WATCHED, "NEURODIFF__PAIRS__MOST_MISSING": "0.17", **changes})
        )
        opened = Run(cfg, watched[0], open_parts(cfg))
        process = DiffusionProcess(cosine_betas(20))
        judge = judge_of(opened)
        assert judge is not None
        return FollowingWatch(opened, judge, process, GreyScale(0.5, 0.2), tmp_path / "following.csv")

    return make


def test_looks_of_other_settings_are_no_part_of_a_curve(
    watch: Callable[..., FollowingWatch], denoiser: torch.nn.Module, tmp_path: Path
) -> None:
    first = watch()
    for step in (1, 2, 3):
        first(denoiser, step)
    watch()(denoiser, 3)  # resumed after the second
    before = read_following(tmp_path / "following.csv")
    assert [look.step for look in before] == [1, 2, 3]
    rows = [",".join(row.split(",")[:5]) for row in (tmp_path / "following.csv").read_text().splitlines()]
    (tmp_path / "old.csv").write_text("\n".join(rows))  # of a version that did not say how images were painted
    assert read_following(tmp_path / "old.csv") == [look._replace(painted_with="") for look in before]
    watch(NEURODIFF__DIFFUSION__SAMPLER_STEPS="3")(denoiser, 4)
    (after,) = read_following(tmp_path / "following.csv")
    assert after.step == 4
    assert after.painted_with != before[0].painted_with


@pytest.mark.parametrize(
    ("least", "told"),
    [
        ("0.9", "The denoiser does not follow its masks: its last image is"),
        ("0.0", "following: the denoiser's last image is"),
        ("", "following: not looked at with these settings"),
    ],
)
def test_a_training_ends_with_a_verdict(
    watch: Callable[..., FollowingWatch],
    denoiser: torch.nn.Module,
    least: str,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    judged = watch(NEURODIFF__PAIRS__LEAST_FOLLOWING=least or "0.9")
    if least:
        judged(denoiser, 4)
    with caplog.at_level("INFO"):
        judged.conclude()
    assert caplog.messages == [message for message in caplog.messages if message.startswith(told)]
    assert len(caplog.messages) == 1


def test_the_place_to_look_at_is_one_that_can_be_judged() -> None:
    # The middle is wide background; neurons touch in the last columns alone.
    label = np.zeros((4, 60, 160), np.uint32)
    label[:, :30, 100:], label[:, 30:, 100:] = 1, 2
    volume = Volume(np.zeros(label.shape, np.float32), label, None, (29.0, 6.0, 6.0))
    place = _place_to_look_at(volume, (4, 60, 40), 25.0)
    assert (place.start, place.stop) == ((0, 0, 120), (4, 60, 160))
    label[:, :, 60:] = 0
    label[:, :30, :60], label[:, 30:, :60] = 1, 2
    assert _place_to_look_at(volume, (4, 60, 40), 25.0).start == (0, 0, 0)
    # The middle has some, too, but less than half as many.
    label[:, 28:30, 80:], label[:, 30:32, 80:] = 1, 2
    assert _place_to_look_at(volume, (4, 60, 40), 25.0).start == (0, 0, 0)
    label[:, :30, 60:], label[:, 30:, 60:] = 1, 2
    assert _place_to_look_at(volume, (4, 60, 40), 25.0).start == (0, 0, 60)
    label[:] = 1
    label[:, :, 50:100] = 0
    with pytest.raises(UserError, match=r"no tile of the train part has membranes.*TILE"):
        _place_to_look_at(volume, (4, 60, 40), 25.0)


def test_a_judge_that_cannot_judge_is_not_kept(tmp_path: Path) -> None:
    few = WATCHED | {"NEURODIFF__PAIRS__JUDGE_ITERATIONS": "1"}
    with pytest.raises(UserError, match="Train the judge longer"):
        run(tmp_path / "out", **few)
    run(tmp_path / "out", **WATCHED)  # as was asked for
    assert (tmp_path / "out" / "diffusion" / "checkpoint.pt").exists()


def test_what_the_gate_could_only_refuse_is_told_before_the_training(tmp_path: Path) -> None:
    changes = {"NEURODIFF__PAIRS__CONTINUITY_LIMIT": "0.25", "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 1, 72, 88]"}
    with pytest.raises(UserError, match=r"does not pass the gate itself: Cannot judge how alike"):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "diffusion").exists()


def test_a_train_part_too_small_for_the_judge_is_told_before_the_training(tmp_path: Path) -> None:
    changes = {"NEURODIFF__PAIRS__LEAST_FOLLOWING": "0.5", "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 1, 12, 40]"}
    with pytest.raises(UserError, match=r"Cannot judge.*LEAST_FOLLOWING"):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "diffusion").exists()


def test_numbers_that_the_gate_could_not_measure_are_left_out_of_the_means() -> None:
    gates = [
        {"checks": {"grey": {"got": 0.02}, "following": {"got": None}, "dark in mitochondria": {"got": 0.9}}},
        {"checks": {"grey": {"got": 0.04}, "dark in mitochondria": {"got": 0.7}}},
        {"passed": False},
    ]
    found = _means_of_checks(gates)
    assert found == {"grey_value_distance": pytest.approx(0.03), "dark_share_in_mitochondria": pytest.approx(0.8)}
