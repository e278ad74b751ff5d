"""A study file, and the trainings that it asks for: arms x seeds x conditions of one recipe.

A study file is YAML:

    RECIPE: ../configs/NeuroDiff-AC4-CPU.yaml     # relative to the study file
    OUTPUT: outputs/studies/ac4                   # all that is made goes there
    SEEDS: [0, 1, 2]
    SETTINGS: {NEURODIFF.SEGMENTER.CHECKPOINTS: 4}      # of all arms, as in a recipe or with dots
    REFERENCE: real
    ARMS:
      real: {AUGMENTOR.SYNTHETIC.ENABLED: False}
      mixed: {}
      fine-tuned: {AUGMENTOR.SYNTHETIC.UNTIL: 0.5}
    CONDITIONS:                                   # optional: every arm under each of them
      4 %: {NEURODIFF.SPLIT.TRAIN.BOX: [0, 0, 0, 16, 512, 512]}
      20 %: {NEURODIFF.SPLIT.TRAIN.BOX: [0, 0, 0, 80, 512, 512]}

Artefacts are shared by what they depend on: arms that ask for the same denoiser, masks and pairs train on the same
files, and arms that ask for the same training are trained once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from ..config import as_dict, load_config
from ..config.load import in_pairs, value_of
from ..config.validate import REST
from ..errors import ConfigError, MissingInput, UserError, did_you_mean
from ..pipeline.networks import SAMPLING_KEYS
from ..pipeline.parts import makes_pairs, makes_pseudo_labels
from ..provenance import hash_of

KEYS = ("RECIPE", "OUTPUT", "SEEDS", "SETTINGS", "REFERENCE", "ARMS", "CONDITIONS")
#: What no artefact depends on, and what only the scores do.
_MACHINE = ("NUM_CPUS", "NUM_THREADS")
_SCORING = ("SEGMENT", "FID")
#: What masks, denoiser and pairs do not depend on.
_AFTER_SYNTHESIS = ("MODEL", "SOLVER", "INFERENCE", "AUGMENTOR")
_AFTER_PAIRS = ("SEGMENTER", *_SCORING)
#: What the denoiser does not depend on either.
_AFTER_DIFFUSION = ("REMODEL", "PAIRS")


@dataclass(frozen=True)
class Trial:
    """One training that is scored: an arm under a condition with a seed.

    Attributes
    ----------
    arm, condition : str
        Their names; the condition is empty in a study without.
    seed : int
        NEURODIFF.SEED.
    cfg : CfgNode
        Frozen; DATASET.OUTPUT_PATH is the folder of the training.
    pairs : str
        Folder of the run that paints its pairs; empty if it trains on real data, or on pairs made before.
    pseudo_labels : str
        Folder of the run that labels the unannotated tissue for it; empty if it needs none.
    """

    arm: str
    condition: str
    seed: int
    cfg: CfgNode
    pairs: str = ""
    pseudo_labels: str = ""

    @property
    def name(self) -> str:
        """Arm and condition, as tables name the row."""
        return f"{self.arm}, {self.condition}" if self.condition else self.arm

    @property
    def folder(self) -> Path:
        """Where its training is."""
        return Path(self.cfg.DATASET.OUTPUT_PATH)

    @property
    def is_mixed(self) -> bool:
        """Whether it trains on synthetic pairs too."""
        return bool(self.cfg.AUGMENTOR.SYNTHETIC.ENABLED)


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes
    ----------
    output : pathlib.Path
        Where everything goes.
    reference : str
        The arm that the others are compared with.
    arms, conditions : list of str
        In the order of the file; without conditions one without a name.
    seeds : list of int
        Each once.
    trials : list of Trial
        Arms x conditions x seeds.
    synthesis : dict of str to CfgNode
        Runs that make pairs, by their folder.
    denoisers : dict of str to CfgNode
        Runs that train the denoisers of these, by their folder.
    pseudo_labels : dict of str to CfgNode
        Runs that label unannotated tissue, by their folder.
    recipe : str
        File name of the recipe.
    """

    output: Path
    reference: str
    arms: list[str]
    conditions: list[str]
    seeds: list[int]
    trials: list[Trial]
    synthesis: dict[str, CfgNode]
    denoisers: dict[str, CfgNode]
    pseudo_labels: dict[str, CfgNode]
    recipe: str

    def row(self, arm: str, condition: str) -> list[Trial]:
        """The trials of an arm under a condition, seed by seed."""
        return [trial for trial in self.trials if (trial.arm, trial.condition) == (arm, condition)]

    def denoiser_of(self, synthesis: str) -> str:
        """Folder of the run that trains the denoiser of a run that makes pairs."""
        return str(self.output / "denoisers" / _denoiser_name(self.synthesis[synthesis]))

    def pseudo_labels_of(self, cfg: CfgNode) -> str:
        """Folder of the run whose pseudo-labels a run that paints onto them, or its denoiser, needs; else empty."""
        needed = "repainted" in cfg.AUGMENTOR.SYNTHETIC.SOURCE
        return str(self.output / "pseudo_labels" / _pseudo_labels_name(cfg)) if needed else ""

    def real_training_of(self, pseudo_labels: str) -> str:
        """Folder of the real arm's training, as a run that makes pseudo-labels needs it, if the study has one."""
        cfg = with_values(self.pseudo_labels[pseudo_labels], {"AUGMENTOR.SYNTHETIC.ENABLED": False})
        folder = self.output / "trainings" / _training_name(Trial("", "", cfg.NEURODIFF.SEED, cfg))
        return str(folder) if any(trial.folder == folder for trial in self.trials) else ""


