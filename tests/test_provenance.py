"""Atomic writes, and artefacts that are reused only if made the same way."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from connectomics_neurodiff.errors import NotEnoughSpace, NotWritable, OutputExists, StaleArtifactError
from connectomics_neurodiff.provenance import (
    Provenance,
    atomic_write,
    hash_of,
    is_reusable,
    remove_unfinished,
    write_provenance,
)

MADE = Provenance("masks", {"SIGMA_NM": 24.0, "BOX": (1, 2)}, {"train": "abc"}, seed=3)


def write_half(target: Path, error: Exception) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text("half of the new")
        raise error


KILLED = """
import os, signal, sys
from connectomics_neurodiff.provenance import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "m[1].h5"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not target.exists()
    process = left.name.split(".")[-3]
    alive = left.with_name(left.name.replace(f".{process}.", f".{os.getppid()}."))
    elsewhere = left.with_name(left.name.replace(f".{platform.node()}.", ".another-machine."))
    other, notes = left.with_name(left.name.replace("m[1]", "m")), tmp_path / ".m[1].notes.part.h5"
    for path in (alive, elsewhere, other, notes):
        path.write_text("x")
    with atomic_write(target) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([target, alive, elsewhere, other, notes])
    assert target.read_text() == "whole"
    assert caplog.messages == [f"{left}, left by a command that was killed, was removed."]


def test_what_cannot_be_removed_is_told_and_does_not_stop_the_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f".a.{platform.node()}.{process.pid}.part.txt"
    left.mkdir()  # a folder cannot be unlinked, by root neither
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert left.is_dir()
    (message,) = caplog.messages
    assert message.startswith(f"{left}, left by a command that was killed, cannot be removed: ")


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(target, RuntimeError())
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_file_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(OutputExists, match="nothing was overwritten"), atomic_write(target, overwrite=False):
        pass
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSpace, match="No space left"):
        write_half(tmp_path / "a.bin", OSError(28, "No space left on device"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("message", ["errno = 28, error message = 'No space left on device'", "'File too large'"])
def test_a_full_disk_is_recognised_in_what_hdf5_says_of_it(tmp_path: Path, message: str) -> None:
    with pytest.raises(NotEnoughSpace, match="nothing was overwritten"):
        write_half(tmp_path / "a.h5", RuntimeError(f"Set slist enabled failed (file write failed: {message})"))


def test_folders_devices_and_files_as_folders_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, named in (
        (tmp_path, "not a file"),
        (Path("/dev/null"), "not a file"),
        (tmp_path / "file" / "a.txt", "is a file, not a folder"),
        (Path("/proc/a.txt"), "cannot be"),
    ):
        with pytest.raises(NotWritable, match=named), atomic_write(path) as temporary:
            temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_an_artefact_is_reused_only_with_equal_provenance(tmp_path: Path) -> None:
    artefact = tmp_path / "copy_000.h5"
    assert not is_reusable(artefact, MADE)
    artefact.write_text("x")
    assert not is_reusable(artefact, MADE)  # no sidecar: the writer was killed
    write_provenance(artefact, MADE)
    assert is_reusable(artefact, MADE)
    assert is_reusable(artefact, replace(MADE, version="9.9"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"SIGMA_NM": 30.0, "BOX": (1, 2)}}, r"SIGMA_NM: 24.0 -> 30.0"),
        ({"parents": {"train": "abd"}}, r"train: abc -> abd"),
        ({"seed": 4}, r"seed: 3 -> 4"),
    ],
)
def test_a_stale_artefact_names_the_difference(tmp_path: Path, change: dict, named: str) -> None:
    artefact = tmp_path / "copy_000.h5"
    artefact.write_text("x")
    write_provenance(artefact, MADE)
    with pytest.raises(StaleArtifactError, match=named):
        is_reusable(artefact, replace(MADE, **change))


def test_hashes_do_not_depend_on_key_order() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": 2})


def test_what_is_unfinished_can_be_removed_at_once(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as first:
        first.write_text("a")
    with atomic_write(tmp_path / "b.txt") as second, atomic_write(tmp_path / "c.txt") as third:
        second.write_text("b")
        remove_unfinished()  # the third is not there yet
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
        second.write_text("b")
        third.write_text("c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt"]
    remove_unfinished()
    assert len(list(tmp_path.iterdir())) == 3
