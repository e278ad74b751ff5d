"""A study from its file to its tables; killed at any moment it ends in the same ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY
from test_study import write_study
from tiny import TINY, neurodiff

from connectomics_neurodiff.errors import UserError
from connectomics_neurodiff.pairs import VERDICT
from connectomics_neurodiff.pipeline.judging import gate_limits
from connectomics_neurodiff.provenance import hash_of_file
from connectomics_neurodiff.study import results, run_study
from connectomics_neurodiff.study.execute import SCORES, Job, execute, jobs_of
from connectomics_neurodiff.study.plan import Study, read_study

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


def test_unannotated_tissue_is_labelled_and_trained_on(tmp_path: Path) -> None:
    settings = SETTINGS | {"DATASET.UNLABELED": "rest", "NEURODIFF.SPLIT.TRAIN.BOX": "[0, 0, 0, 8, 72, 44]"}
    arms = {
        "real": {"AUGMENTOR.SYNTHETIC.ENABLED": False},
        "all": {"AUGMENTOR.SYNTHETIC.SOURCE": ["repainted", "pseudo"]},
    }
    found = neurodiff("study", str(write_study(tmp_path, SEEDS=[3], SETTINGS=settings, ARMS=arms)), "--jobs", "1")
    assert found.returncode == 0, found.stderr
    trainings = list((tmp_path / "study" / "trainings").iterdir())
    assert sorted(path.name.split("-")[0] for path in trainings) == ["mixed", "real"], "the labels took the real arm's"
    (mixed,) = [path for path in trainings if path.name.startswith("mixed")]
    config = (mixed / "config.yaml").read_text()
    assert "pairs/unlabeled_000_copy_000.h5" in config.replace(str(tmp_path), "")
    assert "pseudo_labels/tissue_000.h5" in config.replace(str(tmp_path), "").replace("\n", "")
    before = tables(tmp_path)
    again = neurodiff("study", str(tmp_path / "study.yaml"))
    assert again.returncode == 0, again.stderr
    assert tables(tmp_path) == before


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


def fake_runs(monkeypatch: pytest.MonkeyPatch, start: Callable[[list[str], Path], int]) -> None:
    """Runs that are not run."""

    @contextmanager
    def children(_pool: object) -> Iterator[Callable[[list[str], Path], int]]:
        yield start

    monkeypatch.setattr("connectomics_neurodiff.study.execute._children", children)


def leave(study: Study, jobs: dict[str, Job], log: Path) -> None:
    """What the run of a log would have left."""
    (job,) = (job for job in jobs.values() if job.name.replace("/", "-") == log.stem)
    for name in job.leaves:
        path = study.output / job.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        verdict: dict[str, Any] = {"passed": True}
        if name.endswith(VERDICT):
            pair = path.with_name(path.name.removesuffix(VERDICT) + ".h5")
            verdict |= {"pair": hash_of_file(pair), "limits": asdict(gate_limits(job.cfg))}
        path.write_text(json.dumps(verdict))


@pytest.mark.parametrize(
    ("printed", "code", "reason"),
    [
        ("warning\nneurodiff: error: No pair passed.\ndiffusion:  41%|####", 2, "No pair passed."),
        ("diffusion:  41%|####      | 12/30", -9, "ended by signal 9, SIGKILL: memory may have run out"),
        (
            "Traceback (most recent call last):\n  x\nValueError: odd\nneurodiff: this is our fault",
            1,
            "ValueError: odd",
        ),
    ],
)
def test_what_fails_is_told_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int, reason: str
) -> None:
    study = read_study(write_study(tmp_path, SEEDS=[3], SETTINGS=SETTINGS))
    jobs = jobs_of(study, lambda *_: 1.0)
    started = []

    def start(arguments: list[str], log: Path) -> int:
        started.append(arguments)
        if "diffusion" in arguments:
            log.write_text(printed)
            return code
        leave(study, jobs, log)
        return 0

    fake_runs(monkeypatch, start)
    failed = execute(study, jobs, 2, "native", lambda _: "data")
    kinds = {name.split("/")[0] + name.split("/")[1][:5]: text for name, text in failed.items()}
    assert set(kinds) == {"denoisersseed3", "pairsseed3", "trainingsmixed"}
    assert kinds["denoisersseed3"].startswith(reason)
    assert kinds["pairsseed3"].startswith("its denoisers/seed3-")
    assert kinds["trainingsmixed"].startswith("its pairs/seed3-")
    assert sum("real" in arguments for arguments in started) == 1


def test_other_data_another_engine_and_lost_files_make_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(write_study(tmp_path, SEEDS=[3], SETTINGS=SETTINGS))
    jobs = jobs_of(study, lambda *_: 1.0)
    count = []

    def start(arguments: list[str], log: Path) -> int:
        assert {"--force", "--engine"} <= set(arguments)
        count.append(log.stem)
        leave(study, jobs, log)
        return 0

    fake_runs(monkeypatch, start)

    def runs(engine: str = "native", data: str = "a") -> int:
        count.clear()
        assert execute(study, jobs, 1, engine, lambda _: data) == {}
        return len(count)

    assert [runs(), runs()] == [4, 0]
    assert [runs(data="b"), runs(data="b")] == [4, 0]
    assert [runs("host", "b"), runs("host", "b")] == [4, 0]
    (pair,) = (study.output / "pairs").rglob("copy_000.h5")
    pair.unlink()
    assert runs("host", "b") == 1, "painted again"
    pair.write_text("painted otherwise")
    (refused,) = execute(study, jobs, 1, "host", lambda _: "b").values()
    assert "is about another pair" in refused, "nobody has judged it"
    verdict = json.loads(pair.with_suffix(VERDICT).read_text())
    pair.with_suffix(VERDICT).write_text(json.dumps(verdict | {"pair": hash_of_file(pair)}))
    assert runs("host", "b") == 1, "what it is trained on has changed"
    pair.with_suffix(VERDICT).unlink()
    assert runs("host", "b") == 2, "judged again, and what this run left is another pair"


def test_whoever_waits_hears_of_every_scored_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(write_study(tmp_path, SEEDS=[3, 4], SETTINGS=SETTINGS))
    jobs = jobs_of(study, lambda *_: 1.0)

    def start(arguments: list[str], log: Path) -> int:
        if "seed4" in log.stem and "mixed" in log.stem:
            log.write_text("neurodiff: error: odd")
            return 1
        time.sleep(0.2)
        leave(study, jobs, log)
        return 0

    fake_runs(monkeypatch, start)
    heard: list[tuple[set[str], set[str]]] = []

    def hear(failed: Mapping[str, str], waiting: Collection[str]) -> None:
        heard.append((set(failed), set(waiting)))
        done = [job for name, job in jobs.items() if name not in {*failed, *waiting}]
        assert all((study.output / job.name / leaf).exists() for job in done for leaf in job.leaves)

    assert len(execute(study, jobs, 1, "native", lambda _: "", on_scores=hear)) == 1
    trainings = {name for name in jobs if name.startswith("trainings/")}
    assert [len(trainings - failed - waiting) for failed, waiting in heard] == [1, 2, 3], "of four one failed"


def test_a_broken_disk_is_the_reason_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(write_study(tmp_path, SEEDS=[3], SETTINGS=SETTINGS))
    jobs = jobs_of(study, lambda *_: 1.0)

    def start(arguments: list[str], log: Path) -> int:
        if "real" in arguments:
            raise OSError(28, "No space left on device")
        leave(study, jobs, log)
        return 0

    fake_runs(monkeypatch, start)
    failed = execute(study, jobs, 1, "native", lambda _: "")
    assert list(failed.values()) == ["[Errno 28] No space left on device"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("No such score.")])
def test_a_page_that_cannot_be_written_now_ends_no_training(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_study(tmp_path, SEEDS=[3], SETTINGS=SETTINGS)
    study = read_study(path)
    jobs = jobs_of(study, lambda *_: 1.0)
    written: list[int] = []

    def start(_arguments: list[str], log: Path) -> int:
        leave(study, jobs, log)
        return 0

    def write(_study: Study, _failed: Mapping[str, str], waiting: Collection[str] = ()) -> dict[str, Any]:
        written.append(len(waiting))
        if waiting:
            raise error
        return {"arms": []}

    monkeypatch.setattr(results, "write_results", write)
    fake_runs(monkeypatch, start)
    assert run_study(path, jobs=1) == {"arms": []}
    trainings = sum(job.leaves == SCORES for job in jobs.values())
    assert len(written) == trainings + 1, "after each of them, and at the end"
    assert "The results so far could not be written, the study goes on: " + str(error) in caplog.text
