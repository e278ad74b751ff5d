"""Placement and the whole remodelling: valid, plausible, as much as asked, and deterministic."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics_neurodiff.conditions import membrane_from_labels
from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch, ValueRangeError
from connectomics_neurodiff.geometry import is_anisotropic
from connectomics_neurodiff.remodel import (
    RemodelledMask,
    SignatureLibrary,
    keep_inside,
    place_mitochondria,
    placement,
    plan,
    quality_report,
    remodel,
)
from connectomics_neurodiff.remodel.chain import Pose, _settle
from connectomics_neurodiff.remodel.ellipse import equivalent_ellipse
from connectomics_neurodiff.remodel.library import LEAST_VOLUME_NM3
from connectomics_neurodiff.remodel.placement import _cross_section, _section_of
from connectomics_neurodiff.remodel.plan import plan_of
from connectomics_neurodiff.remodel.room import CandidateGroups, Room, Window, depth_map
from connectomics_neurodiff.remodel.templates import Templates
from connectomics_neurodiff.seeding import rng_for

VOXEL = (29.0, 6.0, 6.0)
ISOTROPIC = (8.0, 8.0, 8.0)
SHAPE = (12, 120, 160)
IN_ORDER = (
    "mito_outside_neuron_voxels",
    "mito_on_membrane_voxels",
    "mito_in_several_neurons",
    "labels_lost",
    "labels_torn",
)


def tissue(shape: tuple[int, int, int] = SHAPE, voxel: tuple[float, float, float] = VOXEL, ends: int = 3):
    """Three large neurons over many small ones, all slanting, and ellipsoidal mitochondria in the large ones."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    slanted = x + 0.5 * z + 4 * np.sin(y / 9)
    label = np.where(y < 2 * shape[1] // 3, 1 + np.clip(3 * slanted // shape[2], 0, 2), 10 + slanted // 8)
    label = label.astype(np.uint32)
    mito = np.zeros(shape, dtype=np.uint8)
    for i in range(3):
        cy, cx, cz = shape[1] / 3 + 8 * (i - 1), shape[2] * (0.17 + 0.3 * i), shape[0] / 2 - 1 + i
        dz, dy, dx = ((z - cz) * voxel[0], (y - cy) * voxel[1], (x - cx) * voxel[2])
        inside = (dz / (ends * 29)) ** 2 + (dy / 110) ** 2 + (dx / 60) ** 2 <= 1
        mito |= (inside & (label == 1 + i)).astype(np.uint8)
    return label, mito


@pytest.fixture(scope="module")
def library() -> SignatureLibrary:
    """Signatures of the phantom."""
    return SignatureLibrary.from_masks(*tissue(), VOXEL)


def assert_valid(mask: RemodelledMask) -> None:
    """Independent check of the contract, component by component with scipy."""
    assert (mask.label.dtype, mask.membrane.dtype, mask.mito.dtype) == (np.uint64, np.uint8, np.uint8)
    assert set(np.unique(mask.membrane)) <= {0, 1}
    assert set(np.unique(mask.mito)) <= {0, 1}
    assert not (mask.mito & mask.membrane).any()
    assert not mask.mito[mask.label == 0].any()
    components, count = ndimage.label(mask.mito, np.ones((3, 3, 3)))
    for i in range(1, count + 1):
        assert len(np.unique(mask.label[components == i])) == 1


@pytest.mark.parametrize("voxel", [VOXEL, ISOTROPIC])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_new_mask_is_valid_and_holds_as_much_mitochondria(voxel, seed) -> None:
    shape = SHAPE if voxel == VOXEL else (50, 70, 90)
    label, mito = tissue(shape, voxel)
    new = remodel(label, mito, voxel, rng_for(seed), candidate_fraction=0.3)
    assert_valid(new)
    report = quality_report(label, mito, new, voxel)
    assert {name: report[name] for name in IN_ORDER} == dict.fromkeys(IN_ORDER, 0.0)
    assert report["mito_fraction"] == pytest.approx(mito.mean(), rel=0.1)
    assert report["mito_overlap"] < 0.8
    assert 0.3 < report["label_overlap"] < 0.99


@pytest.mark.parametrize("kept", [(True, True), (True, False), (False, True), (False, False)])
def test_switches(kept: tuple[bool, bool]) -> None:
    elastic, place = kept
    label, mito = tissue()
    new = remodel(label, mito, VOXEL, rng_for(3), elastic=elastic, place_mitochondria=place)
    assert_valid(new)
    assert np.array_equal(new.label, label) == (not elastic)
    moved = 2 * (new.mito & mito).sum() / (int(new.mito.sum()) + int(mito.sum()))
    # Mitochondria that only move along overlap the old ones; new ones are elsewhere.
    assert (moved > 0.6) == (not place)
    if not elastic and not place:
        membrane = membrane_from_labels(label, VOXEL)
        assert np.array_equal(new.membrane, membrane)
        assert np.array_equal(new.mito, mito & (membrane == 0))


@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("voxel", [VOXEL, ISOTROPIC])
def test_what_is_dark_moves_along_with_its_neuron(voxel, place: bool) -> None:
    """Dark all through every second neuron: it still is in the new mask, less its membranes and mitochondria."""
    label, mito = tissue(SHAPE if voxel == VOXEL else (40, 70, 90), voxel)
    dark = (label % 2 == 1).astype(np.uint8)
    new = remodel(label, mito, voxel, rng_for(5), dark=dark, place_mitochondria=place)
    assert new.dark is not None
    assert new.dark.dtype == np.uint8
    # Of mitochondria that move along the old places are not dark; new ones leave theirs as dark as the neuron was.
    free = (new.membrane == 0) & (new.mito == 0)
    wanted = (new.label % 2 == 1) & free
    missed = (new.dark > 0)[free] != wanted[free]
    assert missed.mean() < (0.002 + mito.mean() if place else 0.002)
    assert not new.dark[(new.membrane > 0) | (new.mito > 0) | (new.label == 0)].any()
    plain = remodel(label, mito, voxel, rng_for(5), place_mitochondria=place)
    for name in ("label", "membrane", "mito"):
        assert np.array_equal(getattr(new, name), getattr(plain, name))
    assert plain.dark is None
    report = quality_report(label, mito, new, voxel, source_dark=dark)
    assert report["source_dark_fraction"] == dark.mean()
    assert report["dark_fraction"] == new.dark.mean()
    assert "dark_fraction" not in quality_report(label, mito, plain, voxel, source_dark=dark)


def test_same_state_same_bytes() -> None:
    label, mito = tissue()
    first, again, other = (remodel(label, mito, VOXEL, rng_for(s)) for s in (7, 7, 8))
    for name in ("label", "membrane", "mito"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
        assert getattr(first, name).tobytes() != getattr(other, name).tobytes()
    assert first.min_jacobian == again.min_jacobian


def test_one_generator_gives_a_new_copy_every_time() -> None:
    label, mito = tissue()
    rng = rng_for(0)
    assert (remodel(label, mito, VOXEL, rng).mito != remodel(label, mito, VOXEL, rng).mito).any()


@pytest.mark.parametrize("mito", [None, np.zeros(SHAPE, dtype=np.uint8)])
@pytest.mark.parametrize("place", [True, False])
def test_without_mitochondria_membranes_alone(mito, place) -> None:
    new = remodel(tissue()[0], mito, VOXEL, rng_for(0), place_mitochondria=place)
    assert_valid(new)
    assert not new.mito.any()
    assert 0.02 < new.membrane.mean() < 0.6


def test_mitochondria_outside_neurons_count_as_none() -> None:
    label, mito = tissue()
    label[label == 1] = 0
    only_outside = ((mito > 0) & (label == 0)).astype(np.uint8)
    assert only_outside.any()
    for place in (True, False):
        assert not remodel(label, only_outside, VOXEL, rng_for(0), place_mitochondria=place).mito.any()


def test_library_of_another_voxel_size_serves_without_masks(library: SignatureLibrary) -> None:
    label, _ = tissue((18, 150, 200), (20, 5, 5))
    new = remodel(label, None, (20, 5, 5), rng_for(0), library=library, candidate_fraction=0.3)
    assert_valid(new)
    assert new.mito.mean() == pytest.approx(library.mito_fraction, rel=0.1)
    # Sizes are in nm: heights of 174 nm in the library's 29 nm sections are about 9 sections of 20 nm.
    heights = [b[0].stop - b[0].start for b in ndimage.find_objects(ndimage.label(new.mito, np.ones((3, 3, 3)))[0])]
    assert 5 <= max(heights) <= 11


@pytest.mark.parametrize("fraction", [0.0, 0.015, 0.03])
def test_asked_fraction_is_met(library: SignatureLibrary, fraction: float) -> None:
    new = remodel(tissue()[0], None, VOXEL, rng_for(1), library=library, mito_fraction=fraction, candidate_fraction=0.3)
    assert new.mito.mean() == pytest.approx(fraction, rel=0.1)


@pytest.mark.parametrize("depth", [12, 60])
@pytest.mark.parametrize("up", [True, False])
def test_cut_templates_lie_on_faces_as_often_as_real_ones(depth: int, up: bool) -> None:
    """Against a simulation: objects twice as high, thrown anywhere where they reach into the stack."""
    label, mito = tissue()
    cut = [s for s in SignatureLibrary.from_masks(label[5:], mito[5:], VOXEL).signatures if s.cut_below]
    template = max(cut, key=len)
    assert not template.is_low
    room = Room.of(np.ones((depth, 20, 28), dtype=np.uint32), np.zeros((depth, 20, 28), np.uint8), VOXEL, 10.0)
    rng = rng_for(1)
    drawn = np.array([_section_of(template, 1.0, up, room, rng) for _ in range(4000)])
    # The template's ends for every section drawn; its first section is the cut one.
    below = drawn - template.widest if up else drawn - (len(template) - 1 - template.widest)
    above = below + len(template) - 1
    on_face = below == 0 if up else above == depth - 1
    whole = 2 * len(template)
    bottom = rng.uniform(-whole, depth, 100_000)
    expected = ((bottom < 0) | (bottom + whole > depth)).mean()
    # One that lies inside may end on the face by chance, one place of depth - height.
    chance = (1 - expected) / (depth - len(template) + 1)
    assert on_face.mean() == pytest.approx(expected + chance, abs=0.05)
    assert below.min() == 0
    assert above.max() == depth - 1


@pytest.mark.parametrize("count", [4, 8, 12])
def test_asked_number_makes_up_the_share(library: SignatureLibrary, count: int) -> None:
    options = {"library": library, "mito_fraction": 0.06, "candidate_fraction": 0.5}
    label, _ = tissue()
    made = [remodel(label, None, VOXEL, rng_for(seed), mito_count=count, **options).mito for seed in range(3)]
    assert np.mean([mito.mean() for mito in made]) == pytest.approx(0.06, rel=0.1)
    assert np.mean([ndimage.label(mito, np.ones((3, 3, 3)))[1] for mito in made]) == pytest.approx(count, rel=0.3)


def test_plan_has_the_library_s_sizes_or_the_number_asked_for(library: SignatureLibrary) -> None:
    volumes = sorted((s.volume_nm3 for s in library.signatures), reverse=True)
    voxels, voxel = library.mito_nm3 / np.prod(VOXEL), np.prod(VOXEL)
    assert [w.volume * voxel for w in plan_of(library, voxels, VOXEL)] == pytest.approx(volumes)
    assert len(plan_of(library, 3 * voxels, VOXEL)) == 3 * len(volumes)
    assert len(plan_of(library, voxels / 1e6, VOXEL)) == 1
    (one,) = plan_of(library, voxels, VOXEL, 1)
    assert one.volume == pytest.approx(voxels)
    few = plan_of(library, voxels, VOXEL, len(volumes) // 2)
    assert sum(w.volume for w in few) == pytest.approx(voxels)
    larger = few[0].volume * voxel / max(volumes)
    assert larger > 1.5
    assert few[0].height_nm == pytest.approx(
        np.cbrt(larger) * max(library.signatures, key=lambda s: s.volume_nm3).z_extent_nm
    )


@given(st.lists(st.floats(1e3, 1e9), min_size=1, max_size=40), st.floats(1.0, 50.0))
def test_volumes_asked_for_have_their_sum_and_none_is_too_small(volumes: list[float], mean: float) -> None:
    """Every volume is the same multiple of what it was, or the least one."""
    falling = np.sort(volumes)[::-1]
    total = mean * LEAST_VOLUME_NM3 * len(falling)
    planned = plan._with_sum(falling, total)
    assert planned.sum() == pytest.approx(total)
    assert planned.min() >= LEAST_VOLUME_NM3
    larger = (planned / falling)[planned > LEAST_VOLUME_NM3 * (1 + 1e-9)]
    assert larger == pytest.approx(larger.max(initial=0))
    assert (LEAST_VOLUME_NM3 / falling >= larger.max(initial=0) - 1e-9)[planned == LEAST_VOLUME_NM3].all()


def drawn(voxels: int, sections: int) -> tuple[np.ndarray, tuple[slice, ...]]:
    """A mitochondrion of so many voxels in so many sections."""
    mask = np.zeros((sections, 10, 20), dtype=bool)
    mask.reshape(sections, -1)[:, : voxels // sections] = True
    return mask, (slice(0, sections), slice(0, 10), slice(0, 20))


@pytest.mark.parametrize(
    ("tries", "chosen"),
    [
        # As large as wanted and half as high; too large; smaller, but the nearest; too small and too low.
        ([(600, 4), (999, 8), (480, 8), (320, 6)], 2),
        # Good enough ends the search, a better one would follow.
        ([(240, 8), (520, 8), (600, 8)], 1),
        # From the ninth on .8 will do.
        ([(480, 8)] * 3 + [None] * 4 + [(488, 8), (600, 8)], 7),
        # None is placed that is less than about a third of what is wanted, or more than may be.
        ([(200, 8), (1200, 8), None], None),
    ],
)
def test_the_try_nearest_in_volume_and_height_is_placed(monkeypatch, library, tries, chosen) -> None:
    """Wanted: 600 voxels in 8 sections; 1000 at most."""
    asked = []
    made = [each and drawn(*each) for each in tries]

    def draw(*_):
        asked.append(len(asked))
        return made[asked[-1]] if asked[-1] < len(made) else None

    monkeypatch.setattr(placement, "_draw", draw)
    room = Room(np.ones(SHAPE, np.uint32), np.full(SHAPE, 60, np.float32), VOXEL, 10.0, 100.0, Window.whole(SHAPE[0]))
    groups, templates = CandidateGroups(room, 1.0, 10.0), Templates.of(library, SHAPE[0], VOXEL)
    wanted = plan.Wanted(600.0, 8 * VOXEL[0])
    voxels = placement._place(room, groups, templates, wanted, 1000.0, rng_for(0))
    if chosen is None:
        assert (voxels, room.mito.any(), len(asked)) == (0, False, 24)
    else:
        mask, box = made[chosen]
        assert voxels == mask.sum() == room.mito.sum()
        assert np.array_equal(room.mito[box] > 0, mask)


def test_what_is_missing_is_asked_for_at_once_then_in_halves(monkeypatch) -> None:
    """Against a room that takes nothing above 300 voxels: 900 are missing, 450 and 225 are tried."""
    asked = []

    def place(room, groups, templates, wanted, most, rng) -> int:
        asked.append((wanted.volume, wanted.height_nm))
        return int(wanted.volume) if wanted.volume <= 300 else 0

    monkeypatch.setattr(placement, "_place", place)
    sizes = [plan.Wanted(1000.0, 500.0), plan.Wanted(200.0, 100.0), plan.Wanted(50.0, 40.0)]
    budget = plan.Budget(1900.0, placed=1000)
    placement._make_up(None, None, None, sizes, budget, rng_for(0))
    assert [volume for volume, _ in asked] == [900, 450, 225, 225, 225, 225]
    assert [height for _, height in asked] == [500, 500, 100, 100, 100, 100]
    assert (budget.placed, budget.count) == (1900, 4)


def test_a_share_or_number_that_is_missed_is_said(caplog, library) -> None:
    label, mito = tissue()
    remodel(label, mito, VOXEL, rng_for(0), library=library)
    assert not caplog.records
    remodel(label, mito, VOXEL, rng_for(0), library=library, mito_fraction=0.9)
    assert "90 % were wanted" in caplog.text


@pytest.mark.parametrize(
    ("placed", "said"),
    [
        ([30, 30, 35], []),
        ([30, 30], ["fill 6 % of the volume, 10 % were"]),
        ([20] * 5, ["5 mitochondria make up the share, 3 were"]),
        ([20] * 4, ["fill 8 %"]),
        ([89], ["fill 8.9 %", "1 mitochondria"]),
    ],
)
def test_a_tenth_less_or_one_more_may_be_placed_unsaid(caplog, placed: list[int], said: list[str]) -> None:
    """Of 1000 voxels 100 are wanted, in 3 mitochondria."""
    budget = plan.Budget(100.0)
    for voxels in [*placed, 0]:
        budget.spend(voxels)
    budget.warn_if_missed(1000, 3)
    assert len(caplog.messages) == len(said)
    assert all(part in message for part, message in zip(said, caplog.messages, strict=True))


def test_coarse_tissue_is_filled_wherever_its_rows_are(library: SignatureLibrary) -> None:
    """Slabs that are deep enough in a single row, on even or on odd ones."""
    voxel = (60.0, 40.0, 40.0)
    filled = []
    for first in range(4):
        label = np.zeros((10, first + 96, 120), np.uint32)
        membrane = np.zeros_like(label)
        for i in range(16):
            start = first + 6 * i
            label[:, start : start + 5] = i + 1
            membrane[:, [start, start + 4]] = 1
        filled.append(place_mitochondria(label, membrane, voxel, library, rng_for(0), mito_fraction=0.02).sum())
    assert min(filled) > 0.5 * max(filled) > 0


def test_what_the_plan_lacks_is_made_up_by_few(library: SignatureLibrary) -> None:
    """A large mitochondrion finds no room in thin neurons: others of the tissue's sizes stand for it, not a crowd."""
    label, _ = tissue()
    volumes = np.array([s.volume_nm3 for s in library.signatures])
    giant = max(library.signatures, key=lambda s: s.volume_nm3)
    scale = 3.0
    giant = replace(
        giant,
        contours=scale * giant.contours,
        axes=scale * giant.axes,
        areas_nm2=scale**2 * giant.areas_nm2,
        volume_nm3=scale**2 * giant.volume_nm3,
    )
    mixed = SignatureLibrary((*library.signatures, giant), float(volumes.sum() + giant.volume_nm3), library.tissue_nm3)
    planned = len(plan_of(mixed, 0.06 * label.size, VOXEL))
    options = {"library": mixed, "mito_fraction": 0.06, "candidate_fraction": 0.5}
    for seed in range(3):
        mito = remodel(label, None, VOXEL, rng_for(seed), **options).mito
        assert mito.mean() == pytest.approx(0.06, rel=0.1)
        # Nine of the others are as large as the giant; a crowd of any size would be eight to ten.
        assert ndimage.label(mito, np.ones((3, 3, 3)))[1] <= planned + 3


def test_impossible_fraction_ends_below_it_with_a_valid_mask(library: SignatureLibrary) -> None:
    new = remodel(tissue()[0], None, VOXEL, rng_for(1), library=library, mito_fraction=0.9)
    assert_valid(new)
    assert 0.02 < new.mito.mean() < 0.6


def test_candidates_are_the_largest_and_more_join_only_when_they_are_full(library: SignatureLibrary) -> None:
    label, _ = tissue()
    membrane = membrane_from_labels(label, VOXEL, 30.0)
    largest = np.argsort(-np.bincount(label.ravel())[1:])[:2] + 1
    options = {"candidate_fraction": 2 / len(np.unique(label)), "mito_fraction": 0.015}
    few = place_mitochondria(label, membrane, VOXEL, library, rng_for(2), **options)
    assert set(np.unique(label[few > 0])) <= set(largest)
    many = place_mitochondria(label, membrane, VOXEL, library, rng_for(2), **{**options, "mito_fraction": 0.4})
    assert set(np.unique(label[many > 0])) > set(largest)


def test_mitochondria_stay_apart_and_keep_a_margin(library: SignatureLibrary) -> None:
    label, _ = tissue()
    membrane = membrane_from_labels(label, VOXEL, 30.0)
    mito = place_mitochondria(label, membrane, VOXEL, library, rng_for(0), mito_fraction=0.06, margin_nm=15.0)
    pieces, count = ndimage.label(mito, np.ones((3, 3, 3)))
    assert count >= 3
    # 6-connected and 26-connected objects are the same ones: each is solid, and none touches another by a corner.
    assert ndimage.label(mito)[1] == count
    for z in range(SHAPE[0]):
        wall = ndimage.distance_transform_edt((membrane[z] == 0) & (label[z] > 0), VOXEL[1:])
        assert not mito[z].any() or wall[mito[z] > 0].min() > 15
        objects, found = ndimage.label(mito[z], np.ones((3, 3)))
        for i in range(1, found + 1):
            away = ndimage.distance_transform_edt(objects != i, VOXEL[1:])
            others = (mito[z] > 0) & (objects != i) & (pieces[z] != pieces[z][objects == i][0])
            assert not others.any() or away[others].min() > 15


def test_mitochondria_look_like_the_library_s(library: SignatureLibrary) -> None:
    """Size, aspect, height and tapered ends, not slivers."""
    label, _ = tissue()
    membrane = membrane_from_labels(label, VOXEL, 30.0)
    mito = place_mitochondria(label, membrane, VOXEL, library, rng_for(4), mito_fraction=0.03, candidate_fraction=0.3)
    components, _ = ndimage.label(mito, np.ones((3, 3, 3)))
    ratios, tapers = [], []
    for i, box in enumerate(ndimage.find_objects(components), start=1):
        areas = (components[box] == i).sum(axis=(1, 2))
        middle = equivalent_ellipse((components[box] == i)[areas.argmax()], VOXEL[1:])
        ratios.append(middle.major_nm / middle.minor_nm)
        assert 80 < middle.major_nm < 260
        assert 2 <= len(areas) <= 7
        inner = [areas[end] / areas.max() for end, z in ((0, box[0].start), (-1, box[0].stop)) if 0 < z < SHAPE[0]]
        tapers.extend(inner)
    assert 1.3 < np.median(ratios) < 2.2
    assert np.median(tapers) < 0.75


def test_orientation_follows_the_neuron() -> None:
    """In a stripe of 30 degrees a mitochondrion lies at about 30 degrees."""
    y, x = np.mgrid[:160, :200]
    across = (y - 80) * np.cos(np.deg2rad(30)) - (x - 100) * np.sin(np.deg2rad(30))
    label = np.where(np.abs(across) < 22, 1, np.where(across > 0, 2, 3)) * np.ones((8, 1, 1), dtype=np.uint32)
    label = np.where(np.abs(across) < 40, label, 0).astype(np.uint32)
    library = SignatureLibrary.from_masks(*tissue(), VOXEL)
    membrane = membrane_from_labels(label, VOXEL, 30.0)
    mito = place_mitochondria(label, membrane, VOXEL, library, rng_for(0), mito_fraction=0.02, candidate_fraction=0.1)
    components, count = ndimage.label(mito, np.ones((3, 3, 3)))
    found = []
    for i in range(1, count + 1):
        one = components == i
        ellipse = equivalent_ellipse(one[one.sum(axis=(1, 2)).argmax()], VOXEL[1:])
        if label[one][0] == 1 and ellipse.major_nm > 1.3 * ellipse.minor_nm:
            found.append(np.rad2deg(ellipse.angle))
    assert len(found) >= 2
    assert np.median(found) == pytest.approx(30, abs=12)


@pytest.mark.parametrize("pitch", [(6.0, 6.0), (5.0, 3.0), (1.5, 2.0), (20.0, 16.0)])
@pytest.mark.parametrize("anchor_nm", [(600, 800), (520, 931)])
def test_cross_section_of_a_slanted_neuron(pitch: tuple[float, float], anchor_nm: tuple[int, int]) -> None:
    y, x = (np.arange(n) * p for n, p in zip((int(1200 / pitch[0]), int(1500 / pitch[1])), pitch, strict=True))
    turned = np.array([[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]])
    along, across = np.einsum("ij,jyx->iyx", turned, np.stack(np.meshgrid(x - 800, y - 600, indexing="xy")))
    label = np.zeros((2, len(y), len(x)), dtype=np.uint32)
    label[1][(along / 480) ** 2 + (across / 210) ** 2 <= 1] = 3
    label[1][:, x < 120] = 3  # another piece, which the anchor is not in
    room = Room.of(label, np.zeros_like(label), (30.0, *pitch), 10.0)
    at = (1, *(round(a / p) for a, p in zip(anchor_nm, pitch, strict=True)))
    found = _cross_section(room, at)
    assert found.major_nm == pytest.approx(960, rel=0.02)
    assert found.minor_nm == pytest.approx(420, rel=0.04)
    assert found.angle == pytest.approx(0.4, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 60.0), st.floats(-8.0, 140.0), st.floats(-8.0, 190.0))
def test_a_section_s_place_scores_best(seed: int, need_nm: float, y_nm: float, x_nm: float) -> None:
    """Depth, as far as it is needed, less .3 of the way there, over the pixels within .75 of the need."""
    rng = rng_for(seed, "settle")
    label = rng.integers(1, 3, (1, 22, 45)).astype(np.uint32)
    depth = (rng.uniform(0, 50, label.shape) * (rng.random(label.shape) < 0.7)).astype(np.float32)
    room = Room(label, depth, (30.0, 6.0, 4.0), 10.0, 100.0, Window.whole(1))
    wanted = np.array([y_nm, x_nm])
    found = _settle(room, Pose(1, (0, 0, 0), 0.0, False, True, 1.0), 0, wanted, need_nm)
    scores = {}
    for y, x in np.argwhere((label[0] == 1) & (depth[0] > 0)):
        steps = np.abs([y - round(y_nm / 6), x - round(x_nm / 4)])
        if (steps <= [max(np.ceil(0.75 * need_nm / 6), 1), max(np.ceil(0.75 * need_nm / 4), 1)]).all():
            away = np.hypot(y * 6 - y_nm, x * 4 - x_nm)
            scores[y * 6.0, x * 4.0] = min(depth[0, y, x], need_nm) - 0.3 * away
    if not scores:
        assert found is None
    else:
        assert found is not None
        assert scores[tuple(found)] == pytest.approx(max(scores.values()), abs=1e-4)


@pytest.mark.parametrize("voxel", [VOXEL, (29.0, 6.0, 5.0), ISOTROPIC])
def test_depth_agrees_with_scipy(voxel) -> None:
    inside = (tissue((6, 60, 80))[0] % 3 > 0).astype(np.uint8)
    depth = depth_map(inside, voxel)
    if is_anisotropic(voxel):
        expected = np.stack([ndimage.distance_transform_edt(section, voxel[1:]) for section in inside])
    else:
        expected = ndimage.distance_transform_edt(inside, voxel)
    # Chamfer distances of square pixels are good to 2 %; those of oblong ones, and of cubes, are exact.
    assert depth == pytest.approx(expected, rel=0.021 if voxel == VOXEL else 1e-5)


@pytest.mark.parametrize("voxel", [VOXEL, (29.0, 6.0, 5.0), ISOTROPIC])
def test_free_is_deeper_than_the_margin_in_one_neuron(voxel) -> None:
    label = tissue((6, 60, 80))[0]
    membrane = np.zeros(label.shape, dtype=np.uint8)
    membrane[:, 20:24] = 1
    room = Room.of(label, membrane, voxel, 15.0)
    everywhere = (slice(None),) * 3
    for n in np.unique(label):
        # Where neurons touch without a membrane, one voxel on either side stands for it.
        wall = membrane.astype(bool)
        for axis in (1, 2) if is_anisotropic(voxel) else (0, 1, 2):
            change = np.diff(label.astype(int), axis=axis) != 0
            for side in (0, 1):
                wall |= np.pad(change, [(1 - side, side) if a == axis else (0, 0) for a in range(3)])
        inside = (label == n) & ~wall
        if is_anisotropic(voxel):
            expected = np.stack([ndimage.distance_transform_edt(s, voxel[1:]) for s in inside]) > 15.0 + 1e-3
        else:
            expected = ndimage.distance_transform_edt(inside, voxel) > 15.0
        assert np.array_equal(room.free(int(n), everywhere), expected)


def test_depth_without_any_obstacle_is_finite() -> None:
    depth = depth_map(np.ones((3, 10, 12), dtype=np.uint8), VOXEL)
    assert np.isfinite(depth).all()
    assert depth.min() > 0


def test_placing_blocks_the_neighbours_and_lowers_the_depth() -> None:
    label = np.ones((5, 30, 40), dtype=np.uint32)
    room = Room.of(label, np.zeros_like(label), VOXEL, 10.0)
    room.put(np.ones((1, 4, 4), dtype=bool), (slice(2, 3), slice(10, 14), slice(20, 24)))
    neighbours = ndimage.binary_dilation(room.mito > 0, np.ones((3, 3, 3)))
    assert not room.depth[neighbours].any()
    assert not (room.free(1, (slice(None),) * 3) & neighbours).any()
    near = ndimage.distance_transform_edt(room.mito[2] == 0, VOXEL[1:])
    assert room.depth[2] == pytest.approx(np.where(near > 10, near, 0), rel=0.021)
    assert room.depth[1][~neighbours[1]].min() > 100


def test_groups_of_candidates_fall_in_volume() -> None:
    label, _ = tissue()
    room = Room.of(label, np.zeros_like(label), VOXEL, 10.0)
    groups = CandidateGroups(room, 0.25, 12.0)
    volumes = [int((label == c.label).sum()) for c in groups.largest(len(groups))]
    assert volumes == sorted(volumes, reverse=True)
    assert len(groups.largest(1)) == int(np.ceil(0.25 * (len(np.unique(label)))))
    assert groups.largest(2)[: len(groups.largest(1))] == groups.largest(1)
    for candidate in groups.largest(len(groups)):
        deep = (label == candidate.label) & (room.depth >= 12.0)
        deep[:, 1::2] = deep[:, :, 1::2] = False
        assert np.array_equal(candidate.deep, np.flatnonzero(deep))


def test_parts_in_two_neurons_are_separated() -> None:
    label = np.ones((4, 12, 16), dtype=np.uint32)
    label[2:, :, :] = 2
    label[:, :, 12:] = 0
    mito = np.zeros_like(label)
    mito[1:, 3:9, 3:14] = 1
    mito[1, 3:9, 3:5] = 0
    membrane = np.zeros_like(label)
    membrane[:, 5] = 1
    kept = keep_inside(mito, label, membrane)
    assert_valid(RemodelledMask(label.astype(np.uint64), membrane.astype(np.uint8), kept))
    # The larger part, two sections in neuron 2, is whole; the one section in neuron 1 keeps what does not touch it.
    assert np.array_equal(kept[2:], mito[2:] & (label[2:] > 0) & (membrane[2:] == 0))
    assert not kept[1].any()


def test_all_background() -> None:
    new = remodel(np.zeros((5, 20, 30), dtype=np.uint8), np.ones((5, 20, 30)), VOXEL, rng_for(0))
    assert_valid(new)
    assert not new.label.any()
    assert not new.mito.any()


def test_one_neuron_only(library: SignatureLibrary) -> None:
    label = np.full(SHAPE, 2**40 + 5, dtype=np.uint64)
    new = remodel(label, None, VOXEL, rng_for(0), library=library, mito_fraction=0.02)
    assert_valid(new)
    assert (new.label == label).all()
    assert new.mito.mean() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("voxel", [VOXEL, ISOTROPIC])
@pytest.mark.parametrize("shape", [(1, 120, 160), (6, 20, 28), (2, 1, 5), (1, 1, 1)])
def test_small_and_single_section_volumes(library: SignatureLibrary, voxel, shape) -> None:
    label, mito = tissue(shape, voxel)
    for source, place in ((mito, True), (mito, False), (None, True)):
        new = remodel(label, source, voxel, rng_for(0), library=library, place_mitochondria=place)
        assert_valid(new)
        assert new.label.shape == shape


def test_a_single_section_holds_its_share(library: SignatureLibrary) -> None:
    label, _ = tissue((1, 240, 320))
    new = remodel(label, None, VOXEL, rng_for(0), library=library, mito_fraction=0.05, candidate_fraction=0.3)
    assert new.mito.mean() == pytest.approx(0.05, rel=0.1)


def test_neurons_too_thin_for_any_template_stay_empty(library: SignatureLibrary) -> None:
    label = (1 + np.arange(120)[None, :, None] // 4) * np.ones(SHAPE, dtype=np.uint32)
    new = remodel(label, None, VOXEL, rng_for(0), library=library, mito_fraction=0.05)
    assert not new.mito.any()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"label": np.ones(SHAPE, dtype=np.float64)}, LabelTypeError),
        ({"label": -np.ones(SHAPE, dtype=np.int64)}, LabelTypeError),
        ({"label": np.ones(SHAPE[1:], dtype=np.uint8)}, ShapeMismatch),
        ({"mito": np.zeros((12, 120, 159))}, ShapeMismatch),
        ({"mito": np.full(SHAPE, np.nan)}, ValueRangeError),
        ({"voxel_nm": (29, 6)}, ValueRangeError),
        ({"voxel_nm": (29, 6, 0)}, ValueRangeError),
        ({"candidate_fraction": 0.0}, ValueRangeError),
        ({"candidate_fraction": 1.5}, ValueRangeError),
        ({"mito_fraction": -0.1}, ValueRangeError),
        ({"mito_fraction": 1.1}, ValueRangeError),
        ({"mito_fraction": 0.0, "mito_count": 3}, ValueRangeError),
        ({"mito_count": 0}, ValueRangeError),
        ({"mito_count": 2.5}, ValueRangeError),
        ({"mito_count": 10**9}, ValueRangeError),
        ({"mito": None, "mito_count": 3}, ValueRangeError),
        ({"margin_nm": -1.0}, ValueRangeError),
        ({"membrane_thickness_nm": 0.0}, ValueRangeError),
        ({"membrane_thickness_nm": 201.0}, ValueRangeError),
        ({"elastic_sigma_nm": -1.0}, ValueRangeError),
        ({"min_jacobian": 0.0}, ValueRangeError),
        ({"min_jacobian": "a"}, ValueRangeError),
        ({"rng": 0}, ValueRangeError),
        ({"library": "shapes.npz"}, ValueRangeError),
        ({"mito_count": True}, ValueRangeError),
        ({"mito_fraction": "a"}, ValueRangeError),
        ({"margin_nm": None}, ValueRangeError),
        ({"place_mitochondria": False, "mito_count": 3}, ValueRangeError),
        ({"place_mitochondria": False, "mito_fraction": 0.1}, ValueRangeError),
        ({"library": SignatureLibrary((), 0.0, 0.0)}, ValueRangeError),
    ],
)
def test_bad_input_is_refused_in_one_line(change, error) -> None:
    label, mito = tissue()
    arguments = {"label": label, "mito": mito, "voxel_nm": VOXEL, "rng": rng_for(0), **change}
    with pytest.raises(error) as caught:
        remodel(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"elastic_spacing_nm": 5.0}, "at least the edge of a voxel, 6 nm"),
        ({"elastic_spacing_nm": 1e6}, "spacing"),
        ({"elastic_sigma_nm": 1e300}, "amplitude"),
        ({"margin_nm": 1e9}, "margin"),
        ({"voxel_nm": ("a", 6, 6)}, "voxel size"),
        ({"mito": np.zeros(SHAPE, dtype="U1")}, "mitochondria mask"),
        ({"label": np.zeros(SHAPE, dtype="m8[s]")}, "non-negative integers"),
    ],
)
def test_absurd_settings_are_refused_at_once(change, error: str) -> None:
    label, mito = tissue()
    with pytest.raises((LabelTypeError, ValueRangeError), match=error):
        remodel(**{"label": label, "mito": mito, "voxel_nm": VOXEL, "rng": rng_for(0), **change})


