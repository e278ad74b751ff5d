"""The plugin for pytorch_connectomics v2: registration, segmenters, decoders, the command. No host is needed."""

from __future__ import annotations

import inspect
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_v2 import DECODERS, OURS, VOXEL, brute_force, run_python, stand_in_host, v2_config, write_stand_in

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.errors import (
    ConfigError,
    MissingDependency,
    MissingInput,
    ShapeMismatch,
    UnknownName,
    UserError,
    ValueRangeError,
    VoxelSizeMissing,
)
from connectomics_neurodiff.host import v2
from connectomics_neurodiff.host.v2 import architectures, decoders
from connectomics_neurodiff.host.v2.config import look_up, plain
from connectomics_neurodiff.metrics import evaluate
from connectomics_neurodiff.segmenters import SEGMENTERS
from connectomics_neurodiff.volume import grow_phantom

stand_in = pytest.fixture(stand_in_host)


def registered(host) -> tuple[set[str], set[str], bool]:
    return (
        set(host.architectures.list_architectures()),
        set(host.decoders.list_decoders()),
        host.dispatch.create_datamodule.__module__ != "connectomics.runtime.dispatch",
    )


def test_register_and_unregister_leave_the_host_as_it_was(stand_in):
    original = stand_in.dispatch.create_datamodule
    assert registered(stand_in) == (set(), set(), False)
    v2.register()
    architectures_, decoders_, hooked = registered(stand_in)
    assert architectures_ == {f"neurodiff_{name}" for name in SEGMENTERS.names()}
    assert architectures_ >= OURS
    assert decoders_ == DECODERS
    assert hooked
    v2.unregister()
    v2.unregister()
    assert registered(stand_in) == (set(), set(), False)
    assert stand_in.dispatch.create_datamodule is original


def test_register_twice_is_register_once(stand_in):
    v2.register()
    once = registered(stand_in)
    v2.register()
    assert registered(stand_in) == once
    v2.unregister()
    assert registered(stand_in) == (set(), set(), False)


def test_a_failure_leaves_nothing_half_registered(stand_in, monkeypatch):
    monkeypatch.delattr(stand_in.dispatch, "create_datamodule")  # the last of the three steps
    with pytest.raises(MissingDependency, match=r"none that the plugin knows: .*create_datamodule.* Tested with"):
        v2.register()
    assert not stand_in.architectures.list_architectures()
    assert not stand_in.decoders.list_decoders()


def test_without_torchvision_the_install_line_is_told(stand_in, monkeypatch):
    monkeypatch.setattr(v2, "has_torchvision", lambda: False)
    with pytest.raises(MissingDependency, match=r"Run: pip install --no-deps torchvision==0\.28\.0"):
        v2.register()
    assert registered(stand_in) == (set(), set(), False)


def test_a_name_of_somebody_else_is_not_taken_over(stand_in):
    stand_in.decoders.register_decoder("neurodiff_multicut", print)
    with pytest.raises(ConfigError, match="decoders there is a 'neurodiff_multicut' already"):
        v2.register()
    assert not stand_in.architectures.list_architectures()
    assert stand_in.decoders.DEFAULT_DECODER_REGISTRY._decoders["neurodiff_multicut"] is print


def test_a_wrapper_put_around_ours_survives(stand_in):
    v2.register()
    ours = stand_in.dispatch.create_datamodule

    def theirs(*arguments, **options):
        return ours(*arguments, **options)

    stand_in.dispatch.create_datamodule = theirs
    v2.unregister()
    assert stand_in.dispatch.create_datamodule is theirs
    assert theirs({}, mode="train") == "the host's own"


def test_bad_pairs_are_refused_before_anything_is_registered(stand_in, tmp_path):
    (tmp_path / "copy_000.h5").touch()
    with pytest.raises(MissingInput, match=r"Did you mean 'copy_000\.h5'"):
        v2.register(pairs=[tmp_path / "copy_00.h5"])
    with pytest.raises(ValueRangeError, match="ratio"):
        v2.register(pairs=[tmp_path / "copy_000.h5"], ratio=-1)
    assert registered(stand_in) == (set(), set(), False)


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        ({"__init__.py": "", "segclr/__init__.py": ""}, "Google's unrelated one"),
        ({"__init__.py": "", "model/build.py": ""}, "pytorch_connectomics v1 is installed"),
        ({"__init__.py": ""}, "none that this plugin knows"),
    ],
)
def test_another_package_of_that_name_is_told_in_one_line(tmp_path, files, finding):
    folder = write_stand_in(tmp_path, files)
    result = run_python("-m", "connectomics_neurodiff.host.v2", "--config", "some.yaml", path=folder)
    assert result.returncode == 2
    assert finding in result.stderr
    assert "pip install" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_importing_the_plugin_needs_no_host_and_no_torch():
    loaded = "[name for name in ('torch', 'connectomics') if name in sys.modules]"
    code = f"import sys; from connectomics_neurodiff.host import v2; print({loaded})"
    assert run_python("-c", code).stdout.strip() == "[]"


# --- Architectures ---


