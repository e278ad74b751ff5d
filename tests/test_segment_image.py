"""Instances straight from a network: block by block and stitched, in the pipeline, on the command line."""

from __future__ import annotations

import json
import os
import platform
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from tiny import neurodiff, settings
from torch import Tensor, nn

from connectomics_neurodiff.agglomerate import grow_labels, segment_image
from connectomics_neurodiff.checkpoints import Checkpoint, save_checkpoint
from connectomics_neurodiff.commands import _warn_of_other_voxels
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import (
    CheckpointMismatch,
    ConfigError,
    LabelTypeError,
    ShapeMismatch,
    ValueRangeError,
)
from connectomics_neurodiff.metrics import evaluate
from connectomics_neurodiff.pipeline import run_pipeline
from connectomics_neurodiff.pipeline.networks import check_networks, trained_erosion
from connectomics_neurodiff.pipeline.run import run_folder
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.training.patches import erode_contacts
from connectomics_neurodiff.volume import grow_phantom, open_volume, write_volume

SMALL = {
    "MODEL__ARCHITECTURE": "agq", "MODEL__FILTERS": "[4, 6]", "MODEL__ISOTROPY": "[False]",
    "NEURODIFF__SEGMENTER__QUERY_WIDTH": "8", "NEURODIFF__SEGMENTER__LEARNED_QUERIES": "4",
    "NEURODIFF__SEGMENTER__GUIDED_QUERIES": "4", "SOLVER__ITERATION_TOTAL": "4",
    "INFERENCE__INPUT_SIZE": "[7, 72, 88]", "INFERENCE__STRIDE": "[7, 72, 88]",
}  # fmt: skip


