"""The plugin for PyTC v1: our side of every signature it calls, and, where PyTC is installed, the real thing."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from host_v1 import KIND, host_or_stand_in, stand_in_signatures
from tiny import neurodiff, settings
from yacs.config import CfgNode

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.config.project import host_defaults, is_project, load_project
from connectomics_neurodiff.engine import FitSettings
from connectomics_neurodiff.errors import (
    ConfigError,
    MissingDependency,
    MissingInput,
    UnknownName,
    UserError,
    ValueRangeError,
)
from connectomics_neurodiff.host import find_host, require_host, v1
from connectomics_neurodiff.host.v1.compat import _replaced_if_missing, bounding_boxes, import_host, make_grid
from connectomics_neurodiff.host.v1.losses import NeuroDiffWeightedBCE
from connectomics_neurodiff.host.v1.models import model_builders, segmenter_for_host, z_pooling
from connectomics_neurodiff.pipeline import run_pipeline
from connectomics_neurodiff.pipeline.engines import choose_engine, load_engine
from connectomics_neurodiff.segmenters import SEGMENTERS
from connectomics_neurodiff.volume import grow_phantom


def needs_host(test: Any) -> Any:
    """With the host, whose own warnings are none of ours."""
    skipped = pytest.mark.skipif(KIND != "v1", reason=f"needs pytorch_connectomics v1 (here: {KIND})")
    return pytest.mark.filterwarnings("ignore")(skipped(test))


host = pytest.fixture(host_or_stand_in)


def with_host(test: Any) -> Any:
    """With the host or its stand-in."""
    return pytest.mark.filterwarnings("ignore")(pytest.mark.usefixtures("host")(test))


without_host = pytest.mark.skipif(KIND == "v1", reason="pytorch_connectomics v1 is installed here")

# What PyTC's build_model passes to every network.
HOST_ARGUMENTS: dict[str, Any] = {
    "block_type": "residual", "in_channel": 1, "out_channel": 3, "filters": [4, 6, 8], "ks": [3, 3, 5],
    "blocks": [2, 2, 2], "attn": "squeeze_excitation", "is_isotropic": False, "isotropy": [False, False, True],
    "pad_mode": "replicate", "act_mode": "elu", "norm_mode": "bn", "pooling": False, "return_feats": None,
}  # fmt: skip

PROJECT = """
MODEL:
  ARCHITECTURE: superhuman
  INPUT_SIZE: [6, 40, 40]
  OUTPUT_SIZE: [6, 40, 40]
  FILTERS: [4, 6, 8]
  ISOTROPY: [False, False, True]
  OUT_PLANES: 3
  TARGET_OPT: ["2"]
  LOSS_OPTION: [["WeightedBCEWithLogitsLoss", "DiceLoss"]]
  LOSS_WEIGHT: [[1.0, 0.5]]
  WEIGHT_OPT: [["1", "0"]]
  OUTPUT_ACT: [["none", "sigmoid"]]
  NORM_MODE: gn
  LABEL_EROSION: 1
DATASET:
  IMAGE_NAME: image.h5
  LABEL_NAME: label.h5
  PAD_SIZE: [2, 8, 8]
SOLVER:
  LR_SCHEDULER_NAME: WarmupCosineLR
  ITERATION_TOTAL: 2
  WARMUP_ITERS: 1
INFERENCE:
  AUG_NUM: None
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Our side of PyTC's calls, without PyTC.


def test_every_segmenter_is_built_from_what_the_host_passes() -> None:
    builders = model_builders("neurodiff", {"preset": "small"}, {"feature_size": 12})
    assert set(builders) >= {"neurodiff_superhuman", "neurodiff_denoiser"}
    assert {f"neurodiff_{name}" for name in SEGMENTERS} < set(builders)
    for name in SEGMENTERS:
        network = builders[f"neurodiff_{name}"](**HOST_ARGUMENTS).eval()
        assert network(torch.rand(1, 1, 5, 16, 20)).shape == (1, 3, 5, 16, 20)
    assert sum(p.numel() for p in builders["neurodiff_denoiser"](**HOST_ARGUMENTS).parameters()) > 1e6


def test_isotropy_has_an_entry_per_level_there_and_per_step_here() -> None:
    assert z_pooling([False, True, False], 3) == [True, False]
    assert z_pooling([True, False], 3) == [True, False]
    with pytest.raises(ConfigError, match="3 or 2 entries"):
        z_pooling([True], 3)
    with pytest.raises(ConfigError, match=r"NORM_MODE is 'bm'.*'bn'"):
        segmenter_for_host({}, "superhuman", **HOST_ARGUMENTS | {"norm_mode": "bm"})


def test_the_loss_takes_the_hosts_arguments() -> None:
    logits, target = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])
    weight = torch.tensor([[[3.0, 1.0]]])
    by_hand = (3 * np.log(2) + (2 + np.log(1 + np.exp(-2)))) / 4
    assert float(NeuroDiffWeightedBCE()(pred=logits, target=target, weight_mask=weight)) == pytest.approx(by_hand)
    assert float(NeuroDiffWeightedBCE()(logits, target)) == pytest.approx((np.log(2) + 2 + np.log(1 + np.exp(-2))) / 2)


