"""Training crops: pure functions of (seed, i), geometry kept, any volume size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from connectomics_neurodiff.conditions import DARK_LEVEL, NULL_CONDITION, membrane_from_labels
from connectomics_neurodiff.errors import MissingInput, UnknownName, ValueRangeError
from connectomics_neurodiff.geometry import ZYX
from connectomics_neurodiff.synthesis import DiffusionCrops, DiffusionProcess, cosine_betas
from connectomics_neurodiff.volume import Volume

PROCESS = DiffusionProcess(cosine_betas(250))
SHAPE, VOXEL = (6, 20, 28), ZYX(29.0, 6.0, 6.0)


def volume(shape: tuple[int, int, int] = SHAPE, voxel: ZYX = VOXEL, mito: bool = True) -> Volume:
    """Every voxel of the image has a grey value of its own, so that a crop betrays where it was cut."""
    image = np.linspace(0.05, 0.95, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    label = np.ones(shape, np.uint64)
    label[:, :, shape[2] // 2 :] = 2
    return Volume(image, label, (image > 0.7).astype(np.uint8) if mito else None, voxel)


def crops(*volumes: Volume, patch: tuple[int, int, int] = (4, 12, 12), seed: int = 0, **options: Any) -> DiffusionCrops:
    return DiffusionCrops(volumes or (volume(),), patch, seed, PROCESS, **({"thickness_nm": 12.0} | options))


def clean_image(sample: dict[str, np.ndarray], source: Volume | None = None) -> np.ndarray:
    """The image in [0, 1] behind a noisy sample of a volume, whose mean and spread it is scaled by."""
    image = (source or volume()).array("image").astype(float)
    clean = PROCESS.clean_from(sample["target"].astype(float), sample["noisy"].astype(float), int(sample["t"]))
    return np.asarray(clean[0] * image.std() + image.mean())


def low_noise(dataset: DiffusionCrops, count: int) -> list[dict[str, np.ndarray]]:
    """Samples at steps where the image can be told from the noise in float32."""
    samples = (dataset[i] for i in range(4000))
    return [s for s, _ in zip((s for s in samples if s["t"] < 180), range(count), strict=False)]


@pytest.mark.parametrize("index", [0, 1, 10**9])
def test_samples_are_pure_functions_of_seed_and_index(index: int) -> None:
    first, again, other = crops()[index], crops()[index], crops(seed=1)[index]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["target"], other["target"])


def test_shapes_types_and_ranges() -> None:
    sample = crops()[5]
    assert {name: (value.shape, value.dtype.name) for name, value in sample.items()} == {
        "noisy": ((1, 4, 12, 12), "float32"),
        "target": ((1, 4, 12, 12), "float32"),
        "t": ((), "int64"),
        "condition": ((2, 4, 12, 12), "float32"),
        "voxel_nm": ((3,), "float32"),
    }
    assert set(np.unique(sample["condition"])) <= {0.0, 1.0}
    assert sample["voxel_nm"].tolist() == [29, 6, 6]


def test_without_augmentation_a_crop_is_a_piece_of_the_volume_with_its_condition() -> None:
    source = volume()
    membrane = membrane_from_labels(source.label, VOXEL, 12.0)
    for sample in low_noise(crops(source, flips=False, transpose=False, intensity_jitter=0.0), 10):
        image = clean_image(sample)
        corner = np.argwhere(np.abs(source.image - image[0, 0, 0]) < 1e-4)
        assert len(corner) == 1
        cut = tuple(slice(c, c + n) for c, n in zip(corner[0], image.shape, strict=True))
        np.testing.assert_allclose(image, source.image[cut], atol=1e-4)
        np.testing.assert_array_equal(sample["condition"][0], membrane[cut])
        np.testing.assert_array_equal(sample["condition"][1], source.mito[cut])


def test_what_is_dark_has_a_level_of_its_own_in_the_condition() -> None:
    source = volume()
    dark = ((source.array("image") > 0.3) & (source.array("image") < 0.5)).astype(np.uint8)
    told = replace(source, dark=dark)
    plain = {"flips": False, "transpose": False, "intensity_jitter": 0.0}
    for sample, untold in zip(low_noise(crops(told, **plain), 10), low_noise(crops(source, **plain), 10), strict=True):
        image = clean_image(sample)
        inside = np.where((image > 0.3) & (image < 0.5), DARK_LEVEL, (image > 0.7).astype(float))
        np.testing.assert_array_equal(sample["condition"][1], inside)
        np.testing.assert_array_equal(sample["noisy"], untold["noisy"])


def test_image_and_condition_turn_together() -> None:
    """The mitochondria are where the image is bright, whatever the orientation."""
    for sample in low_noise(crops(intensity_jitter=0.0), 20):
        image = clean_image(sample)
        clear = np.abs(image - 0.7) > 1e-3
        np.testing.assert_array_equal((image > 0.7)[clear], sample["condition"][1].astype(bool)[clear])


def test_all_sixteen_orientations_occur() -> None:
    seen = set()
    for sample in low_noise(crops(intensity_jitter=0.0), 300):
        gradient = [np.diff(clean_image(sample), axis=axis).mean() for axis in range(3)]
        seen.add((*(g > 0 for g in gradient), abs(gradient[1]) > abs(gradient[2])))
    assert len(seen) == 16


def test_a_patch_that_is_not_square_is_not_transposed() -> None:
    for sample in low_noise(crops(patch=(4, 8, 12), intensity_jitter=0.0), 20):
        gradient = [abs(np.diff(clean_image(sample), axis=axis).mean()) for axis in (1, 2)]
        assert gradient[0] > gradient[1]


@pytest.mark.parametrize(("voxel", "turned"), [(ZYX(29.0, 6.0, 6.0), (29, 6, 6)), (ZYX(30.0, 8.0, 4.0), (30, 4, 8))])
def test_the_voxel_size_turns_with_the_crop(voxel: ZYX, turned: tuple[int, int, int]) -> None:
    """A row is 28 voxels long: the axis along which grey values change fast is y of the volume."""
    for sample in low_noise(crops(volume(voxel=voxel), intensity_jitter=0.0), 20):
        gradient = [abs(np.diff(clean_image(sample), axis=axis).mean()) for axis in (1, 2)]
        expected = tuple(voxel) if gradient[0] > gradient[1] else turned
        assert tuple(sample["voxel_nm"].tolist()) == expected


def test_every_voxel_is_used() -> None:
    source = volume((5, 14, 16))
    dataset = crops(source, patch=(3, 8, 8), flips=False, transpose=False, intensity_jitter=0.0)
    used = np.zeros(source.shape, bool)
    for sample in low_noise(dataset, 2500):
        corner = np.unravel_index(np.abs(source.image - clean_image(sample, source)[0, 0, 0]).argmin(), source.shape)
        used[tuple(slice(c, c + n) for c, n in zip(corner, (3, 8, 8), strict=True))] = True
    assert used.all()


@pytest.mark.parametrize("shape", [(2, 20, 28), (6, 5, 28), (1, 3, 4)])
def test_volumes_smaller_than_the_patch_are_reflected(shape: tuple[int, int, int]) -> None:
    source = volume(shape)
    for sample in low_noise(crops(source, intensity_jitter=0.0), 3):
        image = clean_image(sample, source)
        assert image.shape == (4, 12, 12)
        distance = np.abs(image.reshape(-1, 1) - source.image.reshape(1, -1)).min(axis=1)
        assert distance.max() < 1e-3  # nothing but grey values of the volume
        assert sample["condition"].shape == (2, 4, 12, 12)


def test_intensity_jitter_stays_within_its_bounds() -> None:
    plain = crops(flips=False, transpose=False, intensity_jitter=0.0)
    moved = crops(flips=False, transpose=False, intensity_jitter=0.1)
    shifts = []
    for i in range(40):
        if plain[i]["t"] < 180:
            shifts.append(np.abs(clean_image(moved[i]) - clean_image(plain[i])).max())
    assert max(shifts) <= 0.1 + 0.1 + 1e-3
    assert len({round(float(shift), 6) for shift in shifts}) == len(shifts)


def test_steps_and_volumes_are_drawn_evenly() -> None:
    dataset = crops(volume((6, 20, 28)), volume((6, 20, 84), ZYX(8.0, 8.0, 8.0)))
    samples = [dataset[i] for i in range(600)]
    share = np.mean([s["voxel_nm"][0] == 8 for s in samples])
    assert share == pytest.approx(0.75, abs=0.08)  # in proportion to their voxels
    counts = np.histogram([s["t"] for s in samples], bins=5, range=(0, 250))[0]
    assert counts.min() > 80
    noise = np.concatenate([s["target"].ravel() for s in samples[:100]])
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))


def test_without_mitochondria_their_channel_is_zero() -> None:
    assert not crops(volume(mito=False))[0]["condition"][1].any()


def test_every_volume_has_a_scale_of_its_own() -> None:
    """A dim volume of little contrast reaches the network as the bright one does."""
    bright = volume()
    dim = Volume(0.1 + 0.2 * bright.array("image"), bright.label, None, ZYX(8.0, 8.0, 8.0))
    dataset = crops(bright, dim, intensity_jitter=0.0)
    for scale, source in zip(dataset.scales, (bright, dim), strict=True):
        assert scale.mean == pytest.approx(float(source.array("image").mean()), abs=1e-6)
        assert scale.std == pytest.approx(float(source.array("image").std()), rel=1e-5)
    samples = low_noise(dataset, 200)
    for size, source in ((29, bright), (8, dim)):
        found = np.concatenate([clean_image(s, source).ravel() for s in samples if s["voxel_nm"][0] == size])
        assert float(found.mean()) == pytest.approx(float(source.array("image").mean()), abs=0.03)


def test_noise_levels_are_drawn_as_told() -> None:
    dataset = crops(noise_mean=1.0, noise_spread=0.5)
    drawn = [int(dataset[i]["t"]) for i in range(400)]
    level = 0.5 * np.log((1 - PROCESS.signal) / PROCESS.signal)[drawn]
    assert float(level.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(level.std()) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("patch", [(4, 12), (0, 12, 12), (4, 12, -1)])
def test_patches_that_are_refused(patch: tuple[int, ...]) -> None:
    with pytest.raises(ValueRangeError, match="Got"):
        crops(patch=patch)  # type: ignore[arg-type]


def test_volumes_that_cannot_be_trained_on() -> None:
    whole = volume()
    with pytest.raises(MissingInput):
        DiffusionCrops([], (4, 12, 12), 0, PROCESS, thickness_nm=12.0)
    for lacking in (Volume(None, whole.label, None, VOXEL), Volume(whole.image, None, None, VOXEL)):
        with pytest.raises(MissingInput):
            crops(lacking)


def test_a_volume_without_labels_is_learnt_without_masks() -> None:
    labelled, image = volume(), replace(volume((5, 20, 24)), label=None, mito=None)
    dataset = crops(labelled, image, share="equal")
    null = [bool((dataset[i]["condition"] == NULL_CONDITION).all()) for i in range(200)]
    assert 70 < sum(null) < 130, "half of them"
    assert len(dataset.scales) == 2
    with pytest.raises(MissingInput, match="image and label"):
        crops(image)


@pytest.mark.parametrize(("annotated", "share"), [(0, 1 / 11), (1, 1 / 2), (2, 1 / 11)])
def test_annotated_volumes_are_half_of_the_samples_at_least(annotated: int, share: float) -> None:
    dataset = crops(volume((6, 20, 28)), volume((6, 20, 280), ZYX(8.0, 8.0, 8.0)), annotated=annotated)
    assert np.mean([dataset[i]["voxel_nm"][0] == 29 for i in range(600)]) == pytest.approx(share, abs=0.06)


def test_equal_shares_do_not_starve_a_small_volume() -> None:
    dataset = crops(volume((6, 20, 28)), volume((6, 20, 280), ZYX(8.0, 8.0, 8.0)), share="equal")
    share = np.mean([dataset[i]["voxel_nm"][0] == 8 for i in range(400)])
    assert share == pytest.approx(0.5, abs=0.08)  # by voxels it would be 10/11


def test_dropping_changes_nothing_but_what_is_dropped() -> None:
    plain, dropping = crops(), crops(condition_dropout=0.3, voxel_size_dropout=0.2)
    counts = {"condition": 0, "voxel_nm": 0, "both": 0}
    for i in range(400):
        before, after = plain[i], dropping[i]
        for name in ("noisy", "target", "t"):
            np.testing.assert_array_equal(before[name], after[name])
        without_masks = not np.array_equal(before["condition"], after["condition"])
        without_size = not np.array_equal(before["voxel_nm"], after["voxel_nm"])
        if without_masks:
            assert (after["condition"] == 0.5).all()
            assert after["condition"].shape == before["condition"].shape
        if without_size:
            assert after["voxel_nm"].tolist() == [0, 0, 0]
        counts["condition"] += without_masks
        counts["voxel_nm"] += without_size
        counts["both"] += without_masks and without_size
    assert counts["condition"] / 400 == pytest.approx(0.3, abs=0.07)
    assert counts["voxel_nm"] / 400 == pytest.approx(0.2, abs=0.07)
    assert counts["both"] / 400 == pytest.approx(0.06, abs=0.04)  # one by one, not together
    assert all(np.array_equal(dropping[7][name], dropping[7][name]) for name in dropping[7])


@pytest.mark.parametrize("options", [{"condition_dropout": 1.0}, {"voxel_size_dropout": -0.1}])
def test_dropouts_that_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueRangeError, match=r"in \[0, 1\)"):
        crops(**options)
    with pytest.raises(UnknownName, match="Did you mean 'equal'"):
        crops(share="eqal")
