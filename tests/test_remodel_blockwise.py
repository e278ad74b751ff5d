"""Volumes remodelled block by block from disk to disk, against the same volume as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cc3d
import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from test_remodel import IN_ORDER, ISOTROPIC, VOXEL, assert_valid, tissue
from tiny import neurodiff

from connectomics_neurodiff.conditions import membrane_from_labels, membrane_halo
from connectomics_neurodiff.errors import LabelTypeError, ShapeMismatch, UserError, ValueRangeError
from connectomics_neurodiff.remodel import (
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
from connectomics_neurodiff.seeding import rng_for

CUBE = np.ones((3, 3, 3))
CASES = [((20, 90, 110), VOXEL), ((52, 56, 64), ISOTROPIC)]


def streamed(path: Path, label, mito, voxel, seed: int, sections: int, **options) -> RemodelledMask:
    minimum = remodel_blockwise(path, label, mito, voxel, rng_for(seed), sections=sections, **options)
    with h5py.File(path) as file:
        assert list(file.attrs["resolution_nm"]) == list(voxel)
        return RemodelledMask(file["label"][:].astype(np.uint64), file["membrane"][:], file["mito"][:], minimum)


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
def test_placed_mitochondria_are_valid_and_end_before_every_face(shape, voxel, tmp_path: Path) -> None:
    label, mito = tissue(shape, voxel)
    library = SignatureLibrary.from_masks(label, mito, voxel)
    options = {"library": library, "candidate_fraction": 0.3}
    made = streamed(tmp_path / "m.h5", label, mito, voxel, 0, 16, **options)
    assert_valid(made)
    report = quality_report(label, mito, made, voxel)
    assert {name: report[name] for name in IN_ORDER} == dict.fromkeys(IN_ORDER, 0.0)
    assert made.mito.any()
    for face in range(16, shape[0], 16):
        assert not made.mito[face - 1 : face + 1].any()
    again = streamed(tmp_path / "again.h5", label, mito, voxel, 0, 16, **options)
    assert np.array_equal(again.mito, made.mito)
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "m.h5").read_bytes()


def test_blocks_shallower_than_mitochondria_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label, mito = tissue((40, 60, 70), VOXEL)
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    options = {"library": library, "elastic": False, "mito_fraction": 0.01}
    for sections, warned in ((40, False), (8, True)):
        caplog.clear()
        streamed(tmp_path / f"{sections}.h5", label, None, VOXEL, 0, sections, **options)
        assert ("nm deep and mitochondria up to" in caplog.text) == warned


def test_a_block_s_mitochondria_do_not_depend_on_other_blocks(tmp_path: Path) -> None:
    label, mito = tissue((24, 90, 110), VOXEL)
    options = {"library": SignatureLibrary.from_masks(label, mito, VOXEL), "mito_fraction": 0.02, "elastic": False}
    first = streamed(tmp_path / "a.h5", label, None, VOXEL, 0, 8, **options)
    other = label.copy()
    other[16:, :50] = 99
    second = streamed(tmp_path / "b.h5", other, None, VOXEL, 0, 8, **options)
    assert np.array_equal(first.mito[:16], second.mito[:16])
    assert not np.array_equal(first.mito[16:], second.mito[16:])


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
    assert fits_in_memory((sections, *shape[1:]))
    assert sections_that_fit(shape, ISOTROPIC, 25.0) < sections
    monkeypatch.setattr(blockwise, "available_main_bytes", lambda: 350 << 20)
    with pytest.raises(MemoryError, match=r"8 sections of 500 x 600 voxels .* crop the volume"):
        sections_that_fit(shape, VOXEL, 25.0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sections": 0}, ValueRangeError),
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
    with pytest.raises(error):
        remodel_blockwise(tmp_path / "m.h5", **(arguments | change))
    assert not list(tmp_path.iterdir())


def test_the_command_makes_blocks_when_asked_and_when_memory_is_short(tmp_path: Path) -> None:
    label, mito = tissue((16, 60, 72))
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file["label"], file["mito"] = label, mito
        file.attrs["resolution_nm"] = VOXEL
    asked = neurodiff("remodel", str(tmp_path / "cells.h5"), str(tmp_path / "a.h5"), "--block-sections", "8")
    assert asked.returncode == 0, asked.stderr
    assert "masks are made one after another, in blocks of 8 of 16 sections" in asked.stderr
    code = (
        "import sys; from connectomics_neurodiff.cli import main; "
        "from connectomics_neurodiff.remodel import blockwise as b; "
        "b.available_main_bytes = lambda: b.BYTES_PER_PROCESS + 9 * 60 * 72 * b.BYTES_PER_VOXEL; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "remodel", str(tmp_path / "cells.h5"), str(tmp_path / "b.h5")]
    short = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert short.returncode == 0, short.stderr
    assert "masks are made one after another, in blocks of 8 of 16 sections" in short.stderr
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    refused = neurodiff("remodel", str(tmp_path / "cells.h5"), str(tmp_path / "c.h5"), "--block-sections", "-8")
    assert refused.returncode == 2
    assert "--block-sections must be at least 0" in refused.stderr
