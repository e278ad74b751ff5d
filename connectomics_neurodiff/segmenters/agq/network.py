"""AGQ, neuron segmentation by affinity-guided queries (Chen, Tang, Li, Hu; ICLR 2025).

A residual U-Net predicts affinities; their connected components, and a set of learned embeddings, become queries; a
small decoder turns each query into the mask of one neuron. Labels come straight from the masks, without a watershed.
As its affinities are those of any other segmenter here, they serve waterz and multicut too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ShapeMismatch, ValueRangeError
from ...libraries import waterz
from ..build import SEGMENTERS
from ..levels import Size, check_image, level_factors
from .backbone import IN_PLANE, ISOTROPIC, Backbone, Fusion, conv, conv_norm_elu, with_coordinates
from .decoder import QueryDecoder
from .labelling import enlarge, labels_from_masks
from .queries import component_masks, guided_queries, padded_queries

#: Feature maps per level as published, finest first.
PAPER_FILTERS = (32, 64, 96, 128, 160)
#: Steps between levels, from the finest, that leave z alone as published.
_STEPS_IN_PLANE = 2

_BRANCH_DEPTH = 4
#: Affinities that waterz takes, one per axis.
_AXES = 3


@dataclass(frozen=True)
class InstancePrediction:
    """What the network says about a batch; z', y', x' is its working grid, the second level of the backbone.

    Attributes
    ----------
    affinity : torch.Tensor
        (b, 3, z, y, x) logits at full resolution.
    masks, backgrounds : list of torch.Tensor
        Per stage the logits of the queries (b, q, z', y', x'), -inf for padding, and of the background (b, 1, z', y',
        x'). A softmax over both gives the probabilities.
    valid : torch.Tensor
        (b, q) bool: which queries a sample has. The learned ones come first.
    features : torch.Tensor
        (b, c, z', y', x') mask features of unit length.
    stride : tuple of 3 ints
        Grid point i lies on voxel stride * i. The grid covers the image and may reach beyond its far ends, by less than
        one stride unless the image is a single voxel wide.
    """

    affinity: Tensor
    masks: list[Tensor]
    backgrounds: list[Tensor]
    valid: Tensor
    features: Tensor
    stride: Size


class Branch(nn.Sequential):
    """Convolutions of `width` channels, each with group normalisation and ELU, and a 1x1x1 convolution at the end."""

    def __init__(self, in_channels: int, width: int, out_channels: int, kernel: Size, bias: bool) -> None:
        inputs = [in_channels] + [width] * (_BRANCH_DEPTH - 1)
        super().__init__(
            *(conv_norm_elu(channels, width, kernel) for channels in inputs),
            conv(width, out_channels, (1, 1, 1), bias=bias),
        )


class InstanceBranch(nn.Sequential):
    """Convolutions in the plane, each with batch normalisation and ReLU."""

    def __init__(self, in_channels: int, width: int) -> None:
        inputs = [in_channels] + [width] * (_BRANCH_DEPTH - 1)
        layers = [(conv(channels, width, IN_PLANE), nn.BatchNorm3d(width), nn.ReLU()) for channels in inputs]
        super().__init__(*(part for layer in layers for part in layer))


class PositionCode(nn.Module):
    """Adds random Fourier features of the position (Rahimi and Recht, NeurIPS 2007); nothing is learnt.

    The product of two positions' codes is a Gaussian of their distance d, c / 2 exp(-d^2 / 2 length^2) on average over
    the fixed frequencies: it depends neither on the origin nor on the size of a crop.

    Parameters
    ----------
    width : int
        Channels; even.
    length : float
        Standard deviation in voxels, > 0.
    stride : tuple of 3 ints
        Voxels per step of the grid, (z, y, x).
    """

    frequencies: Tensor

    def __init__(self, width: int, length: float, stride: Size) -> None:
        super().__init__()
        # Drawn apart from the global generator: the same code in every network of this width.
        drawn = torch.randn(width // 2, 3, generator=torch.Generator().manual_seed(0), device="cpu")
        per_step = drawn * torch.tensor(stride, dtype=torch.float32, device="cpu") / length
        self.register_buffer("frequencies", per_step)

    def forward(self, features: Tensor) -> Tensor:
        """Features (b, width, z, y, x) with the code added, float32."""
        axes = [torch.arange(n, device=features.device, dtype=torch.float32) for n in features.shape[2:]]
        with torch.autocast(features.device.type, enabled=False):
            phase = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ self.frequencies.t()
            code = torch.cat([phase.sin(), phase.cos()], dim=-1)
            return features.float() + code.permute(3, 0, 1, 2)


@SEGMENTERS.register("agq")
class AGQ(nn.Module):
    """Neuron masks from affinity-guided and learned queries.

    Parameters
    ----------
    in_channels, out_channels : int
        1 image in, 3 affinity channels (z, y, x) out. With the defaults the network has 4,743,919 parameters.
    filters : sequence of int
        Feature maps per level of the backbone, finest first; at least two levels. Empty means those of the paper.
    z_pool : sequence of bool
        For each of the ``len(filters) - 1`` steps between levels whether z is halved too; y and x always are. Empty
        means all but the first two, as published.
    width : int
        Channels of the heads, the features and the queries.
    learned_queries : int
        Learned embeddings, >= 2. With one, batch normalisation would see a single value in a volume without components.
    guided_queries : int
        Most components of the affinities that become queries, >= 0. Of more, the largest are taken, or in training,
        given generators, a random choice.
    smallest_component : int
        Components of this many voxels of the working grid or fewer make no query.
    iterations : int
        Refinements in the decoder, >= 0.
    heads : int
        Attention heads; a divisor of `width`.
    centred : bool
        Whether mask features are centred and scaled per channel, by the statistics of training, before they get unit
        length. Off as published: early in training all of them then turn to one direction (a mean cosine of .93 to .98
        with their mean was measured after 100 iterations), and masks differ between queries but not between voxels.
    component_prior : float
        Logit by which a guided query prefers the component it comes from at the start of training, >= 0. 0 as
        published: a query then has to find its component again by the features alone, which takes long training.
    position_length : float
        Length in voxels, >= 1, over which the position code decays that mask and instance features get added, or 0 for
        none, as published (:class:`PositionCode`). Neurons far apart in a crop then differ from the first iteration on.
    component_threshold : float
        Above 0: components come from waterz at this threshold, in (0, 1] (:func:`.agglomerated_components`), in place
        of connected ones. 0 as published: then one gap in a membrane makes one query of two neurons.
    coordinates : bool
        Whether the heads see where in the block a voxel lies, each axis from -1 to 1, as published. A network that does
        is at home in blocks of its training's size only.

    Raises
    ------
    ValueRangeError
        If a number is too small, `z_pool` has another length, `heads` does not divide `width`, `width` is odd and there
        is a position code, `component_threshold` is above 1, or above 0 without three affinities.
    MissingDependency
        If waterz is needed and not installed.

    Notes
    -----
    Convolutions followed by a normalisation have no bias, nor have the linear ones of the fusion. Sizes are padded
    inside, by replication, to what the strides divide evenly, and the heads see no more than the image.

    References
    ----------
    Chen, Tang, Li, Hu. Efficient Neuron Segmentation in Electron Microscopy by Affinity-Guided Queries. ICLR 2025.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        filters: Sequence[int] = (),
        z_pool: Sequence[bool] = (),
        width: int = 64,
        learned_queries: int = 100,
        guided_queries: int = 100,
        smallest_component: int = 100,
        iterations: int = 2,
        heads: int = 8,
        centred: bool = False,
        component_prior: float = 0.0,
        position_length: float = 0.0,
        component_threshold: float = 0.0,
        coordinates: bool = True,
    ) -> None:
        super().__init__()
        filters = list(filters) or list(PAPER_FILTERS)
        halve_z = list(z_pool) or [step >= _STEPS_IN_PLANE for step in range(len(filters) - 1)]
        strides = level_factors("AGQ", filters, halve_z, least=2, step="step between levels")
        _check_least(
            width=(width, 1),
            learned_queries=(learned_queries, 2),
            guided_queries=(guided_queries, 0),
            smallest_component=(smallest_component, 0),
            iterations=(iterations, 0),
            heads=(heads, 1),
            component_prior=(component_prior, 0),
            position_length=(position_length, 0),
            component_threshold=(component_threshold, 0),
        )
        if component_threshold > 1:
            raise ValueRangeError(f"AGQ needs component_threshold <= 1. Got {component_threshold}.")
        if component_threshold > 0 and out_channels != _AXES:
            raise ValueRangeError(f"AGQ needs out_channels = 3 for component_threshold > 0. Got {out_channels}.")
        if width % heads:
            raise ValueRangeError(f"AGQ needs a number of heads that divides its width of {width}. Got {heads}.")
        if 0 < position_length < 1:
            # Neighbours on the grid would have nothing in common; far below, the phase overflows.
            raise ValueRangeError(f"AGQ needs position_length = 0, or at least 1 voxel. Got {position_length}.")
        if position_length > 0 and width % 2:
            raise ValueRangeError(f"The position code needs an even width. Got {width}.")
        self.in_channels = in_channels
        #: Spacing of the working grid in voxels, (z, y, x).
        self.stride = strides[0]
        self.reach = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
        self.most_components = guided_queries
        self.smallest_component = smallest_component
        self.component_threshold = component_threshold
        if component_threshold > 0:
            waterz()  # told now rather than at the first image
        self.coordinates = coordinates
        self.backbone = Backbone(in_channels, filters, strides)
        self.fusion = Fusion(filters, width, self.stride)
        shared = width + (3 if coordinates else 0)
        self.affinity_branch = Branch(shared, width, out_channels, ISOTROPIC, bias=True)
        self.mask_branch = Branch(shared, width, width, IN_PLANE, bias=False)
        self.centre: nn.Module = nn.BatchNorm3d(width, affine=False) if centred else nn.Identity()
        self.instance_branch = InstanceBranch(shared, width)
        self.learned = nn.Embedding(learned_queries, width)
        self.position: nn.Module = (
            PositionCode(width, position_length, self.stride) if position_length > 0 else nn.Identity()
        )
        self.decoder = QueryDecoder(width, iterations, heads, component_prior)

    def forward(self, image: Tensor) -> Tensor:
        """Affinity logits alone, as from any other segmenter.

        Parameters
        ----------
        image : torch.Tensor
            (b, in_channels, z, y, x), values in [0, 1]; any size.

        Returns
        -------
        torch.Tensor
            (b, out_channels, z, y, x) logits; the edge (v-1, v) at v.
        """
        return self._enlarged(self.affinity_branch(self._features(image)), image)

    def deepest_features(self, image: Tensor) -> Tensor:
        """Features (b, filters[-1], z', y', x') of the coarsest level, of an image as :meth:`forward` takes it."""
        check_image(image, self.in_channels)
        return self.backbone.encode(self._pad(2 * image - 1))[-1]

    def predict_instances(self, image: Tensor, rngs: Sequence[np.random.Generator] | None = None) -> InstancePrediction:
        """Affinities and the masks of all stages.

        Parameters
        ----------
        image : torch.Tensor
            (b, in_channels, z, y, x), values in [0, 1]; any size.
        rngs : sequence of numpy.random.Generator, optional
            One per sample. In training mode they choose among the components where there are more than
            `guided_queries`; without them, and always in evaluation mode, the largest are taken.

        Raises
        ------
        ShapeMismatch
            If there is not one generator per sample.
        """
        if rngs is not None and len(rngs) != len(image):
            raise ShapeMismatch(f"{len(image)} samples need as many generators. Got {len(rngs)}.")
        affinity, mask_features, instance_features, guided = self._evidence(image, rngs if self.training else None)
        queries, valid = padded_queries(self.learned.weight, [own for own, _ in guided])
        components = None
        if self.decoder.prior is not None:
            learned = self.learned.num_embeddings
            components = component_masks([parts for _, parts in guided], valid, learned, mask_features.dtype)
        masks, backgrounds = self.decoder(queries, valid, mask_features, instance_features, components)
        return InstancePrediction(
            self._enlarged(affinity, image), masks, backgrounds, valid, mask_features, self.stride
        )

    @torch.no_grad()
    def segment(self, image: Tensor, smallest_area: float = 40.0) -> Tensor:
        """Labels of the neurons; the same bits on every call.

        Parameters
        ----------
        image : torch.Tensor
            (b, in_channels, z, y, x), values in [0, 1]; any size.
        smallest_area : float
            Masks whose probabilities sum to less, in voxels of the working grid, are dropped, >= 0.

        Returns
        -------
        torch.Tensor
            (b, z, y, x) int64: 0 is background; the numbers of one sample have nothing to do with those of another.

        Raises
        ------
        ValueRangeError
            If `smallest_area` is below 0, or the network's output not finite.

        Notes
        -----
        Computed in evaluation mode; the network's own mode is restored. Queries and their masks are computed in float32
        under autocast, too.
        """
        _check_least(smallest_area=(smallest_area, 0))
        was_training = self.training
        self.eval()
        try:
            affinity, mask_features, instance_features, guided = self._evidence(image)
            if not torch.isfinite(affinity).all():  # their components would be none, and no query guided
                raise ValueRangeError(
                    "The network's affinities must be finite. Got NaN or infinity: its training has diverged."
                )
            learned, labels = self.learned.weight, []
            z, y, x = image.shape[2:]
            with torch.autocast(image.device.type, enabled=False):
                for (own, numbers), of_masks, of_instances in zip(
                    guided, mask_features, instance_features, strict=True
                ):
                    queries = torch.cat([learned, own.to(learned.dtype)])
                    components = torch.where(numbers > 0, numbers - 1 + len(learned), -1)
                    masks = self.decoder.last_masks(queries, of_masks, of_instances, components)
                    labels.append(labels_from_masks(masks, self.stride, (z, y, x), smallest_area))
        finally:
            self.train(was_training)
        return torch.stack(labels)

    def _evidence(
        self, image: Tensor, rngs: Sequence[np.random.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """What masks are made from, on the working grid: affinity logits, mask features, instance features, and each
        sample's queries with the numbers of their components."""
        shared = self._features(image)
        affinity = self.affinity_branch(shared)
        mask_features = functional.normalize(self.position(self.centre(self.mask_branch(shared))), dim=1)
        instance_features = self.position(self.instance_branch(shared))
        guided = guided_queries(
            affinity.float().sigmoid(),
            instance_features,
            smallest=self.smallest_component,
            most=self.most_components,
            threshold=self.component_threshold,
            rngs=rngs,
        )
        return affinity, mask_features, instance_features, guided

    def _features(self, image: Tensor) -> Tensor:
        """Fused features (b, width, z', y', x') on the working grid, and three coordinates if there are any."""
        check_image(image, self.in_channels)
        fused = self.fusion(self.backbone(self._pad(2 * image - 1)))
        z, y, x = (-(-(n - 1) // step) + 1 for n, step in zip(image.shape[2:], self.stride, strict=True))
        # At least two in the plane, or there is nothing to normalise over.
        fused = fused[..., :z, : max(y, 2), : max(x, 2)]
        return with_coordinates(fused) if self.coordinates else fused

    def _pad(self, image: Tensor) -> Tensor:
        """Replicate the far border up to a multiple of the coarsest level's spacing, plus one."""
        z, y, x = (-(n - 1) % reach for n, reach in zip(image.shape[2:], self.reach, strict=True))
        # In the plane the coarsest level needs more than one voxel, or there is nothing to normalise over.
        y, x = (max(gap, self.reach[1] + 1 - n) for gap, n in zip((y, x), image.shape[3:], strict=True))
        return functional.pad(image, (0, x, 0, y, 0, z), mode="replicate")

    def _enlarged(self, values: Tensor, image: Tensor) -> Tensor:
        z, y, x = image.shape[2:]
        return enlarge(values, self.stride, (z, y, x))


def _check_least(**counts: tuple[float, int]) -> None:
    """Refuse a value below its lower bound; each argument is (value, bound)."""
    for name, (value, least) in counts.items():
        if not least <= value < math.inf:
            raise ValueRangeError(f"AGQ needs {name} >= {least}. Got {value}.")
