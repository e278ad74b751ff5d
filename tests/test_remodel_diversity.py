"""More diversity: neurons that swell, sections that slip, rearranged tissue, grown neurites; none breaks a label."""

from __future__ import annotations

from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_remodel import ISOTROPIC, VOXEL, assert_valid, tissue
from test_remodel_elastic import cells, pieces

from connectomics_neurodiff.conditions import membrane_from_labels
from connectomics_neurodiff.errors import ShapeMismatch, ValueRangeError
from connectomics_neurodiff.remodel import (
    MaskLimits,
    grow_neurites,
    mask_gate,
    quality_report,
    rearranging,
    remodel,
    section_shifts,
    shift_sections,
    swell,
)
from connectomics_neurodiff.remodel.rearranging import join_crops
from connectomics_neurodiff.remodel.sections import misalign
from connectomics_neurodiff.remodel.swelling import _Pressure, _widest_near
from connectomics_neurodiff.seeding import rng_for

CUBE = np.ones((3, 3, 3))
SMALL = [((5, 60, 90), VOXEL), ((30, 36, 44), ISOTROPIC)]
EVERYTHING = {
    "rearrange": True,
    "neuron_spread_nm": 8.0,
    "grown_fraction": 0.5,
    "section_jump_nm": 20.0,
    "section_drift_nm": 4.0,
    "membrane_spread": 0.4,
}


def with_gaps(label: np.ndarray, voxel: tuple[float, float, float], thickness_nm: float = 30.0) -> np.ndarray:
    """Labels apart by background, as experts draw them."""
    return np.where(membrane_from_labels(label, voxel, thickness_nm) > 0, 0, label)


# Neurons that shrink and swell