class Oracle(nn.Module):
    """Knows every neuron: its id is the grey value, in steps of 1/255. Numbers them anew in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def segment(self, image: Tensor, smallest_area: float) -> Tensor:
        self.modes.append(smallest_area == 3.0)
        ids = torch.round(image[:, 0] * 255).long()
        return torch.where(ids > 0, (ids * 7919 + len(self.modes)) % 1000003, 0)


def test_an_oracle_gives_the_neurons_back_from_any_blocks() -> None:
    label = grow_phantom((14, 50, 61), (29, 6, 6), 3).array("label")
    image = (label % 256).astype(np.float32) / 255
    network = Oracle()
    found = np.asarray(segment_image(network, image, block=(6, 20, 30), overlap=(3, 8, 10), smallest_area=3.0))
    assert label.max() < 256
    assert evaluate(found, label).arand < 1e-3
    assert (found > 0).sum() == (label > 0).sum()
    assert len(network.modes) > 20
    assert all(network.modes)


def test_neurons_grow_back_over_what_training_eroded() -> None:
    label = grow_phantom((14, 50, 61), (29, 6, 6), 3).array("label")
    eroded = erode_contacts(label, 1, in_plane=True)
    lost = (eroded == 0) & (label > 0)
    image = (eroded % 256).astype(np.float32) / 255
    blocks = {"block": (6, 20, 30), "overlap": (3, 8, 10), "smallest_area": 3.0}
    left, grown = (np.asarray(segment_image(Oracle(), image, growth=(0, n, n), **blocks)) for n in (0, 1))
    assert lost.mean() > 0.05
    assert not left[lost].any()
    assert (grown[lost] > 0).mean() > 0.95
    assert evaluate(grown, label).voi < 0.4 * evaluate(left, label).voi


@settings_of_hypothesis(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8)),
    growth=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
)
def test_growth_gives_background_within_reach_to_the_nearest_instance(
    seed: int, shape: tuple[int, int, int], growth: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(seed)
    label = np.where(rng.random(shape) < 0.1, rng.integers(1, 5, shape), 0)
    before = label.copy()
    grown = grow_labels(label, growth)
    assert np.array_equal(label, before)
    instances = np.argwhere(label > 0)
    for voxel in np.argwhere(np.ones(shape, bool)):
        value, old = grown[tuple(voxel)], label[tuple(voxel)]
        away = np.abs(instances - voxel)
        allowed = away[:, [axis for axis in range(3) if growth[axis] == 0]].sum(axis=1) == 0
        if old > 0 or not (away <= growth).all(axis=1).any():
            assert value == old
            continue
        distance = np.where(allowed, (away**2).sum(axis=1), np.inf)
        nearest = instances[distance == distance.min()]
        assert value in label[tuple(nearest.T)]


@pytest.mark.parametrize(
    "growth", [(0, 1), (0, -1, 1), (0, 0.5, 1), 1, (0, np.nan, 1), (0, np.inf, 1), "abc", (0, None, 1), (True, 1, 1)]
)
def test_growth_that_makes_no_sense_is_told(growth: object) -> None:
    with pytest.raises(ValueRangeError, match="three whole sizes"):
        grow_labels(np.zeros((2, 3, 4), np.int64), growth)  # type: ignore[arg-type]


def test_growth_takes_labels_alone() -> None:
    with pytest.raises(ShapeMismatch, match="three axes"):
        grow_labels(np.ones((3, 4), np.int64), (0, 1, 1))
    with pytest.raises(LabelTypeError, match="float32"):
        grow_labels(np.ones((2, 3, 4), np.float32), (0, 1, 1))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_growth_beyond_the_volume_fills_the_section(kind: type) -> None:
    label = np.zeros((3, 4, 5), kind)
    label[1, 2, 3] = np.iinfo(kind).max
    grown = grow_labels(label[:, ::-1], (0, 10**12, np.int64(9)))
    assert grown.dtype == kind
    assert (grown[1] == np.iinfo(kind).max).all()
    assert not grown[[0, 2]].any()


@pytest.mark.parametrize("erosion", [-1, 1.0, True, "1", None])
def test_a_checkpoint_without_a_sensible_erosion_is_told(erosion: object) -> None:
    with pytest.raises(CheckpointMismatch, match="label_erosion must be a whole number >= 0"):
        trained_erosion(Checkpoint("segmenter", "agq", {}, {}, {"label_erosion": erosion}))


def test_the_erosion_is_that_of_the_training() -> None:
    told, silent = (Checkpoint("segmenter", "agq", {}, {}, extra) for extra in ({"label_erosion": 2}, {}))
    assert [trained_erosion(told, 1), trained_erosion(silent, 1), trained_erosion(silent)] == [2, 1, 0]


@pytest.mark.parametrize(("voxel", "growth"), [((8, 8, 8), [1, 1, 1]), ((30, 6, 6), [0, 1, 1])])
def test_the_pipeline_grows_by_what_the_given_checkpoint_was_trained_with(
    tmp_path: Path, voxel: tuple[int, int, int], growth: list[int]
) -> None:
    """The run itself erodes nothing."""
    extra = {"label_erosion": 1, "voxel_nm": [list(voxel)]}
    options = {"filters": [4, 6], "width": 8, "learned_queries": 2, "guided_queries": 2}
    weights = build_segmenter("agq", **options).state_dict()
    path = tmp_path / "other.pt"
    save_checkpoint(path, kind="segmenter", architecture="agq", options=options, state_dict=weights, extra=extra)
    methods = {"NEURODIFF__SEGMENT__METHODS": "['agq']", "AUGMENTOR__SYNTHETIC": "False"}
    run_pipeline(
        load_config(overrides=settings(tmp_path / "run", **SMALL, **methods)), inference=True, checkpoint=str(path)
    )
    (record,) = (tmp_path / "run").rglob("segmentations/real_agq*.json")
    assert json.loads(record.read_text())["settings"]["GROWTH"] == growth


class MergesInTheFirstBlock(nn.Module):
    """Two neurons, y < 5 and y >= 5; the first block that it sees is all one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = 0

    def segment(self, image: Tensor, smallest_area: float) -> Tensor:
        self.blocks += 1
        label = torch.ones(image[:, 0].shape, dtype=torch.int64)
        if self.blocks > 1:
            label[:, :, 5:] = 2
        return label


@pytest.mark.parametrize(("fraction", "instances"), [(0.5, 2), (0.62, 2), (0.63, 3), (0.8, 3)])
def test_a_false_merger_is_passed_on_below_the_common_share(fraction: float, instances: int) -> None:
    """In the common part the merged instance has 8 rows, of which the larger neuron holds 5: a share of .625."""
    image = np.zeros((4, 8, 24), np.float32)
    blocks = {"block": (4, 8, 14), "overlap": (0, 0, 4)}
    found = np.asarray(segment_image(MergesInTheFirstBlock(), image, min_fraction=fraction, **blocks))
    assert len(np.unique(found)) == instances
    assert (found[0, 0, 0] == found[0, 0, 23]) == (instances == 2)
    assert found[0, 7, 0] != found[0, 7, 23]


def test_what_cannot_be_segmented_is_told() -> None:
    image = np.zeros((4, 8, 8), np.float32)
    image[0, 0, 0] = np.nan
    blocks = {"block": (4, 8, 8), "overlap": (2, 4, 4)}
    with pytest.raises(ValueRangeError, match="predicts affinities, not instances"):
        segment_image(build_segmenter("superhuman", filters=[4, 6]), image, **blocks)
    with pytest.raises(ValueRangeError, match="finite"):
        segment_image(Oracle(), image, **blocks)
    with pytest.raises(ShapeMismatch, match="three axes"):
        segment_image(Oracle(), image[None], **blocks)


