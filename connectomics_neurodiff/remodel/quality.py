"""How a remodelled mask compares with its source."""

from __future__ import annotations

from collections.abc import Sequence

import cc3d
import numpy as np
from scipy import ndimage

from ..geometry import voxel_size
from .checks import binary_mask, compact_labels
from .remodel import RemodelledMask


def _section_iou(mito: np.ndarray) -> float:
    """Mean overlap (intersection over union) of adjacent sections' mitochondria; 0 if there are none."""
    both = (mito[1:] & mito[:-1]).sum(axis=(1, 2))
    either = (mito[1:] | mito[:-1]).sum(axis=(1, 2))
    return float((both[either > 0] / either[either > 0]).mean()) if (either > 0).any() else 0.0


def _mito_numbers(mito: np.ndarray, prefix: str, pitch_z_nm: float) -> dict[str, float]:
    components = cc3d.connected_components(mito, connectivity=26)
    heights = [box[0].stop - box[0].start for box in ndimage.find_objects(components)]
    return {
        f"{prefix}mito_fraction": float(mito.mean()),
        f"{prefix}mito_count": float(len(heights)),
        f"{prefix}mito_mean_z_nm": float(np.mean(heights)) * pitch_z_nm if heights else 0.0,
        f"{prefix}mito_section_iou": _section_iou(mito),
    }


def _pieces_per_label(compact: np.ndarray, labels: int) -> np.ndarray:
    components, count = cc3d.connected_components(compact, connectivity=26, return_N=True)
    owner = np.zeros(count + 1, dtype=np.int64)
    owner[components.ravel()] = compact.ravel()
    return np.bincount(owner[1:], minlength=labels)


def _shared_components(mito: np.ndarray, label: np.ndarray) -> int:
    """Number of mitochondria (26-connected) that lie in more than one neuron."""
    components = cc3d.connected_components(mito, connectivity=26)
    boxes = ndimage.find_objects(components)
    return sum(len(np.unique(label[b][components[b] == i])) > 1 for i, b in enumerate(boxes, start=1))


def quality_report(
    source_label: np.ndarray,
    source_mito: np.ndarray | None,
    remodelled: RemodelledMask,
    voxel_nm: Sequence[float],
) -> dict[str, float]:
    """Numbers that tell a plausible remodelled mask from a broken one.

    Parameters
    ----------
    source_label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.
    source_mito : numpy.ndarray or None
        (z, y, x), non-zero inside mitochondria.
    remodelled : RemodelledMask
        Made from them.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x).

    Returns
    -------
    dict of str to float
        ``membrane_fraction``; ``mito_fraction``, ``mito_count``, ``mito_mean_z_nm``, ``mito_section_iou`` (mean overlap
        of adjacent sections) and the same of the source with the prefix ``source_``; ``labels_lost``; ``labels_torn``
        (more 26-connected pieces than in the source); ``mito_outside_neuron_voxels``; ``mito_on_membrane_voxels``;
        ``mito_in_several_neurons`` (objects); ``label_overlap`` (share of voxels whose label did not change: the lower,
        the more diverse); ``mito_overlap`` (Dice with the source's mitochondria). All but the first five and
        their sources, and the overlaps, are 0 in a sound mask.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an array or the voxel size is not valid.
    """
    compact, ids = compact_labels(source_label)
    source = binary_mask(np.zeros(compact.shape) if source_mito is None else source_mito, compact.shape, "mitochondria")
    mito = binary_mask(remodelled.mito, compact.shape, "remodelled mitochondria")
    membrane = binary_mask(remodelled.membrane, compact.shape, "remodelled membrane")
    binary_mask(remodelled.label, compact.shape, "remodelled label")
    pitch_z = voxel_size(voxel_nm).z
    new, new_ids = compact_labels(remodelled.label)
    before = dict(zip(ids[1:].tolist(), _pieces_per_label(compact, len(ids))[1:].tolist(), strict=True))
    after = dict(zip(new_ids[1:].tolist(), _pieces_per_label(new, len(new_ids))[1:].tolist(), strict=True))
    marked = int(mito.sum()) + int(source.sum())
    return {
        "membrane_fraction": float(membrane.mean()),
        **_mito_numbers(mito, "", pitch_z),
        **_mito_numbers(source, "source_", pitch_z),
        "labels_lost": float(len(before.keys() - after.keys())),
        "labels_torn": float(sum(after.get(name, 0) > pieces for name, pieces in before.items())),
        "mito_outside_neuron_voxels": float((mito & (new == 0)).sum()),
        "mito_on_membrane_voxels": float((mito & membrane).sum()),
        "mito_in_several_neurons": float(_shared_components(mito, new)),
        "label_overlap": float((ids[compact] == new_ids[new]).mean()),
        "mito_overlap": 2 * int((mito & source).sum()) / marked if marked else 0.0,
    }
