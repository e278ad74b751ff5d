"""The judge: a small boundary network, trained on the real volume, that looks for a mask's membranes in an image.

An image follows its mask if the judge finds the mask's membranes in it as well as it finds those of real tissue that it
never saw in theirs. "As well" is average precision, on a scale whose zero is what the same image scores on masks of
elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from ..conditions import membrane_from_labels
from ..errors import CheckpointMismatch, ShapeMismatch, ValueRangeError
from ..geometry import ZYX, Box, is_anisotropic, tiles, voxel_size
from ..seeding import rng_for
from ..volume import Volume

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .boundary_network import BoundaryNetwork

#: Real tissue must score so much more on its own membranes than on mirrored ones for the judge's word to count.
LEAST_CONTRAST = 0.15
#: Share of the real volume, at the end of its longest axis, that the judge is examined on and not trained on.
_HELD_OUT = 0.25
#: Share of voxels on membranes that average precision is stated for: that of neuropil, whatever a mask's own.
PREVALENCE = 0.2
#: The border of wide background is no membrane everywhere: nothing is asked so near to it.
_CLEARANCE_NM = 75.0
_LEAST_SIDE = 16  # voxels, of either part in the plane
_FOUND = 0.75  # of the membranes, where the image is cut along what looks like them
_LEAST_COUNT = 500  # voxels of membranes, and of others, that a share of a part is taken of
JUDGE_CHANNELS = (24, 48, 96)
#: Sections seen on either side of a section where they are as thin as pixels are wide.
JUDGE_CONTEXT = 3
#: Rows and columns of a patch and of a tile, one section each, and a tile's margin.
JUDGE_PATCH, _TILE, _MARGIN = 128, 256, 24
_BINS, _LARGEST_LOGIT = 1024, 12.0


def found_and_wrong(scores: np.ndarray, target: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the targets, and of all else, that score at least as much as each level, from the highest level down.

    Parameters
    ----------
    scores : numpy.ndarray
        Integers in [0, 1024), larger = more likely to be a target.
    target, counted : numpy.ndarray
        bool, of the same shape: what is to be found, and where it counts.

    Returns
    -------
    found, wrong : numpy.ndarray
        float64 (1024,), rising to 1; NaN where there is no target, or nothing else.
    """
    curves = []
    for kind in (target, ~target):
        counts = np.bincount(scores[counted & kind], minlength=_BINS)[::-1].cumsum(dtype=np.float64)
        curves.append(counts / counts[-1] if counts[-1] else np.full(_BINS, math.nan))
    return curves[0], curves[1]


def average_precision(found: np.ndarray, wrong: np.ndarray) -> float:
    """Average precision: the sum of precision times gain in recall over all thresholds.

    Parameters
    ----------
    found, wrong : numpy.ndarray
        Of :func:`found_and_wrong`.

    Returns
    -------
    float
        In [0, 1], as if `PREVALENCE` of all voxels were targets: tissue of large neurons has fewer membranes than
        tissue of small ones, which alone would change its precision. Chance scores `PREVALENCE`. NaN without targets or
        without others.
    """
    seen = PREVALENCE * found + (1 - PREVALENCE) * wrong
    precision = PREVALENCE * found / np.where(seen > 0, seen, 1)
    return float((precision * np.diff(found, prepend=0)).sum())


def missing_share(found: np.ndarray, wrong: np.ndarray) -> float:
    """Share of the targets that score less than the median of all else: 0 all are seen, .5 by chance.

    Where membranes were left out a half of them looks like cytoplasm; where tissue is merely hard to read few do.
    """
    return float(1 - np.interp(0.5, wrong, found))


