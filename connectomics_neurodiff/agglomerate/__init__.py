"""Room 9: from affinities to neurons.

``fragments_from_affinities`` makes small, pure fragments by watershed; an agglomerator merges them: ``waterz``
(hierarchical, median affinity) or ``multicut``. ``segment`` does both, ``segment_sweep`` gives many thresholds for the
price of one. waterz, bioimage-cpp and python-elf are imported when they are used; PyPI's ``elf`` is another package.
"""

from .affinity_input import affinities_from_interior, as_affinities
from .fragments import fragments_from_affinities
from .hierarchical import waterz_sweep
from .multicut import multicut_sweep
from .segment import AGGLOMERATORS, PUBLISHED_THRESHOLDS, segment, segment_sweep

__all__ = [
    "AGGLOMERATORS",
    "PUBLISHED_THRESHOLDS",
    "affinities_from_interior",
    "as_affinities",
    "fragments_from_affinities",
    "multicut_sweep",
    "segment",
    "segment_sweep",
    "waterz_sweep",
]
