"""Phantoms: what the labels promise, what the image shows, and that both depend on the arguments alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cc3d
import numpy as np
import pytest
from scipy import ndimage

from connectomics_neurodiff.errors import ValueRangeError
from connectomics_neurodiff.volume import Volume, grow_phantom, open_volume, write_volume
from connectomics_neurodiff.volume.phantom import _nearest_neurite
from connectomics_neurodiff.volume.phantom_neurites import Path as Neurite
from connectomics_neurodiff.volume.phantom_render import smooth_noise

CASES = [
    ((24, 128, 128), (29.0, 6.0, 6.0), 0),
    ((12, 100, 140), (50.0, 4.6, 5.0), 1),
    ((56, 48, 64), (8.0, 8.0, 8.0), 2),
    ((3, 24, 32), (29.0, 6.0, 6.0), 3),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def phantom(request: pytest.FixtureRequest) -> Volume:
    shape, voxel, seed = request.param
    volume = grow_phantom(shape, voxel, seed)
    assert volume.shape == shape
    assert volume.voxel_nm == voxel
    return volume


def arrays(volume: Volume) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.asarray(volume.image), np.asarray(volume.label), np.asarray(volume.mito)


def test_types_and_ranges(phantom: Volume) -> None:
    image, label, mito = arrays(phantom)
    assert (image.dtype, label.dtype, mito.dtype) == (np.float32, np.uint64, np.uint8)
    assert image.min() >= 0
    assert image.max() <= 1
    assert set(np.unique(mito)) == {0, 1}


def test_ids_are_consecutive_and_each_is_one_component(phantom: Volume) -> None:
    _, label, _ = arrays(phantom)
    ids = np.unique(label)
    np.testing.assert_array_equal(ids, np.arange(len(ids)))
    assert len(ids) > 4
    for neuron in ids[1:]:
        assert ndimage.label(label == neuron, structure=np.ones((3, 3, 3)))[1] == 1


def test_space_is_filled_but_neurites_do_not_touch_within_a_section(phantom: Volume) -> None:
    _, label, _ = arrays(phantom)
    assert 0.55 < (label > 0).mean() < 0.97
    for axis in (1, 2):
        a, b = np.moveaxis(label, axis, 0)[:-1], np.moveaxis(label, axis, 0)[1:]
        assert not ((a != b) & (a > 0) & (b > 0)).any()


def test_each_mitochondrion_lies_in_one_neurite(phantom: Volume) -> None:
    _, label, mito = arrays(phantom)
    bodies = cc3d.connected_components(mito, connectivity=26)
    for body in range(1, bodies.max() + 1):
        owners = np.unique(label[bodies == body])
        assert len(owners) == 1
        assert owners[0] > 0


def test_membranes_are_darkest_and_mitochondria_darker_than_cytoplasm(phantom: Volume) -> None:
    image, label, mito = arrays(phantom)
    membrane = image[label == 0].mean()
    inside = ndimage.binary_erosion(label > 0, np.ones((1, 3, 3)))
    cytoplasm = image[inside & (mito == 0)].mean()
    assert membrane < image[mito == 1].mean() < cytoplasm
    assert cytoplasm - membrane > 0.15


def test_a_file_holds_it_exactly(phantom: Volume, tmp_path: Path) -> None:
    write_volume(tmp_path / "a.h5", phantom.arrays, phantom.voxel_nm)
    again = open_volume(tmp_path / "a.h5").load()
    for name, array in phantom.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_seed_decides_everything() -> None:
    first, again, other = (arrays(grow_phantom((6, 40, 48), seed=seed)) for seed in (4, 4, 5))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[1], other[1])


def test_another_process_grows_the_same() -> None:
    code = (
        "import hashlib; from connectomics_neurodiff.volume import grow_phantom; v = grow_phantom((6, 40, 48), seed=4);"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in v.arrays.values())).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65


def test_mitochondria_fill_about_the_fraction_asked_for() -> None:
    _, _, some = arrays(grow_phantom((24, 128, 128), seed=1, mito_fraction=0.06))
    assert some.mean() == pytest.approx(0.06, abs=0.02)
    _, _, none = arrays(grow_phantom((12, 64, 64), seed=1, mito_fraction=0))
    assert not none.any()


def test_larger_diameters_give_fewer_neurites() -> None:
    thin, thick = (arrays(grow_phantom((10, 64, 64), seed=2, diameter_nm=d))[1].max() for d in (50, 110))
    assert thin > 2 * thick


def test_neurites_are_elongated() -> None:
    """A ball fills pi/6 of its bounding box's longest edge cubed; a tube far less."""
    _, label, _ = arrays(grow_phantom((48, 48, 48), (8, 8, 8), seed=0, diameter_nm=90))
    counts = np.bincount(label.ravel().astype(int))
    filled = [
        counts[i + 1] / max(s.stop - s.start for s in box) ** 3
        for i, box in enumerate(ndimage.find_objects(label.astype(np.int32)))
    ]
    assert np.median(filled) < 0.5 * np.pi / 6