def cut_share(scores: np.ndarray, target: np.ndarray, counted: np.ndarray, label: np.ndarray) -> float:
    """Share of the neurons' area that boundaries which the mask lacks cut off, section by section.

    Parameters
    ----------
    scores, target, counted : numpy.ndarray
        (z, y, x), of :func:`found_and_wrong`; the targets are the mask's membranes.
    label : numpy.ndarray
        (z, y, x) of the mask.

    Returns
    -------
    float
        In [0, 1]. At a level that finds `_FOUND` of the membranes every profile of a neuron falls into pieces; what is
        not in its largest one is cut off. Dark organelles leave the cytoplasm round them in one piece. 0 where there is
        nothing to find.
    """
    import cc3d

    found, _ = found_and_wrong(scores, target, counted)
    level = _BINS - 1 - int(np.searchsorted(found, _FOUND))
    inside = np.where(counted & ~target, label, 0)
    area = largest = 0
    for section, dark in zip(inside, scores >= level, strict=True):
        profiles = cc3d.connected_components(section, connectivity=4)
        pieces = cc3d.connected_components(np.where(dark, 0, profiles), connectivity=4)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        profile_of = np.zeros(len(sizes), dtype=np.int64)
        profile_of[pieces.ravel()] = profiles.ravel()
        most = np.zeros(int(profiles.max()) + 1, dtype=np.int64)
        np.maximum.at(most, profile_of, sizes)
        area, largest = area + int(sizes.sum()), largest + int(most.sum())
    return 1 - largest / area if area else 0.0


