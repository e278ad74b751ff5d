"""Room 6, segmenters: networks that turn an image into affinities. Chosen by one name; logits out, any image size."""

from .build import SEGMENTERS, build_segmenter, segmenter_from_checkpoint
from .superhuman import Superhuman

__all__ = ["SEGMENTERS", "Superhuman", "build_segmenter", "segmenter_from_checkpoint"]
