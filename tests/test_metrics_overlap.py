"""Scores against hand-computed cases, published numbers, a brute-force twin and invariants."""

from __future__ import annotations

import json
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import adapted_rand_error, variation_of_information

from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.metrics import Scores, contingency, evaluate, overlap, rand_scores


def labels(low: int = 0) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint32, (2, 3, 5), elements=st.integers(low, 4))


def brute_force_overlap(segmentation: np.ndarray, truth: np.ndarray) -> dict[tuple[int, int], int]:
    table: dict[tuple[int, int], int] = {}
    for s, t in zip(segmentation.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t:
            table[t, s] = table.get((t, s), 0) + 1
    return table


def read(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][:]


@given(labels(), labels())
@settings(max_examples=100, deadline=None)
def test_contingency_matches_counting_voxel_by_voxel(segmentation, truth):
    truth[0, 0, 0] = 1
    expected = brute_force_overlap(segmentation, truth)
    table = contingency(segmentation, truth)
    assert sorted(table.voxels) == sorted(expected.values())
    rows = {t: sum(n for (i, _), n in expected.items() if i == t) for t, _ in expected}
    columns = {s: sum(n for (_, j), n in expected.items() if j == s) for _, s in expected}
    assert sorted(table.truth_voxels) == sorted(rows.values())
    assert sorted(table.segment_voxels) == sorted(columns.values())


def test_sorting_and_the_dense_table_count_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    segmentation, truth = rng.integers(0, 50, (2, 4, 16, 20))
    dense = contingency(segmentation, truth)
    monkeypatch.setattr(overlap, "DENSE_TABLE", 1)
    by_sorting = contingency(segmentation, truth)
    np.testing.assert_array_equal(dense.voxels, by_sorting.voxels)
    np.testing.assert_array_equal(dense.truth_index, by_sorting.truth_index)
    np.testing.assert_array_equal(dense.segment_index, by_sorting.segment_index)


@given(labels(low=1), labels(low=1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_scores_do_not_depend_on_the_ids(segmentation, truth, seed):
    rng = np.random.default_rng(seed)
    new_ids = rng.choice(2**62, 5, replace=False).astype(np.uint64) + np.uint64(1)
    before, after = evaluate(segmentation, truth), evaluate(new_ids[segmentation], new_ids[::-1][truth])
    assert after.as_dict() == pytest.approx(before.as_dict(), abs=1e-12)


@given(labels(low=1), labels(low=1))
@settings(max_examples=60, deadline=None)
def test_exchanging_the_two_exchanges_split_and_merge(one, other):
    forth, back = evaluate(one, other), evaluate(other, one)
    assert forth.voi_split == pytest.approx(back.voi_merge, abs=1e-12)
    assert forth.voi_merge == pytest.approx(back.voi_split, abs=1e-12)
    assert forth.arand == pytest.approx(back.arand, abs=1e-12)


@given(labels())
@settings(max_examples=30, deadline=None)
def test_a_segmentation_equal_to_the_truth_is_perfect(truth):
    truth[0, 0, 0] = 3
    assert evaluate(truth, truth) == Scores(0.0, 0.0, 0.0, 0.0)


@given(labels(low=1), labels(low=1))
@settings(max_examples=60, deadline=None)
def test_scores_match_scikit_image(segmentation, truth):
    split, merge = variation_of_information(truth, segmentation)
    scores = evaluate(segmentation, truth)
    assert (scores.voi_split, scores.voi_merge) == pytest.approx((split, merge), abs=1e-9)
    assert scores.voi == pytest.approx(split + merge, abs=1e-9)


def test_truth_zero_is_ignored_and_segmentation_zero_is_a_segment():
    truth = np.array([0, 0, 1, 1, 2, 2])
    segmentation = np.array([5, 6, 0, 0, 0, 0])
    assert evaluate(segmentation, truth) == evaluate(np.full(4, 9), np.array([1, 1, 2, 2]))
    assert evaluate(segmentation, truth).voi_merge == 1.0


def test_halving_a_neuron_costs_one_bit_of_split():
    assert evaluate(np.array([1, 1, 2, 2]), np.ones(4, int)).as_dict() == {
        "voi_split": 1.0,
        "voi_merge": 0.0,
        "voi": 1.0,
        "arand": pytest.approx(1 - 2 * 4 / (12 + 4)),
    }


def test_counts_beyond_32_bits_do_not_overflow():
    table = overlap.Overlap(np.array([0, 0]), np.array([0, 1]), np.array([2.0**33, 2.0**33]))
    assert overlap._rand(table, self_pairs=True).arand == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_every_integer_type_is_accepted(dtype):
    truth, segmentation = np.array([[1, 1, 2, 0]], dtype), np.array([[1, 2, 2, 2]], np.uint32)
    assert evaluate(segmentation, truth) == evaluate(segmentation, truth.astype(np.uint32))


@pytest.mark.parametrize(
    ("segmentation", "truth", "error", "words"),
    [
        (np.ones((2, 3), int), np.ones((3, 2), int), ShapeMismatch, r"\(2, 3\) and \(3, 2\)"),
        (np.ones(3), np.ones(3, int), LabelTypeError, "segmentation.*float64"),
        (np.ones(3, int), np.ones(3, np.float32), LabelTypeError, "truth.*float32"),
        (np.array([1, -7, 1]), np.ones(3, int), LabelTypeError, "minimum -7"),
        (np.ones(3, bool), np.ones(3, int), LabelTypeError, "bool"),
        (np.ones(3, int), np.zeros(3, int), ValueRangeError, "at least one voxel"),
        (np.zeros(0, int), np.zeros(0, int), ValueRangeError, "at least one voxel"),
    ],
)
def test_bad_input_is_refused_in_one_line(segmentation, truth, error, words):
    with pytest.raises(error, match=words) as caught:
        evaluate(segmentation, truth)
    assert "\n" not in str(caught.value)


def test_input_is_not_modified():
    truth, segmentation = np.array([[0, 7, 7]]), np.array([[3, 3, 0]])
    evaluate(segmentation, truth)
    assert (truth.tolist(), segmentation.tolist()) == ([[0, 7, 7]], [[3, 3, 0]])


def test_lazy_datasets_are_read(tmp_path):
    with h5py.File(tmp_path / "labels.h5", "w") as file:
        dataset = file.create_dataset("label", data=np.array([[[1, 2], [2, 2]]]))
        assert evaluate(dataset, dataset).voi == 0.0


@pytest.mark.parametrize("name", ["seg1", "seg4", "watershed"])
def test_published_voi_of_gala(real_data, name):
    path = real_data / "checks" / "gala_test_voi.h5"
    scores = evaluate(read(path, name), read(path, "label"))
    with h5py.File(path) as file:
        published = dict(file[name].attrs)
    assert scores.voi_split == pytest.approx(published["third_party_voi_split_bits"], abs=1e-5)
    assert scores.voi_merge == pytest.approx(published["third_party_voi_merge_bits"], abs=1e-5)
    assert scores.arand == pytest.approx(published["skimage_adapted_rand_error"], abs=1e-4)


def test_adapted_rand_error_of_ffn(real_data):
    segmentation = read(real_data / "checks" / "ffn_prediction_fib_train.h5", "segmentation")
    truth = read(real_data / "fib_medulla_train.h5", "label")
    assert evaluate(segmentation, truth).arand == pytest.approx(0.18455415727766122, abs=1e-9)
    error, precision, recall = adapted_rand_error(truth, segmentation, ignore_labels=(0,))
    ours = rand_scores(segmentation, truth, self_pairs=False)
    assert (ours.arand, ours.rand_split, ours.rand_merge) == pytest.approx((error, precision, recall), abs=1e-9)


def metric_case_arrays(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """(segmentation, truth); waterz's case has random arrays, handed over in this order."""
    if "gt" in case:
        return np.array(case["seg"]), np.array(case["gt"])
    rng = np.random.RandomState(0)
    first, second = (rng.randint(500, size=(3, 3, 3), dtype=np.uint64) for _ in range(2))
    return first, second


def test_every_third_party_case(real_data):
    cases = json.loads((real_data / "checks" / "metric_cases.json").read_text())["cases"]
    checked = 0
    for case in cases:
        segmentation, truth = metric_case_arrays(case)
        scores, rand = evaluate(segmentation, truth), rand_scores(segmentation, truth)
        without_self = rand_scores(segmentation, truth, self_pairs=False)
        ours = {
            "voi_split": scores.voi_split,
            "voi_merge": scores.voi_merge,
            "voi_total_bits": scores.voi,
            "rand_split": rand.rand_split,
            "rand_merge": rand.rand_merge,
            "adapted_rand_error": scores.arand,
            "precision": without_self.rand_split,  # scikit-image's name for it
            "recall": without_self.rand_merge,
            "skimage_variation_of_information(gt, seg, ignore_labels=[0])": [scores.voi_split, scores.voi_merge],
        }
        for key in ours.keys() & case.keys():
            assert ours[key] == pytest.approx(case[key], abs=1e-9), (case["from"], key)
            checked += 1
    assert checked >= 3 + 1 + 1 + 4 + 4 + 4


def test_single_voxel_segments_have_no_pairs_to_get_wrong():
    alone = np.arange(1, 5)
    assert rand_scores(alone, alone, self_pairs=False).arand == 0.0


def test_a_large_volume_is_scored_within_seconds():
    z, y, x = np.ogrid[:100, :512, :512]
    truth = (z // 20 * 400 + y // 26 * 20 + x // 26 + 1).astype(np.uint32)
    segmentation = (z // 13 * 400 + y // 31 * 20 + x // 17 + 1).astype(np.uint64)
    best = min(seconds_of(segmentation, truth) for _ in range(2))
    assert best < 3.0  # 0.5 s on an idle core


def seconds_of(segmentation: np.ndarray, truth: np.ndarray) -> float:
    start = time.perf_counter()
    evaluate(segmentation, truth)
    return time.perf_counter() - start
