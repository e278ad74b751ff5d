"""Training of AGQ: instance targets, the matching of queries to neurons, and the loss (Chen et al., ICLR 2025).

Glossary: q queries, k neurons of a sample, v voxels of the network's working grid (every second voxel in the plane).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..affinities import affinities_from_labels
from ..errors import ShapeMismatch, ValueRangeError
from ..seeding import rng_for
from ..segmenters.agq import AGQ, InstancePrediction
from ..volume import Volume
from .augmentation import AugmentOptions, augment
from .losses import weighted_bce
from .patches import DEFAULT_AUGMENTATION, AffinityPatches, erode_contacts, known_edges

#: Keeps the Dice of a mask that is empty on both sides defined.
_DICE_EPSILON = 1e-4


@dataclass(frozen=True)
class AGQLossWeights:
    """Weights of the loss terms, each >= 0; the defaults are the published ones.

    Attributes
    ----------
    dice, cross_entropy : float
        Of every stage of the decoder.
    pixel_discrimination, affinity : float
        Counted once.
    """

    dice: float = 3.0
    cross_entropy: float = 0.3
    pixel_discrimination: float = 0.1
    affinity: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueRangeError(f"The weight of '{name}' must be >= 0. Got {value}.")


DEFAULT_WEIGHTS = AGQLossWeights()


def instance_labels(label: np.ndarray, *, erosion: int = 1, in_plane: bool = True) -> np.ndarray:
    """Neurons of a crop as separate instances: a neuron that enters it twice is two.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) unsigned integers, 0 = background.
    erosion : int
        Voxels by which neurons in contact lose to background first (:func:`.erode_contacts`), >= 0.
    in_plane : bool
        Whether the erosion treats sections one by one.

    Returns
    -------
    numpy.ndarray
        (z, y, x) int64: 0, or 1..n, each one 26-connected.
    """
    import cc3d

    # cc3d 4.1 misreads views.
    eroded = np.ascontiguousarray(erode_contacts(label, erosion, in_plane=in_plane))
    return cc3d.connected_components(eroded, connectivity=26).astype(np.int64)


class InstancePatches(AffinityPatches):
    """Endless training patches for AGQ; item i is a pure function of (seed, i).

    Parameters
    ----------
    real, synthetic, patch, seed, ratio, synthetic_until, augment
        As for :class:`.AffinityPatches`.
    label_erosion : int
        As there, but 1 by default, as published.
    """

    def __init__(
        self,
        real: Sequence[Volume],
        synthetic: Sequence[Volume],
        *,
        patch: Sequence[int],
        seed: int,
        ratio: float,
        synthetic_until: int | None = None,
        augment: AugmentOptions = DEFAULT_AUGMENTATION,
        label_erosion: int = 1,
    ) -> None:
        super().__init__(
            real,
            synthetic,
            patch=patch,
            seed=seed,
            ratio=ratio,
            synthetic_until=synthetic_until,
            augment=augment,
            label_erosion=label_erosion,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` >= 0.

        Returns
        -------
        dict
            image (1, z, y, x) float32 in [0, 1]; affinity and weight (3, z, y, x) float32, the weight 1 on edges with
            both ends annotated, else 0; instances (z, y, x) int64; known (z, y, x) bool, where the label is annotated;
            number, the index.
        """
        rng = rng_for(self.seed, "affinity patch", index)
        image, label, known = augment(*self._draw(index, rng), rng, self.augment)
        return {
            "image": np.array(image[None, 1:, 1:, 1:], order="C"),
            "affinity": affinities_from_labels(label)[:, 1:, 1:, 1:].astype(np.float32),
            "weight": known_edges(known)[:, 1:, 1:, 1:].astype(np.float32),
            "instances": instance_labels(label[1:, 1:, 1:], erosion=0),
            "known": np.array(known[1:, 1:, 1:], order="C"),
            "number": index,
        }


