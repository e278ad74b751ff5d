"""waterz and multicut: what they merge, which way their thresholds go, and how they do on real volumes."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.agglomerate import (
    DEFAULT_THRESHOLDS,
    affinities_from_interior,
    fragments_from_affinities,
    segment,
    segment_sweep,
)
from connectomics_neurodiff.metrics import evaluate, tune_threshold
from connectomics_neurodiff.volume import grow_phantom

METHODS = sorted(DEFAULT_THRESHOLDS)
SECTIONS = (29.0, 6.0, 6.0)


def stripes(affinity_between: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Fragments 1, 2, ... side by side along x, 4 voxels wide, with the given affinities between neighbours."""
    count = len(affinity_between) + 1
    fragments = np.repeat(np.arange(1, count + 1, dtype=np.uint64), 4)[None, None].repeat(6, axis=1)
    affinities = np.ones((3, *fragments.shape), np.float32)
    for i, affinity in enumerate(affinity_between, start=1):
        affinities[2, :, :, 4 * i] = affinity
    return affinities, fragments


def partition(labels: np.ndarray) -> list[int]:
    """Segment of each stripe, numbered from 0 in the order of appearance."""
    ids = labels[0, 0, ::4].tolist()
    return [sorted(set(ids), key=ids.index).index(i) for i in ids]


@pytest.mark.parametrize(("threshold", "expected"), [(0.05, [0, 1, 2]), (0.3, [0, 0, 1]), (0.7, [0, 0, 0])])
def test_waterz_merges_while_one_minus_affinity_is_below_the_threshold(threshold, expected):
    affinities, fragments = stripes([0.8, 0.4])
    assert partition(segment(affinities, "waterz", threshold, SECTIONS, fragments=fragments)) == expected


@pytest.mark.parametrize(("beta", "expected"), [(0.3, [0, 0, 0]), (0.6, [0, 0, 1]), (0.9, [0, 1, 2])])
def test_multicut_merges_a_lone_edge_if_its_affinity_exceeds_beta(beta, expected):
    affinities, fragments = stripes([0.8, 0.4])
    assert partition(segment(affinities, "multicut", beta, SECTIONS, fragments=fragments)) == expected


@pytest.mark.parametrize(("threshold", "expected"), [(0.15, [0, 1, 2]), (0.5, [0, 0, 1]), (0.65, [0, 0, 0])])
def test_mean_merges_while_one_minus_the_mean_affinity_is_below_the_threshold(threshold, expected):
    affinities, fragments = stripes([0.8, 0.4])
    affinities[2, 0, ::2, 4], affinities[2, 0, 1::2, 4] = 1.0, 0.6  # a mean of .8: no single edge decides
    assert partition(segment(affinities, "mean", threshold, SECTIONS, fragments=fragments)) == expected


def test_waterz_takes_the_largest_affinity_of_two_fragments_and_multicut_the_mean():
    affinities, fragments = stripes([0.9])
    edges = affinities[2, :, :, 4]
    edges.flat[1:] = 0.1  # of 6 edges one is strong: median .1, mean .23
    assert edges.size == 6
    assert partition(segment(affinities, "waterz", 0.3, SECTIONS, fragments=fragments)) == [0, 0]
    assert partition(segment(affinities, "multicut", 0.7, SECTIONS, fragments=fragments)) == [0, 1]


@pytest.mark.parametrize(("contacts", "merged"), [((0.1, 0.1, 0.9), False), ((0.1, 0.9, 0.9), True)])
def test_waterz_takes_the_median_over_the_contacts_of_fragments(contacts, merged):
    """A column of three fragments, merged first, beside a fourth that touches all of them."""
    fragments = np.repeat(np.array([[1, 4], [2, 4], [3, 4]], np.uint64), 4, axis=0).repeat(5, axis=1)[None]
    affinities = np.ones((3, *fragments.shape), np.float32)
    affinities[2, 0, :, 5] = np.repeat(contacts, 4)
    affinities[1, 0, [4, 8], :5] = 0.99
    label = segment(affinities, "waterz", 0.3, SECTIONS, fragments=fragments)
    assert len(np.unique(label[0, :, :5])) == 1
    assert (label[0, 0, 0] == label[0, 0, 9]) == merged


def square_of_regions() -> tuple[np.ndarray, np.ndarray]:
    fragments = np.array([[1, 2], [3, 4]], np.uint64).repeat(5, axis=0).repeat(7, axis=1)[None]
    affinities = np.ones((3, *fragments.shape), np.float32)
    affinities[2, 0, :5, 7], affinities[2, 0, 5:, 7] = 0.7, 0.2
    affinities[1, 0, 5, :7], affinities[1, 0, 5, 7:] = 0.6, 0.65
    return affinities, fragments


@pytest.mark.parametrize("beta", [0.25, 0.4, 0.5, 0.62, 0.8])
def test_multicut_is_optimal_on_a_cycle(beta):
    """Against all partitions of four regions, with costs written out by hand."""
    affinities, fragments = square_of_regions()
    edges = {(0, 1): (0.7, 5), (2, 3): (0.2, 5), (0, 2): (0.6, 7), (1, 3): (0.65, 7)}

    def energy(of_region: tuple[int, ...]) -> float:
        return sum(
            size / 7 * (np.log(p / (1 - p)) + np.log((1 - beta) / beta))
            for (u, v), (mean, size) in edges.items()
            for p in [1 - (0.998 * (1 - mean) + 0.001)]
            if of_region[u] != of_region[v]
        )

    best = min(energy(choice) for choice in product(range(4), repeat=4))
    labels = segment(affinities, "multicut", beta, SECTIONS, fragments=fragments)
    ours = tuple(int(i) for i in labels[0, ::5, ::7].ravel())
    assert energy(ours) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_yields_separate_arrays_equal_to_single_runs(method):
    affinities, fragments = stripes([0.9, 0.7, 0.45, 0.2])
    before = fragments.copy(), affinities.copy()
    sweep = list(segment_sweep(affinities, fragments, method, [0.6, 0.2, 0.4]))
    assert [threshold for threshold, _ in sweep] == [0.2, 0.4, 0.6]
    assert len({tuple(partition(labels)) for _, labels in sweep}) == 3
    for threshold, labels in sweep:
        alone = segment(affinities, method, threshold, SECTIONS, fragments=fragments)
        assert partition(labels) == partition(alone)
    np.testing.assert_array_equal(fragments, before[0])
    np.testing.assert_array_equal(affinities, before[1])


