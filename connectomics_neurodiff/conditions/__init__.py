"""Room 2: labels (and mitochondria) -> membrane -> the condition the diffusion model paints onto."""

from .dark_bodies import dark_bodies, with_dark_bodies
from .encoding import DARK_LEVEL, NULL_CONDITION, OrganelleMask, check_masks, encode_condition, organelles
from .measures import distance_inside, smoothed
from .membrane import MOST_THICKNESS_NM, BackgroundMask, membrane_from_labels, membrane_halo, with_background

__all__ = [
    "DARK_LEVEL",
    "MOST_THICKNESS_NM",
    "NULL_CONDITION",
    "BackgroundMask",
    "OrganelleMask",
    "check_masks",
    "dark_bodies",
    "distance_inside",
    "encode_condition",
    "membrane_from_labels",
    "membrane_halo",
    "organelles",
    "smoothed",
    "with_background",
    "with_dark_bodies",
]
