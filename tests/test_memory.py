"""Freed memory is kept inside the block, and given back at its end."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from connectomics_neurodiff.memory import MOST_VOXELS, kept_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt"
)
BLOCK = 96 << 20  # bytes: larger than any threshold glibc adapts to
PAGE = resource.getpagesize()


def faults_of_ten_blocks() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.empty(BLOCK, np.uint8)[::PAGE] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def in_a_new_process(measure: Callable[[], None]) -> None:
    """Fails as `measure` does. A process that ran other tests has free blocks in the middle of its heap, which glibc
    uses again whatever it is told."""
    process = multiprocessing.get_context("spawn").Process(target=measure)
    process.start()
    process.join(120)
    assert process.exitcode == 0, "what it raised, if anything, is in what the test printed"


def fewer_faults_inside() -> None:
    with kept_memory():
        faults_of_ten_blocks()
        inside = faults_of_ten_blocks()
    outside = faults_of_ten_blocks()
    assert inside < outside / 5, (inside, outside)


def a_block_within_leaves_the_outer_one_as_it_is() -> None:
    with kept_memory():
        with kept_memory():
            faults_of_ten_blocks()
        faults_of_ten_blocks()
        inside = faults_of_ten_blocks()
    outside = faults_of_ten_blocks()
    assert inside < outside / 5, (inside, outside)


def as_many_faults_in_large_passes() -> None:
    with kept_memory(MOST_VOXELS + 1):
        faults_of_ten_blocks()
        inside = faults_of_ten_blocks()
    with kept_memory(MOST_VOXELS):
        faults_of_ten_blocks()
        kept = faults_of_ten_blocks()
    assert kept < inside / 5, (kept, inside)


def less_memory_after_an_error() -> None:
    before = resident_bytes()

    def fill_and_fail() -> None:
        with kept_memory():
            faults_of_ten_blocks()
            assert resident_bytes() > before + BLOCK // 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_and_fail()
    assert resident_bytes() < before + BLOCK // 4, (resident_bytes(), before)


def test_a_block_freed_inside_is_used_again() -> None:
    in_a_new_process(fewer_faults_inside)


def test_a_block_within_another_changes_nothing() -> None:
    in_a_new_process(a_block_within_leaves_the_outer_one_as_it_is)


def test_large_passes_give_freed_memory_back() -> None:
    in_a_new_process(as_many_faults_in_large_passes)


def test_memory_goes_back_at_the_end_even_after_an_error() -> None:
    in_a_new_process(less_memory_after_an_error)
