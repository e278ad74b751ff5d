"""From YAML files and the command line to one validated, frozen configuration.

Order: defaults, then ``_BASE_`` files from the inside out, then the file itself, then ``KEY VALUE`` pairs.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from ..errors import ConfigError, MissingInput, did_you_mean
from .defaults import default_config
from .validate import REST, validate

BASE_KEY = "_BASE_"


def load_config(
    config_file: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> CfgNode:
    """Read, merge, validate and freeze a configuration.

    Parameters
    ----------
    config_file : path, optional
        YAML; may name a file to build on as ``_BASE_: other.yaml``, relative to itself. Without it: the defaults.
    base : path, optional
        YAML merged before `config_file` (``--config-base``).
    overrides : sequence of str
        KEY VALUE KEY VALUE ..., as on the command line.

    Raises
    ------
    MissingInput
        If a file is not there.
    ConfigError
        If a key or value is not valid; the message names the nearest key.
    """
    cfg = default_config()
    for path in (base, config_file):
        if path is not None:
            for content, source in with_bases(Path(path), seen=()):
                merge(cfg, content, source=str(source))
    for content in parse_overrides(overrides):
        merge(cfg, content, source="the command line")
    validate(cfg)
    cfg.freeze()
    return cfg


def with_bases(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[dict[str, Any], Path]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} names itself as {BASE_KEY}, by way of {seen[-1]}.")
    if not path.is_file():
        raise MissingInput(f"No config file at {path}.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must hold keys and values. Got {type(content).__name__}.")
    content = content or {}
    if BASE_KEY in content:
        yield from with_bases(path.parent / str(content.pop(BASE_KEY)), (*seen, path.resolve()))
    yield content, path


def parse_overrides(overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """KEY VALUE pairs as nested keys, one by one: a later pair goes before an earlier one."""
    for key, text in in_pairs(overrides):
        yield nested(key, value_of(text))


def in_pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text) of KEY VALUE KEY VALUE ...; a key without a value is a ConfigError."""
    if len(overrides) % 2:
        raise ConfigError(f"Settings on the command line are KEY VALUE pairs. '{overrides[-1]}' has no value.")
    return list(zip(overrides[::2], overrides[1::2], strict=True))


def value_of(text: Any) -> Any:
    """What a text on the command line or in a YAML looks like: a Python literal, a truth value, or itself."""
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.lower() == "true" if text.lower() in ("true", "false") else text


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"A": {"B": value}}`` of the key ``"A.B"``."""
    content = value
    for name in reversed(key.split(".")):
        content = {name: content}
    return dict(content)


def written_out(key: str, value: Any) -> Any:
    """Short forms in full: ``True`` for AUGMENTOR.SYNTHETIC, one path for its pairs, a name for a volume."""
    if key == "AUGMENTOR.SYNTHETIC" and isinstance(value, bool):
        return {"ENABLED": value}
    volumes = key in ("NEURODIFF.DIFFUSION.EXTRA_VOLUMES", "DATASET.UNLABELED")
    if (volumes or key in ("AUGMENTOR.SYNTHETIC.PAIRS", "AUGMENTOR.SYNTHETIC.SOURCE")) and isinstance(value, str):
        value = [value] if value else []
    if volumes and isinstance(value, list | tuple) and list(value) != [REST]:
        return [{"IMAGE_NAME": volume} if isinstance(volume, str) else volume for volume in value]
    return value


def merge(cfg: CfgNode, content: Mapping[str, Any], *, source: str, prefix: str = "") -> None:
    """Merge nested keys into `cfg` in place, checking names and types.

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest one) or a value of another type (integers are fine where floats go).
    """
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in cfg:
            raise ConfigError(
                f"Unknown key {key} in {source}.{did_you_mean(str(name), cfg)} Known here: {', '.join(cfg)}."
            )
        value = written_out(key, value)
        if isinstance(cfg[name], CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} in {source} is a group of keys ({', '.join(cfg[name])}). Got {value!r}.")
            merge(cfg[name], value, source=source, prefix=f"{key}.")
        else:
            cfg[name] = _as_type_of(cfg[name], value, key, source)


def _as_type_of(default: Any, value: Any, key: str, source: str) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, float) and isinstance(value, str):
        try:  # YAML 1.1 reads "1e-4" as a string
            return float(value)
        except ValueError:
            pass
    if isinstance(default, list) and isinstance(value, tuple):
        value = list(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"{key} in {source} must be of type {type(default).__name__}, like {default!r}. Got {value!r}."
        )
    return value


def dump_config(cfg: CfgNode) -> str:
    """The configuration as YAML that :func:`load_config` reads back."""
    return str(cfg.dump(sort_keys=False))


def as_dict(node: Any) -> Any:
    """A configuration node as plain dicts, for provenance."""
    if isinstance(node, Mapping):
        return {name: as_dict(value) for name, value in node.items()}
    return node
