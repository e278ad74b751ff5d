"""Networks of the synthesis room: the NeuroDiff denoiser and the selective scan it is built on."""

from .build import SYNTHESISERS, build_denoiser
from .mamba import Mamba
from .neurodiff import NeuroDiffDenoiser
from .options import PRESETS, DenoiserOptions
from .scan import selective_scan

__all__ = [
    "PRESETS",
    "SYNTHESISERS",
    "DenoiserOptions",
    "Mamba",
    "NeuroDiffDenoiser",
    "build_denoiser",
    "selective_scan",
]
