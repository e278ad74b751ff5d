"""Our networks in PyTC v1's table of models, under names that it does not use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ...config.project import HOST_ARCHITECTURES, NORMALISATIONS, PREFIX
from ...errors import ConfigError, did_you_mean
from ...segmenters import SEGMENTERS, build_segmenter, options_of
from ...synthesis import build_denoiser
from .compat import import_host

DENOISER = f"{PREFIX}denoiser"


def z_pooling(isotropy: Sequence[bool], levels: int) -> list[bool]:
    """Per pooling step, whether z is pooled too.

    PyTC's MODEL.ISOTROPY has an entry per level, of which the first is not a pooling step; ours has one per step.
    """
    if len(isotropy) == levels:
        return [bool(entry) for entry in isotropy[1:]]
    if len(isotropy) == levels - 1:
        return [bool(entry) for entry in isotropy]
    raise ConfigError(
        f"MODEL.ISOTROPY needs {levels} or {levels - 1} entries for {levels} FILTERS. Got {list(isotropy)}."
    )


def segmenter_for_host(
    ours: Mapping[str, Any],
    architecture: str,
    *,
    in_channel: int,
    out_channel: int,
    filters: Sequence[int],
    isotropy: Sequence[bool],
    norm_mode: str,
    **_unused: Any,
) -> nn.Module:
    """Build a segmenter from the arguments that PyTC's ``build_model`` passes to every model.

    The arguments of PyTC's own blocks (block_type, attn, pad_mode, act_mode, pooling, ...) have no counterpart; `ours`
    are options that PyTC does not pass on.
    """
    if norm_mode not in NORMALISATIONS:
        raise ConfigError(
            f"MODEL.NORM_MODE is '{norm_mode}'.{did_you_mean(norm_mode, NORMALISATIONS)} "
            f"Known: {', '.join(NORMALISATIONS)}."
        )
    options = options_of(architecture, dict(ours) | {"filters": list(filters), "norm": NORMALISATIONS[norm_mode]})
    if "filters" in options:
        options["z_pool"] = z_pooling(isotropy, len(filters))
    return build_segmenter(architecture, in_channel, out_channel, **options)


def denoiser_for_host(options: Mapping[str, Any], architecture: str, **_unused: Any) -> nn.Module:
    """Build the denoiser; PyTC's arguments do not concern it, NEURODIFF.DIFFUSION gives its options."""
    return build_denoiser(architecture, **options)


def model_builders(
    denoiser: str, denoiser_options: Mapping[str, Any], segmenter_options: Mapping[str, Any]
) -> dict[str, Callable[..., nn.Module]]:
    """What goes into PyTC's MODEL_MAP: every segmenter of ours, and the denoiser."""
    builders: dict[str, Callable[..., nn.Module]] = {
        PREFIX + name: partial(segmenter_for_host, dict(segmenter_options), name) for name in SEGMENTERS
    }
    return builders | {DENOISER: partial(denoiser_for_host, dict(denoiser_options), denoiser)}


def provide_host_networks() -> None:
    """Add PyTC's U-Nets to our segmenters, so that the native engine can train a project's network.

    Raises
    ------
    MissingDependency
        If PyTC v1 is not installed.
    """
    import_host()
    for name in HOST_ARCHITECTURES:
        if name not in SEGMENTERS:
            SEGMENTERS.register(name)(partial(_host_network, name))


def _host_network(
    name: str,
    in_channels: int = 1,
    out_channels: int = 3,
    filters: Sequence[int] = (28, 36, 48, 64, 80),
    z_pool: Sequence[bool] = (False, False, False, True, True),
    norm: str = "batch",
    block_type: str = "residual",
) -> nn.Module:
    """One of PyTC's networks; `z_pool` is its MODEL.ISOTROPY, one entry per level."""
    from connectomics.model.build import MODEL_MAP

    host_norm = {ours: theirs for theirs, ours in reversed(NORMALISATIONS.items())}[norm]
    network: nn.Module = MODEL_MAP[name](
        block_type=block_type,
        in_channel=in_channels,
        out_channel=out_channels,
        filters=list(filters),
        isotropy=list(z_pool),
        norm_mode=host_norm,
    )
    return network