def tree() -> CfgNode:
    cfg = CfgNode({"AUGMENTOR": {"ENABLED": True}, "MODEL": {"OUTPUT_ACT": [["none"]], "LABEL_EROSION": None}})
    v1.add_config(cfg)
    return cfg


def test_the_short_forms_are_written_out_before_yacs_sees_them(tmp_path: Path) -> None:
    cfg = tree()
    cfg.merge_from_file(write(tmp_path / "a.yaml", "AUGMENTOR: {SYNTHETIC: True}"))
    assert cfg.AUGMENTOR.SYNTHETIC.ENABLED is True
    content = "AUGMENTOR: {SYNTHETIC: {PAIRS: a.h5, RATIO: 2}}\nNEURODIFF: {VOXEL_NM: [8, 8, 8]}"
    cfg.merge_from_file(write(tmp_path / "b.yaml", content))
    assert cfg.AUGMENTOR.SYNTHETIC.PAIRS == ["a.h5"]
    assert cfg.AUGMENTOR.SYNTHETIC.RATIO == 2.0
    cfg.merge_from_list(["AUGMENTOR.SYNTHETIC", "False", "NEURODIFF.SEED", "3", "MODEL.LABEL_EROSION", "1"])
    assert (cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.NEURODIFF.SEED, cfg.MODEL.LABEL_EROSION) == (False, 3, 1)
    cfg.merge_from_file(write(tmp_path / "c.yaml", "MODEL: {LABEL_EROSION: [1, 2]}"))
    assert cfg.MODEL.LABEL_EROSION == [1, 2]
    assert cfg.clone().AUGMENTOR.SYNTHETIC.RATIO == 2.0


def test_the_stand_in_for_make_grid_puts_images_where_they_belong() -> None:
    images = torch.arange(3, dtype=torch.float32).reshape(3, 1, 1, 1).expand(3, 3, 4, 5)
    grid = make_grid(images, nrow=2, padding=1)
    assert grid.shape == (3, 2 * 5 + 1, 2 * 6 + 1)
    assert (grid[:, 1:5, 7:12] == 1).all()
    assert (grid[:, 6:10, 1:6] == 2).all()
    assert grid[:, :, 6].abs().sum() == 0
    assert float(make_grid(images * 10, normalize=True).max()) == 1


def test_bounding_boxes_are_those_of_a_search() -> None:
    label = np.random.default_rng(0).integers(0, 9, (3, 5, 7)) * 100
    for row in bounding_boxes(label):
        where = np.argwhere(label == row[0])
        assert row[1:].tolist() == np.stack([where.min(0), where.max(0)], axis=1).ravel().tolist()
    assert bounding_boxes(label)[:, 0].tolist() == sorted(np.unique(label))


def test_stand_ins_are_only_there_for_what_is_missing_and_only_for_a_while() -> None:
    def make() -> dict[str, Any]:
        return {"yaml": SimpleNamespace()}

    with _replaced_if_missing("yaml", make):
        assert sys.modules["yaml"] is yaml
    with _replaced_if_missing("no_such_package_", lambda: {"no_such_package_": SimpleNamespace(here=True)}):
        import no_such_package_

        assert no_such_package_.here
    assert "no_such_package_" not in sys.modules


# Without the host: what is told.


@without_host
def test_without_the_host_auto_is_native_and_host_is_an_error() -> None:
    assert choose_engine("auto") == "native"
    with pytest.raises(MissingDependency, match="pip install"):
        load_engine("host")
    with pytest.raises(UnknownName, match="Did you mean 'native'"):
        choose_engine("nativ")


@without_host
def test_the_command_says_in_one_line_that_the_host_is_missing(tmp_path: Path) -> None:
    result = neurodiff("run", "--engine", "host", *settings(tmp_path / "run"))
    assert result.returncode == 2
    assert "pytorch_connectomics is not installed" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def fake_host(folder: Path, mark: str) -> None:
    (folder / "connectomics" / mark).parent.mkdir(parents=True)
    (folder / "connectomics" / "__init__.py").touch()
    (folder / "connectomics" / mark).touch()


@without_host
@pytest.mark.parametrize(
    ("mark", "kind", "told"),
    [("common/bounding_box.py", "google", "Google's"), ("something.py", "unknown", "none that this plugin knows")],
)
def test_other_packages_of_that_name_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, kind: str, told: str
) -> None:
    fake_host(tmp_path, mark)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_host().kind == kind
    with pytest.raises(MissingDependency, match=told):
        require_host("v1")


# A project's YAML, read without the host.


