"""Volumes and our HDF5 layout: types, ranges, laziness, crops, workers, bytes."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics_neurodiff.errors import (
    LabelTypeError,
    MissingInput,
    NotEnoughSpace,
    OutputExists,
    ShapeMismatch,
    UnknownName,
    UserError,
    ValueRangeError,
    VolumeFormatError,
)
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.volume import Scaling, Volume, open_array, open_volume, read_voxel_size, slabs, write_volume
from connectomics_neurodiff.volume.arrays import LazyArray

SHAPE, VOXEL = (6, 20, 28), (29.0, 6.0, 6.0)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, SHAPE, dtype=np.uint8),
        "label": rng.integers(0, 9, SHAPE).astype(np.uint32),
        "mito": rng.integers(0, 2, SHAPE).astype(np.uint8),
    }


@pytest.fixture
def path(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A file as other programs write it: plain h5py, mitochondria as 0/255."""
    file = tmp_path / "volume.h5"
    with h5py.File(file, "w") as h5:
        h5["image"], h5["label"], h5["mito"] = arrays["image"], arrays["label"], arrays["mito"] * 255
        h5.attrs["resolution_nm"] = VOXEL
    return file


def test_opened_volume_has_unit_image_wide_labels_and_a_binary_mask(path: Path, arrays: dict[str, np.ndarray]) -> None:
    volume = open_volume(path)
    assert volume.shape == SHAPE
    assert volume.voxel_nm == VOXEL
    assert volume.scaling == Scaling(0, 255)
    for array, dtype in ((volume.image, np.float32), (volume.label, np.uint64), (volume.mito, np.uint8)):
        assert array is not None
        assert array.dtype == dtype
        assert np.asarray(array).dtype == dtype
        assert array.shape == SHAPE
    np.testing.assert_allclose(np.asarray(volume.image), arrays["image"] / 255, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(volume.label), arrays["label"])
    np.testing.assert_array_equal(np.asarray(volume.mito), arrays["mito"])


@given(
    st.tuples(*[st.one_of(st.integers(-n, n - 1), st.slices(n)) for n in (4, 5, 6)]),
    st.integers(0, 3),
    st.booleans(),
)
def test_lazy_indexing_is_numpy_indexing(key: tuple[int | slice, ...], used: int, dots: bool) -> None:
    whole = np.arange(120).reshape(4, 5, 6)

    class InMemory(LazyArray):
        def _read(self, box: tuple[slice, ...]) -> np.ndarray:
            assert all(s.step is None and 0 <= s.start <= s.stop <= n for s, n in zip(box, self.shape, strict=True))
            return whole[box]

    index = (*key[:used], ...) if dots else key[:used]
    np.testing.assert_array_equal(InMemory(whole.shape, whole.dtype)[index], whole[index])


@pytest.mark.parametrize(
    ("key", "error"), [((0, 0, 0, 0), IndexError), (6, IndexError), (-7, IndexError), ([0, 1], TypeError)]
)
def test_lazy_indexing_refuses_what_it_cannot_do(path: Path, key: object, error: type[Exception]) -> None:
    volume = open_volume(path)
    with pytest.raises(error):
        volume.label[key]  # type: ignore[index]


def test_crop_and_load_are_in_memory_and_agree_with_slicing(path: Path, arrays: dict[str, np.ndarray]) -> None:
    box = Box((1, 3, 5), (4, 17, 26))
    volume = open_volume(path)
    crop = volume.crop(box)
    assert crop.shape == box.shape
    assert crop.voxel_nm == volume.voxel_nm
    assert isinstance(crop.image, np.ndarray)
    np.testing.assert_array_equal(crop.label, arrays["label"][1:4, 3:17, 5:26])
    path.unlink()
    np.testing.assert_array_equal(crop.mito, arrays["mito"][1:4, 3:17, 5:26])


@pytest.mark.parametrize("box", [Box((0, 0, 0), (7, 20, 28)), Box((-1, 0, 0), (6, 20, 28))])
def test_crop_outside_the_volume_is_refused(path: Path, box: Box) -> None:
    with pytest.raises(ValueRangeError, match="inside the volume"):
        open_volume(path).crop(box)


