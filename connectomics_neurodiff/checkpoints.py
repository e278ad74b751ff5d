"""Checkpoints of trained networks: the weights and all that is needed to build the network again.

Read with ``weights_only=True``: no pickled code from disk is ever executed.
"""

from __future__ import annotations

import io
import os
import pickle
import reprlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .errors import CheckpointMismatch, MissingInput
from .provenance import atomic_write

FORMAT = "connectomics_neurodiff checkpoint 1"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object, of: type = object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, of) for k, v in value.items())


#: What each part of a checkpoint is in words, and whether a value is that.
_CONTENT: dict[str, tuple[str, Callable[[object], bool]]] = {
    "kind": ("a word", _is_text),
    "architecture": ("a word", _is_text),
    "options": ("a mapping of names", _is_mapping),
    "state_dict": ("a mapping of names to tensors", lambda value: _is_mapping(value, torch.Tensor)),
    "extra": ("a mapping of names", _is_mapping),
}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network as stored.

    Attributes
    ----------
    kind : str
        ``"denoiser"``, ``"segmenter"`` or ``"judge"``.
    architecture : str
        Registered name of the network.
    options : dict
        Keyword arguments that build it again.
    state_dict : dict
        Parameters and buffers by name.
    extra : dict
        What else belongs to it: voxel sizes trained on, diffusion schedule, patch size, provenance.
    """

    kind: str
    architecture: str
    options: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    extra: dict[str, Any]

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch that it was trained on, voxels (z, y, x); raises :class:`CheckpointMismatch` if it does not say."""
        if "patch" not in self.extra:
            raise CheckpointMismatch(
                f"The checkpoint of '{self.architecture}' does not say what patch it was trained on: give --tile Z Y X."
            )
        patch = self.extra["patch"]
        if not (isinstance(patch, list | tuple) and len(patch) == 3 and all(isinstance(n, int) for n in patch)):
            raise CheckpointMismatch(f"A checkpoint's patch is three whole numbers, (z, y, x). Got {patch!r}.")
        return patch[0], patch[1], patch[2]


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    kind: str,
    architecture: str,
    options: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint atomically; `options` and `extra` may hold numbers, strings, lists and dicts of them."""
    content = {
        "format": FORMAT,
        "version": __version__,
        "kind": kind,
        "architecture": architecture,
        "options": dict(options),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in state_dict.items()},
        "extra": dict(extra),
    }
    # By way of memory: torch's own file writer reports a full disk as an internal error of its archive format.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | os.PathLike[str], *, kind: str) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    MissingInput
        If there is no such file.
    CheckpointMismatch
        If the file is not one of our checkpoints, is damaged, or holds another kind of network.
    """
    if not Path(path).is_file():
        raise MissingInput(f"No checkpoint at {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols of files that are no checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointMismatch(
            f"{path} is no checkpoint of this package: it holds something else than weights, which is never executed."
        ) from error
    except Exception as error:  # torch raises a different class for each way a file can be broken
        reason = (str(error).strip().splitlines() or ["nothing in it"])[0]
        raise CheckpointMismatch(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason})."
        ) from error
    lacking = [name for name in Checkpoint.__dataclass_fields__ if not isinstance(content, dict) or name not in content]
    if lacking or content.get("format") != FORMAT:
        raise CheckpointMismatch(f"{path} is not a checkpoint of this package (expected format '{FORMAT}').")
    for name, (what, fits) in _CONTENT.items():
        if not fits(content[name]):
            raise CheckpointMismatch(
                f"{path} is damaged: its {name} must be {what}. Got {reprlib.repr(content[name])}."
            )
    if content["kind"] != kind:
        raise CheckpointMismatch(
            f"{path} holds a {content['kind']} ({content['architecture']}); a {kind} is needed here."
        )
    return Checkpoint(**{name: content[name] for name in Checkpoint.__dataclass_fields__})


def load_weights(network: torch.nn.Module, checkpoint: Checkpoint) -> torch.nn.Module:
    """Put the checkpoint's weights into a network built from its options.

    Raises
    ------
    CheckpointMismatch
        If names or shapes differ; the message names the first difference.
    """
    wanted = network.state_dict()
    for name in sorted({*wanted, *checkpoint.state_dict}):
        mine = tuple(wanted[name].shape) if name in wanted else "absent"
        stored = tuple(checkpoint.state_dict[name].shape) if name in checkpoint.state_dict else "absent"
        if mine != stored:
            raise CheckpointMismatch(
                f"The checkpoint does not fit {checkpoint.architecture}: {name} is {stored} in it, "
                f"{mine} in the network."
            )
    network.load_state_dict(checkpoint.state_dict)
    return network