@pytest.mark.parametrize("method", METHODS)
def test_background_fragments_stay_background(method):
    affinities, fragments = stripes([1.0, 1.0])
    fragments[fragments == 2] = 0
    labels = segment(affinities, method, 0.5, SECTIONS, fragments=fragments)
    np.testing.assert_array_equal(labels == 0, fragments == 0)
    assert labels[0, 0, 0] != labels[0, 0, -1], "not joined through the background"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fill", [0, 7])
def test_volumes_without_any_edge(method, fill):
    fragments = np.full((2, 3, 4), fill, np.uint32)
    labels = segment(np.ones((3, 2, 3, 4)), method, 0.5, SECTIONS, fragments=fragments)
    assert labels.dtype == np.uint64
    assert len(np.unique(labels)) == 1
    assert (labels == 0).all() == (fill == 0)


def test_small_segments_become_background_if_asked():
    affinities, fragments = stripes([0.0, 0.0])
    fragments[fragments == 3] = 2
    labels = segment(affinities, "waterz", 0.1, SECTIONS, fragments=fragments, min_segment_size=25)
    np.testing.assert_array_equal(labels == 0, fragments == 1)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written_to_stdout(method):
    script = (
        "import numpy as np; from connectomics_neurodiff.agglomerate import segment_sweep;"
        "f = np.arange(1, 9, dtype=np.uint64).reshape(2, 2, 2); a = np.ones((2, 2, 2, 3)).transpose(3, 0, 1, 2);"
        f"print(len(list(segment_sweep(a, f, '{method}', [0.2, 0.4]))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_the_rooms_import_neither_torch_nor_matplotlib():
    script = (
        "import sys, connectomics_neurodiff.agglomerate, connectomics_neurodiff.metrics;"
        "print([m for m in ('torch', 'matplotlib', 'waterz', 'elf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def read(path: Path, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][index]


PERFECT = [
    ("fib_medulla_train.h5", (8.0, 8.0, 8.0), np.s_[40:100, :160, 60:220]),
    ("gala_fib_mini_train.h5", (10.0, 10.0, 10.0), np.s_[:, :, :]),
    ("vnc_sstem_train.h5", (50.0, 4.6, 4.6), np.s_[:10, :, :512]),
    ("checks/snemi3d_ac4_mini.h5", (29.0, 6.0, 6.0), np.s_[:, :, :]),
]


@pytest.mark.parametrize(("file", "voxel_nm", "index"), PERFECT)
def test_perfect_affinities_give_a_perfect_segmentation(real_data, file, voxel_nm, index):
    # Parts of a neuron that a crop separates, or that touch at edges only, are not tied by affinities
    label = cc3d.connected_components(read(real_data / file, "label", index), connectivity=6)
    affinities = affinities_from_labels(label)
    fragments = fragments_from_affinities(affinities, voxel_nm)
    for method, threshold in DEFAULT_THRESHOLDS.items():
        labels = segment(affinities, method, threshold, voxel_nm, fragments=fragments)
        assert evaluate(labels, label).arand < 0.02, method


@pytest.mark.parametrize(
    ("shape", "voxel_nm"),
    [((24, 128, 128), (29.0, 6.0, 6.0)), ((48, 56, 64), (8.0, 8.0, 8.0)), ((6, 20, 28), SECTIONS)],
)
def test_perfect_affinities_of_phantoms(shape, voxel_nm):
    label = np.asarray(grow_phantom(shape, voxel_nm, seed=0).label)
    affinities = affinities_from_labels(label)
    for method, threshold in DEFAULT_THRESHOLDS.items():
        assert evaluate(segment(affinities, method, threshold, voxel_nm), label).arand < 0.02, method


@pytest.mark.parametrize("source", ["given", "ours"])
@pytest.mark.parametrize("method", METHODS)
def test_agglomeration_beats_2d_fragments_on_ac4(real_data, method, source):
    """AC4 with a third party's network: the threshold is tuned on sections 0-15 and scored on sections 16-31."""
    path = real_data / "checks" / "snemi3d_ac4_mini.h5"
    truth, affinities = read(path, "label"), affinities_from_interior(read(path, "interior_prob"))
    fragments = read(path, "fragments") if source == "given" else fragments_from_affinities(affinities, SECTIONS)
    thresholds = np.arange(0.05, 0.96, 0.05)
    tune, test = np.s_[:16], np.s_[16:]
    sweep = segment_sweep(affinities[:, tune], fragments[tune], method, thresholds)
    threshold = tune_threshold(sweep, truth[tune]).threshold
    labels = segment(affinities[:, test], method, threshold, SECTIONS, fragments=fragments[test])
    assert evaluate(labels, truth[test]).arand < 0.5 * evaluate(fragments[test], truth[test]).arand
