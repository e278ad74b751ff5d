"""Dark bodies against hand-made tissue, whose every body is known."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from connectomics_neurodiff.conditions import dark_bodies, membrane_from_labels, with_dark_bodies
from connectomics_neurodiff.errors import ShapeMismatch
from connectomics_neurodiff.volume import Volume, grow_phantom

VOXEL = (30.0, 6.0, 5.0)
BRIGHT, DARK = 0.7, 0.3


def tissue(radii_nm: tuple[float, ...] = (90.0, 12.0)) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Image and labels of two neurons side by side, and the disks of these radii, all in the left one."""
    label = np.ones((3, 120, 180), np.uint32)
    label[:, :, 130:] = 2
    image = np.where(membrane_from_labels(label, VOXEL) > 0, DARK, BRIGHT).astype(np.float32)
    y, x = np.mgrid[0:120, 0:180]
    disks = []
    for i, radius in enumerate(radii_nm):
        inside = np.hypot((y - 60) * VOXEL[1], (x - 30 - 55 * i) * VOXEL[2]) <= radius
        disks.append(np.broadcast_to(inside, label.shape))
        image = np.where(inside, DARK, image)
    return image.astype(np.float32), label, disks


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found.astype(bool) & truth).sum() / (found.sum() + truth.sum()))


def test_a_mitochondrion_is_found_and_a_vesicle_is_none() -> None:
    image, label, (body, vesicle) = tissue()
    found = dark_bodies(image, label, VOXEL)
    assert found.dtype == np.uint8
    assert dice(found, body) > 0.93
    assert not found[vesicle].any()


def test_bodies_lie_in_neurons_and_never_on_membranes() -> None:
    image, label, _ = tissue()
    label[:, :40] = 0
    image[:] = np.where(np.random.default_rng(0).random(image.shape) < 0.5, DARK, image)
    found = dark_bodies(image, label, VOXEL) > 0
    assert not found[label == 0].any()
    assert not found[membrane_from_labels(label, VOXEL) > 0].any()


@pytest.mark.parametrize(("gain", "offset"), [(0.4, 0.0), (0.4, 0.5), (1.0, 0.2)])
def test_brightness_and_contrast_make_no_difference(gain: float, offset: float) -> None:
    image, label, _ = tissue()
    np.testing.assert_array_equal(dark_bodies(image * gain + offset, label, VOXEL), dark_bodies(image, label, VOXEL))


def test_axes_within_a_section_are_treated_alike() -> None:
    image, label, _ = tissue()
    turned = dark_bodies(image.swapaxes(1, 2), label.swapaxes(1, 2), (VOXEL[0], VOXEL[2], VOXEL[1]))
    np.testing.assert_array_equal(turned.swapaxes(1, 2), dark_bodies(image, label, VOXEL))


def test_an_isotropic_ball_is_found_in_three_dimensions_and_a_plate_is_none() -> None:
    size = (8.0, 8.0, 8.0)
    label = np.ones((50, 52, 90), np.uint32)
    label[:, :, 80:] = 2
    z, y, x = np.mgrid[0:50, 0:52, 0:90]
    ball = (z - 25) ** 2 + (y - 26) ** 2 + (x - 24) ** 2 <= 10**2
    plate = (abs(z - 25) < 2) & (x > 50) & (x < 72)
    dark = ball | plate | (membrane_from_labels(label, size) > 0)
    found = dark_bodies(np.where(dark, DARK, BRIGHT).astype(np.float32), label, size)
    assert dice(found[:, :, :45], ball[:, :, :45]) > 0.93
    assert not found[:, :, 50:].any()


def test_the_phantoms_mitochondria_are_found() -> None:
    phantom = grow_phantom((10, 150, 170), (29.0, 6.0, 6.0), 3)
    assert phantom.mito is not None
    found = dark_bodies(phantom.array("image"), phantom.array("label"), phantom.voxel_nm)
    assert dice(found, phantom.array("mito") > 0) > 0.7


def test_membranes_that_are_not_dark_are_told_and_nothing_is_found(caplog: pytest.LogCaptureFixture) -> None:
    image, label, _ = tissue()
    with caplog.at_level(logging.WARNING):
        assert not dark_bodies(1 - image, label, VOXEL).any()
    assert "not darker than cytoplasm" in caplog.text


@pytest.mark.parametrize("label", [np.zeros((2, 9, 11), np.uint32), np.arange(198, dtype=np.uint32).reshape(2, 9, 11)])
def test_without_the_inside_of_a_neuron_nothing_is_found(label: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not dark_bodies(np.zeros(label.shape, np.float32), label, VOXEL).any()
    assert "No dark bodies" in caplog.text


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeMismatch, match="one shape"):
        dark_bodies(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 5), np.uint32), VOXEL)


def test_masks_win_over_what_is_found() -> None:
    image, label, (body, _) = tissue()
    masked = Volume(image, label, np.zeros(label.shape, np.uint8), VOXEL)
    assert not with_dark_bodies(masked).array("mito").any()
    bare = with_dark_bodies(Volume(image, label, None, VOXEL))
    assert dice(bare.array("mito"), body) > 0.9
    known = Volume(image, label, np.zeros(label.shape, np.uint8), VOXEL, dark=np.ones(label.shape, np.uint8))
    assert with_dark_bodies(known) is known


def test_a_mitochondrion_s_rim_belongs_to_it() -> None:
    """Masks are often narrower than what is dark; the rim would stay behind when mitochondria are placed elsewhere."""
    image, label, (body, _) = tissue()
    y, x = np.mgrid[0:120, 0:180]
    narrow = np.hypot((y - 60) * VOXEL[1], (x - 30) * VOXEL[2]) <= 75.0
    mito = np.broadcast_to(narrow, label.shape).astype(np.uint8)
    found = with_dark_bodies(Volume(image, label, mito, VOXEL)).array("dark")
    assert body[mito == 0].any()
    assert not found[body].any()


def test_what_is_too_small_for_a_body_is_dark_all_the_same() -> None:
    image, label, (body, vesicle) = tissue(radii_nm=(90.0, 24.0))
    bare = with_dark_bodies(Volume(image, label, None, VOXEL))
    assert dice(bare.array("dark")[:, :, 70:], vesicle[:, :, 70:]) > 0.8
    assert not (bare.array("dark") & bare.array("mito")).any()
    # Masks that hold no mitochondrion: the body is then one of the dark things.
    masked = with_dark_bodies(Volume(image, label, np.zeros(label.shape, np.uint8), VOXEL))
    assert dice(masked.array("dark"), body | vesicle) > 0.9
    assert not masked.array("dark")[membrane_from_labels(label, VOXEL) > 0].any()