def missing_at_worst(scores: np.ndarray, target: np.ndarray, counted: np.ndarray) -> float:
    """Largest :func:`missing_share` of a section, or of a ninth of the plane through all sections.

    Parts with less than `_LEAST_COUNT` voxels of either kind are left out, and those with less than half as many
    membranes as there are on average: a soma fills them, whose nucleus is as dark. 0 if all are.
    """
    depth, rows, columns = scores.shape
    thirds = [[slice(i * n // 3, (i + 1) * n // 3) for i in range(3)] for n in (rows, columns)]
    cuts: tuple[list[tuple[slice, ...]], ...] = (
        [(slice(z, z + 1),) for z in range(depth)],
        [(slice(None), y, x) for y, x in product(*thirds)],
    )
    worst, membranes = 0.0, int((target & counted).sum())
    for parts in cuts:
        for part in parts:
            on, rest = (int((kind[part] & counted[part]).sum()) for kind in (target, ~target))
            if min(on, rest) >= _LEAST_COUNT and 2 * on * len(parts) >= membranes:
                worst = max(worst, missing_share(*found_and_wrong(scores[part], target[part], counted[part])))
    return worst


class MaskScores(NamedTuple):
    """What a judge finds of a mask in an image.

    Attributes
    ----------
    average_precision : float
        Of the judge's boundaries in the image, as a detector of the mask's membranes, in [0, 1].
    null : float
        The same of mirrored and shifted masks, mean of five: what an image of other tissue would score.
    missing : float
        Share of the mask's membranes that look less like one than half of the cytoplasm does (:func:`missing_share`).
    missing_at_worst : float
        The same of the section or the ninth of the plane where it is largest (:func:`missing_at_worst`).
    cut : float
        Share of the mask's neurons that boundaries in the image cut off which the mask lacks (:func:`cut_share`).
    """

    average_precision: float
    null: float
    missing: float
    missing_at_worst: float
    cut: float


@dataclass(frozen=True)
class Following:
    """How well an image follows its mask.

    Attributes
    ----------
    image, real : MaskScores
        Of the image, and of real tissue that the judge was not trained on, each with its own mask.
    """

    image: MaskScores
    real: MaskScores

    @property
    def share(self) -> float:
        """Way from the null to real tissue: 0 = as an image of elsewhere, 1 = as real tissue."""
        return (self.image.average_precision - self.image.null) / (self.real.average_precision - self.real.null)

    def as_dict(self) -> dict[str, float]:
        """All of its numbers by name; those of real tissue begin with ``real_``."""
        real = {f"real_{name}": value for name, value in self.real._asdict().items()}
        return {**self.image._asdict(), **real, "share": self.share}


@dataclass(frozen=True, eq=False)
class Judge:
    """A trained boundary network, and what it scores on real tissue.

    Attributes
    ----------
    network : torch.nn.Module
        :class:`.BoundaryNetwork`, in evaluation mode.
    voxel_nm : ZYX
        Voxel size that it was trained on, nm.
    membrane_nm : float
        Thickness of the membranes that it was taught.
    real : MaskScores
        Of held-out real tissue; NaN if it was not trained.
    defect : str
        Why it cannot judge; empty if it can.
    """

    network: BoundaryNetwork
    voxel_nm: ZYX
    membrane_nm: float
    real: MaskScores
    defect: str = ""

    def following(self, image: np.ndarray, membrane: np.ndarray, label: np.ndarray) -> Following:
        """How well an image follows its mask.

        Parameters
        ----------
        image : numpy.ndarray
            (z, y, x), values in [0, 1], any size; its mean and spread do not matter.
        membrane, label : numpy.ndarray
            The mask, same shape. Membranes are to be found and neurons to be left alone; wide background (neither) and
            75 nm round it are not looked at: real volumes have anything there, membranes that nobody traced included.

        Raises
        ------
        ShapeMismatch
            If the shapes differ.
        ValueRangeError
            If the judge cannot judge (`defect`).
        """
        if self.defect:
            raise ValueRangeError(self.defect)
        if not image.shape == membrane.shape == label.shape:
            shapes = f"{image.shape}, {membrane.shape} and {label.shape}"
            raise ShapeMismatch(f"Image, membrane and label must have one shape. Got {shapes}.")
        scores = _scores_on_masks(self.network, image, np.asarray(membrane) > 0, label, self.voxel_nm)
        return Following(scores, self.real)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checkpoint of kind ``"judge"``."""
        from ..checkpoints import save_checkpoint

        save_checkpoint(
            path,
            kind="judge",
            architecture="boundary",
            options={"context": self.network.context, "channels": list(JUDGE_CHANNELS)},
            state_dict=self.network.state_dict(),
            extra={
                "voxel_nm": list(self.voxel_nm),
                "membrane_nm": self.membrane_nm,
                "real": self.real._asdict(),
                "defect": self.defect,
            },
        )


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Read a judge that :meth:`Judge.save` wrote.

    Raises
    ------
    MissingInput
        If there is no such file.
    CheckpointMismatch
        If it holds no judge, or a damaged one.
    """
    from ..checkpoints import load_checkpoint, load_weights
    from .boundary_network import BoundaryNetwork

    checkpoint = load_checkpoint(path, kind="judge")
    try:
        options = {name: checkpoint.options[name] for name in ("context", "channels")}
        membrane_nm, defect = (checkpoint.extra[name] for name in ("membrane_nm", "defect"))
        real, size = MaskScores(**checkpoint.extra["real"]), voxel_size(checkpoint.extra["voxel_nm"])
    except (KeyError, TypeError) as error:
        raise CheckpointMismatch(f"{path} is damaged: a judge needs {error}.") from error
    network = BoundaryNetwork(**options)
    load_weights(network, checkpoint)
    return Judge(network.eval(), size, membrane_nm, real, defect)


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is trained.

    Attributes
    ----------
    steps : int
        Optimiser steps, of one patch each.
    learning_rate : float
        Peak rate of Adam; 20 steps of warm-up, then a cosine.
    devices : int
        GPUs; 0 trains on the CPU.
    precision : str
        As :class:`.FitSettings` has it.
    """

    steps: int = 1000
    learning_rate: float = 4e-3
    devices: int = 0
    precision: str = "fp32"


def train_judge(
    volume: Volume,
    *,
    membrane_nm: float,
    seed: int,
    folder: Path,
    key: str = "",
    settings: JudgeSettings | None = None,
) -> Judge:
    """Train a judge on three quarters of a real volume and examine it on the fourth.

    Parameters
    ----------
    volume : Volume
        Real image and label. Its longest axis in nm is cut; the last quarter is held out.
    membrane_nm : float
        Thickness of membranes between touching neurons, nm, as in :func:`.membrane_from_labels`.
    seed : int
        Of weights and patches; the same seed gives the same judge.
    folder : pathlib.Path
        For the resume point and the loss curve (:func:`.fit`).
    key : str
        Identifies the training; a resume point with another key is refused.
    settings : JudgeSettings, optional
        Steps, learning rate, device.

    Returns
    -------
    Judge
        With `defect` set, and untrained, if the volume is too small to be cut; with `defect` set too if held-out tissue
        scores less than `LEAST_CONTRAST` more on its own membranes than on those of elsewhere.
    """
    import torch

    from .boundary_network import BoundaryNetwork

    context = 0 if is_anisotropic(volume.voxel_nm) else JUDGE_CONTEXT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, "judge", "weights").integers(2**31)))
        network = BoundaryNetwork(context=context, channels=JUDGE_CHANNELS)
    membrane = membrane_from_labels(volume.array("label"), volume.voxel_nm, membrane_nm) > 0
    taught, held_out = _split(volume.shape, volume.voxel_nm)
    defect = _too_small(membrane, volume.array("label"), volume.voxel_nm, taught, held_out)
    if defect:
        return Judge(network.eval(), volume.voxel_nm, membrane_nm, MaskScores(*[math.nan] * 5), defect)
    patches = JudgePatches(volume.crop(taught), membrane[taught.slices], context=context, seed=seed)
    _train(network, patches, settings or JudgeSettings(), folder, key)
    image, label = (volume.array(role)[held_out.slices] for role in ("image", "label"))
    scores = _scores_on_masks(network, image, membrane[held_out.slices], label, volume.voxel_nm)
    return Judge(network, volume.voxel_nm, membrane_nm, scores, _no_contrast(scores))


def _split(shape: Sequence[int], voxel_nm: Sequence[float]) -> tuple[Box, Box]:
    """What the judge is taught on, and what it is examined on."""
    axis = int(np.argmax([n * nm for n, nm in zip(shape, voxel_nm, strict=True)]))
    cut = max(1, shape[axis] - max(1, round(_HELD_OUT * shape[axis])))
    stop, start = list(shape), [0, 0, 0]
    stop[axis] = start[axis] = cut
    return Box((0, 0, 0), (stop[0], stop[1], stop[2])), Box(
        (start[0], start[1], start[2]), (shape[0], shape[1], shape[2])
    )


def _too_small(membrane: np.ndarray, label: np.ndarray, voxel_nm: Sequence[float], *parts: Box) -> str:
    """Why a judge cannot be trained on these parts of a volume, or an empty string."""
    for part in parts:
        masks = membrane[part.slices], label[part.slices]
        if min(part.shape[1:]) < _LEAST_SIDE or not followed_membranes(*masks, voxel_nm):
            return (
                "Cannot judge whether images follow their masks: a quarter of the train part is held out, and either "
                f"part needs {_LEAST_SIDE} voxels in y and x, and membranes and neurons that are more than "
                f"{_CLEARANCE_NM:g} nm from wide background. Got {membrane.shape} in all. "
                "Give a larger train part, or set LEAST_FOLLOWING and MOST_MISSING of NEURODIFF.PAIRS to 0."
            )
    return ""


def followed_membranes(membrane: np.ndarray, label: np.ndarray, voxel_nm: Sequence[float]) -> int:
    """How many voxels of membrane the judge would look for; 0 also where nothing else is there to tell them from.

    Parameters
    ----------
    membrane, label : numpy.ndarray
        (z, y, x) of one shape. Voxels near wide background do not count.
    voxel_nm : sequence of 3 floats
        Voxel size, nm.
    """
    on = np.asarray(membrane) > 0
    counted = _counted(on, label, voxel_nm)
    return int((on & counted).sum()) if (~on & counted).any() else 0


def _no_contrast(real: MaskScores) -> str:
    """Why the word of a judge with these scores on real tissue does not count, or an empty string."""
    own, elsewhere = real.average_precision, real.null
    if own - elsewhere >= LEAST_CONTRAST:
        return ""
    return (
        f"Cannot judge whether images follow their masks: on held-out real tissue the judge scores {own:.2f} on its "
        f"own membranes and {elsewhere:.2f} on mirrored ones; {LEAST_CONTRAST:g} more is needed. Train the judge "
        "longer (NEURODIFF.PAIRS.JUDGE_ITERATIONS), give a larger train part, or switch the check off (LEAST_FOLLOWING "
        "and MOST_MISSING 0)."
    )


def _train(network: BoundaryNetwork, patches: JudgePatches, settings: JudgeSettings, folder: Path, key: str) -> None:
    """Train a network in place, on the loss of the voxels that count."""
    from torch.nn import functional as F

    from ..engine import FitSettings, fit

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        target, counted = batch["target"], batch["counted"]
        each = F.binary_cross_entropy_with_logits(net(batch["image"]), target, reduction="none")
        return (each * counted).sum() / counted.sum().clamp_min(1), {}

    how = FitSettings(
        settings.steps,
        learning_rate=settings.learning_rate,
        warmup_steps=min(20, settings.steps),
        schedule="cosine",
        clip_norm=1.0,
        precision=settings.precision,
        devices=settings.devices,
        checkpoint_every=100,
    )
    fit(network, loss, patches, how, folder, label="judge", key=key)


class JudgePatches:
    """Patches of a real volume that a judge is trained on; item i is a pure function of (seed, i).

    Flipped and transposed, with other contrast and brightness, half of them blurred by up to a voxel, all with noise of
    up to a third of the spread: membranes are to be known by their course, not by their grain.

    Parameters
    ----------
    volume : Volume
        Image and label in memory.
    membrane : numpy.ndarray
        (z, y, x) bool, same shape.
    context : int
        Sections on either side that come with a section.
    seed : int
        Seed, >= 0.
    """

    def __init__(self, volume: Volume, membrane: np.ndarray, *, context: int, seed: int) -> None:
        self._image = _standardised(volume.array("image"))
        self._membrane, self._counted = membrane, _counted(membrane, volume.array("label"), volume.voxel_nm)
        self._context, self._seed = context, seed
        # Square, as patches are transposed.
        self._side = min(JUDGE_PATCH, *volume.shape[1:])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Image (1, 2 context + 1, y, x), target and where the loss counts (1, 1, y, x); float32."""
        rng = rng_for(self._seed, "judge", "patch", index)
        z = int(rng.integers(len(self._image)))
        y, x = (int(rng.integers(n - self._side + 1)) for n in self._image.shape[1:])
        plane = slice(y, y + self._side), slice(x, x + self._side)
        flips = tuple(slice(None, None, -1 if rng.integers(2) else 1) for _ in range(3))
        axes = (0, 2, 1) if rng.integers(2) else (0, 1, 2)
        sections = _with_context(z, z + 1, self._context, len(self._image))
        image, target, counted = (
            np.ascontiguousarray(array[at][:, *plane][flips].transpose(axes), dtype=np.float32)[None]
            for array, at in ((self._image, sections), (self._membrane, [z]), (self._counted, [z]))
        )
        return {"image": self._jittered(image, rng), "target": target, "counted": counted}

    def _jittered(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        blur = float(rng.uniform(0, 1)) * int(rng.integers(2))
        image = ndimage.gaussian_filter(image, (0, min(self._context, blur), blur, blur))
        gain, offset, noise = np.exp(rng.normal(0, 0.15)), rng.normal(0, 0.15), rng.uniform(0, 0.3)
        grain = rng.standard_normal(image.shape, dtype=np.float32)
        return np.asarray(gain * image + offset + noise * grain, dtype=np.float32)


def _with_context(start: int, stop: int, context: int, depth: int) -> np.ndarray:
    """Numbers of the sections `start` to `stop` and of those beside; the outermost stand for what lies beyond."""
    return np.clip(np.arange(start - context, stop + context), 0, depth - 1)


def _standardised(image: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1, float32."""
    mean, spread = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    return ((image - np.float32(mean)) / np.float32(max(spread, 1e-6))).astype(np.float32)


def _boundary_scores(network: BoundaryNetwork, image: np.ndarray) -> np.ndarray:
    """Logits of the network in whole numbers, (z, y, x) uint16 in [0, 1024), tile by tile without the margins."""
    import torch

    mean, spread = float(image.mean(dtype=np.float64)), max(float(image.std(dtype=np.float64)), 1e-6)
    scores = np.empty(image.shape, dtype=np.uint16)
    margin = (0, _MARGIN, _MARGIN)
    with torch.inference_mode():
        for box in tiles(image.shape, (1, _TILE, _TILE), [2 * m for m in margin]):
            sections = _with_context(box.start[0], box.stop[0], network.context, len(image))
            tile = (image[sections][:, *box.slices[1:]].astype(np.float32) - np.float32(mean)) / np.float32(spread)
            logits = network(torch.from_numpy(np.ascontiguousarray(tile))[None, None])[0, 0].numpy()
            level = (logits + _LARGEST_LOGIT) * ((_BINS - 1) / (2 * _LARGEST_LOGIT))
            core = [
                slice(m if a else 0, b - a - (m if b < n else 0))
                for a, b, n, m in zip(box.start, box.stop, image.shape, margin, strict=True)
            ]
            place = tuple(slice(a + c.start, a + c.stop) for a, c in zip(box.start, core, strict=True))
            scores[place] = np.clip(np.rint(level[tuple(core)]), 0, _BINS - 1)
    return scores


def _elsewhere(array: np.ndarray) -> Iterator[np.ndarray]:
    """Five masks that have nothing to do with an image but their statistics: mirrored, and shifted by half."""
    yield array[:, ::-1]
    yield array[:, :, ::-1]
    yield array[:, ::-1, ::-1]
    yield np.roll(array, array.shape[1] // 2, axis=1)
    yield np.roll(array, array.shape[2] // 2, axis=2)


def _counted(membrane: np.ndarray, label: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """Where an image is looked at, (z, y, x) bool: not within `_CLEARANCE_NM` of wide background."""
    import edt

    wide = (np.asarray(label) == 0) & ~membrane
    if not wide.any():
        return ~wide
    if not is_anisotropic(voxel_nm):
        distance = edt.edt(~wide, anisotropy=tuple(voxel_nm), black_border=False, parallel=1)
        return np.asarray(distance > _CLEARANCE_NM)
    pitch = tuple(voxel_nm[1:])
    sections = (edt.edt(~section, anisotropy=pitch, black_border=False, parallel=1) for section in wide)
    return np.stack([section > _CLEARANCE_NM for section in sections])


def _scores_on_masks(
    network: BoundaryNetwork, image: np.ndarray, membrane: np.ndarray, label: np.ndarray, voxel_nm: Sequence[float]
) -> MaskScores:
    scores = _boundary_scores(network, image)
    counted = _counted(membrane, label, voxel_nm)
    null = [
        average_precision(*found_and_wrong(scores, other, where))
        for other, where in zip(_elsewhere(membrane), _elsewhere(counted), strict=True)
    ]
    curves = found_and_wrong(scores, membrane, counted)
    return MaskScores(
        average_precision(*curves),
        float(np.mean(null)),
        missing_share(*curves),
        missing_at_worst(scores, membrane, counted),
        cut_share(scores, membrane, counted, label),
    )
