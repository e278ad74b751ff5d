"""Room 6, segmenters: networks that turn an image into affinities. Chosen by one name; logits out, any image size."""

from .agq import AGQ
from .build import SEGMENTERS, Encoder, build_segmenter, encoder_of, options_of, segmenter_from_checkpoint
from .seg_mamba import SegMamba
from .superhuman import Superhuman
from .swin_unetr import SwinUNETRSegmenter

__all__ = [
    "AGQ",
    "SEGMENTERS",
    "Encoder",
    "SegMamba",
    "Superhuman",
    "SwinUNETRSegmenter",
    "build_segmenter",
    "encoder_of",
    "options_of",
    "segmenter_from_checkpoint",
]
