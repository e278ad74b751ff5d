"""Unannotated tissue: which voxels it is, that nobody looks at its labels, and what is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import settings

from connectomics_neurodiff.agglomerate import fragments_from_affinities, segment_sweep
from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import ConfigError, MissingInput, StaleArtifactError, UserError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.pipeline import choose_stages, networks, run_pipeline
from connectomics_neurodiff.pipeline.pairs_stage import own_pairs
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.pipeline.plan import artefacts_of, describe_plan, estimates
from connectomics_neurodiff.pipeline.pseudo_labels_stage import gaps_between, has_gaps
from connectomics_neurodiff.pipeline.run import Run
from connectomics_neurodiff.pipeline.unlabeled import (
    load_pseudo_labelled,
    mask_copies,
    open_unlabeled,
    unlabeled_entries,
)
from connectomics_neurodiff.predict import predict_affinities
from connectomics_neurodiff.provenance import hash_of, hash_of_file
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
    return load_config(overrides=settings(folder, **(PARTS | SHORT | given | changes)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled volume and other tissue: its image with no labels, wrong ones, broken ones, other voxels, and more."""
    folder = tmp_path_factory.mktemp("inputs")
    volume = grow_phantom((20, 72, 88), (29, 6, 6), 0)
    write_volume(folder / "all.h5", volume.arrays, volume.voxel_nm, {})
    write_volume(folder / "resaved.h5", {"image": volume.array("image")[3:, 8:, 5:]}, volume.voxel_nm, {})
    elsewhere = grow_phantom((9, 40, 48), (29, 6, 6), 1)
    image = elsewhere.array("image")
    write_volume(folder / "image.h5", {"image": image}, elsewhere.voxel_nm, {})
    write_volume(folder / "coarse.h5", {"image": image}, (29, 8, 8), {})
    write_volume(folder / "blank.h5", {"image": np.full_like(image, 0.5)}, elsewhere.voxel_nm, {})
    write_volume(folder / "label.h5", {"label": elsewhere.array("label")}, elsewhere.voxel_nm, {})
    wrong = {"image": image, "label": np.ones_like(elsewhere.array("label"))}
    write_volume(folder / "wrong.h5", wrong, elsewhere.voxel_nm, {})
    with h5py.File(folder / "broken.h5", "w") as file:
        file["image"], file["label"] = np.rint(255 * image).astype(np.uint8), np.zeros((2, 3), np.float32)
        file["other"] = np.rint(255 * image[::-1]).astype(np.uint8)
        file.attrs["resolution_nm"] = elsewhere.voxel_nm
    return folder


def files(inputs: Path) -> dict[str, str]:
    return {"DATASET__INPUT_PATH": str(inputs), "DATASET__IMAGE_NAME": "all.h5"}


def labels_of(folder: Path) -> np.ndarray:
    return open_volume(folder / "pseudo_labels" / "tissue_000.h5").load().array("label")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that makes all kinds of pairs."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run_pipeline(config(folder, ["remodelled", "repainted", "pseudo"], NEURODIFF__FID__PATCHES="16"))
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
    cfg = config(tmp_path, ["pseudo"], NEURODIFF__SPLIT__TEST__IMAGE_NAME="other.h5", **files(inputs))
    boxes = [entry["BOX"] for entry in unlabeled_entries(cfg)]
    assert boxes == [[13, 0, 0, 20, 72, 88], [0, 0, 44, 8, 72, 88]]


@pytest.mark.parametrize("name", ["./all.h5", "all.h5::image"])
def test_the_training_file_by_another_spelling_is_the_training_file(inputs: Path, tmp_path: Path, name: str) -> None:
    cfg = config(tmp_path, ["pseudo"], NEURODIFF__SPLIT__TEST__IMAGE_NAME=name, **files(inputs))
    assert [entry["BOX"] for entry in unlabeled_entries(cfg)] == [[0, 0, 44, 8, 72, 88]]


def test_what_is_set_apart_is_not_taken_where_nothing_is_scored(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["pseudo"], NEURODIFF__SPLIT__SCORED="False")
    assert unlabeled_entries(cfg) == [{"BOX": [*LEFT.start, *LEFT.stop]}]


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
    cfg = config(tmp_path, ["pseudo"], ["copy.h5"], **files(inputs))
    with pytest.raises(ConfigError, match=r"UNLABELED\[0\] and train must not share voxels.*and its copy"):
        open_unlabeled(cfg, open_parts(cfg))


