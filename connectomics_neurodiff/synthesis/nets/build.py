"""The registry of synthesisers: networks that predict the noise in an EM volume from its masks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...registry import Registry

SYNTHESISERS: Registry = Registry("synthesiser", call="f(preset, **options) -> nn.Module")


def build_denoiser(name: str, preset: str = "paper", **options: Any) -> nn.Module:
    """Build a denoising network with fresh weights.

    Parameters
    ----------
    name : str
        Registered name; see ``SYNTHESISERS.names()``.
    preset : str
        Named set of sizes: ``"paper"``; ``"small"`` or ``"tiny"`` for training on a CPU.
    **options
        Overrides of single fields of the preset. For ``"neurodiff"`` see
        :class:`~connectomics_neurodiff.synthesis.nets.options.DenoiserOptions`.

    Returns
    -------
    torch.nn.Module
        ``forward(x_t (b, 1, z, y, x), t (b,), condition (b, 2, z, y, x) in [0, 1], voxel_nm (b, 3)) -> noise`` in the
        shape of ``x_t``; with ``learn_variance`` there is a second channel. A voxel size of three zeros means unknown.
        Its ``options`` attribute rebuilds it.

    Raises
    ------
    UnknownName
        If the name, the preset, an option or a named value is not known; the message suggests the nearest.
    ValueRangeError
        If an option has a value that makes no network.

    Examples
    --------
    >>> network = build_denoiser("neurodiff", preset="small", scan_directions=2)
    """
    return SYNTHESISERS.get(name)(preset=preset, **options)
