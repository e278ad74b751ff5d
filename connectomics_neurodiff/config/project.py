"""Projects of pytorch_connectomics v1: their YAML read without the host, and said in our own configuration.

A project's YAML names keys that only the host has (MODEL.BLOCK_TYPE, MODEL.LOSS_OPTION, ...), and means the host's
defaults where it names nothing. Every key is either taken over, or has no effect here, or is not supported; nothing is
left out without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from ..errors import ConfigError, did_you_mean
from .defaults import default_config
from .load import merge, nested, parse_overrides, value_of, with_bases
from .validate import validate

#: Groups of ours that a project may have besides the host's.
OWN = ("NEURODIFF", "AUGMENTOR.SYNTHETIC")
#: Groups of NEURODIFF that make a configuration a recipe of ours, from data to scores.
RECIPE = {"SPLIT", "PHANTOM", "SEGMENT", "FID"}
#: Keys that the host's own files name, and its configuration does not know (Scutoid-Base.yaml).
RENAMED = {"DATASET.LABEL_EROSION": "MODEL.LABEL_EROSION"}
NORMALISATIONS = {"bn": "batch", "sync_bn": "batch", "gn": "group", "in": "instance", "none": "none"}


@dataclass
class Project:
    """A project's configuration, as our engine understands it.

    Attributes
    ----------
    cfg : CfgNode
        Our configuration.
    without_effect : dict of str to str
        Keys that make no difference here, with the reason.
    unsupported : dict of str to str
        Keys that our engine cannot honour, with what it can.
    """

    cfg: CfgNode
    without_effect: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


@cache
def host_defaults() -> dict[str, Any]:
    """Every key of the host, dotted, with its default."""
    content = yaml.safe_load(files(__package__).joinpath("pytc_v1.yaml").read_text())
    return dict(flat(content))


def flat(content: Mapping[str, Any], whole: tuple[str, ...] = OWN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested ones; groups that begin with one of `whole` stay groups."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not key.startswith(whole):
            yield from flat(value, whole, f"{key}.")
        else:
            yield key, value


def is_project(config_file: str | None, base: str | None) -> bool:
    """Whether these files are a project of the host's: they name a key that only the host has, and no :data:`RECIPE`.

    A project may have settings of ours for making its pairs (NEURODIFF.VOXEL_NM, NEURODIFF.DIFFUSION, ...) beside its
    own keys; what is to be split, segmented and scored is said in recipes of ours alone.
    """
    keys: set[str] = set()
    for path in (base, config_file):
        if path is not None:
            for content, _source in with_bases(Path(path), seen=()):
                keys |= {key for key, _ in flat(content)}
                own = content.get("NEURODIFF")
                if isinstance(own, Mapping) and RECIPE & set(own):
                    return False
    ours = {key for key, _ in flat(default_config())}
    return any(key in host_defaults() and key not in ours for key in keys)


def load_project(config_file: str, *, base: str | None = None, overrides: Sequence[str] = ()) -> Project:
    """Read a project's YAML and say it in our configuration.

    Parameters
    ----------
    config_file, base : path
        The host's ``--config-file`` and ``--config-base``.
    overrides : sequence of str
        KEY VALUE pairs, of the host's keys and of ours.

    Raises
    ------
    ConfigError
        If a key is neither the host's nor ours, or a value cannot work.
    """
    values, own = read_settings(config_file, base=base, overrides=overrides)
    project = Project(default_config())
    project.cfg.NEURODIFF.SPLIT.SCORED = False
    _translate(project, {key: value_of(value) for key, value in values.items()})
    for source, key, value in own:
        merge(project.cfg, nested(key, value), source=source)
    if not project.unsupported:  # what cannot be honoured is told first, all of it
        validate(project.cfg)
    project.cfg.freeze()
    return project


def read_settings(
    config_file: str, *, base: str | None = None, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], list[tuple[str, str, Any]]]:
    """All that the files and the command line say.

    Returns
    -------
    values : dict of str to Any
        The host's keys, dotted, with its defaults where nothing is said.
    own : list of (source, key, value)
        What is said of our groups, in order.

    Raises
    ------
    ConfigError
        If a key is neither the host's nor ours.
    """
    values, own = dict(host_defaults()), []
    sources = [
        (str(path), content) for path in (base, config_file) if path for content, _ in with_bases(Path(path), ())
    ]
    sources += [("the command line", content) for content in parse_overrides(overrides)]
    for source, content in sources:
        for name, value in flat(content):
            key = RENAMED.get(name, name)
            if key.startswith(OWN):
                own.append((source, key, value))
            elif key in values:
                values[key] = value
            else:
                raise ConfigError(f"Unknown key {key} in {source}.{did_you_mean(key, values)}")
    return values, own


def _translate(project: Project, values: Mapping[str, Any]) -> None:
    defaults = host_defaults()
    for key, value in values.items():
        handler = _HANDLERS.get(key)
        if handler is not None:
            handler(project, key, value, values)
        elif key.startswith("AUGMENTOR."):
            _take_augmentation(project, key, value, values)
        elif key.startswith(_WITHOUT_EFFECT):
            if value != defaults[key]:
                reason = next(reason for prefix, reason in _REASONS.items() if key.startswith(prefix))
                project.without_effect[key] = f"{value!r}: {reason}"
        elif value != defaults[key]:
            project.unsupported[key] = f"{value!r}, only {defaults[key]!r}"


Handler = Callable[[Project, str, Any, Mapping[str, Any]], None]


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    merge(cfg, nested(key, value), source="the project")


def _take(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    _set(project.cfg, key, value)


def _take_architecture(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    """Ours under the name that it has among the host's, or under its own."""
    _set(project.cfg, key, value.removeprefix(PREFIX))


