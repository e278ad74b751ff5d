"""Room 5, pairs: synthetic images and masks on disk, the gate that judges them, the mixing with real ones."""

from .gate import (
    Check,
    GateLimits,
    GateReport,
    PairReport,
    grey_value_gate,
    judge_pair,
)
from .judge import Following, Judge, JudgeSettings, load_judge, train_judge
from .matching import match_grey_values, match_spectrum
from .mixing import is_synthetic, last_synthetic
from .reliability import ReliabilityMap
from .store import MaskArrays, open_pair, open_pairs, read_reliability, write_pair
from .tissue import RealTissue, TissueStatistics, dark_shares, measure_real

__all__ = [
    "Check",
    "Following",
    "GateLimits",
    "GateReport",
    "Judge",
    "JudgeSettings",
    "MaskArrays",
    "PairReport",
    "RealTissue",
    "ReliabilityMap",
    "TissueStatistics",
    "dark_shares",
    "grey_value_gate",
    "is_synthetic",
    "judge_pair",
    "last_synthetic",
    "load_judge",
    "match_grey_values",
    "match_spectrum",
    "measure_real",
    "open_pair",
    "open_pairs",
    "read_reliability",
    "train_judge",
    "write_pair",
]