def test_a_network_that_has_diverged_gives_no_empty_segmentation() -> None:
    network = build_segmenter("agq", filters=[4, 6], z_pool=[False], width=8, learned_queries=4, guided_queries=4)
    nn.init.constant_(next(network.backbone.parameters()), torch.nan)
    blocks = {"block": (4, 16, 18), "overlap": (2, 8, 8)}
    with pytest.raises(ValueRangeError, match="diverged"):
        segment_image(network, np.full((4, 16, 18), 0.5, np.float32), **blocks)
    # Affinities alone that are no numbers would leave the learned queries, and labels that look like any others.
    network = build_segmenter("agq", filters=[4, 6], z_pool=[False], width=8, learned_queries=4, guided_queries=4)
    nn.init.constant_(next(network.affinity_branch.parameters()), torch.nan)
    with pytest.raises(ValueRangeError, match="affinities must be finite"):
        segment_image(network, np.full((4, 16, 18), 0.5, np.float32), **blocks)


def test_all_of_the_image_is_checked_before_the_first_block() -> None:
    image = np.zeros((9, 8, 8), np.float32)
    image[8, 7, 7] = 1.5
    network = Oracle()
    with pytest.raises(ValueRangeError, match=r"Got 0 to 1.5 in sections 8 to 8"):
        segment_image(network, image, block=(4, 8, 8), overlap=(2, 4, 4))
    assert not network.modes


def test_blocks_that_cannot_be_joined_are_refused_before_the_training(tmp_path: Path) -> None:
    changes = SMALL | {"INFERENCE__INPUT_SIZE": "[4, 72, 88]", "INFERENCE__STRIDE": "[4, 72, 88]"}
    methods = {"NEURODIFF__SEGMENT__METHODS": "['agq']", "AUGMENTOR__SYNTHETIC": "False"}
    with pytest.raises(ConfigError, match=r"STRIDE must be below INPUT_SIZE \[4, 72, 88\] along z"):
        run_pipeline(load_config(overrides=settings(tmp_path / "run", **changes, **methods)))
    assert not (tmp_path / "run").exists()


def test_a_segmenter_without_instances_is_refused_before_the_prediction(tmp_path: Path) -> None:
    options = {"filters": [4, 6]}
    weights = build_segmenter("superhuman", **options).state_dict()
    path = tmp_path / "superhuman.pt"
    save_checkpoint(path, kind="segmenter", architecture="superhuman", options=options, state_dict=weights, extra={})
    methods = {"NEURODIFF__SEGMENT__METHODS": "['waterz', 'agq']", "AUGMENTOR__SYNTHETIC": "False"}
    cfg = load_config(overrides=settings(tmp_path / "run", **SMALL, **methods))
    with pytest.raises(ConfigError, match="holds 'superhuman'"):
        run_pipeline(cfg, inference=True, checkpoint=str(path))
    assert not (tmp_path / "run").exists()


def test_what_a_killed_stitching_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "run" / "segmentations" / "stitching-abc"
    left.mkdir(parents=True)
    (left / "0-1.npy").write_bytes(b"x")
    (tmp_path / "run" / "run.log").touch()
    with run_folder(load_config(overrides=settings(tmp_path / "run"))):
        assert not left.exists()


def test_the_pipeline_trains_agq_and_takes_its_instances(tmp_path: Path) -> None:
    methods = {"NEURODIFF__SEGMENT__METHODS": "['waterz', 'agq']", "AUGMENTOR__SYNTHETIC": "False"}
    cfg = load_config(overrides=settings(tmp_path / "run", **SMALL, **methods))
    metrics = run_pipeline(cfg)
    assert set(metrics["real"]) == {"waterz", "agq"}
    assert set(metrics["provenance"]["thresholds"]["real"]) == {"waterz"}
    assert "agq" in (tmp_path / "run" / "report.html").read_text()
    before = (tmp_path / "run" / "segmentations" / "real_agq.h5").stat().st_mtime_ns
    # Keys of other segmenters make nothing stale.
    other = {"NEURODIFF__SEGMENTER__SCAN_ORIENTATIONS": "1", "MODEL__SWIN_UNETR_FEATURE_SIZE": "48"}
    cfg = load_config(overrides=settings(tmp_path / "run", **SMALL, **methods, **other))
    assert run_pipeline(cfg)["real"] == metrics["real"]
    assert (tmp_path / "run" / "segmentations" / "real_agq.h5").stat().st_mtime_ns == before


