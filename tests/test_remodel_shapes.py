"""Ellipses, outlines, signatures and the library's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from connectomics_neurodiff.errors import LabelTypeError, MissingInput, ShapeMismatch, VolumeFormatError
from connectomics_neurodiff.remodel import SignatureLibrary
from connectomics_neurodiff.remodel.ellipse import CONTOUR_POINTS, aligned_to, equivalent_ellipse, outline

VOXEL = (29.0, 6.0, 6.0)


def ellipse_mask(
    shape: tuple[int, int],
    centre: tuple[float, float],
    axes: tuple[float, float],
    angle: float,
    pitch: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Pixels inside an ellipse given in nm; `axes` are full lengths, `angle` from +x towards +y."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    dy, dx = y * pitch[0] - centre[0], x * pitch[1] - centre[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (2 * along / axes[0]) ** 2 + (2 * across / axes[1]) ** 2 <= 1


def spindle(shape: tuple[int, int, int] = (12, 60, 80), label: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A neuron with one mitochondrion in sections 3..8 that drifts by 2 px (12 nm) in x per section."""
    volume = np.full(shape, label, dtype=np.uint32)
    volume[:, :5] = 0
    mito = np.zeros(shape, dtype=np.uint8)
    for i, width in enumerate((80, 140, 180, 180, 140, 80)):
        mito[3 + i] = ellipse_mask(shape[1:], (180, 200 + 12 * i), (width, width / 2), 0.5, (6, 6))
    return volume, mito


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, -1.0])
@pytest.mark.parametrize("pitch", [(1.0, 1.0), (2.0, 0.5)])
def test_moments_recover_a_known_ellipse(angle: float, pitch: tuple[float, float]) -> None:
    shape = (int(300 / pitch[0]), int(400 / pitch[1]))
    found = equivalent_ellipse(ellipse_mask(shape, (150, 190), (160, 70), angle, pitch), pitch)
    assert found.major_nm == pytest.approx(160, rel=0.01)
    assert found.minor_nm == pytest.approx(70, rel=0.02)
    assert found.angle == pytest.approx(angle, abs=0.02)
    assert found.centroid_nm == pytest.approx((150, 190), abs=0.5)


def test_moments_agree_with_brute_force_covariance() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((9, 13)) > 0.6
    y, x = (v * p for v, p in zip(np.nonzero(mask), (3.0, 5.0), strict=True))
    covariance = np.cov(np.stack([y, x]), bias=True) + np.diag([9 / 12, 25 / 12])
    small, large = 4 * np.sqrt(np.linalg.eigvalsh(covariance))
    found = equivalent_ellipse(mask, (3.0, 5.0))
    assert (found.major_nm, found.minor_nm) == pytest.approx((large, small))


def test_outline_runs_along_the_boundary_at_even_steps() -> None:
    points = outline(ellipse_mask((80, 90), (40, 45), (60, 40), 0.0), (1.0, 1.0))
    assert points.shape == (CONTOUR_POINTS, 2)
    radius = np.hypot((points[:, 0] - 40) / 20, (points[:, 1] - 45) / 30)
    assert np.abs(radius - 1).max() < 0.08
    steps = np.hypot(*np.diff(np.vstack([points, points[:1]]), axis=0).T)
    assert steps.max() < 1.6 * steps.mean()


def test_outline_of_a_single_pixel_is_that_pixel() -> None:
    mask = np.zeros((5, 6), dtype=np.uint8)
    mask[2, 3] = 1
    assert np.array_equal(np.unique(outline(mask, (6.0, 6.0)), axis=0), [[12.0, 18.0]])


def test_alignment_undoes_a_shift_of_the_starting_point() -> None:
    points = outline(ellipse_mask((80, 90), (40, 45), (60, 30), 0.3), (1.0, 1.0))
    assert np.array_equal(aligned_to(np.roll(points, 23, axis=0), points), points)


def test_signature_of_a_known_mitochondrion() -> None:
    label, mito = spindle()
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    (signature,) = library.signatures
    assert len(signature) == 6
    assert signature.z_extent_nm == 6 * 29
    assert signature.axes[:, 0] == pytest.approx([80, 140, 180, 180, 140, 80], rel=0.06)
    assert signature.axes[:, 1] == pytest.approx([40, 70, 90, 90, 70, 40], rel=0.1)
    assert signature.angles == pytest.approx([0.5] * 6, abs=0.05)
    assert signature.centroids[:, 1] == pytest.approx(12 * np.arange(6), abs=1.5)
    assert signature.volume_nm3 == mito.sum() * 29 * 36
    # The host's section is 55 x 80 px: a box's equivalent ellipse is 2 / sqrt(3) as long as the box.
    assert signature.host_ratios[2] == pytest.approx(180 / (80 * 6 * 2 / np.sqrt(3)), rel=0.03)
    assert (signature.cut_below, signature.cut_above, signature.cut_lateral) == (False, False, False)
    assert library.mito_fraction == pytest.approx(mito.mean())