def _sum_of(volume: Volume) -> int:
    assert volume.label is not None
    return int(np.asarray(volume.label).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_volume_works_in_worker_processes(path: Path, method: str, arrays: dict[str, np.ndarray]) -> None:
    volume = open_volume(path)
    assert _sum_of(volume) == arrays["label"].sum()  # opened in the parent before the workers start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sum_of, [volume] * 4) == [arrays["label"].sum()] * 4


def test_pickled_volume_is_small(path: Path) -> None:
    assert len(pickle.dumps(open_volume(path))) < 2000


def test_write_then_open_gives_the_same(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    target = tmp_path / "deep" / "out.h5"
    unit = arrays["image"].astype(np.float32) / 255
    write_volume(target, {**arrays, "image": unit}, VOXEL, {"seed": 3, "settings": {"b": 1, "a": [2]}})
    volume = open_volume(target)
    np.testing.assert_array_equal(np.asarray(volume.image), unit)
    np.testing.assert_array_equal(np.asarray(volume.label), arrays["label"])
    np.testing.assert_array_equal(np.asarray(volume.mito), arrays["mito"])
    with h5py.File(target) as h5:
        assert {name: h5[name].dtype for name in h5} == {"image": "uint8", "label": "uint32", "mito": "uint8"}
        assert h5["image"].compression == "gzip"
        assert h5.attrs["seed"] == 3
        assert h5.attrs["settings"] == '{"a": [2], "b": 1}'
        np.testing.assert_array_equal(h5.attrs["resolution_nm"], VOXEL)


@pytest.mark.parametrize(
    ("name", "array", "stored"),
    [
        ("image", np.array([0, 0.5, 1.0]), np.array([0, 128, 255], np.uint8)),
        ("image", np.array([0.1, 0.2, 0.9], np.float16), np.array([25, 51, 229], np.uint8)),
        ("image", np.array([0, 7, 255], np.uint8), np.array([0, 7, 255], np.uint8)),
        ("label", np.array([0, 7, 2**32 - 1], np.uint64), np.array([0, 7, 2**32 - 1], np.uint32)),
        ("label", np.array([0, 7, 2**32], np.int64), np.array([0, 7, 2**32], np.uint64)),
        ("label", np.array([0, 7, 9], np.int16), np.array([0, 7, 9], np.uint32)),
        ("membrane", np.array([False, True, True]), np.array([0, 1, 1], np.uint8)),
        ("mito", np.array([0, 255, 3], np.int32), np.array([0, 1, 1], np.uint8)),
    ],
)
def test_stored_types(tmp_path: Path, name: str, array: np.ndarray, stored: np.ndarray) -> None:
    write_volume(tmp_path / "a.h5", {name: array.reshape(1, 1, 3)}, VOXEL)
    with h5py.File(tmp_path / "a.h5") as h5:
        assert h5[name].dtype == stored.dtype
        np.testing.assert_array_equal(h5[name][0, 0], stored)


def test_affinities_are_stored_in_half_precision_and_opened_as_they_are(tmp_path: Path) -> None:
    affinity = np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32)
    write_volume(tmp_path / "a.h5", {"affinity": affinity}, VOXEL)
    stored = open_array(tmp_path / "a.h5", ["affinity", "main"])
    assert read_voxel_size(tmp_path / "a.h5") == VOXEL
    assert read_voxel_size(f"{tmp_path}/a.h5::affinity", voxel_nm=(8, 8, 8)) == (8, 8, 8)
    assert stored.shape == (3, *SHAPE)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored[1, 2:4, ::3], affinity[1, 2:4, ::3], atol=5e-4)


