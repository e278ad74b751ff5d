"""The registry of segmenters and the one function that builds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
        If a channel count or an option's value is not allowed.
    """
    entry = SEGMENTERS.get(name)
    known = [key for key in inspect.signature(entry).parameters if key not in ("in_channels", "out_channels")]
    for key in options:
        if key not in known:
            raise UnknownName(
                f"Segmenter '{name}' has no option '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )
    for title, count in (("in_channels", in_channels), ("out_channels", out_channels)):
        if count < 1:
            raise ValueRangeError(f"{title} must be at least 1. Got {count}.")
    return entry(in_channels=in_channels, out_channels=out_channels, **options)


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
    channels = checkpoint.options.get("in_channels", 1), checkpoint.options.get("out_channels", 3) - auxiliary
    if channels != (1, 3):
        raise CheckpointMismatch(
            f"A segmenter maps 1 image channel to 3 affinities here. Got {channels[0]} to {channels[1]}."
        )
    network = load_weights(build_segmenter(checkpoint.architecture, **checkpoint.options), checkpoint).eval()
    return AffinitiesAlone(network).eval() if auxiliary else network


class AffinitiesAlone(nn.Module):
    """A segmenter without the outputs that it had for training only: logits (b, 3, z, y, x), the first channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Affinity logits (b, 3, z, y, x) of an image (b, 1, z, y, x)."""
        logits: Tensor = self.network(image)
        return logits[:, :3]