def test_a_piece_of_the_test_part_that_was_saved_anew_is_found(inputs: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, ["pseudo"], ["resaved.h5"], **files(inputs))
    with pytest.raises(ConfigError, match=r"UNLABELED\[0\] must not show the tune part.*Section [5-9] of"):
        open_unlabeled(cfg, open_parts(cfg))
    cfg = config(tmp_path, ["pseudo"], [{"IMAGE_NAME": "resaved.h5", "BOX": [0, 0, 0, 5, 64, 83]}], **files(inputs))
    assert open_unlabeled(cfg, open_parts(cfg)), "what the train part shows may be seen again"


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("coarse.h5", ConfigError, r"DATASET.UNLABELED\[0\] must have the train part's voxels.*8.0, 8.0"),
        ("label.h5", MissingInput, "image"),
        ("absent.h5", MissingInput, "Missing input: .*absent.h5"),
        ("blank.h5", UserError, r"DATASET.UNLABELED\[0\] must show tissue. Got one grey value, 0.50"),
        (
            {"IMAGE_NAME": "image.h5", "BOX": [0, 0, 0, 9, 40, 49]},
            UserError,
            r"DATASET.UNLABELED\[0\].BOX must lie within",
        ),
    ],
)
@pytest.mark.parametrize("voxel_nm", ["[]", "[29, 6, 6]"])
def test_what_cannot_be_used_is_told(
    inputs: Path, tmp_path: Path, entry: object, error: type[UserError], message: str, voxel_nm: str
) -> None:
    cfg = config(tmp_path, ["pseudo"], [entry], NEURODIFF__VOXEL_NM=voxel_nm, **files(inputs))
    with pytest.raises(error, match=message):
        open_unlabeled(cfg, open_parts(cfg))


def test_labels_that_a_file_has_change_nothing(inputs: Path, tmp_path: Path) -> None:
    """Neither the pseudo-labels nor a denoiser that is shown the images without masks."""
    labels, weights = [], []
    for name in ("image.h5", "wrong.h5", "broken.h5::image"):
        folder = tmp_path / name.split(".")[0]
        run_pipeline(config(folder / "a", ["pseudo"], [name], **files(inputs)), stages=["pseudo_labels"])
        made = open_volume(folder / "a" / "pseudo_labels" / "tissue_000.h5").load()
        np.testing.assert_allclose(
            made.array("image"), open_volume(inputs / "image.h5").load().array("image"), atol=0.002
        )
        labels.append(labels_of(folder / "a"))
        run_pipeline(config(folder / "b", ["remodelled"], [name], **files(inputs)), stages=["diffusion"])
        weights.append((folder / "b" / "diffusion" / "loss.csv").read_text())
    assert np.array_equal(labels[0], labels[1])
    assert np.array_equal(labels[0], labels[2])
    assert weights[0] == weights[1] == weights[2]


def test_pseudo_labels_are_the_segmentation_of_the_real_arms_network_with_gaps(inputs: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, ["pseudo"], ["image.h5"], SOLVER__ITERATION_TOTAL="30", **files(inputs))
    run_pipeline(cfg, stages=["pseudo_labels", "predictions", "segmentations"], arm="real")
    with h5py.File(tmp_path / "pseudo_labels" / "tissue_000.h5") as file:
        label, attributes = file["label"][:], dict(file.attrs)
    tunings = {
        method: json.loads((tmp_path / "segmentations" / f"real_{method}.tuning.json").read_text())
        for method in ("waterz", "multicut")
    }
    best = {method: dict(tuning["judged"])[tuning["threshold"]] for method, tuning in tunings.items()}
    assert best[attributes["method"]] == min(best.values())
    assert attributes["threshold"] == tunings[attributes["method"]]["threshold"]
    network = networks.load_segmenter(str(tmp_path / "segmenter" / "real" / "checkpoint.pt"))
    image = open_volume(inputs / "image.h5").load().array("image")
    affinities = np.asarray(predict_affinities(network, image, **networks.prediction_arguments(cfg)))
    gaps = affinities.mean(axis=0) < 0.5
    assert 0.02 < gaps.mean() < 0.98
    ((_, whole),) = segment_sweep(
        affinities, fragments_from_affinities(affinities, (29, 6, 6)), attributes["method"], [attributes["threshold"]]
    )
    assert (label == 0).any()
    assert gaps[label == 0].all()
    assert np.array_equal(label, np.where(label == 0, 0, whole))
    assert np.array_equal(label == 0, gaps_between(affinities, whole))


