"""Random streams that do not depend on each other, and registries that refuse and suggest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from connectomics_neurodiff.errors import UnknownName, did_you_mean
from connectomics_neurodiff.registry import Registry
from connectomics_neurodiff.seeding import rng_for


def test_streams_differ_by_seed_and_by_every_part_of_the_path() -> None:
    draws = {
        tuple(rng_for(*path).integers(2**40, size=4))
        for path in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a", 2)]
    }
    assert len(draws) == 6


def test_a_stream_is_the_same_in_another_process() -> None:
    here = rng_for(7, "crop", 3).integers(2**60)
    code = "from connectomics_neurodiff.seeding import rng_for; print(rng_for(7, 'crop', 3).integers(2**60))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == here


def test_numpy_integers_are_integers() -> None:
    assert rng_for(0, np.int64(3)).integers(2**40) == rng_for(0, 3).integers(2**40)


def test_the_nearest_name_is_found_whatever_its_case() -> None:
    assert did_you_mean("SwinUNETR", ["agq", "swin_unetr"]) == " Did you mean 'swin_unetr'?"
    assert did_you_mean("flip", ["FLIP"]) == " Did you mean 'FLIP'?"


def test_a_registry_refuses_duplicates_and_suggests_names() -> None:
    registry: Registry = Registry("segmenter", "f()")
    registry.register("superhuman")(dict)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("superhuman")(list)
    with pytest.raises(UnknownName, match="Did you mean 'superhuman'"):
        registry.get("superhumn")
    assert registry.get("superhuman") is dict
    assert list(registry) == ["superhuman"]
