"""Artefacts: written atomically, each with a sidecar that says how it was made; reused only if that still holds."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import NotEnoughSpace, NotWritable, OutputExists, StaleArtifactError

logger = logging.getLogger("connectomics_neurodiff")

#: What a disk, a quota or a limit that is exhausted calls itself; HDF5 hides the error number in its message.
_FULL = ("No space left", "Disk quota exceeded", "File too large")
#: Temporary files of this process, for `remove_unfinished`.
_being_written: set[Path] = set()


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path where no file can be made; asked before any long work, not after it.

    Raises
    ------
    NotWritable
        If it is a folder or a device, lies below a file, or in a folder without permission to write.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise NotWritable(f"{target} is not a file but a folder or a device; nothing was written. Name a file.")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotWritable(f"{target} cannot be made: {folder} is a file, not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotWritable(f"{target} cannot be made: there is no permission to write in {folder}.")


def require_new(path: str | os.PathLike[str]) -> None:
    """Raise OutputExists if there is a file of that name."""
    if Path(path).exists():
        raise OutputExists(f"{path} exists; nothing was overwritten. Name another output, or remove it first.")


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds.

    Whoever kills the process in the middle leaves either the old file or the new one, never half of one. What SIGKILL
    leaves beside it, the temporary file, is removed when the same path is written again on the same machine; where that
    is not permitted, a warning says so.

    Raises
    ------
    OutputExists
        If `path` exists and `overwrite` is false.
    NotEnoughSpace
        If the disk is full; the temporary file is removed.
    NotWritable
        If no file can be made there.
    """
    require_writable(path)
    target = Path(path)
    if not overwrite:
        require_new(target)
    temporary = _temporary(target, str(os.getpid()))
    _remove_leftovers(target)
    _being_written.add(temporary)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", 0) == errno.ENOSPC or any(text in str(error) for text in _FULL):
            raise NotEnoughSpace(
                f"No space left on the disk while writing {target}; nothing was overwritten."
            ) from error
        if isinstance(error, OSError) and (error.errno in (errno.EACCES, errno.EROFS) or temporary.name in str(error)):
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise NotWritable(f"{target} cannot be written: {reason}.") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()
        _being_written.discard(temporary)


def remove_unfinished() -> None:
    """Remove what `atomic_write` is writing in this process, which is about to end without unwinding its stack."""
    for temporary in _being_written.copy():
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def scratch_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder beside `path` for temporary files, where there is room for them; it is made by who uses it.

    It is removed at the end. What a killed process left of its own goes when the same path is written again.
    """
    target = Path(path).absolute()
    folder = _temporary(target, str(os.getpid()), ".stitching")
    _remove_leftovers(target, ".stitching", shutil.rmtree)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path, process: str, suffix: str = "") -> Path:
    """Where a process of this machine writes; a file's suffix stays last: writers choose the format by it."""
    return target.with_name(f".{target.stem}.{platform.node()}.{process}.part{suffix or target.suffix}")


def _remove_leftovers(target: Path, suffix: str = "", remove: Callable[[str], None] = os.unlink) -> None:
    """Remove what processes that were killed have left beside a file; those that run are let alone."""
    import psutil

    before, _, after = _temporary(target, "\n", suffix).name.partition("\n")
    if not os.access(target.parent, os.R_OK):
        return
    for entry in os.scandir(target.parent):
        process = entry.name.removeprefix(before).removesuffix(after)
        if entry.name == before + process + after and process.isdecimal() and not psutil.pid_exists(int(process)):
            try:
                remove(entry.path)
            except FileNotFoundError:  # another writer was faster
                continue
            except OSError as error:  # for example another user's, in a folder like /tmp
                logger.warning(
                    "%s, left by a command that was killed, cannot be removed: %s.", entry.path, error.strerror
                )
            else:
                logger.warning("%s, left by a command that was killed, was removed.", entry.path)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def hash_of(content: Any) -> str:
    """Short hash of anything JSON can hold, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_of_file(path: str | os.PathLike[str]) -> str:
    """Short content hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Provenance:
    """How an artefact was made.

    Attributes
    ----------
    stage : str
        Which step of the pipeline, or which command, made it.
    settings : dict
        Every setting that the bytes depend on (JSON types only).
    parents : dict
        Hash of each input, by name.
    seed : int
        Seed of the run.
    version : str
        Package version. Recorded, not compared: a patch release does not throw away a night of training.
    """

    stage: str
    settings: dict[str, Any]
    parents: dict[str, str]
    seed: int
    version: str = __version__
    conventions: dict[str, str] = field(
        default_factory=lambda: {"axes": "z,y,x", "image": "uint8 on disk, one linear scaling per volume"}
    )

    @property
    def key(self) -> str:
        """Hash of all that the artefact's bytes depend on."""
        return hash_of([self.stage, self.settings, self.parents, self.seed])


def sidecar_of(artefact: str | os.PathLike[str]) -> Path:
    """Where the provenance of a file or folder is kept."""
    path = Path(artefact)
    return path.with_name(path.name + ".provenance.json")


def write_provenance(artefact: str | os.PathLike[str], provenance: Provenance) -> None:
    """Write the sidecar. Call it last: an artefact without one counts as unfinished."""
    write_json(sidecar_of(artefact), {**asdict(provenance), "key": provenance.key})


def read_provenance(artefact: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the sidecar says; None if there is none, or none that can be read."""
    try:
        content = json.loads(sidecar_of(artefact).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} -> {after}")
    return found


def is_reusable(artefact: str | os.PathLike[str], wanted: Provenance) -> bool:
    """Whether a finished artefact made in exactly the wanted way is there.

    Returns
    -------
    bool
        True if it can be reused, False if it is absent or unfinished.

    Raises
    ------
    StaleArtifactError
        If it is there but was made differently; the message names the differences.
    """
    old = read_provenance(artefact)
    if not Path(artefact).exists() or old is None:
        return False
    new = json.loads(json.dumps(asdict(wanted), default=str))
    fields = ("stage", "settings", "parents", "seed")
    found = _differences({k: old.get(k) for k in fields}, {k: new[k] for k in fields})
    if found:
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise StaleArtifactError(
            f"{artefact} was made with other settings ({shown}). "
            "Choose another DATASET.OUTPUT_PATH, or --force to make it anew."
        )
    return True