def test_interpolated_sections_lie_between_the_measured_ones() -> None:
    (signature,) = SignatureLibrary.from_masks(*spindle(), VOXEL).signatures
    (contour, below, above), (centroid, *_), (minor, *_) = signature.at(np.array([1.5 * 29, -10, 1e6]))
    assert contour == pytest.approx((signature.contours[1] + signature.contours[2]) / 2, abs=1e-4)
    assert centroid == pytest.approx((signature.centroids[1] + signature.centroids[2]) / 2, abs=1e-4)
    assert minor == pytest.approx(signature.axes[1:3, 1].mean(), abs=1e-3)
    assert np.array_equal(below, signature.contours[0])
    assert np.array_equal(above, signature.contours[-1])


@pytest.mark.parametrize(("sections", "below", "above"), [(slice(5, 12), True, False), (slice(0, 6), False, True)])
def test_objects_cut_in_z_are_flagged_and_kept(sections: slice, below: bool, above: bool) -> None:
    label, mito = (a[sections] for a in spindle())
    (signature,) = SignatureLibrary.from_masks(label, mito, VOXEL).templates_for(np.inf)
    assert (signature.cut_below, signature.cut_above) == (below, above)


def test_objects_cut_by_the_lateral_border_are_no_templates() -> None:
    label, mito = spindle()
    mito[3:9, 15:40, 72:] = 1
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    assert sorted(s.cut_lateral for s in library.signatures) == [False, True]
    assert [s.cut_lateral for s in library.templates_for(np.inf)] == [False]


def test_sections_at_the_border_are_trimmed_off() -> None:
    label, mito = spindle()
    mito[8] = 0
    mito[8, 20:40, 40:] = 1
    (signature,) = SignatureLibrary.from_masks(label, mito, VOXEL).templates_for(np.inf)
    assert len(signature) == 5
    assert (signature.cut_below, signature.cut_above, signature.cut_lateral) == (False, True, False)


def test_a_flat_remnant_of_a_cut_object_is_a_template_of_thin_stacks_alone() -> None:
    """Two sections (58 nm) of an object 120 nm wide say nothing about its height."""
    label, mito = spindle()
    whole = SignatureLibrary.from_masks(label, mito, VOXEL)
    flat = np.zeros_like(mito)
    flat[:2] = ellipse_mask(mito.shape[1:], (180, 200), (240, 120), 0.5, (6, 6))
    remnant = SignatureLibrary.from_masks(label, flat, VOXEL)
    assert len(remnant) == 1
    both = whole.merged(remnant)
    height = whole.signatures[0].z_extent_nm
    assert both.templates_for(2 * height) == whole.signatures
    assert both.templates_for(2 * height - 1) == both.signatures
    # Where there is nothing else it serves nevertheless.
    assert remnant.templates_for(2 * height) == remnant.signatures


def test_if_the_border_cuts_all_they_serve_nevertheless() -> None:
    label = np.ones((4, 40, 40), dtype=np.uint16)
    mito = np.zeros_like(label)
    mito[:, 10:30, :20] = 1
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    (template,) = library.templates_for(np.inf)
    assert template.cut_lateral


def test_templates_stand_for_half_of_the_volume_at_least() -> None:
    """A large object that the border cuts outweighs a small whole one: it is added, the crumb beside it is not."""
    label, mito = spindle()
    mito[1:11, 45:, 40:] = 1
    mito[5:8, 6:20, 70:] = 1
    library = SignatureLibrary.from_masks(label, mito, VOXEL)
    assert len(library) == 3
    crumb = min(library.signatures, key=lambda s: s.volume_nm3)
    assert crumb.cut_lateral
    templates = library.templates_for(np.inf)
    assert sorted(s.cut_lateral for s in templates) == [False, True]
    assert crumb not in templates
    assert sum(s.volume_nm3 for s in templates) >= sum(s.volume_nm3 for s in library.signatures) / 2


def test_a_mitochondrion_across_two_neurons_is_measured_in_the_one_that_holds_most() -> None:
    label, mito = spindle()
    label[:, :, 45:] = 8
    left = int((mito & (label == 7)).sum())
    right = int((mito & (label == 8)).sum())
    (signature,) = SignatureLibrary.from_masks(label, mito, VOXEL).signatures
    assert left > right > 0
    assert signature.volume_nm3 <= left * 29 * 36


