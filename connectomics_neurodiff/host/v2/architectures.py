"""Our segmenters under the host's names: ``neurodiff_superhuman`` and whatever else the segmenter registry holds.

The host calls ``builder(cfg) -> module`` and the module with an image (b, c, z, y, x), normalised as
``data.image_transform`` says; it wants logits (b, out, z, y, x) back, which is what our segmenters return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, UnknownName, did_you_mean
from .config import look_up, plain

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "neurodiff_"
Builder = Callable[[Any], "nn.Module"]


def check_architecture(cfg: Any) -> None:
    """Check that ``model.arch.type``, if it has our prefix, is one of our segmenters.

    Raises
    ------
    UnknownName
        If it is not; the host would end with a traceback.
    """
    name = str(look_up(cfg, "model.arch.type", ""))
    known = builders()
    if name.startswith(PREFIX) and name not in known:
        raise UnknownName(f"No model.arch.type '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def builders() -> dict[str, Builder]:
    """A builder for each of our segmenters, by the name it gets in the host."""
    from ...segmenters import SEGMENTERS

    return {f"{PREFIX}{name}": _make_builder(name) for name in SEGMENTERS.names()}


def _make_builder(segmenter: str) -> Builder:
    def build(cfg: Any) -> nn.Module:
        return build_from(cfg, segmenter)

    # The host lists these, and reads __module__ too: a functools.partial would have neither.
    build.__name__ = build.__qualname__ = f"build_{PREFIX}{segmenter}"
    build.__doc__ = f"Segmenter '{segmenter}' of connectomics_neurodiff; its options are model.arch.params."
    return build


def build_from(cfg: Any, segmenter: str) -> nn.Module:
    """Build a segmenter from the host's configuration.

    Parameters
    ----------
    cfg : object
        The host's configuration: ``model.in_channels``, ``model.out_channels``, and the segmenter's own options in
        ``model.arch.params``.
    segmenter : str
        Name in our registry.

    Returns
    -------
    torch.nn.Module
        Image (b, in_channels, z, y, x) -> logits (b, out_channels, z, y, x).

    Raises
    ------
    UnknownName
        For an option that the segmenter does not have; the message suggests the nearest.
    ConfigError
        If the host asks for what no segmenter of ours has: heads, deep supervision, two dimensions.
    ValueRangeError
        If an option's value is not allowed.
    """
    from ...convolution import use_sound_convolutions
    from ...segmenters import build_segmenter

    _refuse_what_is_not_supported(cfg, f"{PREFIX}{segmenter}")
    options = plain(look_up(cfg, "model.arch.params", {}))
    for name in ("in_channels", "out_channels"):
        if name in options:
            raise ConfigError(f"model.arch.params.{name} is not an option: set model.{name}.")
    network = build_segmenter(
        segmenter,
        in_channels=int(look_up(cfg, "model.in_channels", 1)),
        out_channels=int(look_up(cfg, "model.out_channels", 3)),
        **options,
    )
    # The host's default precision becomes bfloat16 on a CPU, where oneDNN's convolutions are not to be trusted.
    use_sound_convolutions(network)
    network.register_forward_pre_hook(_as_plain_tensors)
    return network


def _as_plain_tensors(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The host's batches are MONAI's MetaTensors; what a custom function makes of them may not be changed in place."""
    import torch

    return tuple(value.as_subclass(torch.Tensor) for value in inputs)


def _refuse_what_is_not_supported(cfg: Any, name: str) -> None:
    if look_up(cfg, "model.heads"):
        raise ConfigError(f"'{name}' has one output: remove model.heads and set model.out_channels.")
    if look_up(cfg, "model.loss.deep_supervision", False):
        raise ConfigError(f"'{name}' has no deep supervision: set model.loss.deep_supervision: false.")
    size = look_up(cfg, "model.input_size", [])
    if len(size) not in (0, 3):
        raise ConfigError(f"'{name}' works in 3D: model.input_size must be [z, y, x]. Got {plain(size)}.")