def test_memory_layout_and_byte_order_do_not_matter() -> None:
    label, mito = tissue()
    label = label.astype(np.int64) * 70_000
    expected = remodel(label, mito, VOXEL, rng_for(0))
    for other in (label.astype(">i8"), label.astype(">u4"), np.asfortranarray(label)):
        made = remodel(other, np.asfortranarray(mito), VOXEL, rng_for(0))
        for name in ("label", "membrane", "mito"):
            assert np.array_equal(getattr(made, name), getattr(expected, name)), (other.dtype, name)


def test_hundreds_that_find_no_room_are_soon_given_up(library: SignatureLibrary) -> None:
    """Neurons one section high, wide enough for any template: each try fails."""
    label = np.ones((12, 300, 300), dtype=np.uint32) * np.arange(1, 13, dtype=np.uint32)[:, None, None]
    planned = len(plan_of(library, 0.3 * label.size, VOXEL))
    assert planned > 100
    tried = []
    draw = placement._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_draw", lambda *given: tried.append(1) or draw(*given))
        # What comes last draws them so small that one section is enough.
        patch.setattr(placement, "_crowd", lambda *_: None)
        new = remodel(label, None, VOXEL, rng_for(0), library=library, mito_fraction=0.3, elastic=False)
    assert not new.mito.any()
    assert 0 < len(tried) < 24 * planned / 4


