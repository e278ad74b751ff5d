"""Room 5, pairs: synthetic images and masks on disk, the check of their grey values, the mixing with real ones."""

from .gate import GateReport, grey_value_gate, match_grey_values, membrane_gate, membrane_visibility
from .mixing import is_synthetic, last_synthetic
from .reliability import ReliabilityMap
from .store import MaskArrays, open_pair, open_pairs, read_reliability, write_pair

__all__ = [
    "GateReport",
    "MaskArrays",
    "ReliabilityMap",
    "grey_value_gate",
    "is_synthetic",
    "last_synthetic",
    "match_grey_values",
    "membrane_gate",
    "membrane_visibility",
    "open_pair",
    "open_pairs",
    "read_reliability",
    "write_pair",
]
