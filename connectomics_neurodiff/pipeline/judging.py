"""The judge of a run, and what it sees in small images that are painted while the denoiser is trained."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from yacs.config import CfgNode

from ..conditions import membrane_from_labels, organelles, with_background
from ..config import as_dict
from ..errors import UserError
from ..geometry import Box, tiles
from ..provenance import atomic_write, hash_of
from ..seeding import rng_for
from ..volume import Volume
from . import networks
from .run import Run, discard_training, forget_other_training
from .unlabeled import MaskCopy, mask_copies

if TYPE_CHECKING:
    from torch import nn

    from ..pairs import GateLimits, Judge, RealTissue
    from ..synthesis import DiffusionProcess, GreyScale

logger = logging.getLogger("connectomics_neurodiff")

#: How often a training is looked at.
LOOKS = 5


def gate_limits(cfg: CfgNode) -> GateLimits:
    """What the pairs of a configuration must keep to."""
    from ..pairs import GateLimits

    node = cfg.NEURODIFF.PAIRS
    return GateLimits(
        following=node.LEAST_FOLLOWING,
        missing=node.MOST_MISSING,
        grey=node.GREY_LIMIT,
        spectrum=node.SPECTRUM_LIMIT,
        grain=node.GRAIN_LIMIT,
        continuity=node.CONTINUITY_LIMIT,
        order=node.LEAST_ORDER,
        dark=node.DARK_LIMIT,
    )


class RunGate:
    """The gate of a run: its limits, its judge, and what its real tissue looks like, measured when first needed.

    Parameters
    ----------
    run : Run
        Its judge is trained if it is not there yet (:func:`judge_of`).

    Raises
    ------
    UserError
        If the judge cannot judge.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.limits = gate_limits(run.cfg)
        self.judge = judge_of(run)
        self._measured: dict[bool, RealTissue] = {}

    def real(self, annotated: bool) -> RealTissue:
        """What real tissue looks like, with the mitochondria that somebody annotated or without."""
        from ..pairs import measure_real

        if annotated not in self._measured:
            real = self._run.parts["train"].load()
            label = real.array("label")
            membrane = membrane_from_labels(label, real.voxel_nm, self._run.cfg.NEURODIFF.MEMBRANE_NM)
            mito = real.mito_array if annotated else None
            self._measured[annotated] = measure_real(real.array("image"), label, membrane, mito, real.voxel_nm)
        return self._measured[annotated]

    def knows_mitochondria(self, copy: MaskCopy) -> bool:
        """Whether a copy's mitochondria are ground truth: dark bodies that were found in the image are none."""
        return copy.tissue < 0 and not self._run.parts["train"].finds_dark_bodies

    def require_able(self) -> None:
        """Refuse, before hours of work, what cannot be judged, or where real tissue does not pass itself."""
        from ..pairs import gate_defect

        for annotated in {self.knows_mitochondria(copy) for copy in mask_copies(self._run.cfg)}:
            if reason := gate_defect(self.real(annotated), self.judge, self.limits):
                raise UserError(reason)


def judge_of(run: Run) -> Judge | None:
    """The run's judge -> judge/checkpoint.pt; None if the configuration asks neither for following nor for membranes.

    It is trained on the train part in about a minute, once per run. One that cannot judge is not kept.

    Raises
    ------
    UserError
        If it cannot judge: told before the denoiser is trained or an image painted.
    """
    from ..pairs import JudgeSettings, MaskScores, load_judge, train_judge

    node = run.cfg.NEURODIFF.PAIRS
    if not node.LEAST_FOLLOWING and not node.MOST_MISSING:
        return None
    device, precision = networks.device_and_precision(run.cfg)
    settings = {"MEMBRANE_NM": run.cfg.NEURODIFF.MEMBRANE_NM, "ITERATIONS": node.JUDGE_ITERATIONS}
    settings |= {"SCORES": MaskScores._fields}
    provenance = run.provenance("judge", settings | {"PRECISION": precision}, train=run.parts["train"].identity)
    target = run.folder / "judge" / "checkpoint.pt"
    if run.is_done(target, provenance):
        return load_judge(target)
    forget_other_training(run, target.parent, provenance.key)
    judge = train_judge(
        run.parts["train"].load(),
        membrane_nm=run.cfg.NEURODIFF.MEMBRANE_NM,
        seed=run.cfg.NEURODIFF.SEED,
        folder=target.parent,
        key=provenance.key,
        settings=JudgeSettings(
            steps=node.JUDGE_ITERATIONS, devices=1 if device.type == "cuda" else 0, precision=precision
        ),
    )
    if judge.defect:
        discard_training(target.parent)
        raise UserError(judge.defect)
    judge.save(target)
    run.finish(target, provenance)
    return judge