@pytest.mark.parametrize(("axis", "voxel"), [(1, VOXEL), (2, (29.0, 6.0, 5.0)), (0, ISOTROPIC), (2, ISOTROPIC)])
@pytest.mark.parametrize("gap", [0, 1, 3, 4])
def test_a_plane_moves_by_half_the_difference_of_pressure(monkeypatch, axis: int, voxel, gap: int) -> None:
    """Two neurons that meet at a plane, one of higher pressure: it moves three voxels, and the gap keeps its width."""
    shape = [40 if a == axis else n for a, n in enumerate((6, 20, 24))]
    index = np.arange(40)
    profile = np.where(index < 20 - gap // 2, 1, np.where(index < 20 - gap // 2 + gap, 0, 2))
    lying = [-1 if a == axis else 1 for a in range(3)]
    pressure = 3 * voxel[axis] * np.array([0.0, 1.3, -0.7])
    monkeypatch.setattr(_Pressure, "_of", lambda self, n, fields: pressure[n] / (np.sqrt(2) * self.spread_nm))
    moved = swell(np.broadcast_to(profile.reshape(lying), shape), voxel, rng_for(0), spread_nm=100.0)
    assert (moved == profile[np.maximum(index - 3, 0)].reshape(lying)).all()


@pytest.mark.parametrize(("shape", "voxel"), SMALL)
@pytest.mark.parametrize("gaps", [False, True])
@given(seed=st.integers(0, 1000), spread=st.sampled_from([3.0, 10.0, 40.0]))
@settings(max_examples=4, deadline=None)
def test_swelling_loses_and_tears_nothing(shape, voxel, gaps, seed, spread) -> None:
    label = cells(shape, 40, seed)
    if gaps:
        label = cc3d.connected_components(with_gaps(label, voxel), connectivity=26)
    moved = swell(label, voxel, rng_for(seed), spread_nm=spread)
    assert pieces(moved) == pieces(label)
    # A boundary moves by three standard deviations at most; fragments that are given away stay within them, too.
    pitch = voxel[1:] if voxel == VOXEL else voxel
    for n in np.unique(label[label > 0])[::8]:
        away = ndimage.distance_transform_edt(label != n, voxel)
        assert away[moved == n].max() <= 3 * spread + 2 * max(pitch)


def test_boundaries_move_as_far_as_asked() -> None:
    """Wide stripes: nothing is bounded by width, so the displacement has the standard deviation asked for."""
    label = np.broadcast_to(1 + np.arange(1200) // 100, (4, 300, 1200)).astype(np.uint8)
    moved = swell(label, VOXEL, rng_for(1), spread_nm=24.0)
    ends = np.stack([(moved <= n).sum(axis=2) - 100 * n for n in range(1, 12)])
    assert np.std(ends * VOXEL[2]) == pytest.approx(24.0, rel=0.25)
    # Smooth: neighbours along the boundary differ by a pixel or two.
    assert np.abs(np.diff(ends[:, :, 20:-20], axis=2)).max() <= 3


def test_no_spread_no_change_and_same_state_same_bytes() -> None:
    label = with_gaps(tissue()[0], VOXEL)
    assert np.array_equal(swell(label, VOXEL, rng_for(0), spread_nm=0.0), label)
    first, again = (swell(label, VOXEL, rng_for(3), spread_nm=10.0) for _ in range(2))
    assert first.tobytes() == again.tobytes() != label.astype(np.uint64).tobytes()


def test_slabs_do_not_show(monkeypatch) -> None:
    label = cells((70, 24, 30), 30, 0)
    whole = swell(label, ISOTROPIC, rng_for(0), spread_nm=8.0)
    monkeypatch.setattr("connectomics_neurodiff.remodel.swelling._SLAB", 9)
    assert np.array_equal(swell(label, ISOTROPIC, rng_for(0), spread_nm=8.0), whole)


# Sections


def test_shifts_have_the_size_asked_for() -> None:
    voxel = (50.0, 5.0, 4.0)
    drift = np.concatenate(
        [np.diff(section_shifts(50, voxel, rng_for(i), jump_nm=0, drift_nm=40.0), axis=0) for i in range(40)]
    )
    assert drift.std(axis=0) * voxel[1:] == pytest.approx([40, 40], rel=0.1)
    jumps = np.stack([section_shifts(60, voxel, rng_for(i), jump_nm=50.0, drift_nm=0) for i in range(200)])
    changes = (np.diff(jumps, axis=1) != 0).any(axis=2)
    # One that jumps alone changes twice, against the section below and the one above; half of a tenth do.
    assert changes.mean() == pytest.approx(0.145, abs=0.02)
    assert np.abs(jumps.mean(axis=1)).max() <= 1
    assert not section_shifts(9, voxel, rng_for(0), jump_nm=0, drift_nm=0).any()


def test_a_section_moves_as_a_whole_and_fades_out_at_the_frame() -> None:
    volume = np.arange(2 * 60 * 80).reshape(2, 60, 80)
    moved = shift_sections(volume, np.array([[3, -5], [0, 0]]))
    assert np.array_equal(moved[0, 16:44, 24:56], volume[0, 13:41, 29:61])
    assert np.array_equal(moved[1], volume[1])
    # The frame's own rows and columns stay.
    assert moved[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == volume[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist()
    # Order is kept, and at most every fourth row is left out.
    rows = moved[0, :, 0] // 80
    assert np.diff(rows).min() >= 0
    assert np.diff(rows).max() <= 2
    with pytest.raises(ShapeMismatch):
        shift_sections(volume, np.zeros((3, 2), int))


@pytest.mark.parametrize("gap", [0, 3])
def test_misaligning_does_not_widen_membranes(gap: int) -> None:
    """Neither of neurons that touch nor of such that a gap parts; a shift of all sections by 0 changes nothing."""
    label = np.ones((4, 90, 120), dtype=np.uint32)
    label[:, :, 60:] = 2
    label[:, 45:] += 2
    label[:, :, 60 : 60 + gap] = 0
    label[:, 45 : 45 + gap] = 0
    membrane = membrane_from_labels(label, VOXEL)
    mito = np.zeros_like(membrane)
    assert np.array_equal(misalign(label, membrane, mito, np.zeros((4, 2), dtype=int))[1], membrane)
    walls = misalign(label, membrane, mito, np.array([[3, 0], [0, -2], [4, 4], [-7, 1]]))[1]
    assert walls.sum() == pytest.approx(membrane.sum(), rel=0.03)


@given(seed=st.integers(0, 1000), jump=st.sampled_from([10.0, 60.0, 1e5]))
@settings(max_examples=8, deadline=None)
def test_misaligned_labels_stay_in_their_sections_and_whole(seed: int, jump: float) -> None:
    label = cells((8, 50, 70), 60, seed)
    membrane = membrane_from_labels(label, VOXEL, thickness_nm=8.0)
    mito = ((label % 4 == 0) & (membrane == 0)).astype(np.uint8)
    shifts = section_shifts(8, VOXEL, rng_for(seed), jump_nm=jump, drift_nm=8.0)
    moved, walls, inside, _ = misalign(label, membrane, mito, shifts)
    # Rows that are left out take no membrane with them, thin as it is.
    for axis in (1, 2):
        here, ahead = (np.take(moved, range(first, moved.shape[axis] - 1 + first), axis) for first in (0, 1))
        there = (np.take(walls, range(first, moved.shape[axis] - 1 + first), axis) for first in (0, 1))
        assert all(wall[(here != ahead) & (here > 0) & (ahead > 0)].all() for wall in there)
    assert set(pieces(moved).values()) == {1}
    assert set(np.unique(label)) <= set(np.unique(moved))
    for before, after in zip(label, moved, strict=True):
        old = (after > 0) & (after <= label.max())
        assert set(np.unique(after[old])) <= set(np.unique(before))
    assert not (inside & walls).any()
    found, count = ndimage.label(inside, CUBE)
    assert all(len(np.unique(moved[found == i])) == 1 for i in range(1, count + 1))


def test_a_torn_neurite_gets_a_second_label() -> None:
    """A neurite 3 pixels thick, and a jump by 6: both parts stay, under two labels."""
    label = np.ones((6, 80, 90), dtype=np.uint32)
    label[:, 40:43, 44:47] = 2
    nothing = np.zeros(label.shape, np.uint8)
    moved, _, _, _ = misalign(label, nothing, nothing, np.array([[0, 0]] * 3 + [[0, 6]] * 3))
    assert (moved[:3, 40:43, 44:47] == moved[0, 41, 45]).all()
    assert (moved[3:, 40:43, 50:53] == moved[3, 41, 51]).all()
    assert {moved[0, 41, 45], moved[3, 41, 51]} == {2, 3}
    assert (moved > 1).sum() == (label == 2).sum()
    # Where the upper part is all membrane, it is background.
    membrane = np.zeros(label.shape, np.uint8)
    membrane[3:, 39:44, 43:48] = 1
    moved, walls, _, _ = misalign(label, membrane, nothing, np.array([[0, 0]] * 3 + [[0, 6]] * 3))
    assert set(np.unique(moved)) == {0, 1, 2}
    assert walls[moved == 0].all()


# Rearranged tissue


@pytest.mark.parametrize(("shape", "voxel"), [((5, 90, 120), VOXEL), ((36, 60, 60), ISOTROPIC)])
@pytest.mark.parametrize("seed", range(4))
def test_joined_crops(shape, voxel, seed) -> None:
    label = cells(shape, 60, seed)
    mito = (label % 5 == 0).astype(np.uint8)
    joined = join_crops(label, mito, voxel, rng_for(seed))
    made, count = joined.label, int(label.max())
    # Every label, old or new, is one piece; what is not there is told.
    assert set(pieces(made).values()) == {1}
    assert set(np.unique(label)) - set(np.unique(made)) == set(joined.left_out.tolist())
    old = made <= count
    # Slivers aside, the first crop is as it was, and there is much of either.
    assert (made == label)[old].mean() > 0.97
    assert 0.1 < old.mean() < 0.9


def test_the_second_crop_is_the_source_turned() -> None:
    """Of all turns and offsets one explains the new labels: each of them lies in one label of the source."""
    label = cells((20, 60, 60), 60, 0)
    made = join_crops(label, np.zeros(label.shape, np.uint8), ISOTROPIC, rng_for(1)).label
    at = np.argwhere(made > label.max())[::97]
    new = made[tuple(at.T)]

    def explained(turned: np.ndarray, down: int, right: int) -> float:
        z, y, x = (at + np.array([0, down, right])).T
        inside = (y >= 0) & (y < 60) & (x >= 0) & (x < 60)
        if not inside.all():
            return 0.0
        pairs, counts = np.unique(np.stack([new, turned[z, y, x]]), axis=1, return_counts=True)
        return sum(counts[pairs[0] == n].max() for n in np.unique(new)) / len(at)

    turns = [np.flip(v, f) for v in (label, label.transpose(0, 2, 1)) for f in ((), (1,), (2,), (1, 2))]
    offsets = [(d, 0) for d in range(-40, 41)] + [(0, d) for d in range(-40, 41)]
    scores = sorted((explained(turned, *offset) for turned in turns for offset in offsets), reverse=True)
    assert scores[0] > 0.97
    assert scores[2] < 0.95


def seam_cost(keeps: np.ndarray, crops: tuple[np.ndarray, np.ndarray], pitch: np.ndarray) -> float:
    """Sum over the faces between kept and replaced voxels."""
    total = 0.0
    for axis in range(3):
        moved = np.moveaxis(keeps, axis, 0)
        cut = [
            np.moveaxis((c > 0), axis, 0)[1:] & (np.diff(np.moveaxis(c.astype(int), axis, 0), axis=0) == 0)
            for c in crops
        ]
        price = np.choose(cut[0].astype(int) + cut[1], [0.2, 0.4, 4.0])
        total += (price * (moved[1:] != moved[:-1])).sum() * np.prod(pitch) / pitch[axis]
    return total


def test_the_seam_is_the_minimum_cut(monkeypatch) -> None:
    """Against networkx, voxel by voxel."""
    import networkx as nx

    pitch = np.array([29.0, 6.0, 7.0])
    crops = (cells((2, 6, 9), 14, 0), np.where(cells((2, 6, 9), 14, 1) > 2, cells((2, 6, 9), 14, 1), 0))
    graph = nx.Graph()
    for index in np.ndindex(crops[0].shape):
        for axis in range(3):
            ahead = tuple(n + (a == axis) for a, n in enumerate(index))
            if ahead[axis] < crops[0].shape[axis]:
                cut = sum(int(c[index] == c[ahead] > 0) for c in crops)
                graph.add_edge(index, ahead, capacity=(0.2, 0.4, 4.0)[cut] * np.prod(pitch) / pitch[axis])
        if index[2] in (0, 8):
            graph.add_edge("first" if index[2] == 0 else "second", index)
    monkeypatch.setattr(rearranging, "_BLOCK_NM", 1e-3)
    keeps = rearranging._seam(*crops, pitch)
    assert keeps[..., 0].all()
    assert not keeps[..., -1].any()
    assert seam_cost(keeps, crops, pitch) == pytest.approx(nx.minimum_cut_value(graph, "first", "second"), rel=1e-6)


def test_blocks_leave_the_seam_between_neurons() -> None:
    """It costs a fraction of the cheapest straight one, which cuts through neurons."""
    pitch = np.array([29.0, 6.0, 6.0])
    crops = (cells((6, 90, 100), 60, 0), cells((6, 90, 100), 60, 1))
    straight = [seam_cost(np.broadcast_to(np.arange(100) < n, (6, 90, 100)), crops, pitch) for n in range(1, 100)]
    assert seam_cost(rearranging._seam(*crops, pitch), crops, pitch) < 0.6 * min(straight)


def test_rearranging_refuses_what_is_too_small() -> None:
    with pytest.raises(ShapeMismatch, match="8 pixels"):
        join_crops(np.ones((3, 7, 40), np.uint32), np.zeros((3, 7, 40), np.uint8), VOXEL, rng_for(0))


# Grown neurites


@pytest.mark.parametrize(("shape", "voxel"), [((8, 140, 180), VOXEL), ((50, 60, 70), ISOTROPIC)])
@pytest.mark.parametrize("seed", range(3))
def test_neurites_fill_empty_space_and_touch_nobody(shape, voxel, seed) -> None:
    label = tissue(shape, voxel)[0].astype(np.uint64) * 7
    label[label == 7] = 0
    grown = grow_neurites(label, voxel, rng_for(seed), fraction=0.2, radius_nm=35.0, clearance_nm=20.0)
    assert np.array_equal(grown[label > 0], label[label > 0])
    new = np.setdiff1d(grown, label)
    assert len(new) >= 2
    assert all(pieces(np.where(grown == n, 1, 0)) == {1: 1} for n in new)

    def away_from(marked: np.ndarray) -> np.ndarray:
        if voxel == VOXEL:
            return np.stack([ndimage.distance_transform_edt(~s, voxel[1:]) for s in marked])
        return ndimage.distance_transform_edt(~marked, voxel)

    for n in new:
        others = (grown > 0) & (grown != n)
        assert away_from(others)[grown == n].min() > 20.0 - 1e-3
    free = away_from(label > 0) > 20.0
    share = np.isin(grown, new).sum() / free.sum()
    assert 0.2 <= share < 0.5
    # Thin: no voxel of a neurite is deeper than its largest radius and a voxel, a section counted as a whole.
    depth = ndimage.distance_transform_edt(np.isin(grown, new), voxel)
    assert depth.max() <= 1.4 * 35.0 + max(voxel)
    # Between a neurite and its neighbours there is membrane: no neurite voxel off the membrane touches another label.
    membrane = membrane_from_labels(grown, voxel)
    assert not membrane[free & (grown == 0)].all()


def test_nothing_grows_without_empty_space() -> None:
    label = tissue()[0]
    assert np.array_equal(grow_neurites(label, VOXEL, rng_for(0), fraction=0.5), label)
    label[:, 10:13] = 0
    assert np.array_equal(grow_neurites(label, VOXEL, rng_for(0), fraction=0.5), label)


# Together


@pytest.mark.parametrize(("shape", "voxel"), [((8, 120, 160), VOXEL), ((40, 60, 70), ISOTROPIC)])
def test_all_together_pass_the_gate_and_are_deterministic(shape, voxel) -> None:
    label, mito = tissue(shape, voxel)
    label[:, -15:, :60] = 0
    first, again = (remodel(label, mito, voxel, rng_for(2), candidate_fraction=0.3, **EVERYTHING) for _ in range(2))
    assert_valid(first)
    for name in ("label", "membrane", "mito"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    report = quality_report(label, mito, first, voxel)
    assert report["labels_lost"] == report["labels_torn"] == report["mito_in_several_neurons"] == 0
    assert report["labels_left_out"] == len(np.setdiff1d(label[label > 0], first.label)) > 0
    assert report["labels_new"] == len(np.setdiff1d(first.label, label)) > 0


@pytest.mark.parametrize(("name", "box"), [("vnc_sstem", (8, 260, 300)), ("fib_medulla", (40, 90, 100))])
def test_real_volumes(real_data: Path, name: str, box: tuple[int, int, int]) -> None:
    crop = tuple(slice(0, n) for n in box)
    with h5py.File(real_data / f"{name}_train.h5") as file:
        label, mito, voxel = file["label"][crop], file["mito"][crop], file.attrs["resolution_nm"]
    label = cc3d.connected_components(label, connectivity=26)
    new = remodel(label, mito, voxel, rng_for(0), **EVERYTHING)
    assert_valid(new)
    report = quality_report(label, mito, new, voxel)
    assert report["labels_lost"] == report["labels_torn"] == report["mito_in_several_neurons"] == 0


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_key_changes_the_mask_and_no_other_random_number(name: str) -> None:
    label, mito = tissue()
    label[:, -20:, :60] = 0
    off = remodel(label, mito, VOXEL, rng_for(0), place_mitochondria=False)
    on = {name: EVERYTHING[name]}
    new = remodel(label, mito, VOXEL, rng_for(0), place_mitochondria=False, **on)
    assert_valid(new)
    assert (new.membrane != off.membrane).any()
    # The deformation is the same one.
    assert new.min_jacobian == off.min_jacobian or name == "rearrange"
    if name == "grown_fraction":
        assert np.array_equal(new.label[off.label > 0], off.label[off.label > 0])


def test_left_out_labels_are_not_lost_but_others_are() -> None:
    label, mito = tissue()
    new = remodel(label, mito, VOXEL, rng_for(0), rearrange=True, candidate_fraction=0.3)
    assert new.left_out
    assert mask_gate(quality_report(label, mito, new, VOXEL), MaskLimits(profile_change=1, membrane_fraction=1)) == ""
    kept = np.intersect1d(new.label, label[label > 0])[0]
    new.label[new.label == kept] = 0
    assert quality_report(label, mito, new, VOXEL)["labels_lost"] == 1


def test_a_new_label_in_two_pieces_is_torn() -> None:
    label, mito = tissue()
    new = remodel(label, mito, VOXEL, rng_for(0))
    new.label[:, :3, :3] = new.label[:, -3:, -3:] = 10**6
    assert quality_report(label, mito, new, VOXEL)["labels_torn"] >= 1


def test_all_background_stays_empty() -> None:
    new = remodel(np.zeros((4, 40, 50), np.uint8), None, VOXEL, rng_for(0), **{**EVERYTHING, "grown_fraction": 0.0})
    assert not new.label.any()
    assert not new.membrane.any()


def test_ids_up_to_the_largest_number_are_kept_apart() -> None:
    label = tissue()[0].astype(np.uint64) + np.uint64(2**64 - 100)
    label[:, -20:, :60] = 0
    new = remodel(label, None, VOXEL, rng_for(0), grown_fraction=0.5, grown_radius_nm=30.0)
    added = np.setdiff1d(new.label, label)
    assert added.size
    assert 0 < added.min() <= added.max() < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"neuron_spread_nm": -1.0},
        {"neuron_spread_nm": np.nan},
        {"grown_fraction": 0.95},
        {"grown_fraction": 0.5, "grown_radius_nm": 0.0},
        {"grown_fraction": 0.5, "grown_radius_nm": 0.45 * VOXEL[2]},
        {"neuron_spread_nm": 1e6},
        {"section_jump_nm": -1.0},
        {"section_jump_nm": 1e300},
        {"section_drift_nm": np.inf},
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, float]) -> None:
    with pytest.raises(ValueRangeError) as caught:
        remodel(*tissue((3, 40, 50)), VOXEL, rng_for(0), **change)
    assert "\n" not in str(caught.value)


def test_width_of_a_neuron_is_found_however_far_to_look() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (7, 9)).repeat(3, axis=1)
    depth = rng.random(label.shape)
    pieces_by_face = cc3d.connected_components(label + 1, connectivity=4)
    expected = np.zeros(label.shape, np.float32)
    for piece in np.unique(pieces_by_face):
        expected[pieces_by_face == piece] = depth[pieces_by_face == piece].max()
    # So far that one step per pixel would never end.
    assert np.array_equal(_widest_near(depth, label, np.array([6.0, 6.0]), 1e12), expected)