def test_a_project_is_told_from_a_recipe_of_ours(tmp_path: Path) -> None:
    assert is_project(write(tmp_path / "p.yaml", PROJECT), None)
    assert not is_project(write(tmp_path / "o.yaml", "SOLVER: {ITERATION_TOTAL: 5}"), None)
    assert is_project(write(tmp_path / "n.yaml", f"{PROJECT}\nNEURODIFF: {{VOXEL_NM: [29, 6, 6], SEED: 1}}"), None)
    assert not is_project(write(tmp_path / "r.yaml", f"{PROJECT}\nNEURODIFF: {{SPLIT: {{PURGE_NM: 0.0}}}}"), None)
    assert not is_project(None, None)


def test_a_project_says_the_same_in_our_configuration(tmp_path: Path) -> None:
    project = load_project(
        write(tmp_path / "p.yaml", PROJECT),
        overrides=["AUGMENTOR.SYNTHETIC", "True", "NEURODIFF.VOXEL_NM", "[29, 6, 6]"],
    )
    cfg = project.cfg
    assert not project.unsupported
    assert set(project.without_effect) >= {"DATASET.PAD_SIZE", "MODEL.WEIGHT_OPT", "MODEL.OUTPUT_ACT"}
    assert (cfg.MODEL.LOSS_OPTION, cfg.MODEL.LOSS_WEIGHT) == (["WeightedBCEWithLogitsLoss", "DiceLoss"], [1.0, 0.5])
    assert (cfg.MODEL.ISOTROPY, cfg.MODEL.NORM_MODE) == ([False, True], "group")
    assert cfg.NEURODIFF.SEGMENTER.LABEL_EROSION == 1
    assert (cfg.SOLVER.NAME, cfg.SOLVER.BASE_LR, cfg.SOLVER.LR_SCHEDULER_NAME) == ("SGD", 0.001, "cosine")
    assert cfg.AUGMENTOR.SYNTHETIC.ENABLED
    assert cfg.NEURODIFF.VOXEL_NM == [29, 6, 6]
    assert not cfg.NEURODIFF.SPLIT.SCORED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.TARGET_OPT", "['2', '4-1-1']"), ("MODEL.LOSS_OPTION", "[['WeightedMSE']]"),
        ("SOLVER.SWA.ENABLED", "True"), ("DATASET.DO_CHUNK_TITLE", "1"), ("MODEL.OUTPUT_SIZE", "[4, 40, 40]"),
        ("DATASET.DATA_SCALE", "[1.0, 0.5, 0.5]"), ("DATASET.IMAGE_NAME", "a.h5@b.h5"),
        ("SOLVER.LR_SCHEDULER_NAME", "OneCycle"), ("MODEL.OUT_PLANES", "4"),
    ],
)  # fmt: skip
def test_what_the_native_engine_cannot_honour_is_named(tmp_path: Path, key: str, value: str) -> None:
    path = write(tmp_path / "p.yaml", PROJECT)
    assert list(load_project(path, overrides=[key, value]).unsupported) == [key]
    result = neurodiff("run", "--engine", "native", "--config-file", path, key, value)
    assert result.returncode == 2
    assert key in result.stderr.splitlines()[-1]


def test_a_misspelt_key_of_a_project_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.BLOCK_TYP in.*Did you mean 'MODEL\.BLOCK_TYPE'"):
        load_project(write(tmp_path / "p.yaml", PROJECT), overrides=["MODEL.BLOCK_TYP", "x"])


def write_project_data(folder: Path, shape: tuple[int, int, int] = (12, 64, 72)) -> None:
    phantom = grow_phantom(shape, (29, 6, 6), 0)
    for name, array in (("image", (phantom.array("image") * 255).astype(np.uint8)), ("label", phantom.array("label"))):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["main"] = array


SMALL = [
    "NEURODIFF.VOXEL_NM", "[29, 6, 6]", "AUGMENTOR.SYNTHETIC", "True", "NEURODIFF.DIFFUSION.PRESET", "small",
    "NEURODIFF.DIFFUSION.ITERATIONS", "2", "NEURODIFF.DIFFUSION.PATCH", "[4, 24, 24]",
    "NEURODIFF.DIFFUSION.SAMPLER_STEPS", "2", "NEURODIFF.DIFFUSION.TILE", "[12, 64, 64]",
    "NEURODIFF.DIFFUSION.OVERLAP", "[2, 8, 8]", "NEURODIFF.PAIRS.GREY_LIMIT", "1.0",
    "NEURODIFF.PAIRS.LEAST_FOLLOWING", "0.0", "NEURODIFF.PAIRS.MOST_MISSING", "0.0",
    "NEURODIFF.PAIRS.SPECTRUM_LIMIT", "0.0",
    "NEURODIFF.PAIRS.GRAIN_LIMIT", "0.0",
    "NEURODIFF.PAIRS.DARK_LIMIT", "0.0",
    "NEURODIFF.PAIRS.CONTINUITY_LIMIT", "0.0", "NEURODIFF.PAIRS.LEAST_ORDER", "0.0",
    "SYSTEM.NUM_CPUS", "0",
]  # fmt: skip


