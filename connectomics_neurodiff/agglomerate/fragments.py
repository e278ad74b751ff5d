"""Fragments (supervoxels): a distance-transform watershed, section by section or in 3D, that respects the affinities.

The published procedure (Beier et al., Multicut brings automated neurite segmentation closer to human performance,
Nature Methods 14, 2017) floods a smoothed boundary map from the maxima of a smoothed distance transform. On its own
that erases what is thinner than the smoothing, and it cannot keep apart cells that touch, whose boundary has no width:
it lies on edges between voxels. Two additions, both neutral where membranes are thick:

* every region that strong affinities hold together, and in which the distance transform has no maximum, becomes a
  seed of its own: thin neurites survive. Single voxels cut off in their section go to the fragment above or below;
* flooding runs along edges, ordered by the smoothed map *and* by the raw affinity of the edge, so that a clear
  boundary one voxel thick is crossed last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import cc3d
import edt
import fastremap
import numpy as np
from scipy import ndimage

from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import is_anisotropic, voxel_size
from ..libraries import bioimage_cpp
from .affinity_input import as_affinities


@dataclass(frozen=True)
class _Settings:
    """Parameters of :func:`fragments_from_affinities`, for one image of any dimension."""

    threshold: float
    sigma_seeds: float
    sigma_weights: float
    min_size: int
    alpha: float
    edge_weight: float
    min_component: int
    pitch: tuple[float, ...]


def _check(settings: _Settings) -> None:
    shares = {"threshold": settings.threshold, "alpha": settings.alpha, "edge_weight": settings.edge_weight}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueRangeError(f"{name} must lie in [0, 1]. Got {value}.")
    sizes = {name: getattr(settings, name) for name in ("sigma_seeds", "sigma_weights", "min_size", "min_component")}
    for name, value in sizes.items():
        if not value >= 0:
            raise ValueRangeError(f"{name} must be >= 0. Got {value}.")


def _strong_components(affinities: np.ndarray, boundary_threshold: float, inside: np.ndarray) -> np.ndarray:
    """Connected components along edges with affinity >= 1 - threshold, uint32 ids > 0; 0 outside.

    Thresholded channels are cc3d's voxel connectivity graph: the bit of the negative direction of array axis k is
    2 * 4**k, because an edge is stored at its destination voxel.
    """
    graph = np.zeros(inside.shape, dtype=np.uint8)
    for axis, channel in enumerate(affinities):
        here, before = _neighbours(axis, inside.ndim)
        linked = (channel[here] >= 1 - boundary_threshold) & inside[here] & inside[before]
        graph[here] |= linked.astype(np.uint8) << (2 * axis + 1)
    volume = graph if graph.ndim == 3 else graph[..., None]  # cc3d packs 4-connected 2D bits in another way
    components = cc3d.color_connectivity_graph(volume, connectivity=6).reshape(inside.shape)
    return np.where(inside, components, 0).astype(np.uint32, copy=False)


def _neighbours(axis: int, ndim: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index of all voxels with a predecessor along the axis, and of the predecessors."""
    here, before = [slice(None)] * ndim, [slice(None)] * ndim
    here[axis], before[axis] = slice(1, None), slice(None, -1)
    return tuple(here), tuple(before)


def _faces(ndim: int) -> Literal[4, 6]:
    """cc3d's name for "neighbours share a face"."""
    return 4 if ndim == 2 else 6


def _distance(interior: np.ndarray, settings: _Settings) -> np.ndarray:
    """Smoothed distance to the boundary in voxels, 0 on the boundary; bounded where there is none."""
    distance = edt.edt(interior, anisotropy=settings.pitch)
    np.minimum(distance, float(np.linalg.norm(interior.shape)), out=distance)  # infinite without any boundary
    return _smooth(distance, settings.sigma_seeds)


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    return bioimage_cpp().filters.gaussian_smoothing(image, sigma) if sigma > 0 else image


def _seeds(components: np.ndarray, worthy: np.ndarray, distance: np.ndarray, interior: np.ndarray) -> np.ndarray:
    """Maxima of the distance, and whole components that have none but are worthy of one; uint32 ids 1, 2, ..."""
    peaks = (distance == ndimage.maximum_filter(distance, size=3)) & interior
    whole = worthy.copy()
    whole[components[peaks]] = False
    chosen = np.where(peaks | whole[components], components, 0)
    # Face neighbours of one component only: plateaus become one seed, seeds across a boundary stay apart.
    return cc3d.connected_components(chosen, connectivity=_faces(chosen.ndim), out_dtype=np.uint32)