def as_namespace(value):
    """The same with attributes, as the host's dataclasses have; its free dictionaries stay what they are."""
    if not isinstance(value, dict):
        return value
    free = ("params", "heads", "kwargs")
    return SimpleNamespace(**{key: item if key in free else as_namespace(item) for key, item in value.items()})


def test_builders_take_the_configuration_alone_and_say_what_they_are():
    for name, builder in architectures.builders().items():
        assert list(inspect.signature(builder).parameters) == ["cfg"]
        assert builder.__module__.startswith("connectomics_neurodiff.host.v2")
        assert name.removeprefix("neurodiff_") in builder.__doc__


@pytest.mark.parametrize("wrap", [dict, as_namespace])
def test_a_segmenter_is_built_from_any_kind_of_configuration(wrap):
    network = architectures.builders()["neurodiff_superhuman"](wrap(v2_config(out_channels=12, in_channels=2)))
    assert network(torch.zeros(1, 2, 4, 16, 20)).shape == (1, 12, 4, 16, 20)


class Tagged(torch.Tensor):
    """A subclass of tensors, as MONAI's MetaTensor, in which the host's batches come."""


def test_batches_of_a_tensor_subclass_train_in_bfloat16():
    network = architectures.build_from(v2_config(), "superhuman").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.rand(2, 1, 4, 16, 16).as_subclass(Tagged))
        logits.float().mean().backward()
    assert type(logits) is torch.Tensor
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_options_come_from_params():
    def width(**params):
        config = v2_config(arch={"params": params})
        return architectures.build_from(config, "superhuman").embed[0].out_channels

    assert width() == 28
    assert width(filters=[6, 8, 10], norm="group") == 6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": {"params": {"filers": [4, 6]}}}, UnknownName, "no option 'filers'. Did you mean 'filters'"),
        ({"arch": {"params": {"norm": "bach"}}}, UnknownName, "Did you mean 'batch'"),
        ({"arch": {"params": {"out_channels": 3}}}, ConfigError, "set model.out_channels"),
        ({"heads": {"affinity": {}}}, ConfigError, "remove model.heads"),
        ({"loss": {"deep_supervision": True}}, ConfigError, "model.loss.deep_supervision: false"),
        ({"input_size": [64, 64]}, ConfigError, r"works in 3D.*Got \[64, 64\]"),
    ],
)
def test_what_a_segmenter_cannot_do_is_told(changes, error, message):
    with pytest.raises(error, match=message):
        architectures.builders()["neurodiff_superhuman"](v2_config(**changes))


def test_look_up_and_plain():
    cfg = SimpleNamespace(data={"train": SimpleNamespace(json=None, image=("a", "b"))})
    assert look_up(cfg, "data.train.json", "none") == "none"
    assert look_up(cfg, "data.test.image", 3) == 3
    assert plain(look_up(cfg, "data.train.image")) == ["a", "b"]
    assert plain({"a": ({"b": "text"},)}) == {"a": [{"b": "text"}]}


# --- Decoders ---


@pytest.mark.parametrize("order", ["zyx", "xyz"])
@pytest.mark.parametrize("edge_offset", [1, 0])
def test_the_host_s_conventions_become_ours(order, edge_offset):
    label = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    ours = decoders.as_ours(brute_force(label, order, edge_offset), order, edge_offset)
    expected = affinities_from_labels(label)
    assert (ours[0, 1:] == expected[0, 1:]).all()
    assert (ours[1, :, 1:] == expected[1, :, 1:]).all()
    assert (ours[2, :, :, 1:] == expected[2, :, :, 1:]).all()
    if edge_offset == 0:
        assert (ours[0, 0] == ours[0, 1]).all()
        assert (ours[2, :, :, 0] == ours[2, :, :, 1]).all()


@pytest.fixture(scope="module")
def phantom():
    return grow_phantom((10, 96, 96), VOXEL, 1)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize(
    ("order", "edge_offset", "scale", "kind"),
    [("zyx", 1, 1, np.float32), ("xyz", 1, 255, np.uint8), ("zyx", 0, 1, np.float16), ("xyz", 0, 1, np.float64)],
)
def test_perfect_affinities_become_the_neurons(phantom, decoder, order, edge_offset, scale, kind):
    truth = np.asarray(phantom.label)
    affinity = affinities_from_labels(truth)
    if edge_offset == 0:
        for axis in range(3):
            affinity[axis] = np.roll(affinity[axis], -1, axis=axis)
    channels = affinity if order == "zyx" else affinity[::-1]
    predictions = np.concatenate([channels, np.zeros_like(channels)]) * scale  # long-range channels follow
    labels = decoders.decoders()[decoder](
        predictions.astype(kind), voxel_nm=list(VOXEL), channel_order=order, edge_offset=edge_offset
    )
    assert labels.dtype == np.uint32
    assert labels.shape == truth.shape
    assert evaluate(labels, truth).arand < 0.02


