"""Optional compiled libraries, imported where they are used, with an explanation where they are missing."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType

from .errors import MissingDependency

# Scores of two neighbours in waterz, those of its functions that are precompiled in its wheels; others would be
# compiled at run time, which needs a compiler and boost.
#: 1 minus the median, over the contacts of the fragments that two neighbours are made of, of the LARGEST affinity in
#: each contact (waterz starts every histogram with the maximum): of two fragments it is the largest affinity alone.
MEDIAN_OF_LARGEST_AFFINITIES = "OneMinus<HistogramQuantileAffinity<RegionGraphType, 50, ScoreValue, 256>>"
#: 1 minus the mean affinity over the whole contact.
MEAN_AFFINITY = "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"


def _library(module: str, distribution: str, purpose: str) -> ModuleType:
    """Import `module` of `distribution`, or say in one line what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top, missing = module.partition(".")[0], str(error.name)
        if missing == top:
            message = f"{purpose} needs {distribution}. Run: pip install {distribution}"
        elif missing.startswith(f"{top}."):
            message = (
                f"{purpose} needs {distribution}, but another package is installed under its import name '{top}' (it "
                f"has no '{missing}'). Run: pip uninstall {top}; pip install --force-reinstall {distribution}"
            )
        else:
            message = f"{purpose} needs '{missing}', which {distribution} depends on. Run: pip install {missing}"
        raise MissingDependency(message) from error


def waterz() -> ModuleType:
    """funkey's waterz."""
    return _library("waterz", "waterz", "Agglomeration with 'waterz'")


def elf_multicut() -> ModuleType:
    """``elf.segmentation.multicut`` of Constantin Pape's elf (python-elf; PyPI's `elf` parses executables)."""
    return _library("elf.segmentation.multicut", "python-elf", "Agglomeration with 'multicut'")


def bioimage_cpp() -> ModuleType:
    """bioimage-cpp, the C++ library behind elf."""
    return _library("bioimage_cpp", "bioimage-cpp", "Making fragments")


#: One at a time: a second thread would take the first one's silence for the stdout to come back to.
_SILENCE = threading.RLock()


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Discard what a library writes to stdout, from Python or C++: stdout is for results (``evaluate --json``).

    File descriptor 1 is the process's: other threads must not print meanwhile.
    """
    with _SILENCE:
        flush_c = ctypes.CDLL(None).fflush  # std::cout is buffered by C's stdio when stdout is a pipe
        sys.stdout.flush()
        flush_c(None)
        saved = os.dup(1)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                os.dup2(nowhere.fileno(), 1)
                yield
        finally:
            flush_c(None)
            os.dup2(saved, 1)
            os.close(saved)