class FollowingWatch:
    """Paints a small mask every so often while the denoiser is trained, and asks the judge how the image follows it.

    The mask is a tile of the train part (:func:`_place_to_look_at`), its membranes bent: the denoiser has not seen it.

    Parameters
    ----------
    run : Run
        Its settings of the sampling are used.
    judge : Judge
        Who looks for the mask's membranes.
    process, grey
        As the denoiser is trained.
    path : pathlib.Path
        CSV file with a row per look. A resumed training writes those of later steps again, and drops those of images
        that were painted with other settings, or seen by another judge.
    """

    def __init__(self, run: Run, judge: Judge, process: DiffusionProcess, grey: GreyScale, path: Path) -> None:
        self._cfg, self._judge, self._process, self._grey, self._path = run.cfg, judge, process, grey, path
        node = run.cfg.NEURODIFF.DIFFUSION
        self.every = max(1, node.ITERATIONS // LOOKS)
        self._mask, self._membrane = _bent_tile(run.parts["train"].load(), node.TILE, run)
        settings = {name: as_dict(node)[name] for name in networks.SAMPLING_KEYS}
        self._key = hash_of([settings, run.hash_of("judge/checkpoint.pt")])

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        """Share of the way from an image of elsewhere (0) to real tissue (1), and what it comes from."""
        found = self._judge.following(self._image(network), self._membrane, self._mask.array("label"))
        kept = [look for look in self._looks() if look.step < step]
        scores = found.image.average_precision, found.image.null, found.real.average_precision
        look = Look(step, *scores, found.share, self._key)
        with atomic_write(self._path) as temporary, open(temporary, "w", newline="") as handle:
            csv.writer(handle).writerows([Look._fields, *kept, look])
        return {"following": found.share}

    def _looks(self) -> list[Look]:
        return [look for look in read_following(self._path) if look.painted_with == self._key]

    def _image(self, network: nn.Module) -> np.ndarray:
        from ..synthesis import GuidedDenoiser, synthesise

        node = self._cfg.NEURODIFF.DIFFUSION
        first = self._process.step_at(node.GUIDANCE_ABOVE)
        image = synthesise(
            network if node.GUIDANCE == 1 else GuidedDenoiser(network, node.GUIDANCE, first),
            self._process,
            with_background(self._membrane, self._mask.array("label")),
            organelles(self._mask.mito_array, self._mask.dark_array),
            self._mask.voxel_nm,
            seed=int(rng_for(self._cfg.NEURODIFF.SEED, "following").integers(2**31)),
            grey=self._grey,
            tile=self._mask.shape,
            overlap=(0, 0, 0),
            label="following",
            **networks.sampling_arguments(self._cfg),
        )
        return np.asarray(image)

    def conclude(self) -> None:
        """Say in one line how well the trained denoiser follows its masks, and what to do if not."""
        least = self._cfg.NEURODIFF.PAIRS.LEAST_FOLLOWING
        looks = self._looks()
        if not looks:  # all of them before a kill, and painted with other settings
            logger.info("following: not looked at with these settings of the sampling; the gate will tell")
            return
        share = looks[-1].following
        if share >= least or not least:
            logger.info("following: the denoiser's last image is %.2f of the way to real tissue", share)
            return
        logger.warning(
            "The denoiser does not follow its masks: its last image is %.2f of the way from tissue of elsewhere to "
            "real tissue; pairs need %g (NEURODIFF.PAIRS.LEAST_FOLLOWING). Train it longer "
            "(NEURODIFF.DIFFUSION.ITERATIONS) or raise NEURODIFF.DIFFUSION.GUIDANCE before hours of painting.",
            share,
            least,
        )


class Look(NamedTuple):
    """A row of :class:`FollowingWatch`: what the judge said after so many steps, and settings of the sampling."""

    step: int
    average_precision: float
    null: float
    real: float
    following: float
    painted_with: str


def read_following(path: Path) -> list[Look]:
    """Rows of a file that :class:`FollowingWatch` wrote; none without a file."""
    if not path.exists():
        return []
    return [
        Look(
            int(row["step"]),
            float(row["average_precision"]),
            float(row["null"]),
            float(row["real"]),
            float(row["following"]),
            row.get("painted_with", ""),  # files of earlier versions lack it
        )
        for row in csv.DictReader(path.read_text().splitlines())
    ]


def _bent_tile(train: Volume, tile: Sequence[int], run: Run) -> tuple[Volume, np.ndarray]:
    """A tile of a volume with bent membranes: masks, and the membranes."""
    from ..pairs import followed_membranes
    from ..remodel import remodel

    thickness = run.cfg.NEURODIFF.MEMBRANE_NM
    piece = train.crop(_place_to_look_at(train, tile, thickness))
    bent = remodel(
        piece.array("label"),
        piece.mito_array,
        piece.voxel_nm,
        rng_for(run.cfg.NEURODIFF.SEED, "following", "mask"),
        dark=piece.dark_array,
        place_mitochondria=False,
        membrane_thickness_nm=thickness,
    )
    membrane = np.asarray(bent.membrane)
    _require_membranes(followed_membranes(membrane, bent.label, piece.voxel_nm), piece.shape)
    return Volume(None, bent.label, bent.mito, piece.voxel_nm, dark=bent.dark), membrane


def _require_membranes(voxels: int, tile: Sequence[int]) -> None:
    """Refuse a tile that has none to look for."""
    if not voxels:
        raise UserError(
            "Cannot judge whether images follow their masks while the denoiser is trained: no tile of the train part "
            f"has membranes and neurons away from wide background. Got tiles of {tuple(tile)} "
            "(NEURODIFF.DIFFUSION.TILE). Make them larger, or set LEAST_FOLLOWING and MOST_MISSING of NEURODIFF.PAIRS "
            "to 0."
        )


def _place_to_look_at(train: Volume, tile: Sequence[int], membrane_nm: float) -> Box:
    """The tile with most membranes that the judge looks at, or the middle of a volume if it has half as many.

    Raises
    ------
    UserError
        If there is none.
    """
    from ..pairs import followed_membranes

    size = [min(n, t) for n, t in zip(train.shape, tile, strict=True)]
    start = [(n - s) // 2 for n, s in zip(train.shape, size, strict=True)]
    middle = Box.of([*start, *(a + s for a, s in zip(start, size, strict=True))])
    label = train.array("label")
    membrane = membrane_from_labels(label, train.voxel_nm, membrane_nm)
    voxels = {
        box: followed_membranes(membrane[box.slices], label[box.slices], train.voxel_nm)
        for box in (middle, *tiles(train.shape, size, (0, 0, 0)))
    }
    best = max(voxels, key=lambda box: voxels[box])
    _require_membranes(voxels[best], size)
    return middle if 2 * voxels[middle] >= voxels[best] else best
