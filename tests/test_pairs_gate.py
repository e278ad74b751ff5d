"""The gate: its numbers against hand-made cases, and every kind of bad pair of a phantom refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from scipy import ndimage

from connectomics_neurodiff.conditions import membrane_from_labels
from connectomics_neurodiff.errors import ShapeMismatch, ValueRangeError
from connectomics_neurodiff.pairs import (
    GateLimits,
    Judge,
    JudgeSettings,
    MaskArrays,
    PairReport,
    RealTissue,
    dark_shares,
    gate_defect,
    judge_pair,
    match_grey_values,
    match_spectrum,
    measure_real,
    train_judge,
)
from connectomics_neurodiff.pairs.tissue import (
    band_power,
    continuity_and_order,
    depth_in_neurons,
    frequency_bands,
    grain_spread,
    section_likeness,
    tissue_bands,
)
from connectomics_neurodiff.volume import Volume, grow_phantom

VOXEL = (29.0, 6.0, 6.0)
BANDS = ((4.0, 8.0), (8.0, 16.0), (16.0, 32.0))
#: Everything but what a test is about is switched off.
OFF = GateLimits(following=0, missing=0, grey=0, spectrum=0, grain=0, continuity=0, order=0, dark=0)


def test_a_sine_lies_in_the_band_of_its_wavelength() -> None:
    # 100 nm along rows of 5 nm: 10 cycles per micrometre; amplitude .2: variance .02.
    x = np.arange(300) * 5.0
    image = np.broadcast_to(0.5 + 0.2 * np.sin(2 * np.pi * x / 100), (3, 170, 300)).astype(np.float32)
    assert band_power(image, (7.0, 5.0), BANDS) == pytest.approx([0, 0.02, 0], abs=2e-4)
    # The same grey values along columns of 7 nm are 140 nm long: 7.1 cycles per micrometre.
    assert band_power(image.transpose(0, 2, 1), (7.0, 5.0), BANDS) == pytest.approx([0.02, 0, 0], abs=2e-4)
    assert band_power(np.moveaxis(image, 0, 1), (7.0, 5.0), BANDS, axis=1) == pytest.approx([0, 0.02, 0], abs=2e-4)


def test_white_noise_has_power_by_the_area_of_the_band() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (8, 120, 161))
    found = band_power(noise, (6.0, 6.0), BANDS)
    density = 0.01 * 0.006**2
    areas = [np.pi * (high**2 - low**2) for low, high in BANDS]
    assert found == pytest.approx([density * area for area in areas], rel=0.15)


def test_bands_end_at_the_nyquist_frequency_and_need_room() -> None:
    assert frequency_bands((512, 512), (6.0, 6.0))[0] == (4.0, 8.0)
    assert frequency_bands((512, 512), (6.0, 6.0))[-1] == (64.0, pytest.approx(83.333, abs=1e-3))
    assert frequency_bands((512, 512), (6.0, 12.0))[-1] == (32.0, pytest.approx(41.667, abs=1e-3))
    assert frequency_bands((512, 60), (8.0, 8.0))[0] == (8.0, 16.0)
    assert frequency_bands((8, 8), (6.0, 6.0)) == ()
    assert {band.axis for band in tissue_bands((40, 90, 80), (8.0, 8.0, 8.0))} == {0, 1}
    assert {band.axis for band in tissue_bands((40, 90, 80), VOXEL)} == {0}


def alike(image: np.ndarray, tissue: np.ndarray | None = None) -> tuple[float, float]:
    inside = np.ones(image.shape, bool) if tissue is None else tissue
    return continuity_and_order(section_likeness(image, inside, VOXEL))


def test_continuity_of_equal_opposite_and_single_sections() -> None:
    rng = np.random.default_rng(0)
    section = rng.random((40, 60))
    assert alike(np.stack([section] * 3))[0] == pytest.approx(1)
    assert alike(np.stack([section, 1 - section, section]))[0] == pytest.approx(-1)
    assert abs(alike(rng.random((3, 40, 60)))[0]) < 0.15
    assert np.isnan(alike(section[None])).all()
    # Only what is tissue counts: the halves that differ are left out.
    image, inside = rng.random((2, 40, 120)), np.zeros((2, 40, 120), bool)
    image[1, :, :60] = image[0, :, :60]
    inside[:, :, :40] = True
    continuity, order = alike(image, inside)
    assert continuity == pytest.approx(1, abs=0.01)
    assert np.isnan(order)


def test_order_of_sections_that_drift() -> None:
    rng = np.random.default_rng(0)
    drift = np.cumsum(rng.standard_normal((14, 30, 40)), axis=0) + 8 * rng.standard_normal((30, 40))
    image = ((drift - drift.min()) / np.ptp(drift)).astype(np.float32)
    assert alike(image)[1] == 1.0
    shuffled = [alike(image[rng.permutation(14)])[1] for _ in range(8)]
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.1)
    assert max(shuffled) < 0.85
    # Brute force: every section with its neighbour and with those two to four away, on either side.
    smooth = [
        ndimage.gaussian_filter(s, 8 / 6) - ndimage.gaussian_filter(s, 20.0) for s in image[[0, 3, 2, 1, 4, 6, 5]]
    ]
    table = np.corrcoef([details.ravel() for details in smooth])
    wanted = [
        table[z, z + side] > table[z, z + side * lag]
        for z in range(7)
        for side in (-1, 1)
        for lag in (2, 3, 4)
        if 0 <= z + side * lag < 7
    ]
    assert alike(image[[0, 3, 2, 1, 4, 6, 5]])[1] == pytest.approx(np.mean(wanted))


def test_grain_is_even_in_noise_of_any_strength_and_uneven_where_some_places_have_none() -> None:
    rng = np.random.default_rng(0)
    noise, everywhere = rng.normal(0, 0.05, (4, 90, 110)), np.ones((4, 90, 110), bool)
    even = grain_spread(0.5 + noise, everywhere)
    assert even == pytest.approx(grain_spread(0.2 + noise / 7, everywhere), rel=1e-3)
    # Half of the plane a tenth as strong: the two levels are ln(100) apart.
    halves = noise * np.where(np.arange(110) < 55, 1.0, 0.1)
    assert grain_spread(0.5 + halves, everywhere) == pytest.approx(np.hypot(even, np.log(100) / 2), rel=0.03)
    left = everywhere & (np.arange(110) < 45)
    assert grain_spread(0.5 + halves, left) == pytest.approx(even, rel=0.1)
    assert np.isnan(grain_spread(noise, ~everywhere))


def test_enlarged_and_sharpened_tissue_is_refused_for_its_grain(bench: dict[str, Any]) -> None:
    """Right in its membranes, its grey values and its power: what is left is where the finest detail lies."""
    pair = bench["pair"]
    enlarged = ndimage.zoom(pair.image[:, ::2, ::2], (1, 2, 2), order=1)
    sharpened = match_spectrum(enlarged, bench["train"].image, VOXEL)
    report = verdict(bench, pair.painted(sharpened), replace(OFF, grain=1.35))
    assert "The finest detail is not that of a recording" in report.reason
    assert verdict(bench, pair, replace(OFF, grain=1.35)).passed


def slab() -> tuple[np.ndarray, np.ndarray]:
    """One neuron between two membranes of two rows, 40 rows of 6 nm apart: label, membrane."""
    label = np.ones((3, 44, 50), np.uint32)
    membrane = np.zeros(label.shape, np.uint8)
    membrane[:, :2] = membrane[:, 42:] = 1
    return label, membrane


def test_depth_is_measured_in_the_section_or_in_space() -> None:
    label, membrane = slab()
    assert depth_in_neurons(label, membrane, VOXEL)[1, 2:6, 9].tolist() == [6, 12, 18, 24]
    assert depth_in_neurons(label, membrane, VOXEL)[1, 21, 9] == 120
    floor = membrane.copy()
    floor[0] = 1
    assert depth_in_neurons(label, floor, VOXEL)[1, 21, 9] == 120
    assert depth_in_neurons(label, floor, (8.0, 6.0, 6.0))[1, 21, 9] == 8


def test_dark_shares_of_a_hand_made_neuron() -> None:
    label, membrane = slab()
    image = np.where(membrane > 0, 0.2, 0.8).astype(np.float32)
    assert dark_shares(image, label, membrane, None, VOXEL).all == 0
    # Deeper than 36 nm: rows 8 to 35, 28 of them. Dark: rows 14 to 20, 7 of them, right up to smoothing by 1.3 voxels.
    image[:, 14:21] = 0.25
    assert dark_shares(image, label, membrane, None, VOXEL).all == pytest.approx(7 / 28)
    mito = np.zeros_like(membrane)
    mito[:, 14:17] = 1
    found = dark_shares(image, label, membrane, mito, VOXEL)
    assert (found.all, found.mito, found.rest) == (pytest.approx(7 / 28), 1.0, pytest.approx(4 / 25))
    # In every section one piece, of 7 rows and all 50 columns of 6 x 6 nm; 28 rows are deep.
    assert found.size_nm == pytest.approx(2 * np.sqrt(7 * 50 * 36 / np.pi))
    assert found.per_um2 == pytest.approx(1 / (28 * 50 * 36e-6))
    image[:, 25:27, :3] = 0.25
    split = dark_shares(image, label, membrane, mito, VOXEL)
    assert split.per_um2 == pytest.approx(2 * found.per_um2)
    image[:, 25:27, :3] = 0.8
    # In units of the volume's own membranes: contrast and brightness do not matter.
    assert dark_shares(0.5 + 0.3 * image, label, membrane, None, VOXEL).all == pytest.approx(7 / 28)
    assert np.isnan(dark_shares(image[:, :7], label[:, :7], membrane[:, :7], None, VOXEL).all)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_script", REPOSITORY / "projects" / "NeuroDiff" / "gate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A phantom whose first sections are the real train part: its pairs, judge and statistics."""
    torch.set_num_threads(1)
    volume = grow_phantom((36, 120, 136), VOXEL, seed=1)
    train, elsewhere, held_out = (script.pair_at(volume, (z, 0, 0), (12, 120, 136)) for z in (0, 12, 24))
    part = Volume(train.image, train.label, train.mito, volume.voxel_nm)
    folder, settings = tmp_path_factory.mktemp("judge"), JudgeSettings(steps=180)
    judge = train_judge(part, membrane_nm=25.0, seed=0, folder=folder, settings=settings)
    real = measure_real(train.image, train.label, train.membrane, train.mito, VOXEL)
    return {"train": train, "pair": held_out, "elsewhere": elsewhere, "judge": judge, "real": real}