def _take_gpus(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    """As many as asked for and there are, as the host does; its default asks for four."""
    import torch

    there = torch.cuda.device_count()
    if value > there:
        project.without_effect[key] = f"{value!r}: {there} here" + ("" if there else ", so the CPU trains")
    _set(project.cfg, key, min(value, there))


def _take_file(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    file = single_file(value)
    if file is None:
        project.unsupported[key] = f"{value!r}, only one file"
    else:
        _set(project.cfg, key, file)


def file_names(value: Any) -> list[str]:
    """The files, or folders, that a key of the host's names; not what stands in a text file or fits a pattern."""
    names = [str(name) for name in (value if isinstance(value, list | tuple) else str(value or "").split("@"))]
    return [name for name in names if name and not name.endswith(".txt") and "*" not in name]


def single_file(value: Any) -> str | None:
    """The volume that a key of the host's names; None if it names several, a list, tiles, or a pattern."""
    names = file_names(value)
    alone = names == (list(value) if isinstance(value, list | tuple) else [value])
    return names[0] if alone and len(names) == 1 and not names[0].endswith(".json") else None


def _take_isotropy(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    # The host's first entry is a level, not a pooling step.
    _set(project.cfg, key, list(value) if values["MODEL.ARCHITECTURE"] in HOST_ARCHITECTURES else list(value[1:]))


def _take_norm(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    if value in NORMALISATIONS:
        _set(project.cfg, key, NORMALISATIONS[value])
    else:
        project.unsupported[key] = f"{value!r}, only {', '.join(NORMALISATIONS)}"


def _take_targets(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    if list(value) != ["2"]:
        project.unsupported[key] = f"{value!r}, only ['2'] (affinity z, y, x)"


def _take_channels(project: Project, key: str, value: Any, _values: Mapping[str, Any]) -> None:
    ours = default_config().MODEL[key.split(".")[1]]
    if value != ours:
        project.unsupported[key] = f"{value!r}, only {ours}"


def _take_loss(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    known = {"WeightedBCEWithLogitsLoss", "DiceLoss"}
    if len(value) == 1 and value[0] and set(value[0]) <= known:
        _set(project.cfg, key, list(value[0]))
        _set(project.cfg, "MODEL.LOSS_WEIGHT", [float(w) for w in values["MODEL.LOSS_WEIGHT"][0]])
    else:
        project.unsupported[key] = f"{value!r}, only one target with {' and '.join(sorted(known))}"


def _take_size(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    reference = values[key.replace("OUTPUT_SIZE", "INPUT_SIZE")]
    if value != reference:
        project.unsupported[key] = f"{value!r}, only INPUT_SIZE {reference!r}"


def _take_schedule(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    total, steps = values["SOLVER.ITERATION_TOTAL"], values["SOLVER.STEPS"]
    if value in ("MultiStepLR", "WarmupMultiStepLR") and all(step >= total for step in steps):
        _set(project.cfg, key, "constant")
    elif value == "WarmupCosineLR":
        _set(project.cfg, key, "cosine")
    else:
        project.unsupported[key] = f"{value!r}, only WarmupCosineLR, or steps at or beyond ITERATION_TOTAL"
        return
    warm_up = values["SOLVER.WARMUP_ITERS"] if value.startswith("Warmup") else 0
    _set(project.cfg, "SOLVER.WARMUP_ITERS", warm_up)


def _take_erosion(project: Project, _key: str, value: Any, _values: Mapping[str, Any]) -> None:
    rates = value if isinstance(value, list) else [value]
    _set(project.cfg, "NEURODIFF.SEGMENTER.LABEL_EROSION", int(rates[0] or 0))


def _take_inference_size(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    size = value or values["MODEL.INPUT_SIZE"]
    _set(project.cfg, key, size)
    stride = [min(a, b) for a, b in zip(values["INFERENCE.STRIDE"], size, strict=True)]
    _set(project.cfg, "INFERENCE.STRIDE", stride)


def _take_flips(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    if value in (None, 0):
        return
    if value == 16 and values["INFERENCE.AUG_MODE"] == "mean":
        _set(project.cfg, "INFERENCE.FLIP_AUGMENTATION", True)
    else:
        project.unsupported[key] = f"{value!r}, only None, or 16 with AUG_MODE mean"


def _ignore(_project: Project, _key: str, _value: Any, _values: Mapping[str, Any]) -> None:
    """Taken over together with another key."""


def _take_augmentation(project: Project, key: str, value: Any, values: Mapping[str, Any]) -> None:
    group = key.split(".")[1]
    if key == "AUGMENTOR.ENABLED":
        _set(project.cfg, key, value)
    elif group in project.cfg.AUGMENTOR and key.endswith(".P"):
        _set(project.cfg, key, float(value) if values[f"AUGMENTOR.{group}.ENABLED"] else 0.0)
    elif key.endswith(".ENABLED"):
        if value and group not in project.cfg.AUGMENTOR:
            project.without_effect[key] = "True: there is no such augmentation in the native engine"
    elif value != host_defaults()[key]:
        project.without_effect[key] = f"{value!r}: the native augmentation has its own constants"


#: Networks of the host's that the native engine can train where the host is installed.
HOST_ARCHITECTURES = ("unet_3d", "unet_plus_3d")
#: What stands before the names of our networks among the host's.
PREFIX = "neurodiff_"

_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(
        (
            "MODEL.FILTERS", "MODEL.SWIN_UNETR_FEATURE_SIZE", "MODEL.BLOCK_TYPE", "MODEL.INPUT_SIZE",
            "DATASET.INPUT_PATH", "DATASET.OUTPUT_PATH", "SOLVER.NAME", "SOLVER.BASE_LR", "SOLVER.ITERATION_STEP",
            "SOLVER.ITERATION_SAVE", "SOLVER.ITERATION_TOTAL", "SOLVER.SAMPLES_PER_BATCH", "SOLVER.BETAS",
            "SOLVER.MOMENTUM", "SOLVER.WEIGHT_DECAY", "INFERENCE.SAMPLES_PER_BATCH", "SYSTEM.NUM_CPUS",
        ),
        _take,
    ),
    "MODEL.ARCHITECTURE": _take_architecture,
    "SYSTEM.NUM_GPUS": _take_gpus,
    "DATASET.IMAGE_NAME": _take_file,
    "DATASET.LABEL_NAME": _take_file,
    "MODEL.ISOTROPY": _take_isotropy,
    "MODEL.NORM_MODE": _take_norm,
    "MODEL.IN_PLANES": _take_channels,
    "MODEL.OUT_PLANES": _take_channels,
    "MODEL.TARGET_OPT": _take_targets,
    "MODEL.LOSS_OPTION": _take_loss,
    "MODEL.LOSS_WEIGHT": _ignore,
    "MODEL.OUTPUT_SIZE": _take_size,
    "MODEL.LABEL_EROSION": _take_erosion,
    "SOLVER.LR_SCHEDULER_NAME": _take_schedule,
    "SOLVER.STEPS": _ignore,
    "SOLVER.WARMUP_ITERS": _ignore,
    "INFERENCE.INPUT_SIZE": _take_inference_size,
    "INFERENCE.STRIDE": _ignore,
    "INFERENCE.AUG_NUM": _take_flips,
    "INFERENCE.AUG_MODE": _ignore,
}  # fmt: skip

#: Keys without effect, by how they begin, and why.
_REASONS = {
    "MODEL.WEIGHT_OPT": "classes are balanced in the cross-entropy, and not in the Dice loss",
    "MODEL.OUTPUT_ACT": "the loss takes logits",
    "MODEL.PRE_MODEL": "nothing is pre-trained",
    "DATASET.PAD_SIZE": "patches reach the border without padding",
    "DATASET.PAD_MODE": "patches reach the border without padding",
    "DATASET.NORMALIZE_RANGE": "one linear scaling per volume, stored with it",
    "DATASET.DISTRIBUTED": "every device draws from all of the data",
    "DATASET.VAL_": "there is no validation in training",
    "DATASET.REDUCE_LABEL": "labels are compared, never used as numbers",
    "DATASET.IS_ISOTROPIC": "told by the voxel size",
    "DATASET.REJECT_SAMPLING": "patches without neurons have weight 0",
    "SYSTEM.": "the native engine distributes by itself",
    "SOLVER.ITERATION_VAL": "there is no validation in training",
    "SOLVER.WARMUP_": "warm-up is linear from 0",
    "SOLVER.GAMMA": "no step is reached",
    "SOLVER.BIAS_LR_FACTOR": "one rate for all parameters",
    "SOLVER.WEIGHT_DECAY_": "one decay for all parameters",
    "MONITOR.": "losses go to loss.csv and TensorBoard",
    "INFERENCE.": "affinities of any volume: neurodiff predict",
}
_WITHOUT_EFFECT = tuple(_REASONS)
