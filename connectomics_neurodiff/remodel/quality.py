"""How a remodelled mask compares with its source, and whether it may be painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from ..conditions import membrane_from_labels
from ..geometry import ZYX, voxel_size
from .checks import binary_mask, compact_labels
from .remodel import RemodelledMask

#: Numbers that a report gives for the mask and, with the prefix ``source_``, for its source.
PAIRED = (
    "membrane_fraction",
    "neuron_median_nm3",
    "profile_median_nm2",
    "label_section_iou",
    "mito_fraction",
    "mito_count",
    "mito_mean_z_nm",
    "mito_profile_median_nm2",
    "mito_section_iou",
)
#: Numbers of a report that are 0 in a sound mask, and what each counts.
FAULTS = {
    "labels_lost": "labels lost",
    "labels_torn": "labels torn",
    "mito_outside_neuron_voxels": "voxels of mitochondria outside neurons",
    "mito_on_membrane_voxels": "voxels of mitochondria on membranes",
    "mito_in_several_neurons": "mitochondria in more than one neuron",
}
#: Fewer real mitochondria say too little about the distribution of their heights.
LEAST_COMPARED = 20


@dataclass(frozen=True)
class MaskLimits:
    """What :func:`mask_gate` lets pass.

    Attributes
    ----------
    mito_fraction : float
        Largest relative difference of the share of mitochondria from the source's; that of one mitochondrion passes in
        any case.
    mito_height_p : float
        Smallest p of the Kolmogorov-Smirnov test of the mitochondria's heights; asked where the source has at least 20.
    membrane_fraction : float
        Largest relative difference of the share of membranes.
    profile_change : float
        Largest mean change of the areas of the neurons' profiles, as a natural logarithm: 0.1 is about 10 %.
    """

    mito_fraction: float = 0.10
    mito_height_p: float = 0.05
    membrane_fraction: float = 0.25
    profile_change: float = 0.2


def _section_iou(mito: np.ndarray) -> float:
    """Mean overlap (intersection over union) of adjacent sections' mitochondria; 0 if there are none."""
    both = (mito[1:] & mito[:-1]).sum(axis=(1, 2))
    either = (mito[1:] | mito[:-1]).sum(axis=(1, 2))
    return float((both[either > 0] / either[either > 0]).mean()) if (either > 0).any() else 0.0


def _label_section_iou(compact: np.ndarray) -> float:
    """Share of the voxels inside a neuron in one of two adjacent sections that are in the same neuron in both."""
    below, above = compact[:-1], compact[1:]
    inside = (below > 0) | (above > 0)
    return float(((below == above) & inside).sum() / inside.sum()) if inside.any() else 0.0


def _areas(marks: np.ndarray) -> np.ndarray:
    """Voxels of every label in every section it occurs in, 0 left out."""
    counts = [np.bincount(section.ravel())[1:] for section in marks]
    return np.concatenate([count[count > 0] for count in counts])


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else 0.0


