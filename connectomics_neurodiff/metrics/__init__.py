"""Room 10: how good a segmentation and a synthetic image are, and which threshold to choose.

``evaluate`` gives variation of information (bits, split and merge by name) and the adapted Rand error of SNEMI3D,
``evaluate_columns`` the same in parts of a volume, so that a difference comes with an error;
``tune_threshold`` picks a threshold on the tune split. ``fid3d`` tells how far synthetic volumes are from a real one,
``seams`` whether the tiles they were painted in show.
"""

from .boundaries import boundary_precision
from .columns import column_slices, columns_of, evaluate_columns, paired_difference
from .fid3d import FID3D, fid3d, patch_features
from .frechet import bootstrap_interval, frechet_distance
from .overlap import Overlap, RandScores, Scores, contingency, evaluate, rand_scores
from .seams import Seams, even_inside, seams, tile_borders
from .tuning import CRITERIA, TuneResult, tune_threshold

__all__ = [
    "CRITERIA",
    "FID3D",
    "Overlap",
    "RandScores",
    "Scores",
    "Seams",
    "TuneResult",
    "bootstrap_interval",
    "boundary_precision",
    "column_slices",
    "columns_of",
    "contingency",
    "evaluate",
    "evaluate_columns",
    "even_inside",
    "fid3d",
    "frechet_distance",
    "paired_difference",
    "patch_features",
    "rand_scores",
    "seams",
    "tile_borders",
    "tune_threshold",
]