def _edge_order(affinities: np.ndarray, landscape: np.ndarray, weight: float) -> np.ndarray:
    """Priority of each edge in the flooding, high first: its own affinity, and its two voxels' mean height."""
    order = np.empty_like(affinities)
    for axis, channel in enumerate(affinities):
        here, before = _neighbours(axis, landscape.ndim)
        order[axis] = 1 - landscape
        # The mean, not the maximum: on the way up, the lower neighbour then claims a voxel first (steepest descent).
        order[axis][here] = 1 - (landscape[here] + landscape[before]) / 2
        order[axis] *= 1 - weight
        order[axis] += weight * channel
    return order


def _flood(order: np.ndarray, seeds: np.ndarray, inside: np.ndarray) -> np.ndarray:
    offsets = [tuple(-int(axis == k) for k in range(seeds.ndim)) for axis in range(seeds.ndim)]
    return bioimage_cpp().segmentation.watershed_from_affinities(order, offsets, seeds, mask=inside)


def _with_rest(fragments: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Connected parts that no seed reached (boundary throughout) become fragments of their own."""
    rest = inside & (fragments == 0)
    if not rest.any():
        return fragments
    parts = cc3d.connected_components(rest, connectivity=_faces(rest.ndim), out_dtype=np.uint32)
    return np.where(rest, parts + fragments.max(), fragments)


def _attached(labels: np.ndarray, affinities: np.ndarray, minimum: float) -> np.ndarray:
    """Which ids have an edge of at least that affinity to another id > 0; bool, indexed by id."""
    attached = np.zeros(int(labels.max()) + 1, dtype=bool)
    for axis, channel in enumerate(affinities):
        here, before = _neighbours(axis, labels.ndim)
        ours, theirs = labels[here], labels[before]
        crossing = (ours != theirs) & (channel[here] >= minimum) & (ours > 0) & (theirs > 0)
        attached[ours[crossing]] = True
        attached[theirs[crossing]] = True
    return attached


def _largest_of_components(fragments: np.ndarray, seeds: np.ndarray, components: np.ndarray) -> np.ndarray:
    """For each component the id of the largest fragment with a seed in it, 0 where there is none."""
    sizes = np.bincount(fragments.ravel())
    component_of = np.zeros(sizes.size, dtype=np.int64)
    component_of[seeds[seeds > 0]] = components[seeds > 0]  # flooding keeps the ids of the seeds
    ascending = np.argsort(sizes, kind="stable")
    largest = np.zeros(int(components.max()) + 1, dtype=np.int64)
    largest[component_of[ascending]] = ascending  # the last one written is the largest
    largest[0] = 0
    return largest


def _dissolve_small(
    fragments: np.ndarray, kept: np.ndarray, order: np.ndarray, affinities: np.ndarray, settings: _Settings
) -> None:
    """Give fragments of fewer than min_size voxels to their neighbours, in place.

    Not those whose ids are `kept`, nor those set apart: tied to no neighbour by a strong affinity, and not so small
    that any affinity above the boundary's makes them noise.
    """
    sizes = np.bincount(fragments.ravel())
    noise = (sizes < settings.min_component) & _attached(fragments, affinities, settings.threshold)
    small = (sizes < settings.min_size) & (noise | _attached(fragments, affinities, 1 - settings.threshold))
    small[0] = False
    small[kept] = False
    gone = small[fragments]
    if gone.any() and not small[np.unique(fragments[fragments > 0])].all():
        # All other voxels keep their id: flooding what goes and the shell around it gives the same, faster.
        around = ndimage.binary_dilation(gone) & (fragments > 0)
        flooded = _flood(order, np.where(gone, 0, fragments), around)
        fragments[gone] = np.where(flooded > 0, flooded, fragments)[gone]


def _fragment_image(affinities: np.ndarray, inside: np.ndarray, settings: _Settings) -> tuple[np.ndarray, np.ndarray]:
    """Fragments of one section, (2, y, x) affinities, or of one volume, (3, z, y, x).

    Returns
    -------
    fragments : numpy.ndarray
        uint32 ids, 0 outside.
    stray : numpy.ndarray
        bool: voxels on their own, with boundary on all sides; flooding put them somewhere for want of better.
    """
    boundary = 1 - affinities.min(axis=0)
    interior = (boundary <= settings.threshold) & inside
    components = _strong_components(affinities, settings.threshold, inside)
    sizes = np.bincount(components.ravel())
    sealed = ~_attached(components, affinities, settings.threshold)
    sizes[0], sealed[0] = 0, False
    # A sealed pair of voxels is a sliver of a neurite; a loose one is noise. A sealed voxel may just be background.
    worthy = (sizes >= max(1, settings.min_component)) | (sealed & (sizes >= 2))
    distance = _distance(interior, settings)
    seeds = _seeds(components, worthy, distance, interior)
    landscape = settings.alpha * _smooth(boundary, settings.sigma_weights)
    landscape += (1 - settings.alpha) * (1 - distance / max(float(distance.max()), 1e-6))
    order = _edge_order(affinities, landscape, settings.edge_weight)
    fragments = _with_rest(_flood(order, seeds, inside), inside)
    largest = _largest_of_components(fragments, seeds, components)
    kept = largest[(sizes >= settings.min_size) | sealed]  # else the pieces of a thin neurite would vanish together
    _dissolve_small(fragments, kept, order, affinities, settings)
    return fragments, (sealed & (sizes == 1))[components] & (seeds == 0)


def _hand_over_strays(fragments: np.ndarray, affinity_z: np.ndarray, stray: np.ndarray, minimum: float) -> None:
    """Give stray voxels to the fragment above or below that a strong z affinity ties them to, in place.

    Where a neurite grazes a section it leaves a few voxels behind, which in the plane are cut off from all others. In
    a fragment of another neuron they would be the whole contact to their own neurite's next section: a false merge.
    """
    tied = affinity_z[1:] >= minimum
    from_above = stray[1:] & ~stray[:-1] & tied & (fragments[:-1] > 0)
    from_below = stray[:-1] & ~stray[1:] & tied & (fragments[1:] > 0)
    given = fragments.copy()
    given[:-1][from_below] = fragments[1:][from_below]
    given[1:][from_above] = fragments[:-1][from_above]
    fragments[...] = given


def fragments_from_affinities(
    affinities: np.ndarray,
    voxel_nm: Sequence[float],
    *,
    threshold: float = 0.25,
    sigma_seeds: float = 2.0,
    sigma_weights: float = 2.0,
    min_size: int = 100,
    alpha: float = 0.9,
    edge_weight: float = 0.5,
    min_component: int = 8,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Watershed fragments of an affinity volume.

    The boundary map is max(1 - aff_y, 1 - aff_x) in each section of an anisotropic volume (sections at least twice as
    thick as pixels are wide), and max over all three channels in an isotropic one, where the watershed is 3D.

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x), see :func:`as_affinities`.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm.
    threshold : float
        A voxel is boundary if its boundary map exceeds this, in (0, 1).
    sigma_seeds, sigma_weights : float
        Standard deviation in voxels of the smoothing of the distance transform, and of the boundary map.
    min_size : int
        Fragments with fewer voxels are given to their neighbours, unless no affinity >= 1 - threshold ties them to one.
    alpha : float
        Share of the boundary map in the landscape that is flooded, in [0, 1]; the rest is the distance transform.
    edge_weight : float
        Share of an edge's own raw affinity in the order of flooding, in [0, 1]; 0 floods the landscape alone, as
        published; from 0.5 on a perfect boundary is never crossed.
    min_component : int
        A region held together by affinities >= 1 - threshold that has no maximum becomes a seed from this many voxels
        on, or from two voxels on if all affinities around it are below the threshold.
    mask : numpy.ndarray, optional
        (z, y, x) bool; fragments are 0 where it is False. Without it every voxel belongs to a fragment.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint64; ids 1, 2, ... unique over the volume, 0 outside the mask.

    Raises
    ------
    ShapeMismatch, ValueRangeError
        If affinities, mask or a parameter are not as described.
    MissingDependency
        If bioimage-cpp is not installed.
    """
    values = as_affinities(affinities)
    size = voxel_size(voxel_nm)
    shape = values.shape[1:]
    inside = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask)
    if inside.shape != shape or inside.dtype != bool:
        raise ShapeMismatch(f"The mask must be bool of shape {shape}. Got {inside.dtype} of shape {inside.shape}.")
    sectioned = is_anisotropic(size)
    pitch = tuple(length / size.x for length in (size[1:] if sectioned else size))
    settings = _Settings(
        threshold, sigma_seeds, sigma_weights, min_size, alpha, edge_weight, min_component, pitch=pitch
    )
    _check(settings)
    if not sectioned:
        fragments, _ = _fragment_image(values, inside, settings)
        return _renumbered([fragments])[0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sections = list(pool.map(lambda z: _fragment_image(values[1:, z], inside[z], settings), range(shape[0])))
    stack = _renumbered([fragments for fragments, _ in sections])
    _hand_over_strays(stack, values[0], np.stack([stray for _, stray in sections]), 1 - threshold)
    return stack


def _renumbered(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stack of the images with ids 1, 2, ... that no two of them share; 0 stays."""
    stack = np.empty((len(images), *images[0].shape), dtype=np.uint64)
    last = 0
    for out, image in zip(stack, images, strict=True):
        dense, mapping = fastremap.renumber(image)
        out[...] = dense
        out[dense > 0] += np.uint64(last)
        last += len(mapping) - (0 in mapping)
    return stack
