"""Whether a denoiser suits a volume: its voxel size, and the memory that a tile takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoints import Checkpoint
from ..errors import ValueRangeError
from ..memory import available_bytes, peak_bytes
from ..volume import ArrayLike, slabs
from .nets import build_denoiser

logger = logging.getLogger("connectomics_neurodiff")

#: A voxel size this many times off the range of the training is worth a warning.
_FAR = 10.0
#: Tile whose memory is computed; that of others is in proportion to their voxels.
_PROBE = (4, 128, 128)
#: Memory that convolutions take inside and that fragments, over that of the tensors (docs/performance.md).
_OVERHEAD = 1.5


def warn_of_voxel_size(checkpoint: Checkpoint, voxel_nm: Sequence[float]) -> None:
    """Log a warning if a voxel size is ten times off those that a denoiser was trained on.

    Parameters
    ----------
    checkpoint : Checkpoint
        Denoiser; one that does not say what it was trained on is not judged.
    voxel_nm : sequence of 3 floats
        Voxel size of the volume to be painted, (z, y, x), nm.
    """
    trained = checkpoint.extra.get("voxel_nm") or []
    for axis, size, *known in zip("zyx", voxel_nm, *trained, strict=True):
        if known and not min(known) / _FAR < size < max(known) * _FAR:
            logger.warning(
                "The voxel size of %g nm along %s is far from what the denoiser was trained on, %g to %g nm.",
                size,
                axis,
                min(known),
                max(known),
            )


def warn_of_what_is_dark(checkpoint: Checkpoint, mito: ArrayLike | None, dark: ArrayLike | None) -> None:
    """Log a warning if masks tell less, or more, of what is dark inside neurons than a denoiser learnt to be told.

    Parameters
    ----------
    checkpoint : Checkpoint
        Denoiser.
    mito, dark : array or None
        (z, y, x) masks of mitochondria, and of what else is dark inside neurons.
    """
    if not checkpoint.extra.get("knows_dark"):
        if dark is not None:
            logger.warning(
                "The denoiser was not trained with masks of what is dark inside neurons beside mitochondria: what it "
                "makes of the dataset 'dark' is not known. Make masks without 'neurodiff remodel --dark-bodies'."
            )
        return
    if dark is None or not (_any(dark) or (mito is not None and _any(mito))):
        logger.warning(
            "The denoiser learnt what is dark inside neurons beside mitochondria, and these masks do not tell: neurons "
            "are painted too empty, and a segmenter takes all that is dark for a boundary. Make masks with 'neurodiff "
            "remodel --dark-bodies'."
        )


def _any(mask: ArrayLike) -> bool:
    return any(np.asarray(mask[index]).any() for index in slabs(tuple(mask.shape)))


def tile_bytes(checkpoint: Checkpoint, tile: Sequence[int]) -> int:
    """Memory that a denoiser takes to predict one tile, in float32, without its weights; an estimate.

    Parameters
    ----------
    checkpoint : Checkpoint
        Denoiser.
    tile : sequence of 3 ints
        Voxels.
    """
    with torch.device("meta"):
        network = build_denoiser(checkpoint.architecture, **checkpoint.options)
        inputs = (
            torch.zeros(1, 1, *_PROBE),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, 2, *_PROBE),
            torch.ones(1, 3),
        )
    return int(_OVERHEAD * peak_bytes(network, *inputs) * math.prod(tile) / math.prod(_PROBE))


def require_fitting_tile(
    checkpoint: Checkpoint, tile: Sequence[int], margin: Sequence[int], shape: Sequence[int], device: torch.device
) -> None:
    """Refuse a tile that does not fit into the memory of a device.

    Parameters
    ----------
    checkpoint : Checkpoint
        Denoiser.
    tile, margin, shape : sequence of 3 ints
        Voxels of a tile, of what it reaches beyond the volume's faces (:func:`.synthesise`), and of the volume.
    device : torch.device
        Where the network runs.

    Raises
    ------
    ValueRangeError
        With a tile that fits, if any does: the same depth if it can be, rows and columns halved.
    """
    tile = [min(t, n) for t, n in zip(tile, shape, strict=True)]

    of_probe = tile_bytes(checkpoint, _PROBE)

    def bytes_of(size: Sequence[int]) -> int:
        # A tile as large as its volume reaches beyond both faces, any other beyond one at most.
        reaching = [t + m * (2 if t == n else 1) for t, m, n in zip(size, margin, shape, strict=True)]
        return of_probe * math.prod(reaching) // math.prod(_PROBE)

    needed, there = bytes_of(tile), available_bytes(device)
    if needed <= there:
        return
    fitting, least = list(tile), needed
    while least > there and max(fitting) > 1:
        axes = (1, 2) if max(fitting[1:]) > 32 else (0, 1, 2)
        fitting = [max(n // 2, 1) if axis in axes else n for axis, n in enumerate(fitting)]
        least = bytes_of(fitting)
    advice = f"A tile of {tuple(fitting)} fits." if least <= there else "No tile fits."
    raise ValueRangeError(
        f"A tile of {tuple(tile)} voxels takes about {needed / 2**30:.1f} GiB of memory; {there / 2**30:.1f} GiB are "
        f"free on {device}. {advice}"
    )
