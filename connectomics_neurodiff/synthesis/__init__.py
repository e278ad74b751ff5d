"""Room 4, synthesis: EM images painted onto masks by a conditional diffusion model.

Losses (:mod:`.losses`), samplers (:mod:`.samplers`) and networks (:mod:`.nets`) do not know each other; they share the
process (:mod:`.process`) at most. :mod:`.crops` feeds the training, :mod:`.synthesise` paints volumes of any size.
"""

from .crops import DiffusionCrops
from .grey import GreyScale, grey_scale_for, grey_scale_of, recorded_scales
from .guidance import DEFAULT_GUIDANCE, GUIDED_LEVEL, GuidedDenoiser, guided
from .losses import VariationalBound, min_snr_weight, noise_loss, velocity_weight
from .nets import SYNTHESISERS, build_denoiser, selective_scan
from .process import DiffusionProcess, cosine_betas
from .samplers import SAMPLERS, Sampler, Step, sampler_steps
from .suitability import require_fitting_tile, tile_bytes, warn_of_voxel_size, warn_of_what_is_dark
from .synthesise import DEFAULT_MARGIN, denoiser_from_checkpoint, synthesise
from .working_arrays import discard_scratch

__all__ = [
    "DEFAULT_GUIDANCE",
    "DEFAULT_MARGIN",
    "GUIDED_LEVEL",
    "SAMPLERS",
    "SYNTHESISERS",
    "DiffusionCrops",
    "DiffusionProcess",
    "GreyScale",
    "GuidedDenoiser",
    "Sampler",
    "Step",
    "VariationalBound",
    "build_denoiser",
    "cosine_betas",
    "denoiser_from_checkpoint",
    "discard_scratch",
    "grey_scale_for",
    "grey_scale_of",
    "guided",
    "min_snr_weight",
    "noise_loss",
    "recorded_scales",
    "require_fitting_tile",
    "sampler_steps",
    "selective_scan",
    "synthesise",
    "tile_bytes",
    "velocity_weight",
    "warn_of_voxel_size",
    "warn_of_what_is_dark",
]