@pytest.mark.parametrize("where", ["outside", "nowhere", "speck"])
def test_nothing_to_measure_gives_an_empty_library(where: str) -> None:
    label, mito = spindle()
    mito[:] = 0
    if where == "outside":
        mito[2:6, 0:4, 10:40] = 1
    if where == "speck":
        mito[4, 30:33, 30:33] = 1
    assert len(SignatureLibrary.from_masks(label, mito, VOXEL)) == 0


def test_saved_library_is_read_back_bit_for_bit_and_without_pickle(tmp_path: Path) -> None:
    first = SignatureLibrary.from_masks(*spindle(), VOXEL)
    library = first.merged(SignatureLibrary.from_masks(*(a[:7] for a in spindle()), (40, 4, 4)))
    library.save(tmp_path / "library.npz")
    loaded = SignatureLibrary.load(tmp_path / "library.npz")
    assert (loaded.mito_nm3, loaded.tissue_nm3) == (library.mito_nm3, library.tissue_nm3)
    assert len(loaded) == len(library) == 2
    for a, b in zip(loaded.signatures, library.signatures, strict=True):
        assert vars(a).keys() == vars(b).keys()
        assert all(np.array_equal(vars(a)[name], vars(b)[name]) for name in vars(a))
    with np.load(tmp_path / "library.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_merged_fraction_weighs_by_tissue() -> None:
    label, mito = spindle()
    with_mito = SignatureLibrary.from_masks(label, mito, VOXEL)
    without = SignatureLibrary.from_masks(label, np.zeros_like(mito), VOXEL)
    assert with_mito.merged(without, without).mito_fraction == pytest.approx(with_mito.mito_fraction / 3)


def test_empty_library_survives_the_disk(tmp_path: Path) -> None:
    SignatureLibrary((), 0.0, 0.0).save(tmp_path / "empty.npz")
    loaded = SignatureLibrary.load(tmp_path / "empty.npz")
    assert len(loaded) == 0
    assert loaded.mito_fraction == 0


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_broken_library_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(VolumeFormatError, match=r"broken\.npz"):
        SignatureLibrary.load(tmp_path / "broken.npz")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pitch_z_nm", lambda a: a * 0),
        ("contours", lambda a: a[..., :1]),
        ("lengths", lambda a: a * 0),
        ("centroids", lambda a: a * np.nan),
        ("areas_nm2", lambda a: a[:1]),
        ("cut_below", lambda a: a[:0]),
        ("tissue", lambda a: a * np.inf),
        ("tissue", lambda a: a[::-1]),
        ("host_ratios", lambda a: a * 0),
        ("contours", lambda a: a.astype("U8")),
        ("contours", lambda a: a * 1e9),
        ("cut_below", lambda a: a.astype("U8")),
        ("tissue", lambda a: a * [0, 1]),
    ],
)
def test_a_library_whose_arrays_make_no_sense_is_refused(tmp_path: Path, name: str, damage: Any) -> None:
    SignatureLibrary.from_masks(*spindle(), VOXEL).save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(tmp_path / "bad.npz", **(arrays | {name: damage(arrays[name])}))
    with pytest.raises(VolumeFormatError, match=r"bad\.npz"):
        SignatureLibrary.load(tmp_path / "bad.npz")


def test_pickled_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", lengths=np.array([{}], dtype=object))
    np.savez(tmp_path / "foreign.npz", something=np.zeros(3))
    for name in ("pickled.npz", "foreign.npz"):
        with pytest.raises(VolumeFormatError, match=name):
            SignatureLibrary.load(tmp_path / name)
    with pytest.raises(MissingInput, match="absent"):
        SignatureLibrary.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("label", "mito", "error"),
    [
        (np.ones((3, 4, 5), dtype=np.float32), np.zeros((3, 4, 5)), LabelTypeError),
        (-np.ones((3, 4, 5), dtype=np.int32), np.zeros((3, 4, 5)), LabelTypeError),
        (np.ones((4, 5), dtype=np.uint8), np.zeros((4, 5)), ShapeMismatch),
        (np.ones((3, 4, 5), dtype=np.uint8), np.zeros((3, 4, 6)), ShapeMismatch),
    ],
)
def test_bad_masks_are_refused(label: np.ndarray, mito: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        SignatureLibrary.from_masks(label, mito, VOXEL)


def test_library_of_a_real_volume(real_data: Path) -> None:
    with h5py.File(real_data / "vnc_sstem_train.h5") as file:
        label, mito, voxel = file["label"][:], file["mito"][:], file.attrs["resolution_nm"]
    library = SignatureLibrary.from_masks(label, mito, voxel)
    # The annotators drew 29 objects; one is a speck of 301 voxels.
    assert len(library) == 28
    assert library.mito_fraction == pytest.approx(mito.mean())
    assert all(np.isfinite(s.contours).all() and (s.host_ratios < 1.2).all() for s in library.signatures)