def read_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """Read a study file and check every arm's configuration, before any work.

    Parameters
    ----------
    path : path
        YAML, as this module's text says.
    overrides : sequence of str
        KEY VALUE pairs that go before the file's: OUTPUT, SEEDS or REFERENCE, or keys of the recipe, for every arm.

    Raises
    ------
    MissingInput
        If the file or its recipe is not there.
    ConfigError
        If a key of the file or of an arm is not known, a value of a wrong type, a seed given twice, the reference no
        arm, or a name no file could have.
    """
    own, overrides = _own_keys(overrides)
    content = _read(Path(path), own)
    arms = _named(content, "ARMS", path)
    conditions = _named(content, "CONDITIONS", path) or {"": {}}
    seeds = _seeds(content, path)
    reference = str(content.get("REFERENCE", ""))
    if reference not in arms:
        raise ConfigError(
            f"REFERENCE in {path} names the arm that the others are compared with.{did_you_mean(reference, arms)} "
            f"Arms: {', '.join(arms)}. Got '{reference}'."
        )
    recipe = Path(path).parent / str(content["RECIPE"])
    if not recipe.is_file():
        raise MissingInput(f"The recipe of {path} does not exist: {recipe}.")
    output = Path(str(content["OUTPUT"]))
    shared = content.get("SETTINGS") or {}
    trials, synthesis, pseudo_labels = [], {}, {}
    for condition, arm, seed in product(conditions, arms, seeds):
        settings = [*_pairs_of(shared), *_pairs_of(conditions[condition]), *_pairs_of(arms[arm]), *overrides]
        _require_free(settings, path)
        cfg = _config(recipe, settings, seed, arm, condition)
        trial = _place(Trial(arm, condition, seed, cfg), output)
        trials.append(trial)
        if trial.pairs:
            synthesis[trial.pairs] = with_values(cfg, {"DATASET.OUTPUT_PATH": trial.pairs})
        if trial.pseudo_labels:
            pseudo_labels[trial.pseudo_labels] = with_values(cfg, {"DATASET.OUTPUT_PATH": trial.pseudo_labels})
    _require_different(trials, reference)
    denoisers = {}
    for cfg in synthesis.values():
        folder = str(output / "denoisers" / _denoiser_name(cfg))
        denoisers[folder] = with_values(cfg, {"DATASET.OUTPUT_PATH": folder})
    return Study(
        output, reference, [*arms], [*conditions], seeds, trials, synthesis, denoisers, pseudo_labels, recipe.name
    )


def _read(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise MissingInput(f"No study file at {path}.")
    try:
        content = yaml.load(path.read_text(), _NoDuplicates)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold the keys of a study: {', '.join(KEYS)}. Got {type(content).__name__}.")
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"Unknown key {key} in {path}.{did_you_mean(str(key), KEYS)} Known: {', '.join(KEYS)}.")
    content |= own
    missing = [key for key in ("RECIPE", "OUTPUT", "SEEDS", "REFERENCE", "ARMS") if key not in content]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}.")
    if not isinstance(content.get("SETTINGS") or {}, dict):
        raise ConfigError(f"SETTINGS in {path} must hold keys and values, as a recipe. Got {content['SETTINGS']!r}.")
    return content


