"""Unannotated tissue: which voxels it is, that nobody looks at its labels, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import settings

from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import ConfigError, MissingInput, UserError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.pipeline import choose_stages, run_pipeline
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.pipeline.plan import artefacts_of, describe_plan, estimates
from connectomics_neurodiff.pipeline.unlabeled import mask_copies, open_unlabeled, unlabeled_entries
from connectomics_neurodiff.volume import grow_phantom, open_volume, write_volume

PARTS = {
    "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 8, 72, 44]",
    "NEURODIFF__SPLIT__TUNE__BOX": "[8, 0, 0, 13, 72, 88]",
    "NEURODIFF__SPLIT__TEST__BOX": "[13, 0, 0, 19, 72, 88]",
}
#: Of the phantom of 20 x 72 x 88 voxels, what holds a patch of 6 x 32 x 40 beside them.
LEFT = Box((0, 0, 44), (8, 72, 88))
SHORT = {"SOLVER__ITERATION_TOTAL": "4", "NEURODIFF__DIFFUSION__ITERATIONS": "2", "NEURODIFF__FID__PATCHES": "0"}


def config(folder: Path, sources: list[str], unlabeled: object = "rest", **changes: str):  # type: ignore[no-untyped-def]
    given = {"DATASET__UNLABELED": str(unlabeled), "AUGMENTOR__SYNTHETIC__SOURCE": str(sources)}
    return load_config(overrides=settings(folder, **PARTS, **SHORT, **given, **changes))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled volume; another image without labels, with wrong ones, with other voxels, and its labels alone."""
    folder = tmp_path_factory.mktemp("inputs")
    volume = grow_phantom((20, 72, 88), (29, 6, 6), 0)
    write_volume(folder / "all.h5", volume.arrays, volume.voxel_nm, {})
    elsewhere = grow_phantom((9, 40, 48), (29, 6, 6), 1)
    write_volume(folder / "image.h5", {"image": elsewhere.array("image")}, elsewhere.voxel_nm, {})
    write_volume(folder / "coarse.h5", {"image": elsewhere.array("image")}, (29, 8, 8), {})
    write_volume(folder / "label.h5", {"label": elsewhere.array("label")}, elsewhere.voxel_nm, {})
    wrong = {"image": elsewhere.array("image"), "label": np.ones_like(elsewhere.array("label"))}
    write_volume(folder / "wrong.h5", wrong, elsewhere.voxel_nm, {})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that makes all kinds of pairs."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run_pipeline(config(folder, ["remodelled", "repainted", "pseudo"]))
    return folder


def test_the_rest_is_what_no_part_has(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["repainted"], SOLVER__ITERATION_SAVE="3")
    assert unlabeled_entries(cfg) == [{"BOX": [*LEFT.start, *LEFT.stop]}]
    found = np.zeros((20, 72, 88), int)
    small = load_config(
        overrides=[*settings(tmp_path, **PARTS), "DATASET.UNLABELED", "rest", "MODEL.INPUT_SIZE", "[1,1,1]"]
    )
    for entry in unlabeled_entries(small):
        found[Box(tuple(entry["BOX"][:3]), tuple(entry["BOX"][3:])).slices] += 1
    taken = np.zeros_like(found)
    for part in open_parts(small).values():
        taken[part.box.slices] += 1
    assert (found + taken == 1).all(), "every voxel once"


def test_parts_in_other_files_take_nothing_from_the_rest(inputs: Path, tmp_path: Path) -> None:
    files = {"DATASET__INPUT_PATH": str(inputs), "DATASET__IMAGE_NAME": "all.h5"}
    cfg = config(tmp_path, ["pseudo"], NEURODIFF__SPLIT__TEST__IMAGE_NAME="other.h5", **files)
    boxes = [entry["BOX"] for entry in unlabeled_entries(cfg)]
    assert boxes == [[13, 0, 0, 20, 72, 88], [0, 0, 44, 8, 72, 88]]


