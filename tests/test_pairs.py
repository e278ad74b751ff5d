"""Pairs: files, the grey value gate, and exact mixing."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil, floor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance

from connectomics_neurodiff.errors import LabelTypeError, MissingInput, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.pairs import (
    grey_value_gate,
    is_synthetic,
    last_synthetic,
    match_grey_values,
    match_spectrum,
    open_pairs,
    read_reliability,
    write_pair,
)
from connectomics_neurodiff.pairs.matching import _blocks, _filtered
from connectomics_neurodiff.provenance import hash_of_file
from connectomics_neurodiff.volume import Volume, grow_phantom, open_volume, write_volume

SHAPE = (5, 18, 26)
VOXEL = (29.0, 6.0, 6.0)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def make_mask(shape=SHAPE, dtype=np.uint32, mito=True):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 9, shape).astype(dtype)
    return SimpleNamespace(
        label=label,
        membrane=(label == 0).astype(np.uint8),
        mito=(label == 3).astype(np.uint8) if mito else None,
    )


def make_real(voxel=VOXEL) -> Volume:
    return Volume(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint64), None, voxel)


@pytest.mark.parametrize("mito", [True, False])
def test_pair_survives_the_disk(tmp_path, image, mito) -> None:
    mask = make_mask(mito=mito)
    write_pair(tmp_path / "pair.h5", image, mask, VOXEL, {"seed": 3})
    (pair,) = open_pairs([tmp_path / "pair.h5"], make_real())
    assert np.abs(np.asarray(pair.image) - image).max() <= 0.5 / 255 + 1e-6
    assert (np.asarray(pair.label) == mask.label).all()
    assert (pair.mito is None) == (not mito)
    if mito:
        assert (np.asarray(pair.mito) == mask.mito).all()
    assert tuple(pair.voxel_nm) == VOXEL


def test_reliability_survives_the_disk(tmp_path, image) -> None:
    write_pair(tmp_path / "pair.h5", image, make_mask(), VOXEL, {}, reliability=image)
    assert np.abs(read_reliability(tmp_path / "pair.h5") - image).max() <= 0.5 / 255 + 1e-6
    write_pair(tmp_path / "bare.h5", image, make_mask(), VOXEL, {})
    with pytest.raises(MissingInput, match="reliability"):
        read_reliability(tmp_path / "bare.h5")


def test_write_pair_refuses_what_does_not_fit(tmp_path, image) -> None:
    path = tmp_path / "pair.h5"
    with pytest.raises(ShapeMismatch, match="label"):
        write_pair(path, image, make_mask((5, 18, 25)), VOXEL, {})
    with pytest.raises(LabelTypeError, match="float32"):
        write_pair(path, image, make_mask(dtype=np.float32), VOXEL, {})
    for bad in (image * 2, image - 0.5, np.where(image > 0.9, np.nan, image)):
        with pytest.raises(ValueRangeError, match="image"):
            write_pair(path, bad, make_mask(), VOXEL, {})
    assert not path.exists()


def test_open_pairs_refuses_another_voxel_size_and_missing_labels(tmp_path, image) -> None:
    write_pair(tmp_path / "pair.h5", image, make_mask(), VOXEL, {})
    with pytest.raises(ValueRangeError, match="voxel size"):
        open_pairs([tmp_path / "pair.h5"], make_real((6.0, 6.0, 29.0)))
    write_volume(tmp_path / "bare.h5", {"image": image}, VOXEL)
    with pytest.raises(MissingInput, match="label"):
        open_pairs([tmp_path / "bare.h5"], make_real())


@pytest.mark.parametrize("seed", range(4))
def test_distance_agrees_with_scipy(seed) -> None:
    rng = np.random.default_rng(seed)
    levels = [rng.integers(0, 256, 500) / 255, np.clip(rng.normal(100, 30, 700).round(), 0, 255) / 255]
    report = grey_value_gate(*levels, limit=1.0)
    assert report.distance == pytest.approx(wasserstein_distance(*levels), abs=1.5 / 256)
    assert (report.mean_synthetic, report.std_real) == pytest.approx((levels[0].mean(), levels[1].std()))


def test_a_pair_that_the_gate_refused_is_not_opened_for_training(tmp_path, image) -> None:
    path, report = tmp_path / "pair.h5", tmp_path / "pair.gate.json"
    write_pair(path, image, make_mask(), VOXEL, {})
    verdict = {"passed": False, "reason": "It is a cloud.", "pair": hash_of_file(path)}
    report.write_text(json.dumps(verdict))
    with pytest.raises(ValueRangeError, match=r"The gate refused .*pair.h5: It is a cloud\."):
        open_pairs([path], make_real())
    report.write_text(json.dumps(verdict | {"passed": True}))
    assert len(open_pairs([path], make_real())) == 1
    report.write_text(json.dumps(verdict))
    write_pair(path, 1 - image, make_mask(), VOXEL, {})  # painted anew since
    assert len(open_pairs([path], make_real())) == 1


def test_gate_passes_the_same_tissue_and_rejects_a_shift(image) -> None:
    half, other = image * 0.5, image[::-1] * 0.5
    assert grey_value_gate(half, other, limit=0.01).passed
    shifted = grey_value_gate(half + 0.2, other, limit=0.1)
    assert not shifted.passed
    assert shifted.distance == pytest.approx(0.2, abs=0.005)
    assert "0.1 is allowed" in shifted.reason
    with pytest.raises(ValueRangeError, match="Grey values"):
        shifted.require()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(np.full(SHAPE, 0.5), "constant"), (np.full(SHAPE, np.nan), "finite"), (np.full(SHAPE, 2.0), "in")],
)
def test_gate_rejects_broken_images_whatever_the_limit(image, bad, reason) -> None:
    report = grey_value_gate(bad, image, limit=10.0)
    assert not report.passed
    assert reason in report.reason


def test_matching_moves_the_moments_and_keeps_the_order(image) -> None:
    real = 0.4 + 0.1 * image
    matched = match_grey_values(0.2 + 0.5 * image**2, real)
    assert (matched.mean(), matched.std()) == pytest.approx((real.mean(), real.std()), abs=1e-3)
    order = np.argsort(image.ravel())
    assert (np.diff(matched.ravel()[order]) >= -1e-6).all()
    # One map for the volume: a section that was darker stays darker.
    darker = image.copy()
    darker[2] *= 0.5
    assert match_grey_values(darker, real)[2].mean() < match_grey_values(darker, real)[3].mean() - 0.02
    with pytest.raises(ValueRangeError, match="constant"):
        match_grey_values(np.full(SHAPE, 0.3), real)


@given(st.fractions(min_value=0, max_value=20, max_denominator=50), st.integers(1, 400))
def test_share_is_exact_at_every_n(ratio, n) -> None:
    share = ratio / (1 + ratio)
    count = sum(is_synthetic(i, float(ratio)) for i in range(n))
    assert floor(n * share) <= count <= ceil(n * share)


def test_share_is_exact_far_out() -> None:
    drawn = [is_synthetic(i, 0.3) for i in range(2000)]
    assert all(abs(np.cumsum(drawn)[n - 1] - n * Fraction(3, 13)) < 1 for n in range(1, 2001))
    assert not any(is_synthetic(i, 0.0) for i in range(200))


def test_order_does_not_follow_the_batch_position() -> None:
    drawn = np.array([is_synthetic(i, 1.0) for i in range(4000)])
    # With two devices that take turns, each sees its fair share; each pair of samples has one of both.
    assert 0.45 < drawn[::2].mean() < 0.55
    assert (drawn[::2] != drawn[1::2]).all()


@given(st.fractions(0, 20, max_denominator=50), st.integers(0, 300))
def test_a_training_ends_on_real_samples(ratio, until) -> None:
    drawn = [is_synthetic(i, float(ratio), until) for i in range(400)]
    assert drawn[:until] == [is_synthetic(i, float(ratio)) for i in range(until)]
    assert not any(drawn[until:])


def test_where_the_synthetic_samples_end() -> None:
    assert last_synthetic(0.5, 800) == 400
    assert last_synthetic(0.33, 10) == 3
    assert last_synthetic(1.0, 800) is None
    for share in (0.0, 1.01, np.nan):
        with pytest.raises(ValueRangeError, match=r"\(0, 1\]"):
            last_synthetic(share, 800)
    assert last_synthetic(0.001, 800) == 1
    with pytest.raises(ValueRangeError, match=r"one of its 800 samples at least. Got 0.0005"):
        last_synthetic(0.0005, 800)


@pytest.mark.parametrize("ratio", [-0.1, np.nan, np.inf])
def test_bad_ratio(ratio) -> None:
    with pytest.raises(ValueRangeError, match="ratio"):
        is_synthetic(0, ratio)
    with pytest.raises(ValueRangeError, match="number"):
        is_synthetic(-1, 1.0)


@pytest.mark.parametrize("name", ["fib_medulla_train", "vnc_sstem_train", "gala_fib_mini_train"])
def test_two_halves_of_a_real_volume_pass_the_default_gate(real_data, name) -> None:
    image = np.asarray(open_volume(real_data / f"{name}.h5").image[:20])
    half = image.shape[1] // 2
    assert grey_value_gate(image[:, :half], image[:, half:]).passed
    assert not grey_value_gate(image[:, :half] * 0.5, image[:, half:]).passed


def textured(shape: tuple[int, int, int], strength: float, seed: int = 0) -> np.ndarray:
    """Coarse blobs, and white noise of a standard deviation."""
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.standard_normal(shape), (0, 12, 12))
    return np.clip(0.5 + 0.1 * coarse / coarse.std() + strength * rng.standard_normal(shape), 0, 1).astype(np.float32)


def fine_power(image: np.ndarray) -> float:
    """Power of what a Gaussian of one voxel removes."""
    return float(np.var(image - gaussian_filter(image, (0, 1, 1))))


@pytest.mark.parametrize(("strength", "expected"), [(0.03, 1.0), (0.08, 1.0), (0.01, 4 / 25)])
def test_faint_and_strong_grain_gets_the_real_power_up_to_a_factor(strength: float, expected: float) -> None:
    """A gain of 2 brings four times the power: grain of a fifth stays too faint."""
    real, synthetic = textured((6, 96, 120), 0.05), textured((5, 88, 96), strength, 1)
    matched = match_spectrum(synthetic, real, VOXEL)
    assert matched.shape == synthetic.shape
    assert fine_power(matched) / fine_power(real) == pytest.approx(expected, rel=0.15)
    coarse = [gaussian_filter(image, (0, 8, 8)) for image in (matched, synthetic)]
    assert np.abs(coarse[0] - coarse[1])[:, 20:-20, 20:-20].max() < 0.01  # the layout stays


def test_an_isotropic_volume_is_filtered_along_z_too() -> None:
    size = (8.0, 8.0, 8.0)
    rng = np.random.default_rng(0)
    real, synthetic = (0.5 + s * rng.standard_normal((40, 44, 48)).astype(np.float32) for s in (0.06, 0.04))
    matched = match_spectrum(synthetic, real, size)
    for axis in range(3):
        rough = [float(np.square(np.diff(image, axis=axis)).mean()) for image in (matched, real)]
        assert rough[0] / rough[1] == pytest.approx(1, rel=0.1)


def test_a_volume_filtered_in_blocks_is_as_one_filtered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks see beyond their faces as far as the filter reaches: the same voxels within about a grey level, and at the
    faces of blocks no step that could be seen: neighbouring voxels differ by 7 grey levels."""
    size = (8.0, 8.0, 8.0)
    real = grow_phantom((90, 96, 100), size, 1).array("image")
    synthetic = gaussian_filter(real, 1.2).astype(np.float32)
    used: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def spy(image: np.ndarray, nm: tuple[float, ...], axes: tuple[int, ...], *curve: np.ndarray) -> np.ndarray:
        used["curve"] = (curve[0], curve[1])
        return _filtered(image, nm, axes, *curve)

    monkeypatch.setattr("connectomics_neurodiff.pairs.matching._filtered", spy)
    whole = match_spectrum(synthetic, real, size)
    monkeypatch.setattr("connectomics_neurodiff.pairs.matching._BLOCK", 48)
    blocks = _filtered(synthetic, size, (0, 1, 2), *used["curve"])
    assert len(_blocks(synthetic.shape, (0, 1, 2))) == 2 * 2 * 3
    assert np.abs(whole - synthetic).max() > 0.1
    np.testing.assert_allclose(blocks, whole, atol=1.5 / 255, rtol=0)
    step = np.abs(np.diff(blocks - whole, axis=0)).mean(axis=(1, 2))
    assert step.max() < 0.2 / 255


def test_pixels_too_coarse_for_fine_detail_are_left_alone() -> None:
    image = textured((3, 20, 24), 0.02)
    np.testing.assert_array_equal(match_spectrum(image, textured((3, 20, 24), 0.06), (200.0, 80.0, 80.0)), image)


def test_a_constant_image_has_no_spectrum_to_match() -> None:
    with pytest.raises(ValueRangeError, match="constant"):
        match_spectrum(np.full(SHAPE, 0.5), textured(SHAPE, 0.05), VOXEL)
