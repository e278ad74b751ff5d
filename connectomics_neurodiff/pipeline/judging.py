"""The judge of a run, and what it sees in small images that are painted while the denoiser is trained."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..conditions import organelles, with_background
from ..errors import UserError
from ..geometry import Box
from ..provenance import atomic_write
from ..seeding import rng_for
from ..volume import Volume
from . import networks
from .run import Run, forget_other_training

if TYPE_CHECKING:
    from torch import nn

    from ..pairs import Judge
    from ..synthesis import DiffusionProcess, GreyScale

logger = logging.getLogger("connectomics_neurodiff")

#: How often a training is looked at.
LOOKS = 5
COLUMNS = ("step", "average_precision", "null", "real", "following")


def judge_of(run: Run) -> Judge | None:
    """The run's judge -> judge/checkpoint.pt; None if the configuration asks neither for following nor for membranes.

    It is trained on the train part in about a minute, once per run.

    Raises
    ------
    UserError
        If it cannot judge: told before the denoiser is trained or an image painted.
    """
    from ..pairs import JudgeSettings, load_judge, train_judge

    node = run.cfg.NEURODIFF.PAIRS
    if not node.LEAST_FOLLOWING and not node.MOST_MISSING:
        return None
    device, precision = networks.device_and_precision(run.cfg)
    settings = {"MEMBRANE_NM": run.cfg.NEURODIFF.MEMBRANE_NM, "ITERATIONS": node.JUDGE_ITERATIONS}
    provenance = run.provenance("judge", settings | {"PRECISION": precision}, train=run.parts["train"].identity)
    target = run.folder / "judge" / "checkpoint.pt"
    if run.is_done(target, provenance):
        return _able(load_judge(target))
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
    judge.save(target)
    run.finish(target, provenance)
    return _able(judge)


def _able(judge: Judge) -> Judge:
    if judge.defect:
        raise UserError(judge.defect)
    return judge


class FollowingWatch:
    """Paints a small mask every so often while the denoiser is trained, and asks the judge how the image follows it.

    The mask is the middle of the train part, as large as a tile, its membranes bent: the denoiser has not seen it.

    Parameters
    ----------
    run : Run
        Its settings of the sampling are used.
    judge : Judge
        Who looks for the mask's membranes.
    process, grey
        As the denoiser is trained.
    path : pathlib.Path
        CSV file with a row per look; a resumed training writes those of later steps again.
    """

    def __init__(self, run: Run, judge: Judge, process: DiffusionProcess, grey: GreyScale, path: Path) -> None:
        self._cfg, self._judge, self._process, self._grey, self._path = run.cfg, judge, process, grey, path
        node = run.cfg.NEURODIFF.DIFFUSION
        self.every = max(1, node.ITERATIONS // LOOKS)
        self._mask, self._membrane = _bent_middle(run.parts["train"].load(), node.TILE, run)

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        """Share of the way from an image of elsewhere (0) to real tissue (1), and what it comes from."""
        found = self._judge.following(self._image(network), self._membrane, self._mask.array("label"))
        kept = [row for row in read_following(self._path) if row[0] < step]
        row = (float(step), found.average_precision, found.null, found.real, found.share)
        with atomic_write(self._path) as temporary, open(temporary, "w", newline="") as handle:
            csv.writer(handle).writerows([COLUMNS, *kept, row])
        return {"following": found.share}

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

    def warn(self) -> None:
        """Say in one line that the trained denoiser does not follow its masks, if so, and what to do."""
        least = self._cfg.NEURODIFF.PAIRS.LEAST_FOLLOWING
        rows = read_following(self._path)  # of a training that was killed after its last look, too
        if not rows or rows[-1][-1] >= least:
            return
        logger.warning(
            "The denoiser does not follow its masks: its last image is %.2f of the way from tissue of elsewhere to "
            "real tissue; pairs need %g (NEURODIFF.PAIRS.LEAST_FOLLOWING). Train it longer "
            "(NEURODIFF.DIFFUSION.ITERATIONS) or raise NEURODIFF.DIFFUSION.GUIDANCE before hours of painting.",
            rows[-1][-1],
            least,
        )


def read_following(path: Path) -> list[tuple[float, ...]]:
    """Rows of a file that :class:`FollowingWatch` wrote, as `COLUMNS`; none without a file."""
    if not path.exists():
        return []
    return [tuple(float(value) for value in row) for row in csv.reader(path.read_text().splitlines()[1:])]


def _bent_middle(train: Volume, tile: list[int], run: Run) -> tuple[Volume, np.ndarray]:
    """The middle of a volume with bent membranes, as large as a tile where it can be: masks, and the membranes."""
    from ..remodel import remodel

    size = [min(n, t) for n, t in zip(train.shape, tile, strict=True)]
    start = [(n - s) // 2 for n, s in zip(train.shape, size, strict=True)]
    stop = [a + s for a, s in zip(start, size, strict=True)]
    piece = train.crop(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    bent = remodel(
        piece.array("label"),
        piece.mito_array,
        piece.voxel_nm,
        rng_for(run.cfg.NEURODIFF.SEED, "following", "mask"),
        dark=piece.dark_array,
        place_mitochondria=False,
        membrane_thickness_nm=run.cfg.NEURODIFF.MEMBRANE_NM,
    )
    return Volume(None, bent.label, bent.mito, piece.voxel_nm, dark=bent.dark), np.asarray(bent.membrane)
