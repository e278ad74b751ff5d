"""Room 7, training: patches of real and synthetic volumes with their affinities, augmentations, and the loss."""

from .agq import AGQLossWeights, InstancePatches, agq_loss
from .augmentation import AugmentOptions
from .auxiliary import AuxiliaryTargets
from .losses import affinity_loss, weighted_bce
from .patches import AffinityPatches

__all__ = [
    "AGQLossWeights",
    "AffinityPatches",
    "AugmentOptions",
    "AuxiliaryTargets",
    "InstancePatches",
    "affinity_loss",
    "agq_loss",
    "weighted_bce",
]
