"""Room 6, segmenters: networks that turn an image into affinities. Chosen by one name; logits out, any image size."""

from .agq import AGQ
from .build import SEGMENTERS, build_segmenter, options_of, segmenter_from_checkpoint
from .seg_mamba import SegMamba
from .superhuman import Superhuman
from .swin_unetr import SwinUNETRSegmenter

__all__ = [
    "AGQ",
    "SEGMENTERS",
    "SegMamba",
    "Superhuman",
    "SwinUNETRSegmenter",
    "build_segmenter",
    "options_of",
    "segmenter_from_checkpoint",
]
