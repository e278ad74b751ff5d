"""Configuration: merging order, the short form of SYNTHETIC, one-line complaints with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY

from connectomics_neurodiff.config import default_config, dump_config, load_config
from connectomics_neurodiff.errors import ConfigError, MissingInput, UserError


@pytest.mark.parametrize("value", ["0", "-0.5", "1.5", "nan"])
def test_the_synthetic_part_of_a_training_is_a_part(value: str) -> None:
    with pytest.raises(ConfigError, match=r"AUGMENTOR.SYNTHETIC.UNTIL .*\(0, 1\]"):
        load_config(overrides=["AUGMENTOR.SYNTHETIC.UNTIL", value])


def test_order_is_defaults_base_file_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 3, ITERATION_TOTAL: 7, WARMUP_ITERS: 5}")
    (tmp_path / "recipe.yaml").write_text("_BASE_: base.yaml\nSOLVER: {ITERATION_TOTAL: 8, WARMUP_ITERS: 6}")
    cfg = load_config(tmp_path / "recipe.yaml", overrides=["SOLVER.WARMUP_ITERS", "4"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.ITERATION_TOTAL, cfg.SOLVER.WARMUP_ITERS) == (3.0, 8, 4)
    assert cfg.SOLVER.NAME == default_config().SOLVER.NAME
    assert cfg.is_frozen()


@pytest.mark.parametrize("text", ["AUGMENTOR: {SYNTHETIC: True}", "AUGMENTOR: {SYNTHETIC: {ENABLED: True}}"])
def test_both_forms_of_the_synthetic_flag(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for cfg in (load_config(tmp_path / "a.yaml"), load_config(overrides=["AUGMENTOR.SYNTHETIC", "True"])):
        assert cfg.AUGMENTOR.SYNTHETIC.ENABLED is True
        assert cfg.AUGMENTOR.SYNTHETIC.RATIO == 1.0


def test_the_short_form_and_single_keys_go_together() -> None:
    cfg = load_config(overrides=["AUGMENTOR.SYNTHETIC", "true", "AUGMENTOR.SYNTHETIC.RATIO", "2"])
    assert (cfg.AUGMENTOR.SYNTHETIC.ENABLED, cfg.AUGMENTOR.SYNTHETIC.RATIO) == (True, 2.0)


def test_pairs_may_be_one_path_or_several() -> None:
    assert load_config(overrides=["AUGMENTOR.SYNTHETIC.PAIRS", "a.h5"]).AUGMENTOR.SYNTHETIC.PAIRS == ["a.h5"]
    assert load_config(overrides=["AUGMENTOR.SYNTHETIC.PAIRS", "['a.h5', 'b.h5']"]).AUGMENTOR.SYNTHETIC.PAIRS == [
        "a.h5",
        "b.h5",
    ]


def test_an_extra_volume_may_be_a_name_or_a_group(tmp_path: Path) -> None:
    key = "NEURODIFF.DIFFUSION.EXTRA_VOLUMES"
    box = {"IMAGE_NAME": "b.h5", "BOX": [0, 0, 0, 8, 9, 9]}
    assert load_config(overrides=[key, "a.h5"]).NEURODIFF.DIFFUSION.EXTRA_VOLUMES == [{"IMAGE_NAME": "a.h5"}]
    cfg = load_config(overrides=[key, str(["a.h5", box])])
    assert [{"IMAGE_NAME": "a.h5"}, box] == cfg.NEURODIFF.DIFFUSION.EXTRA_VOLUMES
    (tmp_path / "dump.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "dump.yaml") == cfg


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "Did you mean 'BASE_LR'"),
        (["SOLVR.BASE_LR", "1"], "Did you mean 'SOLVER'"),
        (["SOLVER.BASE_LR", "fast"], "must be of type float"),
        (["SOLVER.ITERATION_TOTAL", "1.5"], "must be of type int"),
        (["SOLVER.ITERATION_TOTAL"], "has no value"),
        (["SOLVER.ITERATION_TOTAL", "0"], r"SOLVER.ITERATION_TOTAL must be >= 1. Got 0"),
        (["SOLVER", "3"], "is a group of keys"),
        (["AUGMENTOR.SYNTHETIC.RATIO", "-1"], "RATIO must be >= 0"),
        (["AUGMENTOR.NOISE.P", "1.5"], r"in \[0, 1\]"),
        (["NEURODIFF.DIFFUSION.SAMPLER", "dppm"], "Did you mean 'ddpm'"),
        (["NEURODIFF.DIFFUSION.SAMPLER_STEPS", "251"], "at most the 250 steps"),
        (["NEURODIFF.DIFFUSION.OVERLAP", "[8, 0, 0]"], "OVERLAP"),
        (["NEURODIFF.DIFFUSION.MARGIN", "[0, 0, 513]"], "MARGIN"),
        (["NEURODIFF.DIFFUSION.MARGIN", "[0, -1, 0]"], "MARGIN"),
        (["NEURODIFF.SPLIT.TEST.BOX", "[0, 0, 0, 0, 9, 9]"], "z0 < z1"),
        (["NEURODIFF.SEGMENT.METHODS", "['watrez']"], "Did you mean 'waterz'"),
        (["NEURODIFF.VOXEL_NM", "[6, 6]"], "three numbers > 0"),
        (["NEURODIFF.FID.PATCHES", "1"], "FID.PATCHES must be >= 2, or 0 for none. Got 1"),
        (["NEURODIFF.FID.PATCHES", "-1"], "FID.PATCHES must be >= 2"),
        (["NEURODIFF.FID.PATCH", "[16, 64]"], "three whole numbers"),
        (["NEURODIFF.FID.BOOTSTRAP", "0"], "FID.BOOTSTRAP must be >= 1"),
        (["MODEL.INPUT_SIZE", "[16, 0, 16]"], "three whole numbers"),
        (["INFERENCE.STRIDE", "[17, 80, 80]"], "at most INFERENCE.INPUT_SIZE"),
        (["MODEL.TARGET_OPT", "['0']"], "TARGET_OPT"),
        (["MODEL.IN_PLANES", "2"], "one grey image"),
        (["SOLVER.BASE_LR", "inf"], "BASE_LR must be >="),
        (["SOLVER.BASE_LR.X", "1"], "must be of type float"),
        (["SOLVER.BETAS", "[0.9]"], "two numbers"),
        (["SOLVER.BETAS", "['a', 0.9]"], "two numbers"),
        (["SOLVER.EPS", "-1.0"], "EPS must be"),
        (["AUGMENTOR.SYNTHETIC.RATIO", "inf"], "RATIO must be >= 0"),
        (["AUGMENTOR.SYNTHETIC.PAIRS", "[1]"], "a path or a list of paths"),
        (["NEURODIFF.PHANTOM.SEED", "-1"], "PHANTOM.SEED must be in"),
        (["NEURODIFF.REMODEL.CANDIDATE_FRACTION", "0.0"], "CANDIDATE_FRACTION must be"),
        (["NEURODIFF.REMODEL.MITO_FRACTION", "1.5"], "MITO_FRACTION must be"),
        (["NEURODIFF.REMODEL.MITO_COUNT", "-1"], "MITO_COUNT must be"),
        (["NEURODIFF.REMODEL.MITOCHONDRIA", "False", "NEURODIFF.REMODEL.MITO_COUNT", "3"], "none are placed"),
        (["NEURODIFF.REMODEL.SIGMA_NM", "inf"], "SIGMA_NM must be"),
        (["NEURODIFF.SEGMENT.METHODS", "[1]"], "METHODS is '1'"),
        (["NEURODIFF.SEGMENT.METHODS", "[['agq']]"], r"METHODS is '\['agq'\]'"),
        (["NEURODIFF.SEGMENTER.QUERY_WIDTH", "0"], "a multiple of 8, > 0. Got 0"),
        (["NEURODIFF.SEGMENTER.POSITION_LENGTH", "0.5"], "POSITION_LENGTH must be 0, or at least 1 voxel. Got 0.5"),
        (["NEURODIFF.SEGMENTER.COMPONENT_THRESHOLD", "1.5"], "COMPONENT_THRESHOLD must be from 0 to 1. Got 1.5"),
        (["NEURODIFF.SEGMENTER.COMPONENT_THRESHOLD", "nan"], "COMPONENT_THRESHOLD must be from 0 to 1"),
        (["NEURODIFF.SEGMENT.STITCH_FRACTION", "0"], "STITCH_FRACTION must be above 0, at most 1"),
        (["MODEL.LOSS_WEIGHT", "[1e400]"], "LOSS_WEIGHT must be a number > 0"),
        (["NEURODIFF.SEGMENT.MULTICUT_THRESHOLDS", "[0.5, 1]"], r"inside \(0, 1\)"),
        (["NEURODIFF.DIFFUSION.VOLUME_SHARE", "eqal"], "Did you mean 'equal'"),
        (["NEURODIFF.DIFFUSION.CONDITION_DROPOUT", "1"], r"CONDITION_DROPOUT must be in \[0, 1\). Got 1.0"),
        (["NEURODIFF.DIFFUSION.VOXEL_SIZE_DROPOUT", "-0.1"], r"VOXEL_SIZE_DROPOUT must be in \[0, 1\)"),
        (["NEURODIFF.DIFFUSION.VOXEL_SIZE_DROPOUT", "nan"], r"VOXEL_SIZE_DROPOUT must be in \[0, 1\)"),
        (["NEURODIFF.DIFFUSION.CONDITION_DROPOUT", ".1", "NEURODIFF.DIFFUSION.CONDITIONING", "none"], "has no masks"),
        (["NEURODIFF.DIFFUSION.VOXEL_SIZE_DROPOUT", ".1", "NEURODIFF.DIFFUSION.RPGE", "False"], "0 without RPGE"),
        (["NEURODIFF.DIFFUSION.VOXEL_SIZE_DROPOUT", ".1", "NEURODIFF.DIFFUSION.RGM", "False"], "0 without RPGE"),
        (["NEURODIFF.DIFFUSION.SNR_GAMMA", "-5"], "SNR_GAMMA must be >= 0"),
        (["NEURODIFF.DIFFUSION.INTENSITY_JITTER", "1.5"], r"INTENSITY_JITTER must be in \[0, 1\]"),
        (["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "3"], "must be of type list"),
        (["DATASET.UNLABELED", "[3]"], r"UNLABELED\[0\] must be the name of a volume, or a mapping"),
        (["DATASET.UNLABELED", "[{}]"], r"UNLABELED\[0\] must be the name of a volume or a BOX"),
        (["DATASET.UNLABELED", "[{'BOXX': []}]"], r"UNLABELED\[0\] has no key 'BOXX'. Did you mean 'BOX'"),
        (["DATASET.UNLABELED", "[{'BOX': [0, 0, 0, 0, 9, 9]}]"], r"UNLABELED\[0\].BOX must be .* z0 < z1"),
        (["DATASET.UNLABELED", "a.h5"], "empty while DATASET.IMAGE_NAME is 'phantom'"),
        (["AUGMENTOR.SYNTHETIC.SOURCE", "repaint"], "SOURCE is 'repaint'. Did you mean 'repainted'"),
        (["DATASET.UNLABELED", "['rest', 'a.h5']"], "'rest' only without other entries"),
        (["AUGMENTOR.SYNTHETIC.SOURCE", "[['pseudo']]"], "SOURCE must be a list of one or more kinds of pairs"),
        (["AUGMENTOR.SYNTHETIC.SOURCE", "[]"], "SOURCE must be a list of one or more kinds of pairs"),
        (["AUGMENTOR.SYNTHETIC.SOURCE", "['pseudo', 'pseudo']", "DATASET.UNLABELED", "rest"], "each once"),
        (["AUGMENTOR.SYNTHETIC.SOURCE", "pseudo"], r"must be \['remodelled'\] without DATASET.UNLABELED"),
        (["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "[3]"], r"EXTRA_VOLUMES\[0\] must be the name of a volume"),
        (["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "[{'BOX': []}]"], r"EXTRA_VOLUMES\[0\] must be the name of a volume"),
        (
            ["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "['a.h5', {'IMAGE_NAME': 'b.h5', 'BOXX': []}]"],
            r"EXTRA_VOLUMES\[1\] has no key 'BOXX'. Did you mean 'BOX'",
        ),
        (
            ["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "[{'IMAGE_NAME': 'b.h5', 'BOX': [0, 0, 0, 0, 9, 9]}]"],
            r"EXTRA_VOLUMES\[0\].BOX must be .* z0 < z1",
        ),
        (
            ["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "[{'IMAGE_NAME': 'b.h5', 'VOXEL_NM': [6]}]"],
            r"EXTRA_VOLUMES\[0\].VOXEL_NM must be three numbers",
        ),
        (["NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "[{'IMAGE_NAME': 'b.h5', 'MITO_NAME': 3}]"], "MITO_NAME must be a str"),
        (["NEURODIFF.PHANTOM.VOXEL_NM", "[]"], "PHANTOM.VOXEL_NM must be three numbers"),
        (["DATASET.IMAGE_NAME", ""], "name of a volume"),
        (["NEURODIFF.SPLIT.TUNE.LABEL_NAME", "a.h5"], "empty without NEURODIFF.SPLIT.TUNE.IMAGE_NAME"),
        (["NEURODIFF.SPLIT.TEST.IMAGE_NAME", "a.h5"], "empty while DATASET.IMAGE_NAME is 'phantom'"),
    ],
)
def test_bad_settings_are_named_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: [1", "not valid YAML"),
        ("- 1", "must hold keys"),
        ("_BASE_: a.yaml", "names itself"),
        ("_BASE_: no.yaml", "No config file"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_code_in_yaml_is_never_executed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("!!python/object/apply:os.system ['touch pwned']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_is_missing_input() -> None:
    with pytest.raises(MissingInput, match=r"No config file at nowhere\.yaml"):
        load_config("nowhere.yaml")


RECIPES = [path for folder in ("configs", "projects") for path in sorted((REPOSITORY / folder).rglob("*.yaml"))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_a_dump(recipe: Path, tmp_path: Path) -> None:
    cfg = load_config(recipe)
    (tmp_path / "dump.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "dump.yaml") == cfg
    assert cfg.AUGMENTOR.SYNTHETIC.ENABLED