def verdict(bench: dict[str, Any], pair: Any, limits: GateLimits | None = None, mito: bool = True) -> PairReport:
    mask = MaskArrays(pair.label, pair.membrane, pair.mito if mito else None)
    image = match_grey_values(pair.image, bench["train"].image)
    return judge_pair(image, mask, real=bench["real"], judge=bench["judge"], limits=limits)


def test_the_judge_knows_held_out_tissue(bench: dict[str, Any]) -> None:
    judge: Judge = bench["judge"]
    assert judge.defect == ""
    assert judge.real.average_precision > 0.7
    assert judge.real.null < 0.3


@pytest.mark.parametrize("mito", [True, False])
def test_real_tissue_of_elsewhere_passes(bench: dict[str, Any], mito: bool) -> None:
    # The last part of this phantom is ten times as dark inside as the first, whose statistics only its masks explain.
    for name in ("train", "elsewhere", "pair") if mito else ("train", "elsewhere"):
        report = verdict(bench, bench[name], mito=mito)
        assert report.passed, report.reason
        report.require()
        assert report.following is not None
        assert report.following.share > 0.8
        assert json.loads(json.dumps(report.as_dict(), allow_nan=True))["following"]["share"] > 0.8


def test_every_bad_pair_is_refused_for_what_is_wrong_with_it(bench: dict[str, Any], script: ModuleType) -> None:
    wanted = {
        "clouds": "does not follow its mask",
        "clouds in a quarter": "in one section or one ninth of the plane",
        "blurred by 12 nm": "The texture is not that of the tissue",
        "inverted": "does not follow its mask",
        "mask of another place": "does not follow its mask",
        "half the membranes erased": "Membranes are missing",
        "neurons joined in the mask": "The image has boundaries that its mask lacks",
        "labels shifted by 5 voxels": "does not follow its mask",
        "membranes on other tissue": "",
        "sections shuffled": "Sections are out of order",
        "no organelles": "Neurons are not as dark inside",
    }
    other = grow_phantom((10, 64, 64), (8.0, 8.0, 8.0), seed=2, noise=0.01, diameter_nm=90.0)
    seen = {}
    for kind, pair in script.bad_pairs(bench["pair"], bench["elsewhere"], other, VOXEL, seed=0):
        report = verdict(bench, pair)
        assert not report.passed, kind
        seen[kind] = report.reason
        with pytest.raises(ValueRangeError):
            report.require()
    assert set(seen) == set(wanted)
    for kind, reason in wanted.items():
        assert reason in seen[kind], kind
        assert "\n" not in seen[kind]


