"""convert and describe: several sources become one file, nothing is overwritten, nothing is whole in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile

from connectomics_neurodiff.errors import (
    LabelTypeError,
    OutputExists,
    ShapeMismatch,
    UnknownName,
    UserError,
    VolumeFormatError,
    VoxelSizeMissing,
)
from connectomics_neurodiff.provenance import Provenance, write_provenance
from connectomics_neurodiff.volume import Scaling, convert, describe, open_volume, write_volume

SHAPE, VOXEL = (19, 20, 28), (29.0, 6.0, 6.0)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(0, 70000, SHAPE).astype(np.uint32)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """An image as TIFF, labels as colour PNGs, mitochondria as grey PNGs."""
    tifffile.imwrite(tmp_path / "image.tif", IMAGE)
    for name in ("labels", "mito"):
        (tmp_path / name).mkdir()
    for z in range(SHAPE[0]):
        blue_green_red = np.stack([LABEL[z] & 255, (LABEL[z] >> 8) & 255, LABEL[z] >> 16], axis=-1)
        cv2.imwrite(str(tmp_path / "labels" / f"{z}.png"), blue_green_red.astype(np.uint8))
        cv2.imwrite(str(tmp_path / "mito" / f"{z}.png"), ((IMAGE[z] > 99) * 255).astype(np.uint8))
    return tmp_path


def test_image_labels_and_mitochondria_become_one_file(sources: Path) -> None:
    target = sources / "ac4.h5"
    convert(sources / "image.tif", target, voxel_nm=VOXEL)
    convert(sources / "labels", target, role="label")  # takes the voxel size of the target
    convert(sources / "mito", target, voxel_nm=VOXEL, role="mito")
    volume = open_volume(target)
    assert volume.voxel_nm == VOXEL
    np.testing.assert_array_equal(np.rint(np.asarray(volume.image) * 255), IMAGE)
    np.testing.assert_array_equal(np.asarray(volume.label), LABEL)
    np.testing.assert_array_equal(np.asarray(volume.mito), IMAGE > 99)
    assert {p.name for p in sources.iterdir()} == {"ac4.h5", "image.tif", "labels", "mito"}


@pytest.mark.parametrize(
    ("source", "options", "error"),
    [
        ("image.tif", {"voxel_nm": VOXEL}, OutputExists),
        ("small.tif", {"voxel_nm": VOXEL, "role": "label"}, ShapeMismatch),
        ("labels", {"voxel_nm": (30, 6, 6), "role": "label"}, ShapeMismatch),
        ("labels", {"voxel_nm": VOXEL}, VolumeFormatError),
        ("labels", {"voxel_nm": VOXEL, "role": "lable"}, UnknownName),
        ("negative.h5", {"role": "label"}, LabelTypeError),
    ],
)
def test_refused_additions_leave_the_file_as_it_was(
    sources: Path, source: str, options: dict, error: type[UserError]
) -> None:
    target = sources / "ac4.h5"
    convert(sources / "image.tif", target, voxel_nm=VOXEL)
    tifffile.imwrite(sources / "small.tif", LABEL[:, :-1])
    with h5py.File(sources / "negative.h5", "w") as h5:
        h5["main"] = np.where(LABEL[-1, -1, -1] == LABEL, -1, 1)
    before, names = target.read_bytes(), {p.name for p in sources.iterdir()}
    with pytest.raises(error) as caught:
        convert(sources / source, target, **options)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == before
    assert {p.name for p in sources.iterdir()} == names


def test_new_output_without_voxel_size_is_refused(sources: Path) -> None:
    with pytest.raises(VoxelSizeMissing):
        convert(sources / "image.tif", sources / "out.h5")
    assert not (sources / "out.h5").exists()


@pytest.mark.parametrize("name", ["out.hd5", "out.tif", "out"])
def test_output_must_be_hdf5(sources: Path, name: str) -> None:
    with pytest.raises(VolumeFormatError, match=r"\.h5"):
        convert(sources / "image.tif", sources / name, voxel_nm=VOXEL)


def test_sixteen_bit_image_keeps_its_scaling(tmp_path: Path) -> None:
    grey = IMAGE.astype(np.uint16) * 20 + 1000
    tifffile.imwrite(tmp_path / "a.tif", grey)
    convert(tmp_path / "a.tif", tmp_path / "a.h5", voxel_nm=VOXEL)
    convert(tmp_path / "a.h5", tmp_path / "b.h5")
    volume = open_volume(tmp_path / "b.h5")
    assert volume.scaling == Scaling(grey.min(), grey.max())
    step = (float(grey.max()) - float(grey.min())) / 255
    np.testing.assert_allclose(volume.scaling.from_unit(np.asarray(volume.image)), grey, atol=0.51 * step)


def test_one_role_of_a_file_with_several(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.h5", {"image": IMAGE, "label": LABEL}, VOXEL)
    convert(tmp_path / "a.h5", tmp_path / "all.h5")
    convert(tmp_path / "a.h5", tmp_path / "label.h5", role="label")
    assert set(open_volume(tmp_path / "all.h5").arrays) == {"image", "label"}
    assert set(open_volume(tmp_path / "label.h5").arrays) == {"label"}


def test_conversion_streams(tmp_path: Path) -> None:
    shape = (160, 256, 256)  # 10 MiB stored, 40 MiB as float32
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5.create_dataset("image", data=np.zeros(shape, np.uint8), chunks=(8, 128, 128), compression="gzip")
    tracemalloc.start()
    convert(tmp_path / "a.h5", tmp_path / "b.h5", voxel_nm=(8, 8, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_describe(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.h5", {"image": IMAGE, "label": LABEL}, VOXEL, {"source": "made up"})
    write_provenance(tmp_path / "a.h5", Provenance("phantom", {"shape": list(SHAPE)}, {}, seed=5))
    found = describe(tmp_path / "a.h5")
    assert found["format"] == "HDF5"
    assert found["shape"] == list(SHAPE)
    assert found["voxel_nm"] == list(VOXEL)
    assert found["labels"] == len(set(LABEL.ravel().tolist()) - {0})
    assert found["datasets"]["image"] == {"shape": list(SHAPE), "dtype": "uint8"}
    assert found["attributes"]["source"] == "made up"
    assert found["provenance"]["seed"] == 5
    only = describe(f"{tmp_path}/a.h5::image")
    assert list(only["datasets"]) == ["image"]
    assert only["labels"] is None


def test_describe_needs_neither_voxel_size_nor_a_volume(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", IMAGE)
    assert describe(tmp_path / "a.tif")["voxel_nm"] is None
    write_volume(tmp_path / "a.h5", {"affinity": np.zeros((3, *SHAPE))}, VOXEL)
    assert describe(tmp_path / "a.h5")["datasets"] == {"affinity": {"shape": [3, *SHAPE], "dtype": "float16"}}
