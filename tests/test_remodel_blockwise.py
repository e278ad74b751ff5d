"""Volumes remodelled block by block from disk to disk, against the same volume as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_remodel import IN_ORDER, ISOTROPIC, VOXEL, assert_valid, tissue
from tiny import neurodiff

from connectomics_neurodiff.conditions import membrane_from_labels, membrane_halo
from connectomics_neurodiff.errors import LabelTypeError, OutputExists, ShapeMismatch, UserError, ValueRangeError
from connectomics_neurodiff.remodel import (
    BlockwiseRemodelling,
    BlockwiseSettings,
    RemodelledMask,
    SignatureLibrary,
    blockwise,
    fits_in_memory,
    quality_report,
    remodel,
    remodel_blockwise,
    sections_that_fit,
)
from connectomics_neurodiff.remodel.elastic import deform_compact, pieces_of
from connectomics_neurodiff.remodel.pieces import PieceFinder, touching
from connectomics_neurodiff.remodel.room import CandidateGroups, Room, Window
from connectomics_neurodiff.seeding import rng_for

CUBE = np.ones((3, 3, 3))
CASES = [((20, 90, 110), VOXEL), ((52, 56, 64), ISOTROPIC)]


def streamed(path: Path, label, mito, voxel, seed: int, sections: int, library=None, **options) -> RemodelledMask:
    settings = BlockwiseSettings(**options)
    minimum = remodel_blockwise(
        path, label, mito, voxel, rng_for(seed), sections=sections, library=library, settings=settings
    )
    with h5py.File(path) as file:
        assert list(file.attrs["resolution_nm"]) == list(voxel)
        return RemodelledMask(file["label"][:].astype(np.uint64), file["membrane"][:], file["mito"][:], minimum)


def tall_tissue(shape, voxel, pitch: int, radii_nm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Tissue through which four columns of equal ellipsoids run, one every `pitch` sections, each column shifted."""
    label, _ = tissue(shape, voxel)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    label = np.where(y < shape[1] // 2, 1, 2) + 2 * (x >= shape[2] // 2) + 0 * z
    mito = np.zeros(shape, np.uint8)
    for column in range(4):
        at = (1 + 2 * (column % 2)) * shape[1] / 4, (1 + 2 * (column // 2)) * shape[2] / 4
        for middle in range(pitch // 2 + column * pitch // 4, shape[0] - pitch // 2, pitch):
            away = [(c - m) * v / r for c, m, v, r in zip((z, y, x), (middle, *at), voxel, radii_nm, strict=True)]
            mito |= (sum(a * a for a in away) <= 1).astype(np.uint8)
    return label.astype(np.uint32), mito


@pytest.mark.parametrize(("shape", "voxel"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_and_membranes_are_those_of_the_whole(shape, voxel, seed: int, tmp_path: Path) -> None:
    label, mito = tissue(shape, voxel)
    whole = remodel(label, mito, voxel, rng_for(seed), place_mitochondria=False, elastic_sigma_nm=12.0)
    field_rng = np.random.default_rng(int(rng_for(seed).integers(2**63, size=2)[0]))
    unmended = deform_compact(label, voxel, field_rng, sigma_nm=12.0, spacing_nm=300.0, min_jacobian=0.2)[1].warp(label)
    assert np.array_equal(unmended, whole.label), "the case must not need mending"
    assert (whole.label != label).mean() > 0.01
    for sections in (8, shape[0]):
        made = streamed(
            tmp_path / f"{sections}.h5",
            label,
            mito,
            voxel,
            seed,
            sections,
            place_mitochondria=False,
            elastic_sigma_nm=12.0,
        )
        assert np.array_equal(made.label, whole.label)
        assert np.array_equal(made.membrane, whole.membrane)
        assert made.min_jacobian == whole.min_jacobian
        assert_valid(made)
        # Those that move along differ at most where neurons meet across a face.
        assert (made.mito != whole.mito).sum() <= 0.02 * whole.mito.sum()


@pytest.mark.parametrize(("shape", "voxel"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_block_gives_what_the_whole_volume_gives(shape, voxel, seed: int, tmp_path: Path) -> None:
    label, mito = tissue(shape, voxel)
    options = {"candidate_fraction": 0.3, "elastic_sigma_nm": 12.0}
    whole = remodel(label, mito, voxel, rng_for(seed), **options)
    made = streamed(tmp_path / "m.h5", label, mito, voxel, seed, shape[0], **options)
    for name in ("label", "membrane", "mito"):
        assert np.array_equal(getattr(made, name), getattr(whole, name)), name
    assert made.mito.any()


TALL = [((64, 80, 96), VOXEL, 16, (150.0, 60.0, 80.0), 16), ((120, 44, 48), ISOTROPIC, 30, (90.0, 50.0, 60.0), 30)]


@pytest.mark.parametrize(("shape", "voxel", "pitch", "radii", "sections"), TALL)
@pytest.mark.parametrize("seed", [0])
def test_mitochondria_cross_faces_and_are_as_many_as_in_the_source(
    shape, voxel, pitch: int, radii, sections: int, seed: int, tmp_path: Path
) -> None:
    label, mito = tall_tissue(shape, voxel, pitch, radii)
    made = streamed(tmp_path / "m.h5", label, mito, voxel, seed, sections, candidate_fraction=1.0)
    assert_valid(made)
    report = quality_report(label, mito, made, voxel)
    assert {name: report[name] for name in IN_ORDER} == dict.fromkeys(IN_ORDER, 0.0)
    assert made.mito.mean() == pytest.approx(mito.mean(), rel=0.1)
    found, count = ndimage.label(made.mito, CUBE)
    assert count == pytest.approx(ndimage.label(mito, CUBE)[1], rel=0.2)
    crossing = [np.intersect1d(found[face - 1], found[face]).size - 1 for face in range(sections, shape[0], sections)]
    assert sum(crossing) >= len(crossing)
    shares = [made.mito[z : z + sections].mean() / mito.mean() for z in range(0, shape[0], sections)]
    assert min(shares) > 0.4


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    label, mito = tissue((20, 90, 110), VOXEL)
    for name in "ab":
        streamed(tmp_path / f"{name}.h5", label, mito, VOXEL, 3, 8, candidate_fraction=0.3)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    other = streamed(tmp_path / "c.h5", label, mito, VOXEL, 4, 8, candidate_fraction=0.3)
    with h5py.File(tmp_path / "a.h5") as file:
        assert not np.array_equal(file["mito"][:], other.mito)


def by_place(library: SignatureLibrary) -> list[tuple]:
    """Everything about the shapes of a library, in an order of their own."""
    return sorted(
        (s.volume_nm3, len(s), s.cut_below, s.cut_above, s.cut_lateral, s.contours.tobytes(), s.host_ratios.tobytes())
        for s in library.signatures
    )


def test_shapes_are_those_of_the_whole_volume() -> None:
    label, mito = tall_tissue((64, 80, 96), VOXEL, 16, (150.0, 60.0, 80.0))
    mito[30:44, 10:14, 20:60] = mito[28:31, 10:30, 20:24] = mito[20:30, 26:30, 20:24] = 1  # a hook over three blocks
    whole = SignatureLibrary.from_masks(label, mito, VOXEL)
    surveyed = BlockwiseRemodelling.of(label, mito, VOXEL, sections=12)
    assert by_place(surveyed.shapes) == by_place(whole)
    assert surveyed.shapes.mito_nm3 == pytest.approx(whole.mito_nm3)
    assert surveyed.share == pytest.approx(whole.mito_fraction)


def test_a_mitochondrion_higher_than_what_is_seen_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    label, mito = np.ones((40, 50, 60), np.uint8), np.zeros((40, 50, 60), np.uint8)
    mito[3:38, 20:40, 20:45] = 1
    surveyed = BlockwiseRemodelling.of(label, mito, VOXEL, sections=8)
    (shape,) = surveyed.shapes.signatures
    assert (len(shape), shape.cut_below, shape.cut_above) == (24 - 3, False, True)
    assert surveyed.shapes.mito_nm3 == pytest.approx(mito.sum() * np.prod(VOXEL))
    assert "Blocks are 232 nm deep and mitochondria up to 609 nm high" in caplog.text


def test_shallow_blocks_are_told_once_for_all_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label, mito = tissue((40, 60, 70), VOXEL)
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    settings = BlockwiseSettings(elastic=False, mito_fraction=0.01)
    for sections, warnings in ((40, 0), (8, 0), (4, 1)):
        caplog.clear()
        surveyed = BlockwiseRemodelling.of(label, None, VOXEL, sections=sections, library=library, settings=settings)
        for copy in range(2):
            surveyed.make(tmp_path / f"{sections}_{copy}.h5", rng_for(copy))
        assert caplog.text.count("nm deep and mitochondria up to") == warnings


def test_a_mitochondrion_goes_where_there_is_room_for_it(tmp_path: Path) -> None:
    label, mito = tall_tissue((64, 80, 96), VOXEL, 16, (150.0, 60.0, 80.0))
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    y, x = np.indices(label.shape[1:])
    label[16:48] = 10 + y // 8 + 20 * (x // 8)
    options = {"elastic": False, "mito_fraction": 0.02, "library": library}
    made = streamed(tmp_path / "m.h5", label, None, VOXEL, 0, 16, **options)
    assert made.mito.mean() == pytest.approx(0.02, rel=0.1)
    assert not made.mito[16:48].any()
    assert made.mito[:16].any()
    assert made.mito[48:].any()


@pytest.mark.parametrize("sections", [8, 64])
def test_where_there_is_no_neuron_there_is_no_mitochondrion(sections: int, tmp_path: Path) -> None:
    """Blank sections, deeper than a block and what is seen beside it; and a volume that is all background."""
    label, mito = tall_tissue((64, 60, 72), VOXEL, 16, (150.0, 60.0, 80.0))
    options = {"library": SignatureLibrary.from_masks(label, mito, VOXEL), "mito_fraction": 0.02}
    label[8:48] = 0
    made = streamed(tmp_path / "m.h5", label, None, VOXEL, 0, sections, candidate_fraction=1.0, **options)
    assert made.mito[48:].any()
    assert not made.mito[made.label == 0].any()
    nothing = streamed(tmp_path / "n.h5", np.zeros_like(label), None, VOXEL, 0, sections, **options)
    assert not nothing.mito.any()
    assert not remodel(np.zeros_like(label), None, VOXEL, rng_for(0), **options).mito.any()


@pytest.mark.parametrize(
    "change", [{"candidate_fraction": 0.0}, {"margin_nm": -1.0}, {"mito_fraction": 2.0}, {"mito_count": 10**9}]
)
def test_what_concerns_placing_is_refused_before_any_mask_is_made(change) -> None:
    label, mito = tissue((12, 60, 72), VOXEL)
    with pytest.raises(ValueRangeError):
        BlockwiseRemodelling.of(label, mito, VOXEL, sections=4, settings=BlockwiseSettings(**change))


def test_no_file_is_overwritten_unless_asked(tmp_path: Path) -> None:
    """Least of all the one that the volume is in."""
    label, mito = tissue((6, 40, 50), VOXEL)
    path = tmp_path / "cells.h5"
    with h5py.File(path, "w") as file:
        file["label"], file["mito"] = label, mito
    before = path.read_bytes()
    with h5py.File(path) as file, pytest.raises(OutputExists, match="nothing was overwritten"):
        remodel_blockwise(path, file["label"], file["mito"], VOXEL, rng_for(0), sections=3)
    assert path.read_bytes() == before
    remodel_blockwise(path, label, mito, VOXEL, rng_for(0), sections=3, overwrite=True)
    with h5py.File(path) as file:
        assert set(file) == {"label", "membrane", "mito"}


def test_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (64, 192):
        label, mito = tall_tissue((depth, 60, 72), VOXEL, 64, (100.0, 60.0, 80.0))
        with h5py.File(tmp_path / f"{depth}.h5", "w") as file:
            file["label"], file["mito"] = label, mito
            tracemalloc.start()
            remodel_blockwise(tmp_path / f"m{depth}.h5", file["label"], file["mito"], VOXEL, rng_for(0), sections=8)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("voxel", [VOXEL, ISOTROPIC])
def test_a_room_keeps_off_what_is_there_already(voxel) -> None:
    label, mito = tissue((24, 40, 50), voxel)
    mito[membrane_from_labels(label, voxel) > 0] = 0
    membrane = membrane_from_labels(label, voxel)
    occupied = Room.of(label, membrane, voxel, 10.0)
    occupied.occupy(mito)
    put = Room.of(label, membrane, voxel, 10.0)
    components = ndimage.label(mito, CUBE)[0]
    for i, box in enumerate(ndimage.find_objects(components), start=1):
        put.put(components[box] == i, box)
    assert np.array_equal(occupied.mito, put.mito)
    assert np.array_equal(occupied.depth > 0, put.depth > 0)
    near = ndimage.distance_transform_edt(mito == 0, voxel) < 100
    assert np.allclose(occupied.depth[near], put.depth[near])


@pytest.mark.parametrize("voxel", [VOXEL, ISOTROPIC])
def test_a_window_s_room_is_free_only_where_the_whole_s_is(voxel) -> None:
    label, _ = tissue((40, 40, 50), voxel)
    membrane = membrane_from_labels(label, voxel)
    whole = Room.of(label, membrane, voxel, 20.0)
    window = Window(40, range(10, 31), range(15, 26))
    part = Room.of(label[10:31], membrane[10:31], voxel, 20.0, window=window)
    assert not ((part.depth > 0) & (whole.depth[10:31] == 0)).any()
    assert not part.depth[[0, -1]].any()
    inner = slice(3, -3)
    assert np.array_equal(part.depth[inner] > 0, whole.depth[10:31][inner] > 0)
    groups = CandidateGroups(part, 1.0, 10.0)
    area = label[0].size
    assert {int(at) // area for c in groups.largest(len(groups)) for at in c.deep} == set(range(5, 16))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thin_neurites_are_neither_lost_nor_torn_across_blocks(seed: int, tmp_path: Path) -> None:
    label = np.full((24, 60, 70), 3, dtype=np.uint32)
    for i, y in enumerate(range(4, 56, 8)):
        label[:, y, 5 + 6 * i] = 100 + i
        label[6, y : y + 1, 5:60] = 100 + i
    before = pieces_of(label).counts(int(label.max()) + 1)
    made = streamed(tmp_path / "m.h5", label, None, VOXEL, seed, 8, elastic_sigma_nm=40.0)
    after = [ndimage.label(made.label == name, CUBE)[1] for name in np.unique(label)]
    assert np.unique(made.label).tolist() == np.unique(label).tolist()
    assert all(n <= before[name] for n, name in zip(after, np.unique(label), strict=True))


@settings(deadline=None)  # a busy machine is slow at times
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_over_blocks_are_those_of_the_whole(seed: int, cuts: list[int]) -> None:
    label = np.random.default_rng(seed).integers(0, 4, (sum(cuts), 5, 6)).astype(np.uint64)
    label[np.random.default_rng(seed + 1).random(label.shape) < 0.5] = 0
    finder = PieceFinder()
    for stop, n in zip(np.cumsum(cuts), cuts, strict=True):
        finder.add(label[stop - n : stop])
    found = finder.finish()
    components, count = cc3d.connected_components(label, connectivity=26, return_N=True)
    expected = sorted(
        (int(label[components == i][0]), int((components == i).sum()), ndimage.find_objects(components, i)[i - 1])
        for i in range(1, count + 1)
    )
    names = found.names[found.labels[1:] - 1].tolist()
    assert sorted(zip(names, found.sizes[1:].tolist(), found.boxes[1:], strict=True), key=str) == sorted(
        expected, key=str
    )
    assert sum(len(part) for part in found.of_block) >= count


def test_touching_finds_other_neurons_only() -> None:
    mark, label = np.zeros((3, 4, 5), np.uint8)[0], np.ones((4, 5), np.uint32)
    mark[1, 1] = 1
    above, host = np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint32)
    above[2, 2] = above[3, 3] = above[1, 0] = 1
    host[2, 2] = host[3, 3] = 7
    assert np.argwhere(touching(mark, label, above, host)).tolist() == [[2, 2]]


def test_membranes_of_a_block_need_no_more_than_the_halo() -> None:
    label, _ = tissue((70, 40, 44), ISOTROPIC)
    label[np.random.default_rng(0).random(label.shape) < 0.3] = 0
    label[:, 10:24, 12:30] = 0
    halo = membrane_halo(ISOTROPIC)
    near = membrane_from_labels(label[34 - halo : 36 + halo], ISOTROPIC)
    assert np.array_equal(near[halo : halo + 2], membrane_from_labels(label, ISOTROPIC)[34:36])
    assert membrane_halo(VOXEL) == 0


def test_blocks_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1000, 500, 600)
    monkeypatch.setattr(blockwise, "available_main_bytes", lambda: 64 << 30)
    assert fits_in_memory(shape)
    monkeypatch.setattr(blockwise, "available_main_bytes", lambda: 2 << 30)
    assert not fits_in_memory(shape)
    sections = sections_that_fit(shape, VOXEL, 25.0)
    assert sections % 8 == 0
    assert 8 <= sections < 1000
    assert fits_in_memory((3 * sections, *shape[1:]))
    assert sections_that_fit(shape, ISOTROPIC, 25.0) < sections
    monkeypatch.setattr(blockwise, "available_main_bytes", lambda: 350 << 20)
    with pytest.raises(MemoryError, match=r"8 sections of 500 x 600 voxels .* crop the volume"):
        sections_that_fit(shape, VOXEL, 25.0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sections": 0}, ValueRangeError),
        ({"sections": 2.5}, ValueRangeError),
        ({"rng": 0}, ValueRangeError),
        ({"library": "shapes.npz"}, ValueRangeError),
        ({"mito": np.zeros((4, 5, 7), np.uint8)}, ShapeMismatch),
        ({"label": np.ones((5, 6), np.uint8)}, ShapeMismatch),
        ({"elastic_spacing_nm": 0.0}, ValueRangeError),
        ({"membrane_thickness_nm": np.nan}, ValueRangeError),
        ({"label": np.ones((0, 5, 6), np.uint8)}, ShapeMismatch),
        ({"label": np.full((4, 5, 6), 1.5)}, LabelTypeError),
        ({"label": np.full((4, 5, 6), -1)}, LabelTypeError),
        ({"library": SignatureLibrary((), 0.0, 0.0), "mito_fraction": 0.1}, ValueRangeError),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_left(change, error: type[UserError], tmp_path: Path) -> None:
    arguments = {
        "label": np.ones((4, 5, 6), np.uint8),
        "mito": None,
        "voxel_nm": VOXEL,
        "rng": rng_for(0),
        "sections": 2,
    }
    names = {field.name for field in fields(BlockwiseSettings)}
    settings = BlockwiseSettings(**{name: value for name, value in change.items() if name in names})
    others = {name: value for name, value in change.items() if name not in names}
    with pytest.raises(error):
        remodel_blockwise(tmp_path / "m.h5", **(arguments | others), settings=settings)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_blocks_when_asked_and_when_memory_is_short(tmp_path: Path) -> None:
    label, mito = tissue((30, 60, 72))
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file["label"], file["mito"] = label, mito
        file.attrs["resolution_nm"] = VOXEL
    asked = neurodiff("remodel", str(tmp_path / "cells.h5"), str(tmp_path / "a.h5"), "--block-sections", "8")
    assert asked.returncode == 0, asked.stderr
    assert "masks are made one after another, in blocks of 8 of 30 sections" in asked.stderr
    code = (
        "import sys; from connectomics_neurodiff.cli import main; "
        "from connectomics_neurodiff.remodel import blockwise as b; "
        "b.available_main_bytes = lambda: b.BYTES_PER_PROCESS + 27 * 60 * 72 * b.BYTES_PER_VOXEL; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "remodel", str(tmp_path / "cells.h5"), str(tmp_path / "b.h5")]
    short = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert short.returncode == 0, short.stderr
    assert "masks are made one after another, in blocks of 8 of 30 sections" in short.stderr
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    refused = neurodiff("remodel", str(tmp_path / "cells.h5"), str(tmp_path / "c.h5"), "--block-sections", "-8")
    assert refused.returncode == 2
    assert "--block-sections must be at least 0" in refused.stderr
