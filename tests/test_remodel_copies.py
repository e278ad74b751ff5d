"""Masks in processes of their own: the same bytes for any number, errors and interruptions that end cleanly."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_remodel_quality import masks_of
from tiny import neurodiff

from connectomics_neurodiff.remodel import copies, in_processes, workers_that_fit


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5"
    result = neurodiff("phantom", str(path), "--shape", "8", "60", "72", "--voxel-nm", "29", "6", "6")
    assert result.returncode == 0, result.stderr
    return path


def test_each_item_gets_its_own_result() -> None:
    assert dict(in_processes(math.factorial, range(5), 1)) == {0: 1, 1: 1, 2: 2, 3: 6, 4: 24}
    assert dict(in_processes(math.factorial, range(5), 2)) == {0: 1, 1: 1, 2: 2, 3: 6, 4: 24}
    assert not multiprocessing.active_children()


class Heavy:
    """A job with data that counts how often it is sent."""

    def __init__(self) -> None:
        self.sent = 0

    def __getstate__(self) -> dict[str, int]:
        self.sent += 1
        return {"sent": 0}

    def __call__(self, number: int) -> int:
        return number**2


def test_what_a_job_needs_is_sent_once_to_each_process() -> None:
    heavy = Heavy()
    assert dict(in_processes(heavy, range(12), 2)) == {n: n**2 for n in range(12)}
    assert 1 <= heavy.sent <= 2


def test_an_error_in_a_process_is_an_error_here() -> None:
    with pytest.raises(ValueError, match="negative"):
        list(in_processes(math.factorial, [-1, 3], 2))
    assert not multiprocessing.active_children()


def test_a_killed_process_is_told() -> None:
    with pytest.raises(MemoryError, match="one of 2 processes was killed"):
        list(in_processes(signal.raise_signal, [signal.SIGKILL, signal.SIGKILL], 2))


def test_processes_are_as_many_as_cores_copies_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "_cores", lambda: 8)
    monkeypatch.setattr(copies, "available_main_bytes", lambda: 10 << 30)
    assert workers_that_fit(1000, 20) == 8
    assert workers_that_fit(1000, 3) == 3
    assert workers_that_fit(1000, 20, 12) == 12
    each = copies.BYTES_PER_VOXEL * 10**8 + copies.BYTES_PER_PROCESS
    assert workers_that_fit(10**8, 20) == (10 << 30) // each
    assert workers_that_fit(10**10, 20) == 1
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert workers_that_fit(10**8, 20, 12) == (10 << 30) // each
    assert "2 of 12 processes" in caplog.text


def test_bytes_do_not_depend_on_processes_or_threads(cells: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "connectomics_neurodiff", "remodel", str(cells)]
    for workers, threads in ((1, 1), (2, 2)):
        output = [str(tmp_path / f"{workers}.h5"), "--copies", "3", "--workers", str(workers)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        subprocess.run([*program, *output], env=environment, check=True, capture_output=True)
    made = [[(tmp_path / f"{n}{end}.h5").read_bytes() for end in ("", "_001", "_002")] for n in (1, 2)]
    assert made[0] == made[1]
    assert len(set(made[0])) == 3


def test_the_stage_makes_the_same_masks_in_several_processes(tmp_path: Path) -> None:
    made = []
    for workers in ("0", "2"):
        (tmp_path / workers).mkdir()
        options = ["NEURODIFF.REMODEL.COPIES", "2", "SYSTEM.NUM_CPUS", workers]
        folder = masks_of(tmp_path / workers, *options)
        made.append([(folder / f"copy_00{i}.h5").read_bytes() for i in (0, 1)])
    assert made[0] == made[1]


def alive_in_group(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background deaf to SIGINT, and so the tests' own children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_leaves_whole_files_and_no_process(cells: Path, tmp_path: Path) -> None:
    command = ["remodel", str(cells), str(tmp_path / "m.h5"), "--copies", "400", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "connectomics_neurodiff", *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (tmp_path / "m_002.h5").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("neurodiff: interrupted; masks that were finished stay")
    assert not list(tmp_path.glob(".*"))
    while alive_in_group(process.pid):
        assert time.monotonic() < end + 30
        time.sleep(0.1)


def test_a_negative_number_of_workers_is_refused(cells: Path, tmp_path: Path) -> None:
    result = neurodiff("remodel", str(cells), str(tmp_path / "m.h5"), "--workers", "-1")
    assert result.returncode == 2
    assert "--workers must be at least 0" in result.stderr


SLEEPERS = """
import sys, time
from connectomics_neurodiff.remodel import in_processes
if __name__ == "__main__":
    try:
        for _ in in_processes(time.sleep, [0.01, 60, 61, 62, 63, 64], 2):
            print("under way", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def sleepers(folder: Path, program: str = SLEEPERS, *names: str) -> subprocess.Popen[str]:
    """A program, in a group of its own, whose jobs would take minutes."""
    (folder / "sleepers.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, str(folder / "sleepers.py"), *(str(folder / name) for name in names)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def assert_all_end(group: int) -> None:
    end = time.monotonic() + 15
    while alive_in_group(group):
        assert time.monotonic() < end
        time.sleep(0.1)


def assert_interruptible(process: subprocess.Popen[str]) -> None:
    """Ctrl-C ends the program and all its processes, and nothing is printed."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    assert_all_end(process.pid)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_does_not_wait_for_jobs_that_are_next(tmp_path: Path) -> None:
    process = sleepers(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    assert_interruptible(process)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    process = sleepers(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    process.kill()
    process.communicate(timeout=120)
    assert_all_end(process.pid)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_at_the_start_is_answered_by_one_process(tmp_path: Path) -> None:
    process = sleepers(tmp_path)
    end = time.monotonic() + 120
    while len(alive_in_group(process.pid)) < 4:  # with the tracker of resources
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    assert_interruptible(process)


FINALISERS = """
import sys, time, weakref
from connectomics_neurodiff.provenance import atomic_write
from connectomics_neurodiff.remodel import in_processes

class Volume:
    pass

def write(path):
    with atomic_write(path) as temporary:
        temporary.write_text("half a file")
        volume = Volume()
        reference = weakref.ref(volume, lambda _: time.sleep(60))
        del volume

if __name__ == "__main__":
    try:
        list(in_processes(write, sys.argv[1:], 2))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_while_a_callback_runs_leaves_no_half_written_file(tmp_path: Path) -> None:
    """Python drops an exception that a handler of signals raises there, and goes on."""
    process = sleepers(tmp_path, FINALISERS, "a.txt", "b.txt")
    end = time.monotonic() + 120
    while len(list(tmp_path.glob(".[ab].*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    assert_interruptible(process)
    assert [path.name for path in tmp_path.iterdir()] == ["sleepers.py"]
