"""Average precision of boundaries against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.errors import ShapeMismatch
from connectomics_neurodiff.metrics import boundary_precision

SERIAL, CUBIC = (30.0, 6.0, 6.0), (8.0, 8.0, 8.0)


def labels(shape: tuple[int, int, int] = (4, 13, 17)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).repeat(2, axis=2).astype(np.uint32)


@pytest.mark.parametrize(("size", "axes"), [(SERIAL, (1, 2)), (CUBIC, (0, 1, 2))])
def test_it_is_what_scikit_learn_gives(size: tuple[float, float, float], axes: tuple[int, ...]) -> None:
    label = labels()
    truth = affinities_from_labels(label).astype(float)
    # On the steps that affinities are compared in, so that ties are the same.
    noisy = (
        np.floor(np.clip(truth + np.random.default_rng(1).normal(0, 0.5, truth.shape), 0, 1023 / 1024) * 1024) / 1024
    )
    inner = (slice(1, None),) * 3
    target = np.concatenate([(truth[axis][inner] == 0).ravel() for axis in axes])
    score = np.concatenate([1 - noisy[axis][inner].ravel() for axis in axes])
    assert boundary_precision(noisy, label, size) == pytest.approx(average_precision_score(target, score), abs=1e-9)


def test_perfect_affinities_score_one_and_constant_ones_the_share_of_boundaries() -> None:
    label = labels()
    truth = affinities_from_labels(label).astype(np.float32)
    assert boundary_precision(truth, label, CUBIC) == 1
    boundaries = np.mean([(truth[axis][1:, 1:, 1:] == 0).mean() for axis in range(3)])
    assert boundary_precision(np.full_like(truth, 0.5), label, CUBIC) == pytest.approx(float(boundaries))


def test_without_a_boundary_there_is_no_precision() -> None:
    assert math.isnan(boundary_precision(np.ones((3, 2, 3, 4)), np.ones((2, 3, 4), np.uint8), SERIAL))


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeMismatch, match=r"\(3, z, y, x\)"):
        boundary_precision(np.ones((3, 2, 3, 5)), np.ones((2, 3, 4), np.uint8), SERIAL)
