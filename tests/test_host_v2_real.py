"""The plugin against the real pytorch_connectomics v2; skipped, saying what is missing, where it is not installed."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_v2 import DECODERS, OURS, VOXEL, brute_force, run_python, settings_file

from connectomics_neurodiff.errors import UnknownName
from connectomics_neurodiff.host import find_host, v2
from connectomics_neurodiff.host.detect import explain
from connectomics_neurodiff.metrics import evaluate
from connectomics_neurodiff.volume import grow_phantom, write_volume

# What the host and its libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def real_host():
    """The real pytorch_connectomics v2, with our plugin registered; skips, saying what is missing, where it is not."""
    found = find_host()
    if found.kind != "v2":
        pytest.skip(f"pytorch_connectomics v2 is missing: {explain(found)}")
    v2.register()
    yield SimpleNamespace(
        architectures=importlib.import_module("connectomics.models.architectures"),
        decoders=importlib.import_module("connectomics.decoding.registry"),
        dispatch=importlib.import_module("connectomics.runtime.dispatch"),
    )
    v2.unregister()


HOST_YAML = """
experiment_name: test
default:
  model:
    arch: {type: neurodiff_superhuman, params: {filters: [4, 6], norm: none}}
    in_channels: 1
    out_channels: 3
    input_size: [4, 24, 24]
    output_size: [4, 24, 24]
    loss:
      losses: [{function: WeightedBCEWithLogitsLoss, weight: 1.0}]
  data:
    train:
      dataset_type: neurodiff_pairs
      json: pairs.json
      image: real_image.h5
      label: real_label.h5
      resolution: [30, 6, 6]
    test: {image: real_image.h5, label: real_label.h5, resolution: [30, 6, 6]}
    dataloader: {batch_size: 2, patch_size: [4, 24, 24]}
    label_transform:
      targets: [{name: affinity, kwargs: {offsets: ["1-0-0", "0-1-0", "0-0-1"], affinity_mode: deepem}}]
    augmentation:
      flip: {enabled: true}
      misalignment: {enabled: true, prob: 0.5}
      motion_blur: {enabled: true, prob: 0.5}
  inference:
    model: {channel_activations: [{channels: ":", activation: sigmoid}]}
    window: {window_size: [4, 24, 24], sw_batch_size: 2}
  decoding:
    steps: [{name: neurodiff_waterz, kwargs: {voxel_nm: [30, 6, 6], threshold: 0.3}}]
  evaluation: {enabled: true, metrics: [adapted_rand]}
  optimization: {max_epochs: 1, n_steps_per_epoch: 2, precision: "32"}
  system: {num_gpus: 0, num_workers: 0, seed: 7}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A small project of the host: volumes with one dataset each, two pairs, a configuration."""
    (tmp_path / "pairs").mkdir()
    for seed in (1, 2, 3):
        volume = grow_phantom((8, 48, 48), VOXEL, seed)
        if seed > 1:
            write_volume(tmp_path / "pairs" / f"copy_{seed}.h5", volume.arrays, VOXEL)
            continue
        for role in ("image", "label"):
            write_volume(tmp_path / f"real_{role}.h5", {role: volume.arrays[role]}, VOXEL)
    settings_file(tmp_path, {"pairs": "pairs/*.h5", "ratio": 1.0})
    (tmp_path / "project.yaml").write_text(HOST_YAML)
    return tmp_path


def host_configuration(project: Path, monkeypatch, *overrides: str):
    """The host's own configuration of that project, resolved by the host."""
    cli = importlib.import_module("connectomics.runtime.cli")
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "project.yaml", *overrides])
    return cli.setup_config(cli.parse_args())


def test_the_real_host_lists_what_we_registered(real_host):
    assert set(real_host.architectures.list_architectures()) >= OURS | {"rsunet"}
    assert set(real_host.decoders.list_decoders()) >= DECODERS | {"decode_waterz"}
    assert "neurodiff_superhuman" in real_host.architectures.get_architecture_info()
    v2.unregister()
    assert not set(real_host.architectures.list_architectures()) & OURS
    assert not set(real_host.decoders.list_decoders()) & DECODERS


def test_the_real_host_builds_our_segmenter(real_host, project, monkeypatch):
    build_model = importlib.import_module("connectomics.models").build_model
    network = build_model(host_configuration(project, monkeypatch))
    assert network(torch.zeros(1, 1, 4, 24, 24)).shape == (1, 3, 4, 24, 24)
    with pytest.raises(UnknownName, match="Did you mean 'filters'"):
        build_model(host_configuration(project, monkeypatch, "model.arch.params.filtters=[4,6]"))


@pytest.mark.parametrize("mode", ["deepem", "banis"])
@pytest.mark.parametrize("order", ["zyx", "xyz"])
def test_the_real_host_s_targets_are_those_we_expect(real_host, mode, order):
    target = importlib.import_module("connectomics.data.processing.affinity").seg_to_affinity
    offsets = ["1-0-0", "0-1-0", "0-0-1"] if order == "zyx" else ["0-0-1", "0-1-0", "1-0-0"]
    label = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    theirs = target(label, offsets=offsets, affinity_mode=mode).values
    assert (theirs == brute_force(label, order, 1 if mode == "deepem" else 0)).all()


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_the_real_host_decodes_perfect_affinities(real_host, decoder):
    pipeline = importlib.import_module("connectomics.decoding.pipeline")
    target = importlib.import_module("connectomics.data.processing.affinity").seg_to_affinity
    truth = np.asarray(grow_phantom((10, 96, 96), VOXEL, 1).label).astype(np.int64)
    banis = target(truth, offsets=["0-0-1", "0-1-0", "1-0-0"], affinity_mode="banis").values.astype(np.float32)
    kwargs = {"voxel_nm": list(VOXEL), "channel_order": "xyz", "edge_offset": 0}
    labels = pipeline.apply_decode_pipeline(banis[None], [{"name": decoder, "kwargs": kwargs}])
    assert evaluate(labels, truth).arand < 0.02


