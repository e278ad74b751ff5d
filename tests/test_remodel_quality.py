"""The gate: what it lets pass, and why not; shapes from files; the stage that draws a bad mask again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_remodel import VOXEL, tissue

from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import UserError
from connectomics_neurodiff.pipeline import masks_stage, run_pipeline
from connectomics_neurodiff.remodel import (
    MaskLimits,
    RemodelledMask,
    SignatureLibrary,
    gather_libraries,
    mask_gate,
    quality_report,
    remodel,
)
from connectomics_neurodiff.seeding import rng_for


@pytest.fixture(scope="module")
def sound() -> tuple[np.ndarray, np.ndarray, RemodelledMask]:
    label, mito = tissue()
    return label, mito, remodel(label, mito, VOXEL, rng_for(0), candidate_fraction=0.3)


def test_a_sound_mask_passes(sound) -> None:
    label, mito, mask = sound
    report = quality_report(label, mito, mask, VOXEL)
    assert mask_gate(report, MaskLimits()) == ""
    assert 0.2 <= report["min_jacobian"] < 1


def test_a_mask_equals_itself(sound) -> None:
    _, _, mask = sound
    report = quality_report(mask.label, mask.mito, mask, VOXEL)
    assert report["profile_change"] == 0
    assert report["mito_height_p"] == report["label_overlap"] == report["mito_overlap"] == 1
    pairs = [(value, report[f"source_{name}"]) for name, value in report.items() if f"source_{name}" in report]
    assert len(pairs) == 9
    assert all(value == source for value, source in pairs)


def broken(mask: RemodelledMask, how: str) -> RemodelledMask:
    """The mask with one fault."""
    label, membrane, mito = mask.label.copy(), mask.membrane.copy(), mask.mito.copy()
    if how == "lost":
        label[label == label[0, -1, 0]] = 0
    if how == "torn":
        label[:, 20:22][label[:, 20:22] == 1] = 0
    if how == "outside":
        label[mito > 0] = 0
    if how == "membrane":
        membrane[mito > 0] = 1
    if how == "several":
        wall = int(np.flatnonzero(np.diff(label[5, 30].astype(int)))[0])
        across = (5, 30, slice(wall, wall + 2))
        mito[across], membrane[across] = 1, 0
    if how == "thick":
        membrane[:, ::3] = 1
        mito[membrane > 0] = 0
    if how == "none":
        mito[:] = 0
    return replace(mask, label=label, membrane=membrane, mito=mito)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("lost", "labels lost"),
        ("torn", "labels torn"),
        ("outside", "outside neurons"),
        ("membrane", "on membranes"),
        ("several", "more than one neuron"),
        ("thick", "Membranes fill"),
        ("none", "Mitochondria fill 0.00 %"),
    ],
)
def test_a_bad_mask_is_rejected_with_a_reason(sound, how: str, reason: str) -> None:
    label, mito, mask = sound
    verdict = mask_gate(quality_report(label, mito, broken(mask, how), VOXEL), MaskLimits())
    assert reason in verdict
    assert "\n" not in verdict


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_jacobian": -0.1}, "folds"),
        ({"profile_change": 0.3}, "profiles"),
        ({"mito_height_p": 0.01, "source_mito_count": 20.0}, "as high"),
        ({"mito_height_p": 0.01, "source_mito_count": 19.0}, ""),
        # One of 5 mitochondria more or less is as near as one can get; of 20 it is not.
        ({"mito_fraction": 0.058, "source_mito_fraction": 0.05, "source_mito_count": 5.0}, ""),
        ({"mito_fraction": 0.058, "source_mito_fraction": 0.05, "source_mito_count": 20.0}, "Mitochondria fill"),
        ({"mito_fraction": 0.03, "source_mito_fraction": 0.0, "source_mito_count": 0.0}, ""),
    ],
)
def test_limits_are_kept(sound, change: dict[str, float], reason: str) -> None:
    report = quality_report(*sound, VOXEL) | change
    verdict = mask_gate(report, MaskLimits())
    assert reason in verdict
    assert bool(verdict) == bool(reason)


def test_share_asked_for_stands_for_the_source_s(sound) -> None:
    report = quality_report(*sound, VOXEL) | {"mito_count": 20.0, "mito_fraction": 0.1}
    assert "of the source" in mask_gate(report, MaskLimits())
    assert not mask_gate(report, MaskLimits(), 0.1)
    assert "12.00 % were asked for" in mask_gate(report, MaskLimits(), 0.12)
    none = report | {"mito_count": 0.0, "mito_fraction": 0.0, "source_mito_count": 0.0}
    assert not mask_gate(none, MaskLimits())
    assert "0.00 % of it, 12.00 % were" in mask_gate(none, MaskLimits(), 0.12).replace("fill ", "")


def test_numbers_by_hand() -> None:
    """Two neurons of 4 x 6 and 4 x 4 voxels in 2 sections, one of which moves by a row."""
    label = np.zeros((2, 8, 12), dtype=np.uint8)
    label[:, 0:4, 0:6] = 1
    label[0, 4:8, 0:4] = label[1, 3:7, 8:12] = 2
    mito = np.zeros_like(label)
    mito[0, 1:3, 1:4] = 1
    report = quality_report(label, mito, RemodelledMask(label, 0 * label, mito), VOXEL)
    voxel, pixel = 29 * 36, 36
    assert report["neuron_median_nm3"] == (48 + 32) / 2 * voxel
    assert report["profile_median_nm2"] == (24 + 16) / 2 * pixel
    assert report["label_section_iou"] == 24 / (24 + 16 + 16)
    assert report["mito_profile_median_nm2"] == 6 * pixel
    assert report["mito_mean_z_nm"] == 29


def test_libraries_of_files_join_the_volume_s_own(tmp_path: Path) -> None:
    label, mito = tissue()
    own = SignatureLibrary.from_masks(label, mito, VOXEL)
    path = tmp_path / "shapes.npz"
    own.save(path)
    both = gather_libraries(label, mito, VOXEL, [path])
    assert both is not None
    assert len(both) == 2 * len(own)
    alone = gather_libraries(label, None, VOXEL, [path])
    assert alone is not None
    assert alone.mito_fraction == own.mito_fraction
    assert gather_libraries(label, 0 * mito, VOXEL, []) is None


def test_a_volume_whose_mitochondria_are_specks_gets_membranes_alone(caplog: pytest.LogCaptureFixture) -> None:
    label, mito = tissue()
    speck = np.zeros_like(mito)
    speck[tuple(np.argwhere(mito)[0])] = 1
    library = gather_libraries(label, speck, VOXEL, [])
    assert "masks will have none" in caplog.text
    assert not remodel(label, speck, VOXEL, rng_for(0), library=library).mito.any()


def masks_of(folder: Path, *overrides: str) -> Path:
    """Folder of the masks that the pipeline makes of a small phantom."""
    options = [
        "DATASET.IMAGE_NAME", "phantom", "DATASET.INPUT_PATH", str(folder), "DATASET.OUTPUT_PATH", str(folder / "out"),
        "NEURODIFF.PHANTOM.SHAPE", "[12, 64, 80]", "AUGMENTOR.SYNTHETIC.ENABLED", "True",
        "NEURODIFF.SPLIT.SCORED", "False", *overrides,
    ]  # fmt: skip
    run_pipeline(load_config(overrides=options), stages=["masks"])
    return folder / "out" / "masks"


def test_the_stage_writes_a_report_and_draws_a_bad_mask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verdicts = iter(["It is bad.", ""])
    monkeypatch.setattr(masks_stage, "mask_gate", lambda report, *_: next(verdicts))
    folder = masks_of(tmp_path)
    report = json.loads((folder / "copy_000.quality.json").read_text())
    assert report["attempt"] == 1
    assert report["labels_lost"] == 0
    assert report["limits"]["MITO_FRACTION"] == 0.1
    assert "It is bad." in caplog.text


def test_after_the_last_attempt_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(masks_stage, "mask_gate", lambda report, *_: tried.append(report) or "It is bad.")
    with pytest.raises(UserError, match=r"3 attempts .*It is bad\..*LIMITS"):
        masks_of(tmp_path, "NEURODIFF.REMODEL.ATTEMPTS", "3")
    assert len({report["mito_overlap"] + report["label_overlap"] for report in tried}) == 3
    assert not list((tmp_path / "out" / "masks").glob("*.h5"))


def test_the_stage_places_the_share_and_the_number_asked_for(tmp_path: Path) -> None:
    """More than the source has passes its gate when it was asked for."""
    keys = ["NEURODIFF.REMODEL.CANDIDATE_FRACTION", "1.0", "NEURODIFF.REMODEL.MITO_FRACTION", "0.05"]
    folder = masks_of(tmp_path, *keys, "NEURODIFF.REMODEL.MITO_COUNT", "2")
    report = json.loads((folder / "copy_000.quality.json").read_text())
    assert report["mito_fraction"] == pytest.approx(0.05, rel=0.1)
    # Mitochondria in another number have other heights: they are not compared, and the report says so.
    assert report["limits"]["MITO_HEIGHT_P"] == 0
    assert report["limits"]["MITO_FRACTION"] == 0.1