def test_every_check_can_be_switched_off(bench: dict[str, Any]) -> None:
    inverted = bench["pair"].painted(1 - bench["pair"].image)
    assert verdict(bench, inverted, OFF) == PairReport(passed=True, reason="")
    only = verdict(bench, inverted, replace(OFF, following=0.5))
    assert [check.name for check in only.checks] == ["following"]
    assert not only.passed


def test_a_gate_that_cannot_judge_says_so(bench: dict[str, Any]) -> None:
    pair, real = bench["pair"], bench["real"]
    mask = MaskArrays(pair.label, pair.membrane, pair.mito)
    following = replace(OFF, following=0.5)
    blind = replace(bench["judge"], defect="Cannot judge whether images follow their masks: too small.")
    for judge in (None, blind):
        report = judge_pair(pair.image, mask, real=real, judge=judge, limits=following)
        assert not report.passed
        assert "Cannot judge" in report.reason
        assert report.as_dict()["checks"]["following"]["got"] is None
    empty = MaskArrays(np.ones_like(pair.label), np.zeros_like(pair.membrane))
    assert "Cannot judge" in judge_pair(pair.image, empty, real=real, judge=bench["judge"], limits=following).reason
    dark = judge_pair(pair.image, empty, real=real, judge=None, limits=replace(OFF, dark=1.2))
    assert "Cannot judge what is dark" in dark.reason
    one = MaskArrays(pair.label[:1], pair.membrane[:1])
    report = judge_pair(pair.image[:1], one, real=real, judge=None, limits=replace(OFF, continuity=0.25))
    assert "Cannot judge how alike" in report.reason
    full = MaskArrays(pair.label, np.ones_like(pair.membrane))
    grain = judge_pair(pair.image, full, real=real, judge=None, limits=replace(OFF, grain=1.35))
    assert "Cannot judge the finest detail" in grain.reason
    coarse = replace(real, bands=())
    assert "Cannot judge the texture" in verdict({**bench, "real": coarse}, pair, replace(OFF, spectrum=2.0)).reason