def test_membrane_width_counts_in_nanometres() -> None:
    """Dark voxels around the surface: the same nanometres at half the voxel size."""

    def dark_fraction(n: int, voxel: float) -> float:
        image, _, _ = arrays(grow_phantom((n, n, n), (voxel, voxel, voxel), seed=7, mito_fraction=0, noise=0.0))
        return float((image < 0.45).mean())

    coarse, fine = dark_fraction(32, 16.0), dark_fraction(64, 8.0)
    assert fine == pytest.approx(coarse, rel=0.35)


def test_sections_drift_in_brightness_only_where_they_are_cut() -> None:
    def spread(voxel: tuple[float, float, float]) -> float:
        image, label, mito = arrays(grow_phantom((20, 64, 64), voxel, seed=3))
        cytoplasm = np.where((label > 0) & (mito == 0), image, np.nan)
        return float(np.std(np.diff(np.nanmedian(cytoplasm, axis=(1, 2)))))

    assert spread((29, 6, 6)) > 3 * spread((8, 8, 8))


@pytest.mark.parametrize("radius", [250.22602288194534, 122.80272654099086, 380.8919017825329])
def test_every_voxel_goes_to_the_nearest_surface(radius: float) -> None:
    """Also where the largest radius, squared as a scalar, is rounded below its square in an array."""
    paths = [Neurite(np.array([[0.0, 0.0, 500.0 * i]]), np.array([radius / (1 + i)]), i) for i in range(2)]
    grid = np.stack(np.meshgrid([0.0, 30.0], np.arange(9) * 20.0, np.arange(40) * 15.0, indexing="ij"), axis=-1)
    away = [((grid - path.points) ** 2).sum(axis=-1) - path.radii[0] ** 2 for path in paths]
    assert np.array_equal(_nearest_neurite(paths, grid, np.array([1, 1, 1])), 1 + np.argmin(away, axis=0))


def test_smooth_noise_has_unit_variance_and_its_length() -> None:
    noise = smooth_noise((64, 96, 128), np.array([8.0, 8.0, 4.0]), 40.0, np.random.default_rng(0))
    assert noise.shape == (64, 96, 128)
    assert noise.std() == pytest.approx(1, abs=0.05)

    def correlation(axis: int, step: int) -> float:
        a, b = (noise.take(range(start, noise.shape[axis] - step + start), axis) for start in (0, step))
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    assert correlation(0, 5) == pytest.approx(correlation(2, 10), abs=0.05)  # both 40 nm
    assert correlation(1, 1) > 0.9
    assert abs(correlation(1, 25)) < 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": (0, 10, 10)},
        {"shape": (10, 10)},
        {"shape": (4, 8, 8.5)},
        {"voxel_nm": (29, 6, 0)},
        {"diameter_nm": -1},
        {"diameter_nm": float("nan")},
        {"mito_fraction": 0.9},
        {"gap_nm": -1},
        {"noise": 2},
        {"gap_nm": 9000},
    ],
)
def test_parameters_are_checked(arguments: dict) -> None:
    with pytest.raises(ValueRangeError, match=r"Got|too small"):
        grow_phantom(**{"shape": (4, 16, 16), **arguments})


@pytest.mark.parametrize("shape", [(1, 40, 40), (40, 4, 30), (2, 9, 11)])
def test_thin_shapes_work(shape: tuple[int, int, int]) -> None:
    assert arrays(grow_phantom(shape))[1].any()


def test_speed() -> None:
    """A demo-sized phantom takes about 2 s on one core; four times that leaves room for a busy machine."""
    start = time.process_time()
    grow_phantom((32, 160, 160))
    assert time.process_time() - start < 8