@pytest.mark.parametrize("margin_nm", [60.0, 110.0])
def test_a_wide_margin_is_kept(margin_nm: float) -> None:
    """Beyond 12 pixels by another way than below; against scipy."""
    label = np.ones((3, 70, 90), dtype=np.uint32)
    membrane = np.zeros(label.shape, dtype=np.uint8)
    membrane[:, 20, 30] = membrane[1, 50, 70] = 1
    room = Room.of(label, membrane, VOXEL, margin_nm)
    for section, wall in zip(room.depth, membrane, strict=True):
        away = ndimage.distance_transform_edt(wall == 0, VOXEL[1:])
        assert np.array_equal(section > 0, away > margin_nm)


def test_report_counts_by_hand() -> None:
    """A 2-section mitochondrion on a membrane, one label lost, one torn."""
    source = np.zeros((4, 10, 12), dtype=np.uint8)
    source[:, :, :4], source[:, :, 4:8], source[:, :, 8:] = 1, 2, 3
    label = source.astype(np.uint64)
    label[source == 3] = 0
    label[:, 5, :4] = 0
    mito, membrane = np.zeros_like(source), np.zeros_like(source)
    mito[1, 2:6, 4:6] = mito[2, 2:6, 4:7] = 1
    membrane[:, :, 4] = 1
    mito[3, 0, 11] = 1
    report = quality_report(source, None, RemodelledMask(label, membrane, mito), VOXEL)
    expected = {
        "labels_lost": 1,
        "labels_torn": 1,
        "mito_count": 2,
        "mito_mean_z_nm": 1.5 * 29,
        "mito_outside_neuron_voxels": 1,
        "mito_on_membrane_voxels": 8,
        "mito_in_several_neurons": 0,
        "mito_fraction": 21 / 480,
        "membrane_fraction": 1 / 12,
        "mito_section_iou": np.mean([0, 8 / 12, 0]),
        "label_overlap": 1 - (160 + 16) / 480,
        "source_mito_count": 0,
        "mito_overlap": 0,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("name", "box"), [("vnc_sstem", (20, 400, 500)), ("fib_medulla", (80, 160, 160))])
def test_real_volumes(real_data: Path, name: str, box: tuple[int, int, int]) -> None:
    crop = tuple(slice(0, n) for n in box)
    with h5py.File(real_data / f"{name}_train.h5") as file:
        label, mito, voxel = file["label"][crop], file["mito"][crop], file.attrs["resolution_nm"]
    label = cc3d.connected_components(label, connectivity=26)
    new = remodel(label, mito, voxel, rng_for(0))
    assert_valid(new)
    report = quality_report(label, mito, new, voxel)
    assert {name: report[name] for name in IN_ORDER} == dict.fromkeys(IN_ORDER, 0.0)
    assert report["mito_fraction"] == pytest.approx(report["source_mito_fraction"], rel=0.1)
    assert report["mito_section_iou"] == pytest.approx(report["source_mito_section_iou"], abs=0.2)


def test_the_room_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, connectomics_neurodiff.remodel; print(sorted({'torch', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