def test_a_gate_that_could_only_refuse_says_so_of_the_real_tissue(bench: dict[str, Any]) -> None:
    real, judge, limits = bench["real"], bench["judge"], GateLimits()
    assert gate_defect(real, judge, limits) == ""
    assert "without a judge" in gate_defect(real, None, limits)
    assert gate_defect(real, None, replace(limits, following=0.0, missing=0.0)) == ""
    blind = replace(judge, defect="Cannot judge at all.")
    assert gate_defect(real, blind, limits).endswith("itself: Cannot judge at all.")
    for name, told in (
        ("missing", "40 % of the mask's look like cytoplasm (40 % in real"),
        ("missing_at_worst", "cytoplasm in one section or one ninth of the plane (40 %"),
        ("cut", "cut off 40.0 % of its neurons"),
    ):
        hard = replace(judge, real=judge.real._replace(**{name: 0.4}))
        assert told in gate_defect(real, hard, limits)
        assert gate_defect(real, hard, replace(limits, missing=0.0)) == ""
    shuffled = replace(real, whole=replace(real.whole, order=0.5))
    assert "Sections are out of order" in gate_defect(shuffled, judge, limits)
    single = replace(real, whole=replace(real.whole, continuity=np.nan))
    assert "Cannot judge how alike" in gate_defect(single, judge, limits)


@pytest.mark.parametrize(("value", "reason"), [(0.5, "constant"), (np.nan, "finite"), (2.0, r"[0, 1]")])
def test_broken_images_are_refused_whatever_the_limits(bench: dict[str, Any], value: float, reason: str) -> None:
    pair, real = bench["pair"], bench["real"]
    mask = MaskArrays(pair.label, pair.membrane)
    report = judge_pair(np.full(pair.image.shape, value), mask, real=real, judge=None, limits=OFF)
    assert not report.passed
    assert reason in report.reason
    with pytest.raises(ShapeMismatch, match="label"):
        judge_pair(pair.image[:, 1:], mask, real=real, judge=None, limits=OFF)


def test_what_varies_within_the_real_volume_may_vary_in_a_pair() -> None:
    rng = np.random.default_rng(0)
    label = np.ones((4, 120, 120), np.uint32)
    label[:, 60:] = 2
    membrane = membrane_from_labels(label, VOXEL)
    even = (0.6 + 0.05 * rng.standard_normal(label.shape) - 0.3 * (membrane > 0)).clip(0, 1).astype(np.float32)
    uneven = (even + np.linspace(-0.15, 0.15, 120, dtype=np.float32)).clip(0, 1)
    alike: RealTissue = measure_real(even, label, membrane, None, VOXEL)
    varied = measure_real(uneven, label, membrane, None, VOXEL)
    assert varied.grey_spread > 5 * alike.grey_spread
    mask, moved, limits = MaskArrays(label, membrane), (even + 0.1).clip(0, 1), replace(OFF, grey=0.08)
    assert not judge_pair(moved, mask, real=alike, judge=None, limits=limits).passed
    assert judge_pair(moved, mask, real=varied, judge=None, limits=limits).passed