def test_a_rest_without_room_for_a_patch_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["pseudo"], MODEL__INPUT_SIZE="[6, 32, 64]")
    with pytest.raises(ConfigError, match=r"'rest' must be from one training patch, \[6, 32, 64\].*Got 0 of"):
        open_unlabeled(cfg, open_parts(cfg))


@pytest.mark.parametrize("other", ["TRAIN", "TUNE", "TEST"])
def test_it_shares_no_voxel_with_another_part(tmp_path: Path, other: str) -> None:
    box = json.loads(PARTS[f"NEURODIFF__SPLIT__{other}__BOX"])
    corner = [box[3] - 1, box[4] - 1, box[5] - 1, *box[3:]]
    cfg = config(tmp_path, ["repainted"], [{"BOX": [0, 0, 60, 2, 30, 80]}, {"BOX": corner}])
    message = rf"UNLABELED\[1\] and {other.lower()} must not share voxels.*DATASET.UNLABELED\[1\].BOX"
    with pytest.raises(ConfigError, match=message):
        open_unlabeled(cfg, open_parts(cfg))


def test_a_copy_of_the_test_volume_under_another_name_is_found(inputs: Path, tmp_path: Path) -> None:
    (inputs / "copy.h5").write_bytes((inputs / "all.h5").read_bytes())
    files = {"DATASET__INPUT_PATH": str(inputs), "DATASET__IMAGE_NAME": "all.h5"}
    cfg = config(tmp_path, ["pseudo"], ["copy.h5"], **files)
    with pytest.raises(ConfigError, match=r"UNLABELED\[0\] and train must not share voxels.*and its copy"):
        open_unlabeled(cfg, open_parts(cfg))


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("coarse.h5", ConfigError, r"DATASET.UNLABELED\[0\] must have the train part's voxels.*8.0, 8.0"),
        ("label.h5", MissingInput, "label.h5 has no image"),
        ("absent.h5", MissingInput, "Missing input: .*absent.h5"),
        (
            {"IMAGE_NAME": "image.h5", "BOX": [0, 0, 0, 9, 40, 49]},
            UserError,
            r"DATASET.UNLABELED\[0\].BOX must lie within",
        ),
    ],
)
def test_what_cannot_be_used_is_told(
    inputs: Path, tmp_path: Path, entry: object, error: type[UserError], message: str
) -> None:
    files = {"DATASET__INPUT_PATH": str(inputs), "DATASET__IMAGE_NAME": "all.h5"}
    cfg = config(tmp_path, ["pseudo"], [entry], **files)
    with pytest.raises(error, match=message):
        open_unlabeled(cfg, open_parts(cfg))


def test_labels_that_a_file_has_change_nothing(inputs: Path, tmp_path: Path) -> None:
    labels = []
    for name in ("image.h5", "wrong.h5"):
        files = {"DATASET__INPUT_PATH": str(inputs), "DATASET__IMAGE_NAME": "all.h5"}
        folder = tmp_path / name.split(".")[0]
        run_pipeline(config(folder, ["pseudo"], [name], **files), stages=["pseudo_labels"])
        made = open_volume(folder / "pseudo_labels" / "tissue_000.h5").load()
        np.testing.assert_allclose(
            made.array("image"), open_volume(inputs / name).load().array("image"), atol=0.5 / 255
        )
        labels.append(made.array("label"))
    assert np.array_equal(*labels)


def test_pseudo_labels_are_the_segmentation_of_the_real_arms_network_with_gaps(made: Path) -> None:
    with h5py.File(made / "pseudo_labels" / "tissue_000.h5") as file:
        label, attributes = file["label"][:], dict(file.attrs)
    tunings = {
        method: json.loads((made / "segmentations" / f"real_{method}.tuning.json").read_text())
        for method in ("waterz", "multicut")
    }
    best = {method: dict(tuning["judged"])[tuning["threshold"]] for method, tuning in tunings.items()}
    assert best[attributes["method"]] == min(best.values())
    assert attributes["threshold"] == tunings[attributes["method"]]["threshold"]
    assert label.shape == LEFT.shape
    assert label.any()