def test_gaps_are_where_two_neurons_meet_and_not_inside_of_one() -> None:
    label = np.repeat(np.array([3, 7], np.uint64), 6)[None, None].repeat(9, 1).repeat(2, 0)
    affinities = np.ones((3, *label.shape), np.float32)
    affinities[:, :, :, 5:7] = 0.2  # between the two
    affinities[:, 0, 2:4, 1:3] = 0.0  # inside of the first: a vesicle
    affinities[:, 1, 4, 2:7] = 0.1  # inside of the first too, but it reaches the boundary
    wanted = np.zeros(label.shape, bool)
    wanted[:, :, 5:7] = True
    wanted[1, 4, 2:7] = True
    assert np.array_equal(gaps_between(affinities, label), wanted)
    assert not gaps_between(np.ones_like(affinities), label).any()


@pytest.mark.parametrize(
    ("rows", "gaps"),
    [
        ([[1, 1, 0, 2, 2], [1, 1, 0, 2, 2]], True),
        ([[1, 1, 2, 2, 2], [1, 1, 2, 2, 2]], False),
        ([[0, 1, 2, 2, 3], [0, 1, 2, 2, 3]], False),  # one of three ends at background
        ([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], False),
    ],
)
def test_labels_have_gaps_where_most_neurons_end_at_background(rows: list[list[int]], gaps: bool) -> None:
    assert has_gaps(np.array([rows], np.uint64)) == gaps


def test_all_kinds_of_pairs_enter_the_training(made: Path) -> None:
    cfg = config(made, ["remodelled", "repainted", "pseudo"])
    names = ["pairs/copy_000.h5", "pairs/unlabeled_000_copy_000.h5", "pseudo_labels/tissue_000.h5"]
    passed = [
        made / name
        for name in names
        if name.startswith("pseudo") or json.loads((made / name).with_suffix(".gate.json").read_text())["passed"]
    ]
    assert own_pairs(cfg) == passed
    assert open_volume(made / names[1]).shape == LEFT.shape
    provenance = json.loads((made / "segmenter" / "mixed" / "checkpoint.pt.provenance.json").read_text())
    assert provenance["parents"]["pairs"] == hash_of([hash_of_file(path) for path in passed])
    assert "unannotated tissue with pseudo-labels, 1 of its volumes" in (made / "report.html").read_text()