class _NoDuplicates(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: of two arms of one name, one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As of the safe loader."""
        names = [str(self.construct_object(key, deep=True)) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"'{twice[0]}' is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _require_different(trials: Sequence[Trial], reference: str) -> None:
    """No arm may be the reference under another name, or another arm scored in another way."""
    of_folder: dict[Path, Trial] = {}
    for trial in trials:
        other = of_folder.setdefault(trial.folder, trial)
        if other is trial or (other.condition, other.seed) != (trial.condition, trial.seed):
            continue
        if reference in (trial.arm, other.arm):
            raise ConfigError(f"The arms '{other.arm}' and '{trial.arm}' ask for the same training: nothing differs.")
        if other.cfg != trial.cfg:
            raise ConfigError(
                f"The arms '{other.arm}' and '{trial.arm}' differ in how they are scored alone. A study compares "
                "trainings; NEURODIFF.SEGMENT.METHODS lists all the ways to score one."
            )


def _own_keys(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The pairs that replace a key of the study file, and those that are for the recipe."""
    pairs = in_pairs(overrides)
    own = {key: value_of(text) for key, text in pairs if key in ("OUTPUT", "SEEDS", "REFERENCE")}
    return own, [text for pair in pairs if pair[0] not in own for text in pair]


def _require_free(settings: Sequence[Any], path: str | os.PathLike[str]) -> None:
    """Seeds and folders are the study's to choose."""
    for key, instead in (("NEURODIFF.SEED", "SEEDS"), ("DATASET.OUTPUT_PATH", "OUTPUT")):
        if key in settings[::2]:
            raise ConfigError(f"{key} differs from training to training of a study: use {instead} in {path} instead.")


def _named(content: Mapping[str, Any], key: str, path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Arms or conditions: settings by name."""
    named = content.get(key) or {}
    if not isinstance(named, dict) or not all(isinstance(value, dict | None) for value in named.values()):
        raise ConfigError(f"{key} in {path} must hold settings by name, like 'mixed: {{}}'. Got {named!r}.")
    for name in named:
        if not re.fullmatch(r"[\w%+. -]*\w[\w%+. -]*", str(name)) or str(name).startswith("."):
            raise ConfigError(
                f"Names of {key} in {path} may have letters, digits, spaces and any of _%+.-. Got '{name}'."
            )
    return {str(name): value or {} for name, value in named.items()}


def _seeds(content: Mapping[str, Any], path: str | os.PathLike[str]) -> list[int]:
    seeds = content["SEEDS"]
    if isinstance(seeds, tuple):
        seeds = list(seeds)
    listed = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not listed:
        raise ConfigError(f"SEEDS in {path} must be a list of one or more whole numbers >= 0. Got {seeds!r}.")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"SEEDS in {path} must differ: a seed given twice is one sample. Got {seeds}.")
    return seeds


def _pairs_of(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """KEY VALUE KEY VALUE ... of nested settings, whose names may themselves have dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _pairs_of(value, f"{prefix}{name}.")
        else:
            yield from (f"{prefix}{name}", value)


def _config(recipe: Path, settings: Sequence[Any], seed: int, arm: str, condition: str) -> CfgNode:
    """Configuration of a trial; errors name it."""
    try:
        return load_config(recipe, overrides=[*settings, "NEURODIFF.SEED", str(seed)])
    except UserError as error:
        under = f" under '{condition}'" if condition else ""
        raise type(error)(f"Arm '{arm}'{under}: {error}") from error


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """A frozen copy with some values replaced."""
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([item for pair in values.items() for item in pair])
    changed.freeze()
    return changed


def _place(trial: Trial, output: Path) -> Trial:
    """The trial with the folders of its training and of its pairs, each named by what is in it depends on."""
    if makes_pairs(trial.cfg):
        trial = replace(trial, pairs=str(output / "pairs" / _pairs_name(trial.cfg)))
    if makes_pseudo_labels(trial.cfg):
        trial = replace(trial, pseudo_labels=str(output / "pseudo_labels" / _pseudo_labels_name(trial.cfg)))
    folder = output / "trainings" / _training_name(trial)
    return replace(trial, cfg=with_values(trial.cfg, {"DATASET.OUTPUT_PATH": str(folder)}))


def _training_name(trial: Trial) -> str:
    """Readable, and the same for arms that ask for the same training."""
    content = _shared_settings(trial.cfg)
    content["SOLVER"] = _without(content["SOLVER"], ("ITERATION_SAVE",))
    content["NEURODIFF"] = _without(content["NEURODIFF"], _SCORING)
    if not trial.is_mixed:  # nothing of the synthesis matters
        content["AUGMENTOR"]["SYNTHETIC"] = {}
        content["DATASET"] = _without(content["DATASET"], ("UNLABELED",))
        content["NEURODIFF"] = _without(content["NEURODIFF"], ("DIFFUSION", *_AFTER_DIFFUSION))
    elif not trial.pairs and trial.pseudo_labels:
        content["NEURODIFF"] = _without(content["NEURODIFF"], ("DIFFUSION", *_AFTER_DIFFUSION))
    made: Any = Path(trial.pairs).name
    if trial.pseudo_labels:
        made = [made, Path(trial.pseudo_labels).name]
    return f"{'mixed' if trial.is_mixed else 'real'}-seed{trial.seed}-{hash_of([content, made])[:8]}"


def _pairs_name(cfg: CfgNode) -> str:
    return f"seed{cfg.NEURODIFF.SEED}-{hash_of(_synthesis_settings(cfg, _AFTER_PAIRS))[:8]}"


def _denoiser_name(cfg: CfgNode) -> str:
    content = _synthesis_settings(cfg, (*_AFTER_PAIRS, *_AFTER_DIFFUSION))
    content["NEURODIFF"]["DIFFUSION"] = _without(content["NEURODIFF"]["DIFFUSION"], SAMPLING_KEYS)
    content = _without(content, ("SOURCE",))  # all that matters of it are the pseudo-labels
    # The judge is trained beside it, and goes with it to the pairs.
    pairs = cfg.NEURODIFF.PAIRS
    judge = pairs.JUDGE_ITERATIONS if pairs.LEAST_FOLLOWING or pairs.MOST_MISSING else 0
    return f"seed{cfg.NEURODIFF.SEED}-{hash_of([content, judge])[:8]}"


def _pseudo_labels_name(cfg: CfgNode) -> str:
    """By what the real arm's training depends on, and how its network segments."""
    content = _shared_settings(cfg)
    content["AUGMENTOR"] = _without(content["AUGMENTOR"], ("SYNTHETIC",))
    content["SOLVER"] = _without(content["SOLVER"], ("ITERATION_SAVE",))
    mitochondria = ("MEMBRANE_NM", "DARK_BODIES", "MITO_NAME")
    content["NEURODIFF"] = _without(content["NEURODIFF"], ("DIFFUSION", *_AFTER_DIFFUSION, "FID", *mitochondria))
    return f"seed{cfg.NEURODIFF.SEED}-{hash_of(content)[:8]}"


def _synthesis_settings(cfg: CfgNode, without: Sequence[str]) -> dict[str, Any]:
    """What an artefact of the synthesis depends on."""
    content = _without(_shared_settings(cfg), _AFTER_SYNTHESIS)
    content["NEURODIFF"] = _without(content["NEURODIFF"], without)
    content["NEURODIFF"]["DIFFUSION"] = _without(content["NEURODIFF"]["DIFFUSION"], ("SAVE_EVERY",))
    if cfg.DATASET.UNLABELED == [REST]:
        content["PATCH"] = list(cfg.MODEL.INPUT_SIZE)  # the boxes of the rest hold it
    painted = set(cfg.AUGMENTOR.SYNTHETIC.SOURCE) - {"pseudo"}
    if "repainted" in painted:
        content["PSEUDO_LABELS"] = _pseudo_labels_name(cfg)
    return content if painted == {"remodelled"} else content | {"SOURCE": sorted(painted)}


def _shared_settings(cfg: CfgNode) -> dict[str, Any]:
    """A configuration without what no artefact depends on."""
    content = as_dict(cfg)
    content["DATASET"] = _without(
        content["DATASET"], ("OUTPUT_PATH", *(() if cfg.DATASET.UNLABELED else ("UNLABELED",)))
    )
    sources = sorted(cfg.AUGMENTOR.SYNTHETIC.SOURCE)
    content["AUGMENTOR"]["SYNTHETIC"] = _without(content["AUGMENTOR"]["SYNTHETIC"], ("SOURCE",))
    if sources != ["remodelled"]:
        content["AUGMENTOR"]["SYNTHETIC"]["SOURCE"] = sources
    content["SYSTEM"] = _without(content["SYSTEM"], _MACHINE)
    return content


def _without(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}
