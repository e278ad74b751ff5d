"""Room 3: a labelled mask -> a new one: elastic neurons, and mitochondria placed from a library of real shapes.

Read :mod:`.remodel` first: it is the whole way. :mod:`.field` and :mod:`.elastic` move the neurons, :mod:`.library`
measures real mitochondria, :mod:`.plan` says which to place, :mod:`.templates` chooses their shapes, :mod:`.room`,
:mod:`.chain` and :mod:`.placement` put them into the moved neurons, :mod:`.quality` measures the result.
:mod:`.copies` makes several masks at a time, :mod:`.blockwise` masks of volumes larger than memory, whose mitochondria
:mod:`.block_placing` places.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .blockwise import BlockwiseRemodelling, BlockwiseSettings, fits_in_memory, remodel_blockwise, sections_that_fit
from .copies import in_processes, workers_that_fit
from .elastic import Deformation, elastic_deform
from .field import DisplacementField, jacobian_minimum
from .inside import keep_inside
from .library import Signature, SignatureLibrary, gather_libraries
from .placement import place_mitochondria
from .quality import PAIRED, MaskLimits, mask_gate, quality_report
from .remodel import RemodelledMask, mask_arrays, remodel

__all__ = [
    "PAIRED",
    "BlockwiseRemodelling",
    "BlockwiseSettings",
    "Deformation",
    "DisplacementField",
    "MaskLimits",
    "RemodelledMask",
    "Signature",
    "SignatureLibrary",
    "elastic_deform",
    "fits_in_memory",
    "gather_libraries",
    "in_processes",
    "jacobian_minimum",
    "keep_inside",
    "mask_arrays",
    "mask_gate",
    "place_mitochondria",
    "quality_report",
    "remodel",
    "remodel_blockwise",
    "sections_that_fit",
    "workers_that_fit",
]


class _CallableRoom(ModuleType):
    """The room and its main function share a name; called, the room does what the function does."""

    def __call__(self, *args: Any, **options: Any) -> RemodelledMask:
        """See :func:`connectomics_neurodiff.remodel.remodel.remodel`."""
        return remodel(*args, **options)


sys.modules[__name__].__class__ = _CallableRoom