def test_a_project_trains_on_mixed_pairs_under_the_native_engine(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    path = write(tmp_path / "p.yaml", PROJECT)
    where = ["DATASET.INPUT_PATH", str(tmp_path), "DATASET.OUTPUT_PATH", str(tmp_path / "run"), "SYSTEM.NUM_GPUS", "-1"]
    result = neurodiff("run", "--engine", "native", "--config-file", path, *where, *SMALL)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "pairs" / "copy_000.h5").exists()
    assert (tmp_path / "run" / "segmenter" / "mixed" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "segmenter" / "real").exists()


# With the host.


@needs_host
def test_the_table_of_the_hosts_keys_is_that_of_the_host() -> None:
    from connectomics.config import get_cfg_defaults

    def flat(node: Any, prefix: str = "") -> Any:
        for name, value in node.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]

    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in flat(get_cfg_defaults())}
    assert host_defaults() == listed


@needs_host
def test_the_stand_in_has_the_signatures_of_the_host() -> None:
    import_host()
    for place, arguments in stand_in_signatures().items():
        module, _, path = place.partition(":")
        if path.startswith("_") and path not in ("_pad", "_rescale"):
            continue  # the stand-in's own
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        parameters = [name for name in inspect.signature(found).parameters if name != "self"]
        by_name = path == "TileDataset.__init__"  # whose arguments PyTC's get_dataset passes by name
        assert set(arguments) <= set(parameters) if by_name else parameters[: len(arguments)] == arguments, place


def host_cfg(tmp_path: Path, **pairs: Any) -> CfgNode:
    import_host()
    from connectomics.config import get_cfg_defaults

    cfg = get_cfg_defaults()
    v1.add_config(cfg)
    cfg.MODEL.TARGET_OPT, cfg.MODEL.OUT_PLANES = ["2"], 3
    cfg.MODEL.INPUT_SIZE = cfg.MODEL.OUTPUT_SIZE = [4, 16, 16]
    cfg.DATASET.INPUT_PATH, cfg.DATASET.OUTPUT_PATH = str(tmp_path), str(tmp_path / "out")
    cfg.DATASET.IMAGE_NAME, cfg.DATASET.LABEL_NAME, cfg.DATASET.PAD_SIZE = "image.h5", "label.h5", [0, 0, 0]
    cfg.AUGMENTOR.ENABLED = False
    cfg.SYSTEM.NUM_CPUS = 0
    cfg.DATASET.IMAGE_SCALE = cfg.DATASET.LABEL_SCALE = cfg.DATASET.DATA_SCALE
    cfg.merge_from_list([text for pair in pairs.items() for text in pair])
    return cfg


def write_pairs(tmp_path: Path, shape: tuple[int, int, int] = (8, 40, 48)) -> list[str]:
    paths = []
    for seed in (1, 2):
        phantom = grow_phantom(shape, (29, 6, 6), seed)
        paths.append(str(tmp_path / f"pair_{seed}.h5"))
        with h5py.File(paths[-1], "w") as file:
            file["image"] = np.full(shape, 7, np.uint8)  # told from a real patch by its grey value
            file["label"] = phantom.array("label")
            file.attrs["resolution_nm"] = (29, 6, 6)
    return paths


@with_host
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_share_of_synthetic_patches_is_exact(tmp_path: Path, ratio: float) -> None:
    write_project_data(tmp_path)
    cfg = host_cfg(tmp_path)
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    cfg.AUGMENTOR.SYNTHETIC.RATIO = ratio
    v1.register(cfg)
    try:
        from connectomics.engine import trainer

        dataset = trainer.build_dataloader(cfg, None, "train").dataset
        grey = [float(np.ptp(dataset[i][1])) for i in range(2000)]
    finally:
        v1.unregister()
    assert sum(value == 0 for value in grey) == pytest.approx(2000 * ratio / (1 + ratio), abs=1)
    first = dataset[17][1]
    random.seed(99)
    np.testing.assert_array_equal(dataset[17][1], first)


