"""Room 8, predict: a trained segmenter and an image of any size give affinities."""

from .affinities import predict_affinities

__all__ = ["predict_affinities"]