def test_sizes_that_do_not_fit_are_told_by_their_keys(tmp_path: Path) -> None:
    cfg = load_config(overrides=settings(tmp_path, **SMALL | {"MODEL__ISOTROPY": "[False, True]"}))
    with pytest.raises(ConfigError, match=r"MODEL.ISOTROPY \(z_pool\) must fit. AGQ needs one z_pool .* Got 2"):
        check_networks(cfg)


@pytest.mark.parametrize("sizes", [[8, 8, 8], "x", [["a", 1, 2]], 8, [[8, 8, 0]]])
def test_a_checkpoint_without_sensible_voxel_sizes_is_told(sizes: object) -> None:
    checkpoint = Checkpoint("segmenter", "agq", {}, {}, {"voxel_nm": sizes})
    with pytest.raises(CheckpointMismatch, match="voxel_nm must be a list of sizes"):
        _warn_of_other_voxels(checkpoint, "a.h5", grow_phantom((4, 32, 32), (29.0, 6.0, 6.0), 0))


def test_the_comparison_takes_no_region_beyond_the_test_part() -> None:
    compare = runpy.run_path(str(REPOSITORY / "projects" / "AGQ" / "compare.py"))["middle_of"]
    assert compare((9, 10, 11), (3, 10, 4)) == (slice(3, 6), slice(0, 10), slice(3, 7))
    with pytest.raises(SystemExit, match=r"from 1 to \(9, 10, 11\) voxels.* Got \(3, 11, 4\)"):
        compare((9, 10, 11), (3, 11, 4))


def test_the_method_needs_the_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agq for the method agq"):
        load_config(overrides=settings(tmp_path, NEURODIFF__SEGMENT__METHODS="['agq']"))


def test_the_command_segments_an_image(tmp_path: Path) -> None:
    volume = grow_phantom((6, 40, 48), (29, 6, 6), 0)
    cells, out, weights = (str(tmp_path / name) for name in ("cells.h5", "out.h5", "weights.pt"))
    write_volume(cells, volume.arrays, volume.voxel_nm)
    options = {"filters": [4, 6], "z_pool": [False], "width": 8, "learned_queries": 4, "guided_queries": 4}
    network = build_segmenter("agq", **options)
    extra = {"patch": [1, 32, 32], "voxel_nm": [[8, 8, 8]]}
    save_checkpoint(weights, kind="segmenter", architecture="agq", options=options, state_dict=network.state_dict(),
                    extra=extra)  # fmt: skip
    lost = neurodiff("segment", cells, cells, "--method", "agq", "--checkpoint", weights, "--force")
    assert lost.returncode == 2
    assert "is an input of this command" in lost.stderr
    assert np.array_equal(open_volume(cells).load().array("label"), volume.array("label"))
    agq = ["segment", cells, out, "--method", "agq", "--gpus", "0"]
    # By a command that was killed, and by one that runs: this one.
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, running = (
        tmp_path / f".out.{platform.node()}.{process}.part.stitching" / "stitching-abc"
        for process in (ended.pid, os.getpid())
    )
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "0-1.npy").touch()
    made = neurodiff(*agq, "--checkpoint", weights, "--tile", "6", "32", "32")
    assert made.returncode == 0
    assert "left by a command that was killed, was removed" in made.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5", "out.h5", "weights.pt", running.parent.name}
    assert [path.name for path in running.iterdir()] == ["0-1.npy"]
    assert "has voxels of (29.0, 6.0, 6.0) nm; the segmenter was trained on (8.0, 8.0, 8.0) nm" in made.stderr
    assert "arand" in json.loads(neurodiff("evaluate", out, "--truth", cells, "--json").stdout)
    for arguments, told in [
        (agq, "needs --checkpoint"),
        ([*agq, "--checkpoint", weights, "--threshold", "0.3"], "has no --threshold"),
        ([*agq, "--checkpoint", weights], "--tile must be at least 2 on every axis of (6, 40, 48) that is longer"),
        (["segment", cells, out, "--method", "waterz", "--precision", "bf16"], "takes affinities alone. Got --prec"),
        (["segment", cells, out, "--method", "waterz", "--checkpoint", weights], "go with --method agq"),
        (["segment", cells, out, "--method", "waterz", "--stitch-fraction", "0"], "takes affinities alone. Got --stit"),
        ([*agq, "--checkpoint", weights, "--tile", "6", "32", "32", "--stitch-fraction", "1.5"], "must lie in (0, 1]"),
    ]:
        result = neurodiff(*arguments, "--force")
        assert result.returncode == 2
        assert told in result.stderr