@with_host
def test_a_project_ends_on_real_patches(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    cfg = host_cfg(tmp_path, **{"SOLVER.ITERATION_TOTAL": 30, "SOLVER.SAMPLES_PER_BATCH": 2})
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    cfg.AUGMENTOR.SYNTHETIC.UNTIL = 0.6
    v1.register(cfg)
    try:
        from connectomics.engine import trainer

        dataset = trainer.build_dataloader(cfg, None, "train").dataset
        synthetic = [float(np.ptp(dataset[i][1])) == 0 for i in range(60)]
    finally:
        v1.unregister()
    assert sum(synthetic[:36]) == 18
    assert not any(synthetic[36:])
    cfg.SYSTEM.DISTRIBUTED = True  # samples would come in a random order
    try:
        with pytest.raises(ConfigError, match=r"SYNTHETIC.UNTIL must be 1 in a distributed training.* Got 0.6"):
            v1.register(cfg)
        cfg.DATASET.DISTRIBUTED = True  # each process has its own files, and draws in order
        v1.register(cfg)
    finally:
        v1.unregister()


@with_host
def test_workers_and_a_resumed_training_draw_the_same_samples(tmp_path: Path) -> None:
    write_project_data(tmp_path, (12, 88, 96))
    cfg = host_cfg(tmp_path, **{"SOLVER.SAMPLES_PER_BATCH": 2})
    cfg.AUGMENTOR.ENABLED = True  # the augmentation too follows from the number alone
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path, (9, 80, 88))

    def batches(count: int, **options: Any) -> list[torch.Tensor]:
        v1.register(cfg, **options)
        try:
            from connectomics.data.augmentation import build_train_augmentor
            from connectomics.engine import trainer

            loader = iter(trainer.build_dataloader(cfg, build_train_augmentor(cfg), "train"))
            return [next(loader).out_input.clone() for _ in range(count)]
        finally:
            v1.unregister()

    whole = batches(6)
    cfg.SYSTEM.NUM_CPUS = 2
    torch.save({"iteration": 4}, tmp_path / "checkpoint_00004.pth.tar")
    resumed = batches(2, checkpoint=tmp_path / "checkpoint_00004.pth.tar")
    for expected, found in zip([*whole, *whole[4:]], [*batches(6), *resumed], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(whole[0], whole[4])


def write_tiles(folder: Path) -> None:
    """The project's volume as PyTC's tiles: a PNG per section and quarter, and the two JSON files."""
    import imageio.v2 as imageio

    with h5py.File(folder / "image.h5") as image, h5py.File(folder / "label.h5") as label:
        arrays = {"image": image["main"][()], "label": label["main"][()].astype(np.uint8)}
    depth, height, width = arrays["image"].shape
    for name, array in arrays.items():
        for z, (row, column) in product(range(depth), product(range(2), range(2))):
            tile = array[z, row * 40 : (row + 1) * 40, column * 40 : (column + 1) * 40]
            imageio.imwrite(folder / f"{name}_{z}_{row}_{column}.png", tile)
        content = {
            "image": [str(folder / f"{name}_{z}_{{row}}_{{column}}.png") for z in range(depth)],
            "depth": depth, "height": height, "width": width, "dtype": "uint8",
            "tile_size": 40, "tile_st": [0, 0], "tile_ratio": 1.0,
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))


CHUNKS = [
    "DATASET.DO_CHUNK_TITLE", "1", "DATASET.IMAGE_NAME", "image.json", "DATASET.LABEL_NAME", "label.json",
    "DATASET.DATA_CHUNK_NUM", "[1, 2, 1]", "DATASET.DATA_CHUNK_ITER", "3", "SOLVER.ITERATION_TOTAL", "6",
    "SOLVER.SAMPLES_PER_BATCH", "2",
]  # fmt: skip