def match_queries(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one matching of queries to neurons with the largest sum of Dice coefficients (Hungarian method).

    Parameters
    ----------
    probabilities : torch.Tensor
        (q, v) in [0, 1].
    targets : torch.Tensor
        (k, v), 0 or 1.

    Returns
    -------
    queries, neurons : torch.Tensor
        Two index vectors of length min(q, k), of equal device; query ``queries[i]`` belongs to neuron ``neurons[i]``.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        area = probabilities.square().sum(1)[:, None] + targets.square().sum(1)
        dice = 2 * (probabilities @ targets.t()) / (area + _DICE_EPSILON)
    # After a divergence the loss is NaN whatever the matching; the engine says so, rather than scipy.
    queries, neurons = linear_sum_assignment(dice.nan_to_num().cpu().numpy(), maximize=True)
    return torch.from_numpy(queries).to(targets.device), torch.from_numpy(neurons).to(targets.device)


def dice_of_pairs(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - 2 sum(p t) / (sum p^2 + sum t^2) over pairs (k, v); 0 without any (Milletari et al. 2016)."""
    if len(targets) == 0:
        return probabilities.new_zeros(())
    area = probabilities.square().sum(1) + targets.square().sum(1)
    return (1 - 2 * (probabilities * targets).sum(1) / (area + _DICE_EPSILON)).mean()


def pixel_discrimination(
    features: Tensor, instances: Tensor, rng: np.random.Generator, *, pixels: int = 4096, temperature: float = 0.3
) -> Tensor:
    """Contrast of voxels: alike within a neuron, unlike between neurons (after Wang et al., MaX-DeepLab, CVPR 2021).

    Of voxels drawn at random from the foreground, each is to be most similar to those of its own neuron: the
    cross-entropy of softmax_j(f_i . f_j / temperature) with the even distribution over the j of the neuron of i.

    Parameters
    ----------
    features : torch.Tensor
        (c, v), of unit length over c.
    instances : torch.Tensor
        (v,) integers, 0 = background.
    rng : numpy.random.Generator
        Draws the voxels.
    pixels : int
        How many, at most.
    temperature : float
        > 0.

    Returns
    -------
    torch.Tensor
        Scalar, nats; 0 without foreground.
    """
    foreground = instances.nonzero()[:, 0]
    if len(foreground) == 0:
        return features.new_zeros(())
    if len(foreground) > pixels:
        chosen = rng.choice(len(foreground), pixels, replace=False)
        foreground = foreground[torch.from_numpy(chosen).to(foreground.device)]
    drawn, of = features[:, foreground].t(), instances[foreground].unique(return_inverse=True)[1]
    # The mean of f_i . f_j over a neuron is f_i . (mean of f_j): only the softmax's sum needs all pairs.
    neuron = functional.one_hot(of).to(drawn.dtype)
    means = (neuron.t() @ drawn) / neuron.sum(0)[:, None]
    own = (drawn * (neuron @ means)).sum(1) / temperature
    return ((drawn / temperature @ drawn.t()).logsumexp(dim=1) - own).mean()


def agq_loss(
    network: nn.Module,
    batch: dict[str, Tensor],
    *,
    seed: int = 0,
    weights: AGQLossWeights = DEFAULT_WEIGHTS,
    pixels: int = 4096,
    temperature: float = 0.3,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of AGQ on a batch of :class:`InstancePatches`, in the form that ``engine.fit`` takes.

    Queries are matched to neurons once, on the masks of the first stage; the matching holds for all stages. Every
    stage pays Dice over its matched pairs and cross-entropy over all voxels, each voxel's class being the query of its
    neuron, or the background. With more neurons than queries, the neurons left over count as nothing: their voxels
    take no part, just as those that are not annotated. Computed in float32 whatever the precision of the network.

    Parameters
    ----------
    network : AGQ
        In training mode, usually.
    batch : dict
        image, affinity, weight, instances, known and number, each with a leading batch axis.
    seed : int
        With a sample's number, decides which components become queries and which voxels are contrasted.
    weights : AGQLossWeights
        Weights of the terms.
    pixels, temperature
        As for :func:`pixel_discrimination`.

    Returns
    -------
    loss : torch.Tensor
        Scalar; mean over samples. Finite also where nothing is labelled.
    logs : dict
        ``"dice"`` and ``"cross_entropy"`` summed over stages, ``"pixel_discrimination"``, ``"affinity"``; unweighted.

    Raises
    ------
    ValueRangeError
        If `pixels` or `temperature` is not positive, or the network is of another kind.
    ShapeMismatch
        If instances, known and image differ in size.
    """
    if not (pixels >= 1 and temperature > 0):
        raise ValueRangeError(f"pixels must be >= 1 and temperature > 0. Got {pixels} and {temperature}.")
    if not isinstance(network, AGQ):
        raise ValueRangeError(f"This loss trains the segmenter 'agq'. Got a {type(network).__name__}.")
    _check_sizes(batch)
    numbers = batch["number"].tolist()
    prediction = network.predict_instances(batch["image"], [rng_for(seed, "agq queries", n) for n in numbers])
    terms = []
    with torch.autocast(batch["image"].device.type, enabled=False):
        for i, number in enumerate(numbers):
            instances = on_grid(batch["instances"][i], prediction, 0)
            known = on_grid(batch["known"][i], prediction, False)
            rng = rng_for(seed, "agq pixels", number)
            contrast = pixel_discrimination(
                prediction.features[i].flatten(1).float(),
                instances * known,
                rng,
                pixels=pixels,
                temperature=temperature,
            )
            terms.append(torch.stack([*mask_losses(prediction, i, instances, known), contrast]))
        dice, cross_entropy, discrimination = torch.stack(terms).mean(0)
        affinity = weighted_bce(prediction.affinity, batch["affinity"], batch["weight"])
        loss = (
            weights.dice * dice
            + weights.cross_entropy * cross_entropy
            + weights.pixel_discrimination * discrimination
            + weights.affinity * affinity
        )
    logs = {
        "dice": dice,
        "cross_entropy": cross_entropy,
        "pixel_discrimination": discrimination,
        "affinity": affinity,
    }
    return loss, {name: value.detach() for name, value in logs.items()}


def on_grid(volume: Tensor, prediction: InstancePrediction, outside: int | bool) -> Tensor:
    """What the working grid sees of a volume (z, y, x), flat (v,); `outside` where the grid reaches beyond it."""
    grid = prediction.features.shape[2:]
    z, y, x = ((g - 1) * step + 1 - n for g, step, n in zip(grid, prediction.stride, volume.shape, strict=True))
    sz, sy, sx = prediction.stride
    padded = functional.pad(volume, (0, x, 0, y, 0, z), value=outside)
    return padded[::sz, ::sy, ::sx].flatten()


def mask_losses(prediction: InstancePrediction, sample: int, instances: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and cross-entropy of one sample, each summed over the stages.

    Parameters
    ----------
    prediction : InstancePrediction
        Of the batch.
    sample : int
        Which of the batch.
    instances, known : torch.Tensor
        (v,) integers, 0 = background; (v,) bool.

    Returns
    -------
    dice, cross_entropy : torch.Tensor
        Scalars.
    """
    valid = prediction.valid[sample]
    stages = [
        torch.cat([background[sample], masks[sample][valid]]).flatten(1).float().log_softmax(dim=0)
        for masks, background in zip(prediction.masks, prediction.backgrounds, strict=True)
    ]
    ids = instances[known & (instances > 0)].unique()
    targets = ((instances == ids[:, None]) & known).float()
    queries, neurons = match_queries(stages[0][1:].detach().exp() * known, targets)
    targets = targets[neurons]
    # The class of a voxel is its channel: 0 for the background, else one more than the query.
    channel = ((queries + 1)[:, None] * targets.long()).sum(0)
    counted = known & ((instances == 0) | (channel > 0))
    dice = [dice_of_pairs(stage[queries + 1].exp() * counted, targets) for stage in stages]
    voxels = counted.sum().clamp_min(1)
    cross_entropy = [-(stage.gather(0, channel[None])[0] * counted).sum() / voxels for stage in stages]
    return torch.stack(dice).sum(), torch.stack(cross_entropy).sum()


def _check_sizes(batch: dict[str, Tensor]) -> None:
    size = batch["image"].shape[2:]
    for name in ("instances", "known"):
        if batch[name].shape[1:] != size:
            raise ShapeMismatch(
                f"'{name}' must have the size of the image, {tuple(size)}. Got {tuple(batch[name].shape[1:])}."
            )
