"""Bad input is refused at the door: the right class, one line, the nearest name."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from connectomics_neurodiff.errors import (
    LabelTypeError,
    MissingInput,
    ShapeMismatch,
    UserError,
    ValueRangeError,
    VolumeFormatError,
    VoxelSizeMissing,
)
from connectomics_neurodiff.geometry import ZYX
from connectomics_neurodiff.volume import Volume, check_training_volume, open_array, open_volume

SHAPE, VOXEL = (6, 20, 28), ZYX(29.0, 6.0, 6.0)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(0, 9, SHAPE).astype(np.uint32)
WITH_NAN = IMAGE.astype(np.float32)
WITH_NAN[5, 19, 27] = np.nan
NEGATIVE = LABEL.astype(np.int32)
NEGATIVE[5, 19, 27] = -1


def write(path: Path, voxel: tuple[float, ...] | None = VOXEL, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as h5:
        for name, array in arrays.items():
            h5[name] = array
        if voxel is not None:
            h5.attrs["resolution_nm"] = voxel
    return path


def test_a_good_volume_passes(tmp_path: Path) -> None:
    check_training_volume(open_volume(write(tmp_path / "a.h5", image=IMAGE, label=LABEL, mito=LABEL)))


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({"image": WITH_NAN, "label": LABEL}, ValueRangeError, "NaN"),
        ({"image": IMAGE, "label": LABEL[:, 1:]}, ShapeMismatch, r"image \(6, 20, 28\), label \(6, 19, 28\)"),
        ({"image": IMAGE, "label": LABEL.astype(np.float32)}, LabelTypeError, "float32"),
        ({"image": IMAGE, "label": NEGATIVE}, LabelTypeError, "-1"),
        ({"image": IMAGE, "label": LABEL, "mito": WITH_NAN}, LabelTypeError, "mito"),
        ({"image": IMAGE, "label": LABEL * 0}, ValueRangeError, "background only"),
        ({"image": IMAGE}, MissingInput, "no label"),
        ({"label": LABEL}, MissingInput, "no image"),
        ({"image": IMAGE[0], "label": LABEL[0]}, VolumeFormatError, "three axes"),
        ({"image": IMAGE, "label": LABEL, "voxel": None}, VoxelSizeMissing, "--voxel-nm"),
        ({"image": IMAGE, "label": LABEL, "voxel": (29, 6)}, ValueRangeError, "three positive"),
        ({"image": IMAGE, "label": LABEL, "voxel": (29, 6, 0)}, ValueRangeError, "three positive"),
        ({"imagination": IMAGE, "lab": LABEL}, MissingInput, "imagination"),
        ({}, MissingInput, "nothing"),
    ],
)
def test_volumes_that_cannot_be_trained_on(
    tmp_path: Path, arrays: dict[str, np.ndarray], error: type[UserError], words: str
) -> None:
    path = write(tmp_path / "a.h5", **arrays)  # type: ignore[arg-type]
    with pytest.raises(error, match=words) as caught:
        check_training_volume(open_volume(path))
    assert "\n" not in str(caught.value)
    assert "a.h5" in str(caught.value) or "voxel size" in str(caught.value)


@pytest.mark.parametrize(
    ("image", "label", "error"),
    [
        (np.full(SHAPE, np.nan, np.float32), LABEL, ValueRangeError),
        (np.full(SHAPE, 255, np.float32), LABEL, ValueRangeError),
        (IMAGE / np.float32(255), NEGATIVE, LabelTypeError),
        (IMAGE / np.float32(255), LABEL.astype(float), LabelTypeError),
    ],
)
def test_volumes_in_memory_are_checked_too(image: np.ndarray, label: np.ndarray, error: type[UserError]) -> None:
    with pytest.raises(error):
        check_training_volume(Volume(image, label, None, VOXEL))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.95])
def test_truncated_hdf5(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as h5:
        h5.create_dataset("image", data=np.random.default_rng(0).integers(0, 256, (32, 64, 64), dtype=np.uint8))
        h5.attrs["resolution_nm"] = VOXEL
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(VolumeFormatError, match="truncated") as caught:
        open_volume(path)
    assert "\n" not in str(caught.value)


def test_damaged_chunk_is_reported_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as h5:
        h5.create_dataset("image", data=IMAGE, chunks=SHAPE, compression="gzip")
        h5.create_dataset("label", data=LABEL)
        h5.attrs["resolution_nm"] = VOXEL
        chunk = h5["image"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with pytest.raises(VolumeFormatError, match=r"a\.h5::image cannot be read"):
        check_training_volume(open_volume(path))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("volum.h5", MissingInput, r"does not exist.* Did you mean 'volume\.h5'"),
        ("nowhere/volume.h5", MissingInput, "does not exist"),
        ("volume.h55", VolumeFormatError, r"Got '\.h55'.* Did you mean '\.h5'"),
        ("volume.txt", VolumeFormatError, r"Got '\.txt'"),
        ("empty", MissingInput, "holds none"),
        ("volume.h5::lable", MissingInput, r"no dataset 'lable'.* Did you mean 'label'\? It has: image .*label"),
    ],
)
def test_missing_and_unknown_files(tmp_path: Path, name: str, error: type[UserError], words: str) -> None:
    write(tmp_path / "volume.h5", image=IMAGE, label=LABEL)
    (tmp_path / "volume.h55").touch()
    (tmp_path / "volume.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=words) as caught:
        open_volume(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_the_only_dataset_is_taken_unless_it_says_that_it_is_something_else(tmp_path: Path) -> None:
    write(tmp_path / "main.h5", main=IMAGE)
    write(tmp_path / "label.h5", label=LABEL)
    assert open_array(tmp_path / "main.h5", ["affinity"]).shape == SHAPE
    with pytest.raises(MissingInput, match="'affinity'"):
        open_array(tmp_path / "label.h5", ["affinity"])
    assert open_array(f"{tmp_path}/label.h5::label", ["affinity"]).dtype == np.uint32


def test_a_file_that_vanishes_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", image=IMAGE)
    volume = open_volume(path)
    path.unlink()
    with pytest.raises(VolumeFormatError, match="cannot be read"):
        np.asarray(volume.image)