def test_the_real_host_draws_pairs_in_the_exact_ratio_and_repeatably(real_host, project, monkeypatch):
    config = host_configuration(project, monkeypatch)
    first = real_host.dispatch.create_datamodule(config, mode="train", fast_dev_run=False).train_dataloader()
    batch = next(iter(first))
    assert batch["image"].shape == (2, 1, 4, 24, 24)
    assert batch["label"].shape == batch["label_mask"].shape == (2, 3, 4, 24, 24)
    assert batch["label_mask"].dtype == torch.bool
    drawn = []
    inner = first.dataset.synthetic
    monkeypatch.setattr(type(inner), "__getitem__", recording(type(inner).__getitem__, drawn))
    samples = [first.dataset[i] for i in range(2000)]
    assert len(drawn) / 2000 == pytest.approx(0.5, rel=0.03)
    again = real_host.dispatch.create_datamodule(config, mode="train").train_dataloader().dataset
    for i in (3, 0, 17, 1999, 4):
        assert torch.equal(torch.as_tensor(again[i]["image"]), torch.as_tensor(samples[i]["image"]))
        assert torch.equal(torch.as_tensor(again[i]["label"]), torch.as_tensor(samples[i]["label"]))
    assert not torch.equal(torch.as_tensor(samples[0]["image"]), torch.as_tensor(samples[4]["image"]))


def recording(function, calls: list[int]):
    def record(self, index):
        calls.append(index)
        return function(self, index)

    return record


def test_workers_of_the_real_host_draw_the_same_samples(real_host, project, monkeypatch):
    config = host_configuration(project, monkeypatch)
    loaders = []
    for workers in (0, 2):
        config.system.num_workers = workers
        loaders.append(real_host.dispatch.create_datamodule(config, mode="train").train_dataloader())
    assert loaders[1].num_workers == 2
    for alone, shared in zip(*loaders, strict=True):
        assert torch.equal(torch.as_tensor(alone["image"]), torch.as_tensor(shared["image"]))


def test_pairs_join_volumes_that_the_real_host_reads_lazily(real_host, project, monkeypatch):
    config = host_configuration(project, monkeypatch)
    config.data.dataloader.use_preloaded_cache_train, config.data.dataloader.use_lazy_h5 = False, True
    first, again = (real_host.dispatch.create_datamodule(config, mode="train").train_dataloader() for _ in range(2))
    assert type(first.dataset.real).__name__ == "LazyH5VolumeDataset"
    for one, other in zip(first, again, strict=True):
        assert torch.equal(torch.as_tensor(one["image"]), torch.as_tensor(other["image"]))


def test_the_real_host_trains_and_segments_with_one_command(real_host, project):
    command = "-m", "connectomics_neurodiff.host.v2", "--config", "project.yaml"
    trained = run_python(*command, cwd=project)
    assert trained.returncode == 0, trained.stderr
    assert "Synthetic pairs: 2, 50.0 % of the samples (ratio 1)" in trained.stdout
    (checkpoint,) = project.glob("outputs/project/*/checkpoints/last.ckpt")
    tested = run_python(*command, "--mode", "test", "--checkpoint", str(checkpoint), cwd=project)
    assert tested.returncode == 0, tested.stderr
    assert "test_adapted_rand" in tested.stdout
    (decoded,) = project.glob("outputs/project/*/test_last/real_image/decoded_*neurodiff_waterz*.h5")
    assert decoded.stat().st_size > 0


def test_two_lines_in_front_of_the_real_host_do_the_same(real_host, project):
    (project / "pairs.json").unlink()
    program = """
        import sys
        from connectomics_neurodiff.host import v2
        v2.register(pairs=["pairs/*.h5"], ratio=3.0)
        from connectomics.runtime import cli, dispatch
        args = cli.parse_args()
        dispatch.dispatch_runtime(args, cli.setup_config(args))
        """
    (project / "main.py").write_text(textwrap.dedent(program))
    arguments = "main.py", "--config", "project.yaml", "data.train.json=null"
    result = run_python(*arguments, cwd=project)
    assert result.returncode == 0, result.stderr
    refused = run_python(*arguments[:-1], "data.train.json=none.json", cwd=project)
    assert refused.returncode == 2
    assert "error: Pairs are given twice" in refused.stderr


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.train.json=none.json", "none.json, named by data.train.json, does not exist"),
        ("data.train.resolution=[40,4,4]", "real volume's voxel size"),
        ("model.arch.params.norm=bach", "Did you mean 'batch'"),
        ("data.train.dataset_type=neurodiff_pair", "Did you mean 'neurodiff_pairs'"),
    ],
)
def test_bad_input_to_the_real_host_is_exit_2_with_one_line(real_host, project, override, line):
    result = run_python("-m", "connectomics_neurodiff.host.v2", "--config", "project.yaml", override, cwd=project)
    assert result.returncode == 2
    assert line in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
