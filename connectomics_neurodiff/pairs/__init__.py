"""Room 5, pairs: synthetic images and masks on disk, the gate that judges them, the mixing with real ones."""

from .gate import (
    Check,
    GateLimits,
    GateReport,
    PairReport,
    gate_defect,
    grey_value_gate,
    judge_pair,
)
from .judge import Following, Judge, JudgeSettings, MaskScores, followed_membranes, load_judge, train_judge
from .matching import match_grey_values, match_spectrum
from .mixing import is_synthetic, last_synthetic
from .reliability import ReliabilityMap
from .store import VERDICT, MaskArrays, membrane_of_pair, open_pair, open_pairs, read_reliability, write_pair
from .tissue import RealTissue, TissueStatistics, dark_shares, measure_real

__all__ = [
    "VERDICT",
    "Check",
    "Following",
    "GateLimits",
    "GateReport",
    "Judge",
    "JudgeSettings",
    "MaskArrays",
    "MaskScores",
    "PairReport",
    "RealTissue",
    "ReliabilityMap",
    "TissueStatistics",
    "dark_shares",
    "followed_membranes",
    "gate_defect",
    "grey_value_gate",
    "is_synthetic",
    "judge_pair",
    "last_synthetic",
    "load_judge",
    "match_grey_values",
    "match_spectrum",
    "measure_real",
    "membrane_of_pair",
    "open_pair",
    "open_pairs",
    "read_reliability",
    "train_judge",
    "write_pair",
]