def test_distances_from_real_tissue_are_those_of_painted_images(made: Path, tmp_path: Path) -> None:
    """Pseudo-labelled tissue is real."""
    shutil.copytree(made, tmp_path / "run")
    with_pseudo = json.loads((made / "fid3d.json").read_text())
    assert len(with_pseudo["pairs"]) == len(own_pairs(config(made, ["remodelled", "repainted"])))
    cfg = config(tmp_path / "run", ["pseudo"], NEURODIFF__FID__PATCHES="16")
    run_pipeline(cfg, stages=["segmenter", "predictions", "segmentations", "metrics", "report"], force=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["synthesis"]["fid3d"] is None
    assert "mask_quality" not in (tmp_path / "run" / "report.html").read_text()


def test_a_second_run_makes_nothing_anew(made: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*.h5")} | {
        path: path.stat().st_mtime_ns for path in made.rglob("checkpoint.pt")
    }
    run_pipeline(config(made, ["remodelled", "repainted", "pseudo"], NEURODIFF__FID__PATCHES="16"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize("stage", ["pseudo_labels", "diffusion", "masks"])
def test_labels_of_other_tissue_are_never_used(made: Path, tmp_path: Path, stage: str) -> None:
    shutil.copytree(made, tmp_path / "run")
    cfg = config(tmp_path / "run", ["remodelled", "repainted", "pseudo"], [{"BOX": [0, 0, 44, 8, 71, 88]}])
    with pytest.raises(StaleArtifactError, match="tissue"):
        run_pipeline(cfg, stages=[stage])


def test_two_datasets_of_a_file_are_two_pieces_of_tissue(inputs: Path, tmp_path: Path) -> None:
    run_pipeline(config(tmp_path, ["pseudo"], ["broken.h5::image"], **files(inputs)), stages=["pseudo_labels"])
    with pytest.raises(StaleArtifactError, match="tissue"):
        run_pipeline(config(tmp_path, ["pseudo"], ["broken.h5::other"], **files(inputs)), stages=["pseudo_labels"])


def test_a_teacher_trained_anew_leaves_no_score_of_the_old_one(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    cfg = config(tmp_path / "run", ["pseudo"], SOLVER__ITERATION_TOTAL="6")
    run_pipeline(cfg, arm="mixed", force=True)
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) & {"real", "mixed"} == {"mixed"}


def test_inference_with_a_given_network_needs_no_pseudo_labels(made: Path, tmp_path: Path) -> None:
    checkpoint = made / "segmenter" / "mixed" / "checkpoint.pt"
    run_pipeline(config(tmp_path, ["pseudo"]), inference=True, checkpoint=str(checkpoint))
    assert (tmp_path / "report.html").exists()


def test_the_train_parts_mask_is_that_of_a_run_without_unannotated_tissue(made: Path, tmp_path: Path) -> None:
    run_pipeline(load_config(overrides=settings(tmp_path / "plain", **PARTS, **SHORT)), stages=["masks"])
    masks = [open_volume(folder / "masks" / "copy_000.h5").load() for folder in (made, tmp_path / "plain")]
    assert np.array_equal(masks[0].array("label"), masks[1].array("label"))


@pytest.mark.parametrize("dark_bodies", ["True", "False"])
def test_mitochondria_are_found_where_the_train_part_has_marked_ones(
    inputs: Path, tmp_path: Path, dark_bodies: str
) -> None:
    given = {"NEURODIFF__DARK_BODIES": dark_bodies, "SOLVER__ITERATION_TOTAL": "30", **files(inputs)}
    cfg = config(tmp_path, ["repainted"], ["image.h5"], **given)
    run_pipeline(cfg, stages=["pseudo_labels"])
    parts = open_parts(cfg)
    assert parts["train"].volume.mito is not None
    run = Run(cfg, tmp_path, parts, unlabeled=open_unlabeled(cfg, parts))
    tissue = load_pseudo_labelled(run, 0)
    assert tissue.mito is not None
    assert (tissue.dark is not None) == (dark_bodies == "True")


def test_plan_and_estimates_know_of_it(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["remodelled", "repainted", "pseudo"], NEURODIFF__REMODEL__COPIES="2")
    assert [copy.name for copy in mask_copies(cfg)] == [
        "copy_000", "copy_001", "unlabeled_000_copy_000", "unlabeled_000_copy_001",
    ]  # fmt: skip
    assert [path.name for path in artefacts_of(cfg, "pseudo_labels")] == ["tissue_000.h5"]
    plan = describe_plan(cfg, choose_stages(cfg))
    assert "UNLABELED[0]: embedded phantom (0, 0, 44)-(8, 72, 88)" in plan
    both = {one.stage: one.seconds for one in estimates(cfg, choose_stages(cfg), (8, 72, 44))}
    assert both["pseudo_labels"] > both["segmenter"], "each trains one arm, and the first segments too"


def test_a_dry_run_names_a_missing_file(tmp_path: Path) -> None:
    cfg = config(tmp_path, ["repainted"], DATASET__IMAGE_NAME="absent.h5")
    plan = describe_plan(cfg, choose_stages(cfg))
    assert "missing: " in plan
    assert "absent.h5" in plan


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


@pytest.mark.parametrize(("sources", "parent"), [("remodelled", "unlabeled"), ("repainted", "pseudo_labels")])
def test_unannotated_tissue_teaches_the_denoiser_too(tmp_path: Path, sources: str, parent: str) -> None:
    for name, source, unlabeled in (("without", "remodelled", "[]"), ("with", sources, "rest")):
        cfg = config(tmp_path / name, [source], unlabeled)
        run_pipeline(cfg, stages=[stage for stage in ("pseudo_labels", "diffusion") if stage in choose_stages(cfg)])
    parents = [
        json.loads((tmp_path / name / "diffusion" / "checkpoint.pt.provenance.json").read_text())["parents"]
        for name in ("without", "with")
    ]
    assert set(parents[1]) - set(parents[0]) == {parent}
    scales = [
        load_checkpoint(tmp_path / name / "diffusion" / "checkpoint.pt", kind="denoiser").extra["grey_scales"]
        for name in ("without", "with")
    ]
    assert (len(scales[0]), len(scales[1])) == (1, 2)
    assert scales[0] == scales[1][:1], "painted are the grey values of the train part"
