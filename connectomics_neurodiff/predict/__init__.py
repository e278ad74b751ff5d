"""Room 8, predict: a trained segmenter and an image of any size give affinities."""

from .affinities import check_values, predict_affinities

__all__ = ["check_values", "predict_affinities"]
