"""SwinUNETR (Hatamizadeh et al., "Swin UNETR", arXiv:2201.01266) for affinities: MONAI's network, any image size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..errors import MissingDependency, ValueRangeError
from .build import SEGMENTERS
from .levels import check_image, pad_to_multiple

#: The network halves its image this often.
HALVINGS = 5


@SEGMENTERS.register("swin_unetr")
class SwinUNETRSegmenter(nn.Module):
    """Shifted-window transformer encoder with a convolutional decoder.

    Parameters
    ----------
    in_channels, out_channels : int
        1 image in, 3 affinity channels (z, y, x) out.
    feature_size : int
        Channels of the first stage, a multiple of 12: 12, 24 and 48 give 4.1, 15.7 and 62.2 million parameters.
    z_pool : sequence of bool
        For each of the five halvings whether z is halved too; empty: always, as published. Only the first may leave z
        as it is, for thin stacks: with ``[False, True, True, True, True]`` z is padded to 16, not 32, sections.
    checkpointing : bool
        Recompute the transformer's activations in the backward pass: less memory, a third more time.

    Raises
    ------
    ValueRangeError
        If `feature_size` is not a positive multiple of 12, or `z_pool` another than these.
    MissingDependency
        If MONAI is not installed.

    Notes
    -----
    Every axis is padded to a multiple of 32, z of a thin stack too: a stack of 16 sections costs as much as one of 32
    unless `z_pool` says otherwise.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        feature_size: int = 24,
        z_pool: Sequence[bool] = (),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        halve_z = list(z_pool) or [True] * HALVINGS
        if len(halve_z) != HALVINGS or not all(halve_z[1:]):
            raise ValueRangeError(
                f"SwinUNETR halves z {HALVINGS} times; of z_pool's {HALVINGS} entries only the first may be false. "
                f"Got {list(z_pool)}."
            )
        if feature_size < 1 or feature_size % 12:
            raise ValueRangeError(f"SwinUNETR needs a feature_size that is a multiple of 12. Got {feature_size}.")
        try:
            from monai.networks.blocks import UnetrUpBlock
            from monai.networks.nets import SwinUNETR
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "The segmenter 'swin_unetr' needs MONAI: pip install -c constraints.txt '.[segmenters]'"
            ) from error
        self.in_channels = in_channels
        first = (2 if halve_z[0] else 1, 2, 2)
        #: Sizes that need no padding are multiples of this, (z, y, x).
        self.multiple = tuple(step * 2 ** (HALVINGS - 1) for step in first)
        #: The coarsest level needs more than one voxel to normalise over.
        self.least = (self.multiple[0], 2 * self.multiple[1], 2 * self.multiple[2])
        meta = torch.empty(0).device.type == "meta"
        with torch.device("cpu") if meta else nullcontext():  # MONAI reads numbers of tensors, which "meta" has not
            self.network = SwinUNETR(
                in_channels,
                out_channels,
                patch_size=first,  # type: ignore[arg-type]
                feature_size=feature_size,
                use_checkpoint=checkpointing,
            )
            if not halve_z[0]:
                # MONAI's last upsampling doubles every axis, whatever the patch size.
                self.network.decoder1 = UnetrUpBlock(
                    spatial_dims=3,
                    in_channels=feature_size,
                    out_channels=feature_size,
                    kernel_size=3,
                    upsample_kernel_size=first,
                    norm_name="instance",
                    res_block=True,
                )

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
        check_image(image, self.in_channels)
        z, y, x = image.shape[2:]
        logits: Tensor = self.network(pad_to_multiple(image, self.multiple, self.least))
        return logits[:, :, :z, :y, :x]

    def deepest_features(self, image: Tensor) -> Tensor:
        """Features (b, 16 feature_size, z', y', x') of the coarsest level, of an image as :meth:`forward` takes it."""
        check_image(image, self.in_channels)
        padded = pad_to_multiple(image, self.multiple, self.least)
        coarsest = self.network.swinViT(padded, self.network.normalize)[-1]
        features: Tensor = self.network.encoder10(coarsest)
        return features
