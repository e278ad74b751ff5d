"""A study from its file to its tables; killed at any moment it ends in the same ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from test_study import write_study
from tiny import TINY, neurodiff

SETTINGS = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"} | {
    "SOLVER.ITERATION_TOTAL": "16",
    "SOLVER.ITERATION_SAVE": "4",
    "NEURODIFF.SEGMENTER.CHECKPOINTS": "2",
    "NEURODIFF.SEGMENT.METHODS": "['mean']",
    "NEURODIFF.SEGMENT.MEAN_THRESHOLDS": "[0.5, 0.75]",
    "NEURODIFF.FID.PATCHES": "0",
}
TABLES = ("study.json", "study.html", "table.md", "table.csv", "table.tex")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    found = neurodiff("study", str(write_study(folder, SEEDS=[3], SETTINGS=SETTINGS)), "--jobs", "1")
    assert found.returncode == 0, found.stderr
    assert "| mixed | 1 |" in found.stdout
    return folder


def tables(folder: Path) -> dict[str, bytes]:
    # The page's title is the name of the study's folder.
    return {name: (folder / "study" / name).read_bytes() for name in TABLES}


def test_what_is_done_is_not_done_again(finished: Path) -> None:
    before = tables(finished)
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "study" / "trainings").rglob("*")}
    found = neurodiff("study", str(finished / "study.yaml"))
    assert found.returncode == 0, found.stderr
    assert tables(finished) == before
    assert {path: path.stat().st_mtime_ns for path in (finished / "study" / "trainings").rglob("*")} == stamps


def test_the_real_training_never_sees_the_synthesis_and_the_mixed_one_its_pairs(finished: Path) -> None:
    trainings = {path.name.split("-")[0]: path for path in (finished / "study" / "trainings").iterdir()}
    assert set(trainings) == {"real", "mixed"}
    assert [path.name for path in (trainings["mixed"] / "segmenter").iterdir()] == ["mixed"]
    (pairs,) = (finished / "study" / "pairs").iterdir()
    assert str(pairs / "pairs" / "copy_000.h5") in (trainings["mixed"] / "config.yaml").read_text()
    assert "PAIRS: []" in (trainings["real"] / "config.yaml").read_text()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_killed_it_takes_its_runs_along_and_goes_on(finished: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, SEEDS=[3], SETTINGS=SETTINGS)
    command = [sys.executable, "-m", "connectomics_neurodiff", "study", str(path), "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wait_for(lambda: any((tmp_path / "study").glob("trainings/mixed*/segmenter/mixed/last.ckpt")), 600)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(child.is_running() for child in children), 10)
    found = neurodiff("study", str(path), "--jobs", "1")
    assert found.returncode == 0, found.stderr
    assert tables(tmp_path) == tables(finished)


def test_what_fails_is_told_and_the_rest_is_done(tmp_path: Path) -> None:
    # A limit that no pair can keep: the mixed arm has nothing to train on.
    settings = SETTINGS | {"NEURODIFF.PAIRS.GREY_LIMIT": "0.0001", "SOLVER.ITERATION_TOTAL": "4"}
    found = neurodiff("study", str(write_study(tmp_path, SEEDS=[3], SETTINGS=settings)))
    assert found.returncode == 2
    assert "2 of the study's runs failed" in found.stderr
    assert "No synthetic volume passed the gate" in found.stderr
    table = (tmp_path / "study" / "table.md").read_text()
    assert "| real | 1 |" in table
    assert "| mixed" not in table
    assert "mixed, seed 3: no scores (its pairs/" in table
