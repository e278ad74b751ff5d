"""Room 10: how good a segmentation and a synthetic image are, and which threshold to choose.

``evaluate`` gives variation of information (bits, split and merge by name) and the adapted Rand error of SNEMI3D;
``tune_threshold`` picks a threshold on the tune split; ``seams`` tells whether tiles show in a synthetic image.
"""

from .overlap import Overlap, RandScores, Scores, contingency, evaluate, rand_scores
from .seams import Seams, seams, tile_borders
from .tuning import CRITERIA, TuneResult, tune_threshold

__all__ = [
    "CRITERIA",
    "Overlap",
    "RandScores",
    "Scores",
    "Seams",
    "TuneResult",
    "contingency",
    "evaluate",
    "rand_scores",
    "seams",
    "tile_borders",
    "tune_threshold",
]
