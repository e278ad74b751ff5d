"""Room 9: from affinities to neurons.

``fragments_from_affinities`` makes small, pure fragments by watershed; an agglomerator merges them: ``waterz``
(hierarchical) or ``multicut``. ``segment`` does both, ``segment_sweep`` gives many thresholds for the
price of one. ``segment_blockwise`` runs any segmenter over a volume larger than memory, block by block;
``stitch_blocks`` joins what the blocks hold. waterz, bioimage-cpp and python-elf are imported when they are used;
PyPI's ``elf`` is another package.
"""

from .affinity_input import affinities_from_interior, as_affinities
from .blockwise import segment_blockwise
from .fragments import fragments_from_affinities
from .hierarchical import waterz_sweep
from .instances import grow_labels, segment_image
from .multicut import multicut_sweep
from .segment import AGGLOMERATORS, DEFAULT_THRESHOLDS, segment, segment_sweep
from .stitching import SCRATCH_PREFIX, stitch_blocks

__all__ = [
    "AGGLOMERATORS",
    "DEFAULT_THRESHOLDS",
    "SCRATCH_PREFIX",
    "affinities_from_interior",
    "as_affinities",
    "fragments_from_affinities",
    "grow_labels",
    "multicut_sweep",
    "segment",
    "segment_blockwise",
    "segment_image",
    "segment_sweep",
    "stitch_blocks",
    "waterz_sweep",
]