def test_keywords_reach_the_watershed_and_the_agglomeration():
    # Two stripes with an affinity of .6 between them, under a boundary that only one threshold sees.
    affinities = np.ones((3, 4, 20, 20), np.float32)
    affinities[2, :, :, 10] = 0.6
    waterz = decoders.decoders()["neurodiff_waterz"]
    fine = {"voxel_nm": VOXEL, "boundary_threshold": 0.1, "min_fragment_size": 0, "sigma_seeds": 1.0}
    assert len(np.unique(waterz(affinities, threshold=0.2, **fine))) == 2
    assert len(np.unique(waterz(affinities, threshold=0.6, **fine))) == 1
    assert waterz(affinities, threshold=0.6, min_segment_size=2000, **fine).max() == 0


@pytest.mark.parametrize(
    ("predictions", "options", "error", "message"),
    [
        (np.ones((3, 4, 4, 4)), {}, VoxelSizeMissing, r"voxel_nm: \[z, y, x\]"),
        (np.ones((3, 4, 4, 4)), {"voxel_nm": [6, 6]}, ValueRangeError, "three positive numbers"),
        (np.ones((3, 4, 4, 4)), {"voxel_nm": VOXEL, "treshold": 0.3}, UnknownName, "Did you mean 'threshold'"),
        (np.ones((3, 4, 4, 4)), {"voxel_nm": VOXEL, "channel_order": "yxz"}, ConfigError, "zyx or xyz. Got 'yxz'"),
        (np.ones((3, 4, 4, 4)), {"voxel_nm": VOXEL, "edge_offset": 2}, ConfigError, "deepem.*banis.*Got 2"),
        (np.ones((3, 4, 4, 4)), {"voxel_nm": VOXEL, "threshold": 1.5}, ValueRangeError, r"\[0, 1\]"),
        (np.ones((2, 4, 4, 4)), {"voxel_nm": VOXEL}, ShapeMismatch, r"at least three channels. Got \(2, 4, 4, 4\)"),
        (np.ones((3, 4, 4)), {"voxel_nm": VOXEL}, ShapeMismatch, "at least three channels"),
        (np.full((3, 4, 4, 4), -4.0), {"voxel_nm": VOXEL}, ValueRangeError, "must lie in"),
        (np.ones((3, 4, 4, 4), np.int32), {"voxel_nm": VOXEL}, ValueRangeError, "dtype int32"),
    ],
)
@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_bad_predictions_and_keywords_are_told(decoder, predictions, options, error, message):
    with pytest.raises(error, match=message):
        decoders.decoders()[decoder](predictions, **options)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "neurodiff_waterz", "kwargs": {"voxel_nm": VOXEL, "thresholds": 0.3}}, "Did you mean 'threshold'"),
        ({"name": "neurodiff_waters", "kwargs": {}}, "Did you mean 'neurodiff_waterz'"),
        ({"name": "neurodiff_multicut"}, "needs the voxel size"),
    ],
)
def test_steps_are_checked_before_the_run(step, message):
    with pytest.raises(UserError, match=message):
        decoders.check_steps({"decoding": {"steps": [step]}})
    node = {"op": step["name"], "kwargs": step.get("kwargs")}
    with pytest.raises(UserError, match=message):
        decoders.check_steps(as_namespace({"decoding": {"graph": {"nodes": [node]}}}))
    decoders.check_steps({"decoding": {"steps": [{**step, "enabled": False}]}})


def test_good_steps_and_those_of_the_host_pass():
    kwargs = {"voxel_nm": VOXEL, "spatial_transpose": [2, 1, 0], "threshold": 0.4, "sigma_seeds": 1.0}
    decoders.check_steps(
        {
            "decoding": {
                "steps": [{"name": "neurodiff_waterz", "kwargs": kwargs}, {"name": "seg_2d", "kwargs": {"thr": 3}}]
            }
        }
    )
    decoders.check_steps({})


# --- The command ---


def run_command(stand_in, folder: Path, **changes) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps({**v2_config(), "data": {"train": {}}, **changes}))
    (stand_in.folder / "torchvision").mkdir(exist_ok=True)
    (stand_in.folder / "torchvision" / "__init__.py").touch()
    return run_python("-m", "connectomics_neurodiff.host.v2", str(folder / "config.json"), path=stand_in.folder)


def test_the_command_registers_and_runs_the_host(stand_in, tmp_path):
    result = run_command(stand_in, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"root {stand_in.folder}", "datamodule: the host's own"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (v2_config(arch={"type": "neurodiff_superhuman", "params": {"filers": [4, 6]}}), "Did you mean 'filters'"),
        (v2_config(arch={"type": "neurodiff_superhumn"}), "Did you mean 'neurodiff_superhuman'"),
        ({"decoding": {"steps": [{"name": "neurodiff_waterz"}]}}, "needs the voxel size"),
        ({"data": {"train": {"dataset_type": "neurodiff_pairs"}}}, "needs pairs"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(stand_in, tmp_path, changes, line):
    result = run_command(stand_in, tmp_path, **changes)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_our_error_inside_the_host_s_run_is_still_exit_2(stand_in, tmp_path):
    result = run_command(stand_in, tmp_path, decode="neurodiff_waterz")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: Decoder 'neurodiff_waterz' needs the voxel size")