def test_all_kinds_of_pairs_enter_the_training(made: Path) -> None:
    assert {path.name for path in (made / "pairs").glob("*.h5")} == {"copy_000.h5", "unlabeled_000_copy_000.h5"}
    assert open_volume(made / "pairs" / "unlabeled_000_copy_000.h5").shape == LEFT.shape
    provenance = json.loads((made / "segmenter" / "mixed" / "checkpoint.pt.provenance.json").read_text())
    only = json.loads((made / "segmenter" / "real" / "checkpoint.pt.provenance.json").read_text())
    assert provenance["parents"]["pairs"] != only["parents"]["pairs"]
    assert (made / "report.html").exists()


def test_a_second_run_makes_nothing_anew(made: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*.h5")} | {
        path: path.stat().st_mtime_ns for path in made.rglob("checkpoint.pt")
    }
    run_pipeline(config(made, ["remodelled", "repainted", "pseudo"]))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_the_train_parts_mask_is_that_of_a_run_without_unannotated_tissue(made: Path, tmp_path: Path) -> None:
    run_pipeline(load_config(overrides=settings(tmp_path / "plain", **PARTS, **SHORT)), stages=["masks"])
    masks = [open_volume(folder / "masks" / "copy_000.h5").load() for folder in (made, tmp_path / "plain")]
    assert np.array_equal(masks[0].array("label"), masks[1].array("label"))


def test_plan_and_estimates_know_of_it(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["remodelled", "repainted", "pseudo"], NEURODIFF__REMODEL__COPIES="2")
    assert [copy.name for copy in mask_copies(cfg)] == [
        "copy_000", "copy_001", "unlabeled_000_copy_000", "unlabeled_000_copy_001",
    ]  # fmt: skip
    assert [path.name for path in artefacts_of(cfg, "pseudo_labels")] == ["tissue_000.h5"]
    plan = describe_plan(cfg, choose_stages(cfg))
    assert "UNLABELED[0]: embedded phantom (0, 0, 44)-(8, 72, 88)" in plan
    both = {one.stage: one.seconds for one in estimates(cfg, choose_stages(cfg), (8, 72, 44))}
    assert both["pseudo_labels"] == both["segmenter"], "each trains one arm"


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, ["pseudo_labels", "diffusion", "masks", "pairs", "segmenter"]),
        ({"AUGMENTOR__SYNTHETIC__SOURCE": "pseudo"}, ["pseudo_labels", "segmenter"]),
        ({"AUGMENTOR__SYNTHETIC__SOURCE": "remodelled"}, ["diffusion", "masks", "pairs", "segmenter"]),
        ({"AUGMENTOR__SYNTHETIC": "False"}, ["segmenter"]),
        ({"AUGMENTOR__SYNTHETIC__PAIRS": "made.h5"}, ["segmenter"]),
    ],
)
def test_stages_that_a_configuration_has(tmp_path: Path, changes: dict[str, str], stages: list[str]) -> None:
    given = {"DATASET__UNLABELED": "rest", "AUGMENTOR__SYNTHETIC__SOURCE": "repainted"} | changes
    cfg = load_config(overrides=settings(tmp_path, **PARTS, **given))
    assert choose_stages(cfg)[: len(stages)] == stages
    assert "predictions" in choose_stages(cfg)[len(stages)]
    if "pseudo_labels" not in stages:
        with pytest.raises(ConfigError, match=r"'pseudo_labels' labels unannotated tissue, but AUGMENTOR.SYNTHETIC"):
            choose_stages(cfg, ["pseudo_labels"])


def test_images_without_masks_teach_the_denoiser_too(tmp_path: Path) -> None:
    for name, unlabeled in (("without", "[]"), ("with", "rest")):
        cfg = config(tmp_path / name, ["remodelled"], unlabeled)
        run_pipeline(cfg, stages=["diffusion"])
    parents = [
        json.loads((tmp_path / name / "diffusion" / "checkpoint.pt.provenance.json").read_text())["parents"]
        for name in ("without", "with")
    ]
    assert set(parents[1]) - set(parents[0]) == {"unlabeled"}
    losses = [(tmp_path / name / "diffusion" / "loss.csv").read_text() for name in ("without", "with")]
    assert losses[0] != losses[1]
