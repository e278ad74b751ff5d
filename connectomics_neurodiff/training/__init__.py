"""Room 7, training: patches of real and synthetic volumes with their affinities, augmentations, and the loss."""

from .augmentation import AugmentOptions
from .losses import affinity_loss, weighted_bce
from .patches import AffinityPatches

__all__ = ["AffinityPatches", "AugmentOptions", "affinity_loss", "weighted_bce"]
