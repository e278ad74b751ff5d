"""Multicut agglomeration: the partition of the fragments that cuts the weak edges and keeps the strong ones.

Fragments are the nodes of a region adjacency graph. With the mean affinity a_e and the number s_e of the voxel pairs on
the boundary of two fragments, p_e = 1 - a_e is the probability that the edge e is a cut, and its cost is

    c_e = s_e / max(s) * (log((1 - p_e) / p_e) + log((1 - beta) / beta)).

Positive costs attract, negative ones repel; the multicut minimises the sum of c_e over the edges that are cut. On its
own an edge is merged if a_e > beta: beta is the mean affinity at which an edge is indifferent. A HIGHER beta therefore
cuts MORE (waterz's threshold works the other way round), and beta < 0.5 favours merging.

Beier et al., Multicut brings automated neurite segmentation closer to human performance, Nature Methods 14 (2017).
Solver: Kernighan-Lin moves (Keuper et al., ICCV 2015), started from greedy additive edge contraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import fastremap
import numpy as np

from ..affinities import OFFSETS
from ..errors import ValueRangeError
from ..libraries import bioimage_cpp, elf_multicut


def _region_graph(affinities: np.ndarray, fragments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (n, 2) between fragments numbered 0 (background), 1, ..., with mean affinity and number of voxel pairs."""
    graph = bioimage_cpp().graph
    rag = graph.region_adjacency_graph(fragments)
    features = graph.features.affinity_features(rag, fragments, affinities, OFFSETS)
    edges = np.asarray(rag.uv_ids(), dtype=np.uint64)
    between_fragments = (edges > 0).all(axis=1)  # background stays alone
    return edges[between_fragments], features[between_fragments, 0], features[between_fragments, 1]


def _unbiased_costs(mean_affinity: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs at beta = 0.5, where the bias term is 0, and the size weight that the bias of another beta gets."""
    if size.size == 0:
        return size, size
    costs = elf_multicut().compute_edge_costs(1 - mean_affinity, edge_sizes=size, beta=0.5, weighting_scheme="all")
    return costs, size / size.max()


def multicut_sweep(
    affinities: np.ndarray, fragments: np.ndarray, thresholds: Sequence[float]
) -> Iterator[tuple[float, np.ndarray]]:
    """Segmentations at several values of beta; the region graph and its costs are computed once.

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x) float32 in [0, 1].
    fragments : numpy.ndarray
        (z, y, x) unsigned integers, 0 = background; not modified.
    thresholds : sequence of float
        beta in (0, 1), see the module's docstring: a HIGHER beta merges LESS.

    Yields
    ------
    threshold, segmentation : float, numpy.ndarray
        (z, y, x) uint64, in ascending order of beta; 0 where the fragments are 0.

    Raises
    ------
    ValueRangeError
        If a beta is not inside (0, 1).
    """
    betas = sorted(float(threshold) for threshold in thresholds)
    if not all(0 < beta < 1 for beta in betas):
        raise ValueRangeError(f"The threshold (beta) of multicut must lie inside (0, 1). Got {betas}.")
    dense = fastremap.renumber(fragments)[0].astype(np.uint32, copy=False)
    edges, mean_affinity, size = _region_graph(affinities, dense)
    graph = bioimage_cpp().graph.UndirectedGraph.from_unique_edges(int(dense.max()) + 1, edges)
    costs, weight = _unbiased_costs(mean_affinity, size)
    for beta in betas:
        if costs.size == 0:  # no two fragments touch
            yield beta, dense.astype(np.uint64)
            continue
        of_node = elf_multicut().multicut_kernighan_lin(graph, costs + weight * np.log((1 - beta) / beta))
        of_node = of_node.astype(np.uint64) + np.uint64(1)
        of_node[0] = 0
        yield beta, of_node[dense]
