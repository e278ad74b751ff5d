"""Room 4, synthesis: EM images painted onto masks by a conditional diffusion model.

Losses (:mod:`.losses`), samplers (:mod:`.samplers`) and networks (:mod:`.nets`) do not know each other; they share the
process (:mod:`.process`) at most. :mod:`.crops` feeds the training, :mod:`.synthesise` paints volumes of any size.
"""

from .crops import DiffusionCrops
from .losses import VariationalBound, min_snr_weight, noise_loss
from .nets import SYNTHESISERS, build_denoiser, selective_scan
from .process import DiffusionProcess, cosine_betas
from .samplers import SAMPLERS, SamplerState, sample_ddim, sample_ddpm, sample_dpmpp
from .synthesise import denoiser_from_checkpoint, synthesise

__all__ = [
    "SAMPLERS",
    "SYNTHESISERS",
    "DiffusionCrops",
    "DiffusionProcess",
    "SamplerState",
    "VariationalBound",
    "build_denoiser",
    "cosine_betas",
    "denoiser_from_checkpoint",
    "min_snr_weight",
    "noise_loss",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp",
    "selective_scan",
    "synthesise",
]
