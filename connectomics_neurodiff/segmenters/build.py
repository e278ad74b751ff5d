"""The registry of segmenters and the one function that builds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..checkpoints import Checkpoint, load_weights
from ..errors import CheckpointMismatch, UnknownName, ValueRangeError, did_you_mean
from ..registry import Registry

SEGMENTERS: Registry[Callable[..., nn.Module]] = Registry(
    "segmenter", "f(in_channels, out_channels, **options) -> nn.Module"
)


def build_segmenter(name: str, in_channels: int = 1, out_channels: int = 3, **options: Any) -> nn.Module:
    """Build a segmenter by name.

    Parameters
    ----------
    name : str
        One of ``SEGMENTERS.names()``.
    in_channels : int
        Image channels, 1 for EM.
    out_channels : int
        3 for nearest-neighbour affinities (z, y, x).
    **options
        Keyword arguments of that segmenter; see its class.

    Returns
    -------
    torch.nn.Module
        ``forward(image (b, in_channels, z, y, x) in [0, 1]) -> logits (b, out_channels, z, y, x)``, any z, y, x.

    Raises
    ------
    UnknownName
        If the segmenter or an option does not exist; the message suggests the nearest name.
    ValueRangeError
        If a channel count or an option's type or value is not allowed.
    """
    entry = SEGMENTERS.get(name)
    parameters = inspect.signature(entry).parameters
    known = [key for key in parameters if key not in ("in_channels", "out_channels")]
    for key in options:
        if key not in known:
            raise UnknownName(
                f"Segmenter '{name}' has no option '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )
    options = {"in_channels": in_channels, "out_channels": out_channels, **options}
    for key, value in options.items():
        what, fits = _TYPES.get(str(parameters[key].annotation), _ANYTHING)
        if not fits(value):
            raise ValueRangeError(f"Segmenter '{name}' takes {what} for '{key}'. Got {value!r}.")
    for key in ("in_channels", "out_channels"):
        if options[key] < 1:
            raise ValueRangeError(f"{key} must be at least 1. Got {options[key]}.")
    return entry(**options)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


#: What an option's annotation says in words, and whether a value is that.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    "bool": ("true or false", _is_truth),
    "str": ("a word", lambda value: isinstance(value, str)),
    "Sequence[int]": ("a list of whole numbers", lambda value: _is_list(value, _is_whole)),
    "Sequence[bool]": ("a list of true and false", lambda value: _is_list(value, _is_truth)),
}
_ANYTHING: tuple[str, Callable[[Any], bool]] = ("anything", lambda value: True)


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options that a configuration holds for all segmenters, those that this one has.

    Raises
    ------
    UnknownName
        If there is no such segmenter.
    """
    known = inspect.signature(SEGMENTERS.get(name)).parameters
    return {key: value for key, value in given.items() if key in known}


def segmenter_from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """Build the segmenter that a checkpoint holds, with its weights, in evaluation mode.

    Raises
    ------
    CheckpointMismatch
        If the weights do not fit the architecture, or it does not map one image channel to three affinities.
    UnknownName
        If this version does not know the architecture.
    """
    auxiliary = checkpoint.extra.get("auxiliary_channels", 0)
    channels = checkpoint.options.get("in_channels", 1), checkpoint.options.get("out_channels", 3)
    if not _is_whole(auxiliary) or auxiliary < 0 or channels != (1, 3 + auxiliary):
        beside = f", beside {auxiliary!r} auxiliary ones" if auxiliary else ""
        raise CheckpointMismatch(
            f"A segmenter maps 1 image channel to 3 affinities here{beside}. Got {channels[0]} to {channels[1]}."
        )
    network = load_weights(build_segmenter(checkpoint.architecture, **checkpoint.options), checkpoint).eval()
    return AffinitiesAlone(network).eval() if auxiliary else network


@runtime_checkable
class Encoder(Protocol):
    """A segmenter that shows what it sees before it decodes, as every one of this room does."""

    def deepest_features(self, image: Tensor) -> Tensor:
        """Features (b, c, z', y', x') of the coarsest level, of an image (b, in_channels, z, y, x) in [0, 1]."""


def encoder_of(network: nn.Module) -> Encoder:
    """The segmenter as an :class:`Encoder`.

    Raises
    ------
    UnknownName
        If it has no ``deepest_features``, as the networks of pytorch_connectomics.
    """
    inner = network.network if isinstance(network, AffinitiesAlone) else network
    if not isinstance(inner, Encoder):
        raise UnknownName(
            f"The deepest features are known of the segmenters of this package. Got {type(inner).__name__}, which has "
            "no deepest_features."
        )
    return inner


class AffinitiesAlone(nn.Module):
    """A segmenter without the outputs that it had for training only: logits (b, 3, z, y, x), the first channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Affinity logits (b, 3, z, y, x) of an image (b, 1, z, y, x)."""
        logits: Tensor = self.network(image)
        return logits[:, :3]
