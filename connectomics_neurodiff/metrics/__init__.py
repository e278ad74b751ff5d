"""Room 10: how good a segmentation is, and which threshold to choose.

``evaluate`` gives variation of information (bits, split and merge by name) and the adapted Rand error of SNEMI3D;
``tune_threshold`` picks a threshold on the tune split.
"""

from .overlap import Overlap, RandScores, Scores, contingency, evaluate, rand_scores
from .tuning import CRITERIA, TuneResult, tune_threshold

__all__ = [
    "CRITERIA",
    "Overlap",
    "RandScores",
    "Scores",
    "TuneResult",
    "contingency",
    "evaluate",
    "rand_scores",
    "tune_threshold",
]
