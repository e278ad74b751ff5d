"""Formats that are not ours: one-dataset HDF5, TIFF stacks, folders of sections, Zarr."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import zarr

from connectomics_neurodiff.errors import UserError, ValueRangeError, VolumeFormatError, VoxelSizeMissing
from connectomics_neurodiff.volume import Scaling, Volume, open_array, open_volume, read_voxel_size
from connectomics_neurodiff.volume.sections import natural_key

SHAPE, VOXEL = (11, 20, 28), (29.0, 6.0, 6.0)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(0, 70000, SHAPE).astype(np.uint32)


def assert_is_image(volume: Volume) -> None:
    assert volume.label is None
    assert volume.image is not None
    np.testing.assert_allclose(np.asarray(volume.image), IMAGE / 255, atol=1e-7)
    np.testing.assert_allclose(volume.image[4, 3:9, ::-2], IMAGE[4, 3:9, ::-2] / 255, atol=1e-7)


class TestHDF5:
    @pytest.mark.parametrize(
        ("stored", "role"),
        [(IMAGE, "image"), (IMAGE.astype(np.float32), "image"), (LABEL, "label"), (LABEL.astype(np.int64), "label")],
    )
    def test_single_dataset_gets_its_role_from_its_type(self, tmp_path: Path, stored: np.ndarray, role: str) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5["main"] = stored
        assert list(open_volume(tmp_path / "a.h5", voxel_nm=VOXEL).arrays) == [role]

    def test_a_role_given_by_name_goes_before_the_type(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5["main"] = IMAGE
        volume = open_volume(tmp_path / "a.h5", voxel_nm=VOXEL, role="label")
        np.testing.assert_array_equal(np.asarray(volume.label), IMAGE)

    def test_dataset_by_path_and_foreign_names(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "cremi.h5", "w") as h5:
            h5["volumes/raw"], h5["volumes/labels/neuron_ids"] = IMAGE, LABEL
            h5["volumes/raw"].attrs["resolution"] = (40.0, 4.0, 4.0)
        volume = open_volume(tmp_path / "cremi.h5")
        assert set(volume.arrays) == {"image", "label"}
        assert volume.voxel_nm == (40, 4, 4)
        assert_is_image(open_volume(f"{tmp_path}/cremi.h5::volumes/raw"))
        assert open_volume(f"{tmp_path}/cremi.h5", voxel_nm=VOXEL).voxel_nm == VOXEL

    @pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.float64])
    def test_wide_images_get_one_scaling_from_their_true_range(self, tmp_path: Path, dtype: type) -> None:
        stored = (IMAGE.astype(float) * 3 + 100).astype(dtype)
        stored[0], stored[9, 0, 0] = 100, 4000  # the first section is flat: a scaling per section would differ
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5["image"] = stored
        volume = open_volume(tmp_path / "a.h5", voxel_nm=VOXEL)
        assert volume.scaling == Scaling(100, 4000)
        np.testing.assert_allclose(np.asarray(volume.image), (stored - 100.0) / 3900, atol=1e-6)
        np.testing.assert_allclose(volume.scaling.from_unit(np.asarray(volume.image)), stored, atol=1e-3)

    def test_a_constant_wide_image_is_black(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as h5:
            h5["image"] = np.full(SHAPE, 7, np.uint16)
        assert not np.asarray(open_volume(tmp_path / "a.h5", voxel_nm=VOXEL).image).any()


class TestTiff:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"compression": "zlib"},
            {"bigtiff": True},
            {"imagej": True},
            {"byteorder": ">", "bigtiff": True, "compression": "zlib"},
            {"metadata": None, "contiguous": False},
            {"rowsperstrip": 7},
            {"tile": (16, 16)},
        ],
    )
    def test_stacks_of_all_kinds(self, tmp_path: Path, options: dict) -> None:
        tifffile.imwrite(tmp_path / "a.tif", IMAGE, photometric="minisblack", **options)
        assert_is_image(open_volume(tmp_path / "a.tif", voxel_nm=VOXEL))

    def test_pages_written_one_by_one(self, tmp_path: Path) -> None:
        with tifffile.TiffWriter(tmp_path / "a.tiff") as writer:
            for section in IMAGE:
                writer.write(section, photometric="minisblack", metadata=None)
        assert_is_image(open_volume(tmp_path / "a.tiff", voxel_nm=VOXEL))

    @pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"metadata": None, "compression": "zlib"}])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.9])
    def test_truncated_stacks_are_refused_not_shortened(self, tmp_path: Path, options: dict, share: float) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, IMAGE, photometric="minisblack", **options)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(VolumeFormatError, match=r"a\.tif is truncated"):
            open_volume(path, voxel_nm=VOXEL)

    def test_a_single_section_is_a_thin_volume(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "a.tif", IMAGE[0])
        assert open_volume(tmp_path / "a.tif", voxel_nm=VOXEL).shape == (1, 20, 28)

    @pytest.mark.parametrize(("unit", "per_unit"), [("micron", 1000), ("um", 1000), ("\\u00B5m", 1000), ("nm", 1)])
    def test_imagej_voxel_size(self, tmp_path: Path, unit: str, per_unit: float) -> None:
        resolution = (per_unit / 5, per_unit / 4)  # x, y: pixels per unit
        metadata = {"spacing": 30 / per_unit, "unit": unit, "axes": "ZYX"}
        tifffile.imwrite(tmp_path / "a.tif", IMAGE, imagej=True, resolution=resolution, metadata=metadata)
        np.testing.assert_allclose(open_volume(tmp_path / "a.tif").voxel_nm, (30, 4, 5), rtol=1e-5)

    @pytest.mark.parametrize("metadata", [{"unit": "micron"}, {"spacing": 0.03, "unit": "pixel"}, {"spacing": 0.03}])
    def test_incomplete_imagej_voxel_size_is_none(self, tmp_path: Path, metadata: dict) -> None:
        tifffile.imwrite(
            tmp_path / "a.tif", IMAGE, imagej=True, resolution=(200, 200), metadata={"axes": "ZYX", **metadata}
        )
        with pytest.raises(VoxelSizeMissing):
            open_volume(tmp_path / "a.tif")

    def test_ome_voxel_size(self, tmp_path: Path) -> None:
        metadata = {
            "axes": "ZYX",
            "PhysicalSizeX": 5.0,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.004,
            "PhysicalSizeZ": 0.03,
            "PhysicalSizeZUnit": "µm",
        }
        tifffile.imwrite(tmp_path / "a.ome.tif", IMAGE, metadata=metadata, compression="zlib")
        volume = open_volume(tmp_path / "a.ome.tif")
        np.testing.assert_allclose(volume.voxel_nm, (30, 4, 5))
        assert_is_image(volume)

    def test_colours_and_more_axes_are_refused(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((4, 8, 9, 3), np.uint8), photometric="rgb")
        tifffile.imwrite(tmp_path / "5d.tif", np.zeros((2, 3, 4, 8, 9), np.uint8), photometric="minisblack")
        for name in ("rgb.tif", "5d.tif"):
            with pytest.raises(VolumeFormatError, match="grey sections"):
                open_volume(tmp_path / name, voxel_nm=VOXEL)


def write_sections(folder: Path, stack: np.ndarray, suffix: str = ".png") -> Path:
    """Section z as ``section_<z>``: in plain alphabetical order 10 comes before 2. Colours are red, green, blue."""
    folder.mkdir()
    for z, section in enumerate(stack):
        if suffix == ".png":
            assert cv2.imwrite(str(folder / f"section_{z}.png"), section[..., ::-1] if section.ndim == 3 else section)
        else:
            tifffile.imwrite(folder / f"section_{z}{suffix}", section)
    return folder


def as_colours(label: np.ndarray) -> np.ndarray:
    return np.stack([label >> 16, (label >> 8) & 255, label & 255], axis=-1).astype(np.uint8)


class TestSections:
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".TIF"])
    def test_sections_in_natural_order(self, tmp_path: Path, suffix: str) -> None:
        folder = write_sections(tmp_path / "stack", IMAGE, suffix)
        (folder / "notes.txt").write_text("not a section")
        assert_is_image(open_volume(folder, voxel_nm=VOXEL))

    def test_natural_order(self) -> None:
        names = ["b2.png", "a10.png", "a9.png", "a010b1.png", "A1.png", "7.png", "a.png"]
        assert sorted(names, key=natural_key) == [
            "7.png",
            "A1.png",
            "a9.png",
            "a10.png",
            "a010b1.png",
            "a.png",
            "b2.png",
        ]

    def test_colour_sections_are_ids(self, tmp_path: Path) -> None:
        folder = write_sections(tmp_path / "labels", as_colours(LABEL))
        volume = open_volume(folder, voxel_nm=VOXEL, role="label")
        np.testing.assert_array_equal(np.asarray(volume.label), LABEL)
        np.testing.assert_array_equal(open_array(folder, ["label"])[2], LABEL[2])

    def test_sixteen_bit_sections_are_ids_too(self, tmp_path: Path) -> None:
        folder = write_sections(tmp_path / "labels", (LABEL % 65536).astype(np.uint16))
        volume = open_volume(folder, voxel_nm=VOXEL, role="label")
        np.testing.assert_array_equal(np.asarray(volume.label), LABEL % 65536)

    def test_grey_images_saved_as_colours_are_grey(self, tmp_path: Path) -> None:
        assert_is_image(open_volume(write_sections(tmp_path / "rgb", np.stack([IMAGE] * 3, axis=-1)), voxel_nm=VOXEL))
        opaque = np.concatenate([np.stack([IMAGE] * 3, axis=-1), np.full((*SHAPE, 1), 255, np.uint8)], axis=-1)
        (tmp_path / "rgba").mkdir()
        for z, section in enumerate(opaque):
            cv2.imwrite(str(tmp_path / "rgba" / f"{z}.png"), section)
        assert_is_image(open_volume(tmp_path / "rgba", voxel_nm=VOXEL))

    def test_colour_sections_are_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(VolumeFormatError, match="--as label"):
            open_volume(write_sections(tmp_path / "rgb", as_colours(LABEL)), voxel_nm=VOXEL)

    @pytest.mark.parametrize("damage", ["shape", "dtype", "truncated"])
    def test_one_bad_section_is_named_on_reading(self, tmp_path: Path, damage: str) -> None:
        folder = write_sections(tmp_path / "stack", IMAGE)
        bad = folder / "section_7.png"
        if damage == "truncated":
            bad.write_bytes(bad.read_bytes()[:100])
        else:
            cv2.imwrite(str(bad), IMAGE[0, :10] if damage == "shape" else IMAGE[0].astype(np.uint16))
        volume = open_volume(folder, voxel_nm=VOXEL)
        assert volume.image is not None
        volume.image[:7]
        with pytest.raises(VolumeFormatError, match=r"section_7\.png"):
            volume.image[6:9]

    def test_mixed_folders_are_refused(self, tmp_path: Path) -> None:
        folder = write_sections(tmp_path / "stack", IMAGE)
        tifffile.imwrite(folder / "section_99.tif", IMAGE[0])
        with pytest.raises(VolumeFormatError, match="all PNG or all TIFF"):
            open_volume(folder, voxel_nm=VOXEL)


def _mean(volume: Volume) -> float:
    return float(np.asarray(volume.image).mean())


class TestZarr:
    @pytest.mark.parametrize("version", [2, 3])
    def test_array(self, tmp_path: Path, version: int) -> None:
        array = zarr.create_array(
            tmp_path / "a.zarr",
            shape=SHAPE,
            chunks=(4, 8, 8),
            dtype="uint8",
            zarr_format=version,  # type: ignore[arg-type]
        )
        array[...] = IMAGE
        array.attrs["voxel_size"] = list(VOXEL)
        volume = open_volume(tmp_path / "a.zarr")
        assert volume.voxel_nm == VOXEL
        assert_is_image(volume)

    @pytest.mark.parametrize("version", [2, 3])
    @pytest.mark.parametrize("key", ["resolution_nm", "resolution"])
    def test_group(self, tmp_path: Path, version: int, key: str) -> None:
        group = zarr.open_group(tmp_path / "plain_folder", mode="w", zarr_format=version)  # type: ignore[arg-type]
        group.create_array("image", data=IMAGE)
        group.create_array("label", data=LABEL)
        group.create_array("other/mito", data=IMAGE)
        group["image"].attrs[key] = list(VOXEL)
        volume = open_volume(tmp_path / "plain_folder")
        assert set(volume.arrays) == {"image", "label"}
        assert volume.voxel_nm == VOXEL
        np.testing.assert_array_equal(np.asarray(volume.label), LABEL)
        assert_is_image(open_volume(f"{tmp_path}/plain_folder::other/mito", role="image"))

    @pytest.mark.parametrize("nested", [False, True])
    def test_ngff_pyramid(self, tmp_path: Path, nested: bool) -> None:
        group = zarr.open_group(tmp_path / "a.ome.zarr", mode="w", zarr_format=3 if nested else 2)
        group.create_array("0", data=IMAGE[None, None])
        group.create_array("1", data=IMAGE[None, None, ::2, ::2, ::2])
        axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
        levels = [
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 0.03, 0.004, 0.005]}]}
            for i in range(2)
        ]
        entry = {"version": "0.4", "axes": [{"name": "t"}, {"name": "c"}, *axes], "datasets": levels}
        group.attrs.update({"ome": {"multiscales": [entry]}} if nested else {"multiscales": [entry]})
        volume = open_volume(tmp_path / "a.ome.zarr")
        np.testing.assert_allclose(volume.voxel_nm, (30, 4, 5))
        assert_is_image(volume)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_works_in_worker_processes(self, tmp_path: Path, method: str) -> None:
        zarr.create_array(tmp_path / "a.zarr", data=IMAGE)
        volume = open_volume(tmp_path / "a.zarr", voxel_nm=VOXEL)
        here = _mean(volume)
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map_async(_mean, [volume] * 4).get(timeout=60) == [here] * 4


@pytest.mark.parametrize("stated", [(0, 6, 6), (29, float("nan"), 6), (6, 6), "29 nm", (0.029, 0.006, 0.006)])
def test_a_voxel_size_that_is_none_is_shown_and_can_be_given(tmp_path: Path, stated: object) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = IMAGE
        file.attrs["resolution_nm"] = stated
    with pytest.raises(ValueRangeError, match=r"a\.h5: .*three positive numbers.*resolution_nm is .*--voxel-nm"):
        open_volume(tmp_path / "a.h5")
    assert open_volume(tmp_path / "a.h5", voxel_nm=VOXEL).voxel_nm == VOXEL


@pytest.mark.parametrize("multiscales", [{"x": 1}, [{}], [{"datasets": [{}]}], ["a"]])
def test_damaged_ngff_metadata_are_told_in_one_line(tmp_path: Path, multiscales: object) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("0", data=IMAGE)
    group.attrs["multiscales"] = multiscales
    with pytest.raises(VolumeFormatError, match="OME-NGFF"):
        open_volume(tmp_path / "a.zarr", voxel_nm=VOXEL)


def test_no_format_invents_a_voxel_size(tmp_path: Path) -> None:
    write_sections(tmp_path / "stack", IMAGE)
    tifffile.imwrite(tmp_path / "a.tif", IMAGE)
    zarr.create_array(tmp_path / "a.zarr", data=IMAGE)
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["main"] = IMAGE
    for name in ("stack", "a.tif", "a.zarr", "a.h5"):
        with pytest.raises(VoxelSizeMissing, match="--voxel-nm"):
            open_volume(tmp_path / name)
        with pytest.raises(VoxelSizeMissing):
            read_voxel_size(tmp_path / name)


@pytest.mark.parametrize("name", ["a.h5", "a.tif", "a.zarr"])
def test_files_of_another_kind_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    if name == "a.zarr":
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text("{")
    else:
        (tmp_path / name).write_bytes(b"this is not a volume" * 50)
    with pytest.raises(UserError) as caught:
        open_volume(tmp_path / name, voxel_nm=VOXEL)
    assert isinstance(caught.value, VolumeFormatError)
    assert "\n" not in str(caught.value)
