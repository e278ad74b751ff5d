"""What the agglomerators accept, and what they say about the rest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.agglomerate import (
    AGGLOMERATORS,
    affinities_from_interior,
    as_affinities,
    fragments_from_affinities,
    segment,
    segment_sweep,
)
from connectomics_neurodiff.errors import (
    LabelTypeError,
    ShapeMismatch,
    UnknownName,
    ValueRangeError,
)

VOXEL_NM = (29.0, 6.0, 6.0)


def two_cells() -> np.ndarray:
    label = np.ones((3, 20, 28), np.uint32)
    label[:, :, 14:] = 2
    return label


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_affinities_keep_their_values(dtype):
    values = np.linspace(0, 1, 3 * 4 * 5 * 6).reshape(3, 4, 5, 6).astype(dtype)
    ours = as_affinities(values)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, values.astype(np.float32))


def test_bytes_are_scaled_by_255_but_zeros_and_ones_are_binary():
    values = np.zeros((3, 1, 1, 2), np.uint8)
    values[0, 0, 0, 0] = 51
    assert as_affinities(values).max() == pytest.approx(0.2)
    binary = affinities_from_labels(two_cells())
    np.testing.assert_array_equal(as_affinities(binary), binary)
    np.testing.assert_array_equal(as_affinities(binary.astype(bool)), binary)


def test_rounding_beyond_the_range_is_clipped_and_the_input_kept():
    values = np.full((3, 1, 1, 2), 1.0005, np.float32)
    assert as_affinities(values).max() == 1.0
    assert values.max() > 1.0


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.full((3, 2, 2, 2), np.nan), ValueRangeError, "no NaN"),
        (np.full((3, 2, 2, 2), 1.5), ValueRangeError, "from 1.5 to 1.5"),
        (np.full((3, 2, 2, 2), -0.1), ValueRangeError, "from -0.1"),
        (np.full((3, 2, 2, 2), np.inf), ValueRangeError, "inf"),
        (np.zeros((3, 2, 2, 2), np.int64), ValueRangeError, "int64"),
        (np.zeros((2, 2, 2, 2)), ShapeMismatch, r"\(2, 2, 2, 2\)"),
        (np.zeros((3, 2, 2)), ShapeMismatch, r"\(3, 2, 2\)"),
        (np.zeros((3, 0, 2, 2)), ShapeMismatch, r"\(3, 0, 2, 2\)"),
    ],
)
def test_bad_affinities_are_refused_before_any_work(values, error, words):
    for call in (
        lambda: as_affinities(values),
        lambda: fragments_from_affinities(values, VOXEL_NM),
        lambda: segment(values, "waterz", 0.3, VOXEL_NM),
        lambda: segment_sweep(values, np.ones(values.shape[1:], int), "multicut", [0.3]),
    ):
        with pytest.raises(error, match=words):
            call()


def test_interior_probability_becomes_the_smaller_of_both_voxels():
    interior = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    affinities = affinities_from_interior(interior)
    for index in np.ndindex(interior.shape):
        for axis in range(3):
            before = tuple(i - (k == axis) for k, i in enumerate(index))
            expected = interior[index] if index[axis] == 0 else min(interior[index], interior[before])
            assert affinities[(axis, *index)] == expected


def test_interior_probability_is_checked():
    assert affinities_from_interior(np.full((1, 2, 2), 255, np.uint8)).max() == 1.0
    with pytest.raises(ShapeMismatch, match=r"\(z, y, x\)"):
        affinities_from_interior(np.zeros((2, 2)))
    with pytest.raises(ValueRangeError, match="NaN"):
        affinities_from_interior(np.full((1, 2, 2), np.nan))


def test_unknown_methods_get_the_nearest_name():
    with pytest.raises(UnknownName, match=r"Did you mean 'multicut'\? Known: .*waterz"):
        segment(affinities_from_labels(two_cells()), "multicutt", 0.3, VOXEL_NM)
    assert {"multicut", "waterz"} <= set(AGGLOMERATORS)


@pytest.mark.parametrize(("method", "threshold"), [("waterz", 1.2), ("waterz", -0.1), ("multicut", float("nan"))])
def test_thresholds_outside_the_unit_interval_are_refused(method, threshold):
    with pytest.raises(ValueRangeError, match=r"\[0, 1\]"):
        segment(affinities_from_labels(two_cells()), method, threshold, VOXEL_NM)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_the_interval_are_no_beta(beta):
    with pytest.raises(ValueRangeError, match="beta"):
        segment(affinities_from_labels(two_cells()), "multicut", beta, VOXEL_NM)


@pytest.mark.parametrize(
    ("fragments", "error", "words"),
    [
        (np.ones((3, 20, 27), int), ShapeMismatch, r"\(3, 20, 28\)"),
        (np.ones((3, 20, 28)), LabelTypeError, "float64"),
        (np.full((3, 20, 28), -1), LabelTypeError, "non-negative"),
    ],
)
def test_bad_fragments_are_refused(fragments, error, words):
    with pytest.raises(error, match=words):
        segment(affinities_from_labels(two_cells()), "waterz", 0.3, VOXEL_NM, fragments=fragments)


def test_options_for_fragments_that_are_given_are_refused():
    with pytest.raises(ValueRangeError, match="min_size"):
        segment(affinities_from_labels(two_cells()), "waterz", 0.3, VOXEL_NM, fragments=two_cells(), min_size=5)


@pytest.mark.parametrize(
    "option",
    [
        {"threshold": 1.5},
        {"alpha": -0.1},
        {"edge_weight": 2.0},
        {"sigma_seeds": -1.0},
        {"sigma_weights": float("nan")},
        {"min_size": -1},
        {"min_component": -1},
    ],
)
def test_bad_fragment_options_are_named(option):
    with pytest.raises(ValueRangeError, match=next(iter(option))):
        fragments_from_affinities(affinities_from_labels(two_cells()), VOXEL_NM, **option)


@pytest.mark.parametrize("mask", [np.ones((3, 20, 27), bool), np.ones((3, 20, 28), np.uint8)])
def test_bad_masks_are_refused(mask):
    with pytest.raises(ShapeMismatch, match="mask must be bool"):
        fragments_from_affinities(affinities_from_labels(two_cells()), VOXEL_NM, mask=mask)


def test_a_bad_voxel_size_is_refused():
    with pytest.raises(ValueRangeError, match="voxel size"):
        fragments_from_affinities(affinities_from_labels(two_cells()), (29.0, 0.0, 6.0))


@pytest.mark.parametrize(
    ("loader", "module", "words"),
    [
        ("waterz", "waterz", "pip install waterz"),
        ("elf_multicut", "elf", "pip install python-elf"),
        ("bioimage_cpp", "bioimage_cpp", "pip install bioimage-cpp"),
    ],
)
def test_missing_libraries_are_named(loader, module, words):
    assert words in error_of(f"{HIDE.format(module)}{SHOW_ERROR}libraries.{loader}()")


def test_the_unrelated_elf_of_pypi_is_explained(tmp_path):
    (tmp_path / "elf").mkdir()
    (tmp_path / "elf" / "__init__.py").write_text("")
    message = error_of(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SHOW_ERROR}libraries.elf_multicut()")
    assert "another package" in message
    assert "pip uninstall elf" in message
    assert "python-elf" in message


def test_a_missing_dependency_of_a_library_is_named(tmp_path):
    (tmp_path / "waterz.py").write_text("import a_package_that_is_not_there\n")
    message = error_of(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SHOW_ERROR}libraries.waterz()")
    assert "'a_package_that_is_not_there', which waterz depends on" in message


def test_stdout_comes_back_after_two_threads_were_silent_at_once():
    script = """
import threading, time
from connectomics_neurodiff.libraries import silent_stdout
def hold(before, during):
    time.sleep(before)
    with silent_stdout():
        time.sleep(during)
threads = [threading.Thread(target=hold, args=times) for times in ((0, 0.4), (0.2, 0.4))]
[t.start() for t in threads]
[t.join() for t in threads]
print("heard", flush=True)
"""
    assert error_of(script) == "heard\n"


#: Makes a top-level module impossible to find.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {0!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hide())
"""

#: Followed by a call: prints the message of the MissingDependency it raises.
SHOW_ERROR = """
import sys
from connectomics_neurodiff import libraries
from connectomics_neurodiff.errors import MissingDependency
sys.excepthook = lambda kind, error, _: print(error if kind is MissingDependency else "")
"""


def error_of(script: str) -> str:
    """Run in a process of its own: imports cannot be undone."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
