"""The main job: what it leaves, what it reuses, what it refuses, and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import command, settings

from connectomics_neurodiff.checkpoints import load_checkpoint, save_checkpoint
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import ConfigError, MissingInput, OutputExists, StaleArtifactError, UserError
from connectomics_neurodiff.pairs import read_reliability
from connectomics_neurodiff.pipeline import choose_stages, networks, run_pipeline, stages
from connectomics_neurodiff.volume import grow_phantom

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def digest(folder: Path, pattern: str) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))}


def scores(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {arm: metrics[arm] for arm in ("real", "mixed")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = subprocess.run(command(folder), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stderr
    assert "arand" in result.stdout
    assert str(folder / "report.html") in result.stdout
    return folder


def test_a_run_leaves_what_the_design_says(undisturbed: Path) -> None:
    for name in (
        "config.yaml", "diffusion/checkpoint.pt", "masks/copy_000.h5", "pairs/copy_000.h5",
        "segmenter/real/checkpoint.pt", "segmenter/mixed/checkpoint.pt", "predictions/real_test.h5",
        "segmentations/mixed_multicut.h5", "metrics.json", "report.html", "figures/synthesis.png", "run.log",
    ):  # fmt: skip
        assert (undisturbed / name).stat().st_size > 0, name
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert set(metrics) == {"real", "mixed", "synthesis", "seconds", "provenance"}
    columns = json.loads((undisturbed / "columns.json").read_text())
    assert "Difference in columns" in (undisturbed / "report.html").read_text()
    for arm in ("real", "mixed"):
        for method in ("waterz", "multicut"):
            assert len(columns[arm][method]) == 9
            assert set(metrics[arm][method]) == {"voi_split", "voi_merge", "voi", "arand"}
            assert all(math.isfinite(v) for v in metrics[arm][method].values())
    synthesis = metrics["synthesis"]
    assert synthesis["fid3d_interval"][0] <= synthesis["fid3d"] <= synthesis["fid3d_interval"][1]
    assert (synthesis["fid3d_patches"], synthesis["fid3d_features"]) == (16, 12)
    # Eight iterations of diffusion make no tissue.
    assert 0 < synthesis["fid3d_floor"] < synthesis["fid3d"]
    assert 0 < synthesis["fid3d_test"] < synthesis["fid3d"]
    assert set(synthesis["seams"]) == {"y", "x"}  # tiles are as deep as the train part
    assert all(0.5 < seam["ratio"] < 2 for seam in synthesis["seams"].values())
    assert "3D-FID of the synthetic volumes" in (undisturbed / "report.html").read_text()
    # Nothing from outside. The letters "http" alone occur by chance in the base64 of one page's pictures in twelve.
    assert "://" not in (undisturbed / "report.html").read_text().split("</style>")[1].split("<details")[0]


def test_pair_files_have_the_documented_layout(undisturbed: Path) -> None:
    with h5py.File(undisturbed / "pairs" / "copy_000.h5") as file:
        assert {name: file[name].dtype.kind + str(file[name].dtype.itemsize) for name in file} == {
            "image": "u1", "label": "u4", "membrane": "u1", "mito": "u1",
        }  # fmt: skip
        assert file["image"].shape == (8, 72, 88)
        assert file.attrs["resolution_nm"].tolist() == [29, 6, 6]


def test_a_run_s_masks_say_what_is_dark_and_its_denoiser_knows(undisturbed: Path) -> None:
    with h5py.File(undisturbed / "masks" / "copy_000.h5") as file:
        assert set(file) == {"label", "membrane", "mito", "dark"}
        assert file["dark"][:].any()
        assert not (file["dark"][:] & (file["mito"][:] | file["membrane"][:])).any()
    assert load_checkpoint(undisturbed / "diffusion" / "checkpoint.pt", kind="denoiser").extra["knows_dark"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_kill_9_in_every_long_stage_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    moments: list[Callable[[], bool]] = [
        lambda: (folder / "diffusion" / "last.ckpt").exists(),
        lambda: (folder / "pairs").exists(),
        lambda: (folder / "segmenter" / "mixed" / "last.ckpt").exists(),
    ]
    for moment in moments:
        process = subprocess.Popen(
            command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "metrics.json").exists()
    assert subprocess.run(command(folder), capture_output=True, env=ENVIRONMENT, check=False).returncode == 0
    assert scores(folder) == scores(undisturbed)
    assert digest(folder / "pairs", "*.h5") == digest(undisturbed / "pairs", "*.h5")


def run(folder: Path, **changes: str) -> dict:
    options = {key: changes.pop(key) for key in ("stages", "force") if key in changes}
    return run_pipeline(load_config(overrides=settings(folder, **changes)), **options)  # type: ignore[arg-type]


def test_one_seed_gives_the_same_masks_and_two_seeds_others(tmp_path: Path, undisturbed: Path) -> None:
    for name, seed in (("same", "0"), ("other", "1")):
        run(tmp_path / name, NEURODIFF__SEED=seed, stages=["masks"])
    assert digest(tmp_path / "same" / "masks", "*.h5") == digest(undisturbed / "masks", "*.h5")
    assert digest(tmp_path / "other" / "masks", "*.h5") != digest(undisturbed / "masks", "*.h5")


def test_a_second_run_makes_nothing_anew(undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.provenance.json")}
    metrics = run(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.provenance.json")} == before
    assert {arm: metrics[arm] for arm in ("real", "mixed")} == scores(undisturbed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"NEURODIFF__REMODEL__SIGMA_NM": "30.0"}, "SIGMA_NM: 24.0 -> 30.0"),
        ({"NEURODIFF__SEED": "5"}, "seed: 0 -> 5"),
        ({"NEURODIFF__DIFFUSION__LEARNING_RATE": "2e-4"}, "LEARNING_RATE"),
    ],
)
def test_changed_settings_stop_the_run_and_are_named(undisturbed: Path, change: dict, named: str) -> None:
    config = (undisturbed / "config.yaml").read_text()
    with pytest.raises(StaleArtifactError, match=named):
        run(undisturbed, **change)
    assert (undisturbed / "config.yaml").read_text() == config


def test_new_limits_of_the_gate_judge_again_and_paint_nothing(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(undisturbed, folder)
    pair = folder / "pairs" / "copy_000.h5"
    before = pair.read_bytes(), pair.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"No synthetic volume passed the gate\. Sections are out of order"):
        run(folder, NEURODIFF__PAIRS__LEAST_ORDER="1.0", stages=["pairs"])
    gate = json.loads((folder / "pairs" / "copy_000.gate.json").read_text())
    assert not gate["passed"]
    assert gate["limits"]["order"] == 1.0
    with pytest.raises(StaleArtifactError, match=r"other limits of NEURODIFF\.PAIRS: run the stage 'pairs' again"):
        run(folder, stages=["segmenter"])
    run(folder, stages=["pairs"])
    verdict = pair.with_suffix(".gate.json").read_text()
    pair.with_suffix(".gate.json").write_text(verdict.replace(json.loads(verdict)["pair"], "of another image"))
    with pytest.raises(StaleArtifactError, match="is about another pair"):
        run(folder, stages=["segmenter"])
    run(folder, stages=["pairs"])
    assert (pair.read_bytes(), pair.stat().st_mtime_ns) == before
    assert json.loads((folder / "pairs" / "copy_000.gate.json").read_text())["passed"]


def test_force_makes_stale_artefacts_anew(tmp_path: Path) -> None:
    run(tmp_path / "run", stages=["masks"])
    old = digest(tmp_path / "run" / "masks", "*.h5")
    run(tmp_path / "run", NEURODIFF__REMODEL__SIGMA_NM="40.0", stages=["masks"], force=True)
    assert digest(tmp_path / "run" / "masks", "*.h5") != old


def test_fid_is_kept_until_something_that_it_depends_on_changes(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(undisturbed, folder)
    kept = folder / "fid3d.json"
    first = kept.read_bytes(), kept.stat().st_mtime_ns
    run(folder, stages=["metrics"])
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == first
    found = run(folder, NEURODIFF__FID__PATCHES="12", stages=["metrics"])["synthesis"]
    assert found["fid3d_patches"] == 12
    assert kept.read_bytes() != first[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NEURODIFF__FID__PATCHES": "0"}, "NEURODIFF.FID.PATCHES is 0"),
        ({"NEURODIFF__FID__PATCH": "[8, 72, 88]"}, "take a smaller patch"),
    ],
)
def test_where_there_is_no_fid_the_log_says_why(undisturbed: Path, tmp_path: Path, change: dict, reason: str) -> None:
    folder = tmp_path / "without"
    shutil.copytree(undisturbed, folder)
    metrics = run(folder, **change, stages=["metrics", "report"])
    assert {name: value for name, value in metrics["synthesis"].items() if name.startswith("fid3d")} == dict.fromkeys(
        ("fid3d", "fid3d_interval", "fid3d_floor", "fid3d_patches", "fid3d_features", "fid3d_test")
    )
    assert {arm: metrics[arm] for arm in ("real", "mixed")} == scores(undisturbed)
    (line,) = [line for line in (folder / "run.log").read_text().splitlines() if "no 3D-FID: " in line]
    assert reason in line
    assert "not computed" in (folder / "report.html").read_text()


def test_pairs_made_before_are_used_as_they_are(undisturbed: Path, tmp_path: Path) -> None:
    pair = str(undisturbed / "pairs" / "copy_000.h5")
    run(
        tmp_path / "run",
        AUGMENTOR__SYNTHETIC__PAIRS=pair,
        AUGMENTOR__SYNTHETIC__ENABLED="True",
        SOLVER__ITERATION_TOTAL="2",
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["synthesis"]["fid3d_patches"] == 16
    assert not (tmp_path / "run" / "diffusion").exists()
    assert (tmp_path / "run" / "segmenter" / "mixed" / "checkpoint.pt").exists()


def test_without_synthetic_pairs_there_is_one_arm(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", AUGMENTOR__SYNTHETIC="False", SOLVER__ITERATION_TOTAL="2")
    assert "real" in metrics
    assert "mixed" not in metrics
    assert "no synthetic pairs" in (tmp_path / "run" / "report.html").read_text()
    assert metrics["synthesis"]["fid3d"] is None
    assert "no 3D-FID: it compares" in (tmp_path / "run" / "run.log").read_text()


def test_another_checkpoint_can_be_used_for_inference(undisturbed: Path, tmp_path: Path) -> None:
    cfg = load_config(overrides=settings(tmp_path / "run", AUGMENTOR__SYNTHETIC="False"))
    metrics = run_pipeline(cfg, inference=True, checkpoint=str(undisturbed / "segmenter" / "mixed" / "checkpoint.pt"))
    assert metrics["real"] == scores(undisturbed)["mixed"]
    assert "was trained on" not in (tmp_path / "run" / "run.log").read_text()
    with pytest.raises(ConfigError, match="goes with --inference"):
        run_pipeline(cfg, checkpoint=str(undisturbed / "segmenter" / "mixed" / "checkpoint.pt"))


def test_a_checkpoint_of_other_voxels_is_told(undisturbed: Path, tmp_path: Path) -> None:
    found = load_checkpoint(undisturbed / "segmenter" / "real" / "checkpoint.pt", kind="segmenter")
    other = tmp_path / "other.pt"
    save_checkpoint(other, **vars(found) | {"extra": found.extra | {"voxel_nm": [[8.0, 8.0, 8.0]]}})
    cfg = load_config(overrides=settings(tmp_path / "run", AUGMENTOR__SYNTHETIC="False"))
    run_pipeline(cfg, stages=["predictions"], checkpoint=str(other))
    told = (tmp_path / "run" / "run.log").read_text()
    assert "The test part has voxels of" in told
    assert "the segmenter was trained on (8.0, 8.0, 8.0) nm." in told


def test_one_checkpoint_is_scored_as_one_arm(undisturbed: Path, tmp_path: Path) -> None:
    cfg = load_config(overrides=settings(tmp_path / "run"))
    metrics = run_pipeline(cfg, inference=True, checkpoint=str(undisturbed / "segmenter" / "mixed" / "checkpoint.pt"))
    assert metrics["mixed"] == scores(undisturbed)["mixed"]
    assert "real" not in metrics
    assert "left ARAND" not in (tmp_path / "run" / "report.html").read_text()


def test_stages_are_chosen_in_order_and_misspelt_ones_refused() -> None:
    cfg = load_config(overrides=["AUGMENTOR.SYNTHETIC", "True"])
    assert choose_stages(cfg, ["report", "masks"]) == ["masks", "report"]
    assert choose_stages(cfg, inference=True) == ["predictions", "segmentations", "metrics", "report"]
    assert "diffusion" not in choose_stages(load_config())
    with pytest.raises(UserError, match="Did you mean 'masks'"):
        choose_stages(cfg, ["maskss"])


def write_volume(path: Path, **changes: object) -> str:
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 255, (12, 40, 44), dtype=np.uint8), "label": np.ones((12, 40, 44), np.uint32)}
    arrays.update(changes)  # type: ignore[arg-type]
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
        file.attrs["resolution_nm"] = (29, 6, 6)
    return path.name


NAN = np.full((12, 40, 44), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": NAN}, "finite|NaN"),
        ({"label": np.ones((12, 40, 45), np.uint32)}, "shape"),
        ({"label": np.ones((12, 40, 44), np.float32)}, "integer"),
        ({"label": np.full((12, 40, 44), -1, np.int32)}, "negative"),
        ({"label": None}, "label"),
    ],
)
def test_bad_volumes_are_refused_before_any_work(tmp_path: Path, changes: dict, message: str) -> None:
    name = write_volume(tmp_path / "v.h5", **changes)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "out", DATASET__INPUT_PATH=str(tmp_path), DATASET__IMAGE_NAME=name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    name = write_volume(tmp_path / "v.h5")
    content = (tmp_path / "v.h5").read_bytes()
    (tmp_path / "v.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"v\.h5"):
        run(tmp_path / "out", DATASET__INPUT_PATH=str(tmp_path), DATASET__IMAGE_NAME=name)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"nowhere\.h5"):
        run(tmp_path / "out", DATASET__IMAGE_NAME="nowhere.h5")


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune and test must not share voxels"):
        run(tmp_path / "out", NEURODIFF__SPLIT__TUNE__BOX="[8, 0, 0, 14, 72, 88]")


def test_a_part_without_labels_is_told_before_any_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, box in (("TRAIN", (0, 4)), ("TUNE", (4, 8)), ("TEST", (8, 12))):
        label = rng.integers(1, 9, (12, 40, 44)).astype(np.uint32)
        label[slice(*box)] = 0
        changes = {
            f"NEURODIFF__SPLIT__{name}__BOX": str([a, 0, 0, b, 40, 44])
            for name, (a, b) in (("TRAIN", (0, 4)), ("TUNE", (4, 8)), ("TEST", (8, 12)))
        }
        name = write_volume(tmp_path / "v.h5", label=label)
        with pytest.raises(UserError, match=f"The {part.lower()} part has no labelled voxel"):
            run(tmp_path / "out", DATASET__INPUT_PATH=str(tmp_path), DATASET__IMAGE_NAME=name, **changes)
    assert not (tmp_path / "out").exists()


def test_an_erosion_that_leaves_no_neuron_is_told_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LABEL_EROSION must leave something.*Got 60 voxels"):
        run(tmp_path / "out", NEURODIFF__SEGMENTER__LABEL_EROSION="60")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_training_volume_is_no_test_volume(tmp_path: Path) -> None:
    name = write_volume(tmp_path / "v.h5")
    shutil.copy(tmp_path / name, tmp_path / "renamed.h5")
    with pytest.raises(ConfigError, match=r"must not share voxels.*its copy .*renamed\.h5"):
        run(
            tmp_path / "out",
            DATASET__INPUT_PATH=str(tmp_path),
            DATASET__IMAGE_NAME=name,
            NEURODIFF__SPLIT__TRAIN__BOX="[0, 0, 0, 4, 40, 44]",
            NEURODIFF__SPLIT__TUNE__BOX="[4, 0, 0, 8, 40, 44]",
            NEURODIFF__SPLIT__TEST__IMAGE_NAME="renamed.h5",
            NEURODIFF__SPLIT__TEST__BOX="[0, 0, 0, 4, 40, 44]",
        )


def test_another_voxel_size_makes_what_was_made_stale(tmp_path: Path) -> None:
    changes = {
        "DATASET__INPUT_PATH": str(tmp_path),
        "DATASET__IMAGE_NAME": write_volume(tmp_path / "v.h5"),
        "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 4, 40, 44]",
        "NEURODIFF__SPLIT__TUNE__BOX": "[4, 0, 0, 8, 40, 44]",
        "NEURODIFF__SPLIT__TEST__BOX": "[8, 0, 0, 12, 40, 44]",
    }
    run(tmp_path / "out", **changes, stages=["masks"])
    with pytest.raises(StaleArtifactError, match="train: "):
        run(tmp_path / "out", **changes, NEURODIFF__VOXEL_NM="[6, 6, 6]", stages=["masks"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MODEL__ARCHITECTURE": "superhumn"}, "Did you mean 'superhuman'"),
        ({"MODEL__FILTERS": "[8]"}, "at least two levels"),
        ({"MODEL__FILTERS": "[8.5, 12]"}, "whole numbers"),
        ({"MODEL__ISOTROPY": "[False, True]"}, "one z_pool per pooling"),
        ({"NEURODIFF__DIFFUSION__ARCHITECTURE": "neurodif"}, "Did you mean 'neurodiff'"),
        ({"NEURODIFF__DIFFUSION__PRESET": "smal"}, "Did you mean 'small'"),
        ({"SYSTEM__NUM_NODES": "2"}, "launcher"),
    ],
)
def test_networks_that_cannot_be_built_are_told_before_any_work(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, stages=["masks"])
    left, others = folder / "masks" / ".copy_000.4711.part.h5", [folder / ".notes.part", folder / "my.1.part.h5"]
    for path in (left, *others):
        path.write_text("x")
    run(folder, stages=["masks"])
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_stages_that_this_configuration_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"AUGMENTOR\.SYNTHETIC is off"):
        choose_stages(load_config(), ["masks"])
    with pytest.raises(MissingInput, match="run the stage 'pairs' first"):
        run(tmp_path / "out", stages=["segmenter"])
    assert not (tmp_path / "out" / "segmenter").exists()


@pytest.mark.parametrize("damage", ["negative", "background"])
def test_pairs_made_elsewhere_are_read_before_any_training(tmp_path: Path, damage: str) -> None:
    label = np.zeros((12, 40, 44), np.int32)
    if damage == "negative":
        label[...] = 1
        label[-1, -1, -1] = -1
    write_volume(tmp_path / "pair.h5", label=label)
    with pytest.raises(UserError, match=damage):
        run(tmp_path / "out", AUGMENTOR__SYNTHETIC__PAIRS=str(tmp_path / "pair.h5"), stages=["segmenter"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("until", "last"), [(1.0, None), (0.5, 12), (0.25, 6)])
def test_a_part_of_the_training_is_a_number_of_samples(until: float, last: int | None) -> None:
    """4 steps of 3 forward passes of 2 samples."""
    volume = grow_phantom((8, 64, 64), (29.0, 6.0, 6.0), 0)
    for architecture in ("superhuman", "agq"):
        cfg = load_config(
            overrides=[
                *("SOLVER.ITERATION_TOTAL", "4", "SOLVER.ITERATION_STEP", "3", "SOLVER.SAMPLES_PER_BATCH", "2"),
                *("AUGMENTOR.SYNTHETIC.UNTIL", str(until), "SYSTEM.NUM_GPUS", "0", "MODEL.ARCHITECTURE", architecture),
            ]
        )
        assert networks.segmenter_samples(cfg) == 24
        patches, _ = stages._samples_and_loss(cfg, volume, [volume], 1.0, [])
        assert patches.synthetic_until == last


def test_a_mixed_training_without_a_synthetic_sample_is_refused_before_any_work() -> None:
    options = ["SYSTEM.NUM_GPUS", "0", "SOLVER.ITERATION_TOTAL", "4", "SOLVER.SAMPLES_PER_BATCH", "2"]
    options += ["AUGMENTOR.SYNTHETIC.ENABLED", "True", "AUGMENTOR.SYNTHETIC.UNTIL"]
    networks.check_networks(load_config(overrides=[*options, "0.1"]))
    with pytest.raises(ConfigError, match=r"AUGMENTOR.SYNTHETIC.UNTIL is too small.* one of its 8 samples.* Got 0.05"):
        networks.check_networks(load_config(overrides=[*options, "0.05"]))


def test_pairs_need_no_membrane(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(1, 9, (3, 10, 11)).repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint32)
    write_volume(tmp_path / "pair.h5", label=label)
    changes = {"AUGMENTOR__SYNTHETIC__PAIRS": str(tmp_path / "pair.h5"), "SOLVER__ITERATION_TOTAL": "1"}
    run(tmp_path / "out", **changes)
    assert (tmp_path / "out" / "figures" / "synthesis.png").exists()


def test_force_starts_a_half_finished_training_anew_even_after_a_refusal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--stages", "diffusion"]
    process = subprocess.Popen(
        command(folder, *options, NEURODIFF__DIFFUSION__ITERATIONS="500"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for(lambda: (folder / "diffusion" / "last.ckpt").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130  # not 0: what was asked for has not been done
    assert errors.splitlines()[-1] == "neurodiff: interrupted; the same command goes on where it stopped"
    changes = {"NEURODIFF__DIFFUSION__LEARNING_RATE": "2e-4", "stages": ["diffusion"]}
    for _ in range(2):
        with pytest.raises(StaleArtifactError, match="--force"):
            run(folder, **changes)
    run(folder, **changes, force=True)
    assert (folder / "diffusion" / "checkpoint.pt").exists()


def test_pairs_of_several_samples_are_learnt_as_far_as_they_are_reliable(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, NEURODIFF__PAIRS__SAMPLES="2", stages=["diffusion", "masks", "pairs"])
    reliability = read_reliability(folder / "pairs" / "copy_000.h5")
    assert reliability.shape == (8, 72, 88)
    assert reliability.std() > 0.01
    assert not list((folder / "pairs").glob(".*unfinished"))
    changes = {"NEURODIFF__PAIRS__SAMPLES": "2", "SOLVER__ITERATION_TOTAL": "5", "stages": ["segmenter"]}
    weights = []
    for weighted in ("False", "True"):
        run(folder, NEURODIFF__SEGMENTER__RELIABILITY_WEIGHTS=weighted, force=weighted == "True", **changes)
        checkpoint = load_checkpoint(folder / "segmenter" / "mixed" / "checkpoint.pt", kind="segmenter")
        weights.append(torch.cat([tensor.flatten() for tensor in checkpoint.state_dict.values()]))
    assert not torch.equal(*weights)


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="not a run's folder"):
        run(tmp_path, stages=["masks"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder_exclude_each_other(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        wait_for(lambda: (tmp_path / "run" / "config.yaml").exists(), process)
        with pytest.raises(UserError, match="Another run is working"):
            run(tmp_path / "run", stages=["masks"])
    finally:
        process.kill()
        process.wait()
