"""The network that is kept of a training, and runs of one arm."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command, neurodiff, settings

from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.metrics import boundary_precision
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.volume import grow_phantom, open_array, write_volume

CHANGES = {
    "AUGMENTOR__SYNTHETIC": "False",
    "NEURODIFF__SEGMENTER__CHECKPOINTS": "3",
    # A rate that spoils what was learnt: the best is not the last.
    "SOLVER__BASE_LR": "0.06",
    "SOLVER__ITERATION_TOTAL": "24",
    "SOLVER__ITERATION_SAVE": "4",
}


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selected") / "run"
    found = neurodiff("run", *settings(folder, **CHANGES))
    assert found.returncode == 0, found.stderr
    return folder


def rows_of(folder: Path) -> list[tuple[int, float]]:
    text = (folder / "segmenter" / "real" / "tuning.csv").read_text()
    return [(int(row["step"]), float(row["average_precision"])) for row in csv.DictReader(text.splitlines())]


def test_the_best_of_three_is_kept_and_is_what_predicts(selected: Path) -> None:
    rows = rows_of(selected)
    assert [step for step, _ in rows] == [8, 16, 24]
    best = max(rows, key=lambda row: row[1])
    checkpoint = load_checkpoint(selected / "segmenter" / "real" / "checkpoint.pt", kind="segmenter")
    assert checkpoint.extra["iterations"] == best[0]
    # The stage after the training predicts the tune part anew, with the checkpoint.
    affinities = np.asarray(open_array(selected / "predictions" / "real_tune.h5", ("affinity",)), np.float32)
    truth = tune_labels(selected)
    assert boundary_precision(affinities, truth, (29.0, 6.0, 6.0)) == pytest.approx(best[1], abs=2e-3)
    boundaries = json.loads((selected / "boundaries.json").read_text())["real"]
    assert 0 < boundaries["average_precision"] <= 1
    assert len(boundaries["columns"]) == 9
    rounding = json.loads((selected / "rounding.json").read_text())["real"]["scores"]
    assert {method: len(scores) for method, scores in rounding.items()} == {"waterz": 3, "multicut": 3}


def tune_labels(folder: Path) -> np.ndarray:
    return open_parts(load_config(folder / "config.yaml"))["tune"].load().array("label")


def test_looking_changes_nothing_of_the_training(selected: Path, tmp_path: Path) -> None:
    changes = {**CHANGES, "NEURODIFF__SEGMENTER__CHECKPOINTS": "1"}
    assert neurodiff("run", "--stages", "segmenter", *settings(tmp_path / "run", **changes)).returncode == 0
    curve = "segmenter/real/loss.csv"
    assert (tmp_path / "run" / curve).read_text() == (selected / curve).read_text()
    assert not (tmp_path / "run" / "segmenter" / "real" / "tuning.csv").exists()


def test_kill_9_changes_nothing(selected: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(command(folder, "--stages", "segmenter", **CHANGES), stderr=subprocess.DEVNULL)
    tuning = folder / "segmenter" / "real" / "tuning.csv"
    until = time.monotonic() + 120
    while not tuning.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows_of(folder)[-1][0] < 24, "killed in the middle"
    assert neurodiff("run", "--stages", "segmenter", *settings(folder, **CHANGES)).returncode == 0
    assert tuning.read_text() == (selected / "segmenter" / "real" / "tuning.csv").read_text()
    found, expected = (
        torch.load(path / "segmenter" / "real" / "checkpoint.pt", weights_only=True)["state_dict"]
        for path in (folder, selected)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_other_trials_are_another_training(selected: Path) -> None:
    found = neurodiff("run", *settings(selected, **{**CHANGES, "NEURODIFF__SEGMENTER__CHECKPOINTS": "2"}))
    assert found.returncode == 2
    assert "SELECTION.CHECKPOINTS: 3 -> 2" in found.stderr


def test_one_arm_alone(tmp_path: Path) -> None:
    pair = grow_phantom((8, 40, 48), (29.0, 6.0, 6.0), 5)
    write_volume(tmp_path / "pair.h5", pair.arrays, pair.voxel_nm)
    changes = {"SOLVER__ITERATION_TOTAL": "2", "AUGMENTOR__SYNTHETIC__PAIRS": str(tmp_path / "pair.h5")}
    arguments = settings(tmp_path / "run", **changes)
    found = neurodiff("run", "--arm", "mixed", *arguments)
    assert found.returncode == 0, found.stderr
    assert [path.name for path in (tmp_path / "run" / "segmenter").iterdir()] == ["mixed"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "real" not in metrics
    assert set(metrics["mixed"]) == {"waterz", "multicut"}
    planned = neurodiff("run", "--arm", "mixed", "--dry-run", *arguments)
    assert "segmenter: 1 file, 1 of them there already" in planned.stdout
    real = settings(tmp_path / "other", AUGMENTOR__SYNTHETIC="False")
    refused = neurodiff("run", "--arm", "mixed", *real)
    assert refused.returncode == 2
    assert "trains real. Got the arm 'mixed'" in refused.stderr
