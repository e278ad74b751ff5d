"""SwinUNETR (Hatamizadeh et al., "Swin UNETR", arXiv:2201.01266) for affinities: MONAI's network, any image size."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..errors import MissingDependency, ValueRangeError
from .build import SEGMENTERS
from .levels import pad_to_multiple

#: The network halves its image five times; the coarsest level needs more than one voxel to normalise over.
MULTIPLE = (32, 32, 32)
LEAST = (32, 64, 64)


@SEGMENTERS.register("swin_unetr")
class SwinUNETRSegmenter(nn.Module):
    """Shifted-window transformer encoder with a convolutional decoder.

    Parameters
    ----------
    in_channels, out_channels : int
        1 image in, 3 affinity channels (z, y, x) out.
    feature_size : int
        Channels of the first stage, a multiple of 12: 12, 24 and 48 give 4.1, 15.7 and 62.2 million parameters.
    checkpointing : bool
        Recompute the transformer's activations in the backward pass: less memory, a third more time.

    Raises
    ------
    ValueRangeError
        If `feature_size` is not a positive multiple of 12.
    MissingDependency
        If MONAI is not installed.

    Notes
    -----
    Every axis is padded to a multiple of 32, z of a thin stack too: a stack of 16 sections costs as much as one of 32.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 3, feature_size: int = 24, checkpointing: bool = False
    ) -> None:
        super().__init__()
        if feature_size < 1 or feature_size % 12:
            raise ValueRangeError(f"SwinUNETR needs a feature_size that is a multiple of 12. Got {feature_size}.")
        try:
            from monai.networks.nets import SwinUNETR
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "The segmenter 'swin_unetr' needs MONAI: pip install connectomics_neurodiff[segmenters]"
            ) from error
        meta = torch.empty(0).device.type == "meta"
        with torch.device("cpu") if meta else nullcontext():  # MONAI reads numbers of tensors, which "meta" has not
            self.network = SwinUNETR(in_channels, out_channels, feature_size=feature_size, use_checkpoint=checkpointing)

    def forward(self, image: Tensor) -> Tensor:
        """Affinity logits.

        Parameters
        ----------
        image : torch.Tensor
            (b, in_channels, z, y, x), values in [0, 1]; any size.

        Returns
        -------
        torch.Tensor
            (b, out_channels, z, y, x) logits.
        """
        z, y, x = image.shape[2:]
        logits: Tensor = self.network(pad_to_multiple(image, MULTIPLE, LEAST))
        return logits[:, :, :z, :y, :x]