@dataclass(frozen=True, eq=False)
class _Masks:
    """One side of the comparison: compact labels, membranes, mitochondria, and what is measured on them."""

    compact: np.ndarray
    membrane: np.ndarray
    mito: np.ndarray
    size: ZYX

    def heights(self) -> np.ndarray:
        """Sections that each mitochondrion (26-connected) reaches through."""
        boxes = ndimage.find_objects(cc3d.connected_components(self.mito, connectivity=26))
        return np.array([box[0].stop - box[0].start for box in boxes])

    def profiles(self) -> np.ndarray:
        """Areas of the neurons' cross-sections, nm^2."""
        return _areas(self.compact) * self.size.y * self.size.x

    def numbers(self, heights: np.ndarray, profiles: np.ndarray) -> dict[str, float]:
        """The numbers of `PAIRED`."""
        volumes = np.bincount(self.compact.ravel())[1:] * np.prod(self.size)
        pieces = np.stack([cc3d.connected_components(section, connectivity=8) for section in self.mito])
        return {
            "membrane_fraction": float(self.membrane.mean()),
            "neuron_median_nm3": _median(volumes),
            "profile_median_nm2": _median(profiles),
            "label_section_iou": _label_section_iou(self.compact),
            "mito_fraction": float(self.mito.mean()),
            "mito_count": float(len(heights)),
            "mito_mean_z_nm": float(heights.mean()) * self.size.z if heights.size else 0.0,
            "mito_profile_median_nm2": _median(_areas(pieces)) * self.size.y * self.size.x,
            "mito_section_iou": _section_iou(self.mito),
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


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sample Kolmogorov-Smirnov test; 1 if one of the samples is empty."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(first, second).pvalue) if first.size and second.size else 1.0


def _mean_change(first: np.ndarray, second: np.ndarray) -> float:
    """First Wasserstein distance of the logarithms; 0 if one of the samples is empty."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(np.log(first), np.log(second))) if first.size and second.size else 0.0


def quality_report(
    source_label: np.ndarray,
    source_mito: np.ndarray | None,
    remodelled: RemodelledMask,
    voxel_nm: Sequence[float],
    membrane_thickness_nm: float = 25.0,
    source_dark: np.ndarray | None = None,
) -> dict[str, float]:
    """Numbers that tell a plausible remodelled mask from a broken one.

    Parameters
    ----------
    source_label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.
    source_mito : numpy.ndarray or None
        (z, y, x), non-zero inside mitochondria; those outside neurons are ignored.
    remodelled : RemodelledMask
        Made from them.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x).
    membrane_thickness_nm : float
        Of the source's membranes, as of the mask's; see :func:`.membrane_from_labels`.
    source_dark : numpy.ndarray or None
        (z, y, x), non-zero where the source is dark inside neurons without a mitochondrion.

    Returns
    -------
    dict of str to float
        Of the mask, and of the source with the prefix ``source_``: ``membrane_fraction``; ``neuron_median_nm3``
        (volume); ``profile_median_nm2`` (area of a neuron in a section); ``label_section_iou`` and
        ``mito_section_iou`` (overlap of adjacent sections); ``mito_fraction``, ``mito_count``, ``mito_mean_z_nm``
        (height), ``mito_profile_median_nm2``; ``dark_fraction``, if both say what else is dark. Of both together:
        ``profile_change`` (mean change of the logarithm of the profiles' areas: first Wasserstein distance),
        ``mito_height_p`` (p of the two-sample Kolmogorov-Smirnov test of the mitochondria's heights);
        ``label_overlap`` (share of voxels whose label did not change: the lower, the more diverse); ``mito_overlap``
        (Dice); ``min_jacobian``, > 0 in a sound mask. 0 in a sound mask: ``labels_lost``;
        ``labels_torn`` (more 26-connected pieces than in the source);
        ``mito_outside_neuron_voxels``; ``mito_on_membrane_voxels``; ``mito_in_several_neurons`` (objects).

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an array or a length is not valid.
    """
    compact, ids = compact_labels(source_label)
    size = voxel_size(voxel_nm)
    mito = binary_mask(np.zeros(compact.shape) if source_mito is None else source_mito, compact.shape, "mitochondria")
    source = _Masks(compact, membrane_from_labels(compact, size, membrane_thickness_nm), mito * (compact > 0), size)
    binary_mask(remodelled.label, compact.shape, "remodelled label")
    new, new_ids = compact_labels(remodelled.label)
    made = _Masks(
        new,
        binary_mask(remodelled.membrane, compact.shape, "remodelled membrane"),
        binary_mask(remodelled.mito, compact.shape, "remodelled mitochondria"),
        size,
    )
    heights, profiles = (made.heights(), source.heights()), (made.profiles(), source.profiles())
    before = dict(zip(ids[1:].tolist(), _pieces_per_label(compact, len(ids))[1:].tolist(), strict=True))
    after = dict(zip(new_ids[1:].tolist(), _pieces_per_label(new, len(new_ids))[1:].tolist(), strict=True))
    marked = int(made.mito.sum()) + int(source.mito.sum())
    dark = {}
    if source_dark is not None and remodelled.dark is not None:
        masks = {"dark_fraction": remodelled.dark, "source_dark_fraction": source_dark}
        dark = {name: float(binary_mask(mask, compact.shape, "dark").mean()) for name, mask in masks.items()}
    return {
        **made.numbers(heights[0], profiles[0]),
        **{f"source_{name}": value for name, value in source.numbers(heights[1], profiles[1]).items()},
        **dark,
        "profile_change": _mean_change(*profiles),
        "mito_height_p": _likeness(*heights),
        "labels_lost": float(len(before.keys() - after.keys())),
        "labels_torn": float(sum(pieces > before.get(name, 1) for name, pieces in after.items())),
        "mito_outside_neuron_voxels": float((made.mito & (new == 0)).sum()),
        "mito_on_membrane_voxels": float((made.mito & made.membrane).sum()),
        "mito_in_several_neurons": float(_shared_components(made.mito, new)),
        "label_overlap": float((ids[compact] == new_ids[new]).mean()),
        "mito_overlap": 2 * int((made.mito & source.mito).sum()) / marked if marked else 0.0,
        "min_jacobian": float(remodelled.min_jacobian),
    }


def mask_gate(report: dict[str, float], limits: MaskLimits, mito_fraction: float | None = None) -> str:
    """Why a remodelled mask may not be painted, or an empty string.

    Mitochondria are compared where the source has any, or their share was asked for.

    Parameters
    ----------
    report : dict of str to float
        As made by :func:`quality_report`.
    limits : MaskLimits
    mito_fraction : float or None
        Share of mitochondria that was asked for; None: the source's.
    """
    for name, meaning in FAULTS.items():
        if report[name]:
            return f"It has {report[name]:g} {meaning}; none is allowed."
    if report["min_jacobian"] <= 0:
        return f"Its deformation folds: the smallest Jacobian determinant is {report['min_jacobian']:.3g}."
    membrane, source_membrane = report["membrane_fraction"], report["source_membrane_fraction"]
    if abs(membrane - source_membrane) > limits.membrane_fraction * source_membrane:
        return (
            f"Membranes fill {100 * membrane:.1f} % of it, {100 * source_membrane:.1f} % of the source; at most "
            f"{100 * limits.membrane_fraction:g} % of that may they differ."
        )
    if report["profile_change"] > limits.profile_change:
        return (
            f"The areas of its neurons' profiles differ from the source's by {report['profile_change']:.2f} on average "
            f"(logarithm); at most {limits.profile_change:g} is allowed."
        )
    return _mito_fault(report, limits, mito_fraction)


def _mito_fault(report: dict[str, float], limits: MaskLimits, mito_fraction: float | None) -> str:
    share, count = report["mito_fraction"], report["source_mito_count"]
    wanted = report["source_mito_fraction"] if mito_fraction is None else mito_fraction
    if mito_fraction is None and not count:
        return ""
    # Of none at all one is not all that was asked for.
    one = 1 / (count if mito_fraction is None else max(report["mito_count"], 2))
    if abs(share - wanted) > max(limits.mito_fraction, one) * wanted:
        return (
            f"Mitochondria fill {100 * share:.2f} % of it, {100 * wanted:.2f} % "
            f"{'of the source' if mito_fraction is None else 'were asked for'}; at most "
            f"{100 * limits.mito_fraction:g} % of that, or one mitochondrion, may they differ."
        )
    if count >= LEAST_COMPARED and report["mito_height_p"] < limits.mito_height_p:
        return (
            f"Its mitochondria are not as high as the source's (Kolmogorov-Smirnov p {report['mito_height_p']:.3f}, at "
            f"least {limits.mito_height_p:g} is needed)."
        )
    return ""