@with_host
def test_chunks_of_tiles_train_on_pairs_and_go_on_in_the_numbers(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    write_tiles(tmp_path)
    cfg = host_cfg(tmp_path)
    cfg.merge_from_list(CHUNKS)
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    v1.register(cfg)
    try:
        from connectomics.data.dataset import get_dataset
        from connectomics.engine import trainer

        tiles = get_dataset(cfg, None, "train")
        samples = []
        for _ in range(2):
            tiles.updatechunk()
            loader = trainer.build_dataloader(cfg, None, "train", dataset=tiles.dataset)
            samples += [loader.dataset[i] for i in range(6)]
        tested = get_dataset(cfg, None, "test")
        tested.updatechunk()
    finally:
        v1.unregister()
    flat = [float(np.ptp(image)) == 0 for _, image, *_ in samples]
    assert sum(flat) == 6
    places = [tuple(place) for (place, *_), synthetic in zip(samples, flat, strict=True) if synthetic]
    assert not {*places[:3]} & {*places[3:]}  # the second chunk does not repeat the numbers of the first
    assert len(tested.dataset.volume) == 1  # no synthetic volume is predicted


@with_host
def test_a_project_in_chunks_trains_under_the_host(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    write_tiles(tmp_path)
    pairs = ["AUGMENTOR.SYNTHETIC.PAIRS", str(write_pairs(tmp_path))]
    where = ["DATASET.INPUT_PATH", str(tmp_path), "DATASET.OUTPUT_PATH", str(tmp_path / "run"), "SYSTEM.NUM_GPUS", "1"]
    size = ["MODEL.INPUT_SIZE", "[4, 24, 24]", "MODEL.OUTPUT_SIZE", "[4, 24, 24]", "DATASET.PAD_SIZE", "[0, 0, 0]"]
    path = write(tmp_path / "p.yaml", PROJECT.replace("superhuman", "neurodiff_superhuman"))
    result = neurodiff("run", "--engine", "host", "--config-file", path, *where, *SMALL, *CHUNKS, *pairs, *size,
                        "AUGMENTOR.ENABLED", "False")  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    content = torch.load(tmp_path / "run" / "checkpoint_00006.pth.tar", weights_only=True)
    assert content["iteration"] == 6


@with_host
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("MODEL.ARCHITECTURE", "unet_3b", "Did you mean 'unet_3d'"),
        ("MODEL.FILTERS", "[4]", "ISOTROPY needs 1 or 0 entries for 1 FILTERS"),
        ("DATASET.LABEL_NAME", "lable.h5", "No file at .*lable.h5"),
        ("INFERENCE.AUG_NUMBER", "4", "AUG_NUMBER"),
    ],
)
def test_what_the_host_cannot_do_is_told_before_any_work(tmp_path: Path, key: str, value: str, told: str) -> None:
    write_project_data(tmp_path)
    path = write(tmp_path / "p.yaml", PROJECT.replace("superhuman", "neurodiff_superhuman"))
    where = ["DATASET.INPUT_PATH", str(tmp_path), "DATASET.OUTPUT_PATH", str(tmp_path / "run"), "SYSTEM.NUM_GPUS", "1"]
    result = neurodiff("run", "--engine", "host", "--config-file", path, *where, *SMALL, key, value)
    assert result.returncode == 2, result.stderr
    assert re.search(told, result.stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def run_host_project(tmp_path: Path, *options: str, **changes: Any) -> Any:
    """A project of 2 iterations on real patches, unless `changes` say otherwise."""
    if not (tmp_path / "image.h5").exists():
        write_project_data(tmp_path)
        write(tmp_path / "p.yaml", PROJECT)
    keys = {
        "DATASET.INPUT_PATH": tmp_path, "DATASET.OUTPUT_PATH": tmp_path / "run", "SYSTEM.NUM_GPUS": 1,
        "SYSTEM.NUM_CPUS": 0, "AUGMENTOR.ENABLED": False, "MODEL.ARCHITECTURE": "neurodiff_superhuman",
        "MODEL.INPUT_SIZE": [4, 16, 16], "MODEL.OUTPUT_SIZE": [4, 16, 16], "DATASET.PAD_SIZE": [0, 0, 0],
        "MODEL.LOSS_OPTION": [["WeightedBCEWithLogitsLoss"]], "INFERENCE.OUTPUT_PATH": tmp_path / "test",
        "INFERENCE.IMAGE_NAME": "image.h5",
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    words = [str(word) for pair in keys.items() for word in pair]
    return neurodiff("run", "--engine", "host", "--config-file", str(tmp_path / "p.yaml"), *options, *words)


@with_host
def test_a_project_goes_on_where_it_stopped_and_ends_the_same(tmp_path: Path) -> None:
    pairs = {"AUGMENTOR__SYNTHETIC": True, "AUGMENTOR__SYNTHETIC__PAIRS": write_pairs(tmp_path)}
    length = {"SOLVER__ITERATION_TOTAL": 4, "SOLVER__ITERATION_SAVE": 2}
    whole = run_host_project(tmp_path, **pairs, **length)
    assert whole.returncode == 0, whole.stderr
    last = tmp_path / "run" / "checkpoint_00004.pth.tar"
    expected = torch.load(last, weights_only=True)
    last.unlink()  # as if it had been killed before
    assert run_host_project(tmp_path, **pairs, **length).returncode == 0
    ended = torch.load(last, weights_only=True)
    for name, tensor in expected["state_dict"].items():
        torch.testing.assert_close(ended["state_dict"][name], tensor, rtol=0, atol=0)
    assert ended["lr_scheduler"]["last_epoch"] == expected["lr_scheduler"]["last_epoch"]
    assert "nothing left to train" in run_host_project(tmp_path, **pairs, **length).stdout


@with_host
def test_a_training_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    assert run_host_project(tmp_path).returncode == 0
    before = (tmp_path / "run" / "checkpoint_00002.pth.tar").read_bytes()
    pairs = {"AUGMENTOR__SYNTHETIC": True, "AUGMENTOR__SYNTHETIC__PAIRS": write_pairs(tmp_path)}
    mixed = run_host_project(tmp_path, **pairs)
    assert mixed.returncode == 2
    assert "other settings (AUGMENTOR.SYNTHETIC.ENABLED: False -> True" in mixed.stderr
    assert (tmp_path / "run" / "checkpoint_00002.pth.tar").read_bytes() == before
    assert run_host_project(tmp_path, "--force", **pairs).returncode == 0
    assert (tmp_path / "run" / "checkpoint_00002.pth.tar").read_bytes() != before


@with_host
@pytest.mark.parametrize(
    ("content", "options", "changes", "told"),
    [
        ({"foo": 1}, ["--inference"], {}, "holds no weights"),
        ([1], ["--inference"], {}, "no checkpoint of PyTC's"),
        ({"iteration": "abc", "state_dict": {}}, [], {}, "no checkpoint of PyTC's"),
        ({"state_dict": {"a": torch.zeros(3)}}, ["--inference"], {}, "belongs to another network"),
        (None, ["--inference"], {}, "No checkpoint at"),
        (b"garbage", [], {}, "cannot be read as a checkpoint"),
    ],
)
def test_a_foreign_checkpoint_is_refused(
    tmp_path: Path, content: Any, options: list[str], changes: dict[str, Any], told: str
) -> None:
    path = tmp_path / "c.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    result = run_host_project(tmp_path, *options, "--checkpoint", str(path), **changes)
    assert result.returncode == 2, result.stderr
    assert told in result.stderr.splitlines()[-1]
    assert path.exists() == (content is not None)


@with_host
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"DATASET__IMAGE_NAME": "image.h5@nope.h5"}, "No file at .*nope.h5"),
        ({"DATASET__VAL_IMAGE_NAME": "nope.h5"}, "No file at .*nope.h5"),
        ({"DATASET__LABEL_NAME": None}, "Training needs labels|LABEL_NAME"),
        ({"DATASET__OUTPUT_PATH": "/dev/null"}, "is a file; name a folder"),
        ({"MODEL__INPUT_SIZE": [40, 40, 40], "MODEL__OUTPUT_SIZE": [40, 40, 40]}, "No volume is as large"),
        ({"SOLVER__ITERATION_TOTAL": -5}, "ITERATION_TOTAL must be >= 1"),
        ({"SOLVER__BASE_LR": 1e30, "SOLVER__ITERATION_TOTAL": 8}, "has diverged"),
        ({"NEURODIFF__SEED": -3}, "NEURODIFF.SEED must be in"),
        ({"MODEL__FILTERSS": [4]}, "MODEL.FILTERSS in the command line.*MODEL.FILTERS"),
        ({"MODEL__LOSS_OPTION": [["Foo"]]}, "Foo|loss_dict"),
        ({"MODEL__FILTERS": ["a", "b", "c"]}, "a list of whole numbers for 'filters'"),
    ],
)
def test_mistakes_in_a_project_are_one_line_and_exit_2(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    result = run_host_project(tmp_path, **changes)
    assert result.returncode == 2, result.stderr
    assert re.search(told, result.stderr.splitlines()[-1])


@with_host
def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("# my notes")
    assert run_host_project(tmp_path, DATASET__OUTPUT_PATH=mine).returncode == 2
    assert (mine / "config.yaml").read_text() == "# my notes"


@with_host
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("MODEL.TARGET_OPT", ["0"], "ids of neurons"),
        ("DATASET.LABEL_BINARY", True, "LABEL_BINARY"),
        ("AUGMENTOR.SYNTHETIC.RATIO", -1.0, "RATIO must be >= 0"),
        ("NEURODIFF.DIFFUSION.PRESET", "foo", "No denoiser preset 'foo'"),
    ],
)
def test_what_pairs_do_not_go_with_is_refused(tmp_path: Path, key: str, value: Any, told: str) -> None:
    write_project_data(tmp_path)
    cfg = host_cfg(tmp_path)
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=told):
        v1.register(cfg)