def test_same_content_gives_same_bytes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_volume(tmp_path / "a.h5", arrays, VOXEL, {"x": 1, "y": 2})
    time.sleep(1.1)  # HDF5 time stamps count seconds
    write_volume(tmp_path / "b.h5", arrays, VOXEL, {"y": 2, "x": 1})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_lazy_arrays_are_streamed_into_a_new_file(path: Path, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    volume = open_volume(path)
    write_volume(tmp_path / "copy.h5", volume.arrays, volume.voxel_nm)
    with h5py.File(tmp_path / "copy.h5") as h5:
        np.testing.assert_array_equal(h5["image"][...], arrays["image"])
        np.testing.assert_array_equal(h5["label"][...], arrays["label"])


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"imge": np.zeros(SHAPE, np.uint8)}, UnknownName),
        ({"image": np.zeros(SHAPE), "label": np.zeros((6, 20, 27), int)}, ShapeMismatch),
        ({"affinity": np.zeros(SHAPE)}, ShapeMismatch),
        ({"image": np.zeros((1, *SHAPE))}, ShapeMismatch),
        ({"image": np.full(SHAPE, 1.5)}, ValueRangeError),
        ({"image": np.full(SHAPE, np.nan)}, ValueRangeError),
        ({"image": np.full(SHAPE, 7, np.uint16)}, ValueRangeError),
        ({"affinity": np.full((3, *SHAPE), -0.1)}, ValueRangeError),
        ({"label": np.zeros(SHAPE, np.float32)}, LabelTypeError),
        ({"label": np.full(SHAPE, -1)}, LabelTypeError),
        ({"mito": np.zeros(SHAPE, np.float32)}, LabelTypeError),
    ],
)
def test_wrong_arrays_leave_the_old_file(tmp_path: Path, arrays: dict[str, np.ndarray], error: type[UserError]) -> None:
    target = tmp_path / "a.h5"
    target.write_bytes(b"precious")
    with pytest.raises(error) as caught:
        write_volume(target, arrays, VOXEL)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_existing_file_is_kept_unless_overwriting(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    (tmp_path / "a.h5").write_bytes(b"precious")
    with pytest.raises(OutputExists):
        write_volume(tmp_path / "a.h5", arrays, VOXEL, overwrite=False)
    assert (tmp_path / "a.h5").read_bytes() == b"precious"


def test_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(NotEnoughSpace):
        write_volume(tmp_path / "a.h5", arrays, VOXEL)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_file_and_no_crash(tmp_path: Path) -> None:
    # Limits in every phase of the file's growth: HDF5 itself crashes on some and keeps half of the data on others.
    code = """
import os, resource, sys
import numpy as np
from connectomics_neurodiff.errors import NotEnoughSpace
from connectomics_neurodiff.volume import write_volume
label = np.random.default_rng(0).integers(0, 9, (24, 64, 72)).astype(np.uint32)
for limit in (400, 5_000, 20_000, 40_000, 60_000):
    if not os.fork():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_volume(sys.argv[1], {"label": label, "mito": label > 4}, (40, 8, 8))
        except NotEnoughSpace:
            sys.exit(7)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.h5")], capture_output=True, text=True)
    assert (made.stdout.split(), made.stderr) == (["7"] * 5, "")
    assert not list(tmp_path.iterdir())


def test_space_that_was_asked_for_is_given_back(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_volume(tmp_path / "a.h5", arrays, VOXEL)
    assert (tmp_path / "a.h5").stat().st_size < 100_000
    with h5py.File(tmp_path / "a.h5") as file:
        assert all(np.array_equal(file[name].shape, array.shape) for name, array in arrays.items())


def test_scaling_inverts() -> None:
    scaling = Scaling(-3.5, 1021.0)
    grey = np.array([-3.5, 0.0, 500.25, 1021.0])
    unit = scaling.to_unit(grey)
    assert unit.dtype == np.float32
    assert (unit[0], unit[-1]) == (0, 1)
    np.testing.assert_allclose(scaling.from_unit(unit), grey, atol=1e-3)


def test_volume_refuses_arrays_of_different_shape() -> None:
    with pytest.raises(ShapeMismatch, match=r"image \(2, 3, 4\), label \(2, 3, 5\)"):
        Volume(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 5), np.uint64), None, VOXEL)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [None, np.zeros((3, 4), np.float32), np.zeros((0, 3, 4), np.float32)])
def test_volume_refuses_what_is_no_volume(image: np.ndarray | None) -> None:
    with pytest.raises(VolumeFormatError):
        Volume(image, None, None, VOXEL)  # type: ignore[arg-type]


def test_slabs_cover_every_voxel_once() -> None:
    count = np.zeros((2, 19, 3, 4), int)
    for index in slabs(count.shape, 8):
        count[index] += 1
        assert count[index].shape[1] <= 8
    assert (count == 1).all()


def test_real_volumes_open(real_data: Path) -> None:
    expected = {
        "vnc_sstem_train.h5": ((20, 672, 1024), (50, 4.6, 4.6), 0.050),
        "fib_medulla_train.h5": ((160, 250, 250), (8, 8, 8), 0.124),
        "gala_fib_mini_train.h5": ((50, 100, 200), (10, 10, 10), None),
    }
    for name, (shape, voxel, mito_fraction) in expected.items():
        volume = open_volume(real_data / name)
        assert volume.shape == shape
        assert volume.voxel_nm == voxel
        crop = volume.crop(Box((3, 10, 20), (9, 90, 95)))
        assert crop.label is not None
        with h5py.File(real_data / name) as h5:
            np.testing.assert_array_equal(crop.label, h5["label"][3:9, 10:90, 20:95])
        if mito_fraction is not None:
            assert np.asarray(volume.mito).mean() == pytest.approx(mito_fraction, abs=1e-3)


def test_real_segmentation_without_image_opens_as_labels(real_data: Path) -> None:
    volume = open_volume(real_data / "checks" / "snemi3d_ac4_mini.h5")
    assert volume.image is None
    assert volume.shape == (32, 160, 160)
    fragments = open_array(real_data / "checks" / "snemi3d_ac4_mini.h5::fragments", ["label"])
    assert fragments.dtype == np.uint32
    with pytest.raises(MissingInput, match="interior_prob"):
        open_array(real_data / "checks" / "snemi3d_ac4_mini.h5", ["affinity"])
