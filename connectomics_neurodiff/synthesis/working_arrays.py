"""Arrays of a volume that is being denoised: in memory, or in files, so that any size fits and a killed run goes on.

In files, a commit makes everything written so far durable and says how far the work has come. Whoever goes on from a
commit must write the same voxels again, or others, but must not need what was overwritten since.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import CheckpointMismatch, NotEnoughSpace, NotWritable, UserError
from ..provenance import atomic_write
from ..volume.arrays import LazyArray
from .grey import GreyScale

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("connectomics_neurodiff")

_PROGRESS, _LOCK = "progress.json", "lock"


class WorkingArrays:
    """Named float32 arrays, and how far the work on them has come.

    Parameters
    ----------
    folder : pathlib.Path or None
        Where the files are; made if it is not there. None keeps all in memory.
    key : str
        Identifies the work. Files of other work are made anew.
    shapes : mapping of str to shape
        The arrays; zero at first.

    Raises
    ------
    NotEnoughSpace
        If the disk cannot hold them; asked before any work.
    CheckpointMismatch
        If the files of this very work are damaged.
    """

    def __init__(self, folder: Path | None, key: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self._folder, self._key = folder, key
        self._mapped: list[np.memmap] = []
        self._lock = None if folder is None else _locked(folder)
        try:
            #: How far the work had come at the last commit; None before the first one.
            self.progress = self._read_progress(shapes)
            if folder is not None and self.progress is None:
                self._allocate(folder, shapes)
            self._arrays = {name: self._open(name, shape) for name, shape in shapes.items()}
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            self._lock.close()

    def path_of(self, name: str) -> Path | None:
        """File of an array, None in memory."""
        return None if self._folder is None else self._folder / f"{name}.float32"

    def commit(self, progress: dict[str, int]) -> None:
        """Record how far the work has come, and let go of the memory that mapped files take."""
        self.progress = progress
        if self._folder is None:
            return
        for array in self._mapped:
            array.flush()
            # Pages of a shared mapping stay in the file; only this process forgets them.
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        with atomic_write(self._folder / _PROGRESS) as temporary:
            temporary.write_text(json.dumps({"key": self._key, "progress": progress}))

    def _read_progress(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int] | None:
        path = None if self._folder is None else self._folder / _PROGRESS
        if path is None or not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            if found["key"] != self._key:
                logger.warning("%s holds the unfinished work of other masks or settings; it is made anew.", path.parent)
                return None
            progress = {name: int(value) for name, value in found["progress"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(path) from error
        for name, shape in shapes.items():
            file = path.with_name(f"{name}.float32")
            if not file.exists() or file.stat().st_size != _bytes(shape):
                raise self._damaged(file)
        return progress

    def _damaged(self, path: Path) -> CheckpointMismatch:
        return CheckpointMismatch(f"{path} is damaged or missing; remove {path.parent} to start the volume anew.")

    def _allocate(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        """Files of zeros whose space is reserved: a full disk behind a mapped file would kill the process later."""
        _remove_files(folder)
        for name, shape in shapes.items():
            with open(folder / f"{name}.float32", "wb") as handle:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(handle.fileno(), 0, _bytes(shape))
                    else:
                        handle.truncate(_bytes(shape))
                except OSError as error:
                    _remove_files(folder)
                    raise NotEnoughSpace(
                        f"{folder} needs {sum(map(_bytes, shapes.values())) / 2**30:.2f} GiB while the volume is "
                        f"painted: {os.strerror(error.errno or 0)}."
                    ) from error

    def _open(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.path_of(name)
        if path is None:
            return np.zeros(shape, np.float32)
        array = np.memmap(path, np.float32, mode="r+", shape=shape)
        self._mapped.append(array)
        return array


def discard_scratch(folder: Path) -> None:
    """Remove the files of :class:`WorkingArrays`, and their folder if nothing else is in it."""
    if not folder.is_dir():
        return
    _remove_files(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_files(folder: Path) -> None:
    # With what a kill left of a commit.
    for file in [folder / _PROGRESS, *folder.glob("*.float32"), *folder.glob(".progress.*.part.json")]:
        file.unlink(missing_ok=True)


def _locked(folder: Path) -> BinaryIO:
    """The folder's lock file, open for as long as this process works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotWritable(f"{folder} is in the way: it is where the unfinished volume goes. Move it.") from error
    handle = open(folder / _LOCK, "ab")  # noqa: SIM115  # open on purpose
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise UserError(
                f"Another process is painting into {folder}. Wait for it, or name another output."
            ) from error
    return handle


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape, dtype=np.int64))


class PaintedImage(LazyArray):
    """Image (z, y, x) in [0, 1], float32, read from a file of the model's values as it is indexed.

    Parameters
    ----------
    path : pathlib.Path
        File of an array of :class:`WorkingArrays`.
    shape : tuple of 3 ints
        Its shape.
    grey : GreyScale
        Scale of the values.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], grey: GreyScale) -> None:
        super().__init__(shape, np.float32)
        self._path, self._grey = path, grey

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        return self._grey.to_grey(np.memmap(self._path, np.float32, mode="r", shape=self.shape)[box])