@with_host
def test_grey_values_of_both_kinds_must_be_stored_alike(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    cfg = host_cfg(tmp_path)
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    with h5py.File(tmp_path / "pair_2.h5", "r+") as file:
        image = file["image"][()]
        del file["image"]
        file["image"] = image.astype(np.uint16)
    with pytest.raises(ValueRangeError, match=r"must both be uint8\. .*pair_2\.h5 is uint16"):
        v1.register(cfg)


@with_host
def test_a_name_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    cfg = host_cfg(tmp_path)
    from connectomics.model.build import MODEL_MAP

    MODEL_MAP["neurodiff_superhuman"] = theirs = object()
    try:
        with pytest.raises(ConfigError, match="knows 'neurodiff_superhuman' already"):
            v1.register(cfg)
        assert MODEL_MAP["neurodiff_superhuman"] is theirs
        assert "neurodiff_denoiser" not in MODEL_MAP
    finally:
        del MODEL_MAP["neurodiff_superhuman"]
    with pytest.raises(ConfigError, match="add_cfg_func"):
        v1.register(CfgNode({"AUGMENTOR": {"ENABLED": True}}))


@with_host
def test_register_puts_in_all_and_unregister_takes_out_all(tmp_path: Path) -> None:
    cfg = host_cfg(tmp_path)
    from connectomics.engine import trainer
    from connectomics.model.build import MODEL_MAP

    before, loader = dict(MODEL_MAP), trainer.build_dataloader
    v1.register(cfg)
    v1.register(cfg)
    assert "neurodiff_superhuman" in MODEL_MAP
    v1.unregister()
    assert before == MODEL_MAP
    cfg.AUGMENTOR.SYNTHETIC.ENABLED = True
    with pytest.raises(MissingInput, match="without pairs"):
        v1.register(cfg)
    assert before == MODEL_MAP
    assert trainer.build_dataloader is loader


@with_host
def test_pairs_of_another_voxel_size_are_refused(tmp_path: Path) -> None:
    cfg = host_cfg(tmp_path)
    cfg.NEURODIFF.VOXEL_NM = [8, 8, 8]
    cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.PAIRS = True, write_pairs(tmp_path)
    with pytest.raises(ValueRangeError, match="voxel size"):
        v1.register(cfg)


@with_host
@pytest.mark.parametrize("mode", ["mean", "min", "max"])
@pytest.mark.parametrize("number", [None, 4, 8, 16])
def test_perfect_affinities_come_back_from_test_time_augmentation(mode: str, number: int | None) -> None:
    augmentor_class = v1.AffinityTestAugmentor
    from connectomics.data.augmentation import TestAugmentor

    label = torch.from_numpy(np.random.default_rng(0).integers(1, 4, (2, 1, 5, 12, 16)).astype(np.float32))

    def perfect(image: torch.Tensor) -> torch.Tensor:
        affinities = [affinities_from_labels(v[0].numpy().astype(np.uint32)).astype(np.float32) for v in image]
        extra = image  # a second target beside the affinity: turned back, never shifted
        return torch.cat([torch.from_numpy(np.stack(affinities)), extra], dim=1)

    plain = TestAugmentor(mode=mode, num_aug=number, inference_act=lambda x: x)
    ours = augmentor_class(plain, ["2", "0"], [3, 1])(perfect, label)
    np.testing.assert_allclose(ours, perfect(label).numpy(), atol=1e-6)


@with_host
def test_the_pipeline_runs_and_resumes_under_the_host(tmp_path: Path) -> None:
    metrics = run_pipeline(load_config(overrides=settings(tmp_path / "whole")), engine="host")
    assert set(metrics["mixed"]) == {"waterz", "multicut"}
    half = settings(tmp_path / "half", NEURODIFF__DIFFUSION__SAVE_EVERY="4")
    from connectomics_neurodiff.host.v1 import engine

    real = engine._FitTrainer._log

    def stop_at_five(self: Any, step: int, *rest: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt
        real(self, step, *rest)

    engine._FitTrainer._log = stop_at_five  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(load_config(overrides=half), engine="host", stages=["diffusion"])
    finally:
        engine._FitTrainer._log = real  # type: ignore[method-assign]
    run_pipeline(load_config(overrides=half), engine="host", stages=["diffusion", "masks", "pairs"])
    with h5py.File(tmp_path / "whole/pairs/copy_000.h5") as one, h5py.File(tmp_path / "half/pairs/copy_000.h5") as two:
        np.testing.assert_array_equal(one["image"][()], two["image"][()])


@with_host
def test_a_training_killed_while_somebody_looks_is_looked_at_again(tmp_path: Path) -> None:
    """PyTC saves before it is looked at: without a second look a resumed training would lack a row."""
    from connectomics_neurodiff.host.v1.engine import fit

    class Watch:
        every = 2

        def __init__(self, dies_at: int = 0) -> None:
            self.looks: list[int] = []
            self.dies_at = dies_at

        def __call__(self, network: torch.nn.Module, step: int) -> dict[str, float]:
            if step == self.dies_at:
                raise KeyboardInterrupt
            self.looks.append(step)
            return {}

    class Samples:
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            values = np.random.default_rng(index).random((1, 2, 4, 4), dtype=np.float32)
            return {"image": values, "target": values}

    def loss(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (network(batch["image"]) - batch["target"]).square().mean(), {}

    def train(watch: Watch) -> None:
        how = FitSettings(4, checkpoint_every=2, precision="fp32")
        fit(torch.nn.Conv3d(1, 1, 1), loss, Samples(), how, tmp_path, label="tiny", watch=watch)

    for dies_at, looks in ((2, []), (4, [2]), (0, [4])):
        watch = Watch(dies_at)
        if dies_at:
            with pytest.raises(KeyboardInterrupt):
                train(watch)
        else:
            train(watch)
        assert watch.looks == looks


@with_host
def test_one_checkpoint_paints_the_same_volume_under_both_engines(tmp_path: Path) -> None:
    import shutil

    run_pipeline(
        load_config(overrides=settings(tmp_path / "a")), engine="native", stages=["diffusion", "masks", "pairs"]
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "pairs" / "copy_000.h5").unlink()
    command = ["run", "--engine", "host", "--stages", "pairs", *settings(tmp_path / "b")]
    result = neurodiff(*command)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a/pairs/copy_000.h5").read_bytes() == (tmp_path / "b/pairs/copy_000.h5").read_bytes()


@needs_host
def test_a_project_trains_on_mixed_pairs_under_the_host_and_predicts(tmp_path: Path) -> None:
    write_project_data(tmp_path)
    path = write(tmp_path / "p.yaml", PROJECT.replace("superhuman", "neurodiff_superhuman"))
    where = ["DATASET.INPUT_PATH", str(tmp_path), "DATASET.OUTPUT_PATH", str(tmp_path / "run"), "SYSTEM.NUM_GPUS", "1"]
    quiet = ["AUGMENTOR.ENABLED", "False", "INFERENCE.OUTPUT_PATH", str(tmp_path / "test")]
    test = ["INFERENCE.IMAGE_NAME", "image.h5", "INFERENCE.AUG_NUM", "4", "INFERENCE.SAMPLES_PER_BATCH", "1"]
    command = ["run", "--engine", "host", "--config-file", path]
    result = neurodiff(*command, *where, *SMALL, *quiet, *test)
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoint_00002.pth.tar"
    assert checkpoint.exists()
    result = neurodiff(*command, "--inference", "--checkpoint", str(checkpoint), *where, *SMALL, *quiet, *test)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "test").glob("*.h5"))
