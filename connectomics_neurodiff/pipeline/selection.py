"""Which of a training's networks is kept: the one that finds the boundaries of the tune part best."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..metrics import boundary_precision
from ..provenance import atomic_write
from . import networks
from .run import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

COLUMNS = ("step", "average_precision")


class SelectionWatch:
    """Tries a segmenter on the tune part every so often while it is trained, and keeps what it finds best.

    Trainings of different data are best after different numbers of iterations; each arm is judged at its own best, by
    the same rule.

    Parameters
    ----------
    run : Run
        Its settings of the inference are used.
    folder : pathlib.Path
        Where ``tuning.csv``, a row per trial, and the weights that were tried are kept until the training is done. A
        resumed training tries those of later steps again.
    label : str
        Name on the progress bar.
    """

    def __init__(self, run: Run, folder: Path, label: str) -> None:
        self._run, self._folder, self._label = run, folder, label
        node = run.cfg
        self.every = -(-node.SOLVER.ITERATION_TOTAL // node.NEURODIFF.SEGMENTER.CHECKPOINTS)
        tune = run.parts["tune"].load()
        self._image, self._truth, self._voxel_nm = tune.array("image"), tune.array("label"), tune.voxel_nm

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        """Average precision of the boundaries of the tune part."""
        found = boundary_precision(self._affinities(network), self._truth, self._voxel_nm)
        self._keep(network, step)
        kept = [row for row in read_tuning(self._path) if row[0] < step]
        with atomic_write(self._path) as temporary, open(temporary, "w", newline="") as handle:
            csv.writer(handle).writerows([COLUMNS, *kept, (step, found)])
        return {"average_precision": found}

    @property
    def _path(self) -> Path:
        return self._folder / "tuning.csv"

    def _affinities(self, network: nn.Module) -> np.ndarray:
        from ..predict import predict_affinities

        arguments = networks.prediction_arguments(self._run.cfg)
        affinities = predict_affinities(network, self._image, label=self._label, **arguments)
        return np.asarray(affinities)

    def _weights_of(self, step: int) -> Path:
        return self._folder / f"tried-{step:07d}.pt"

    def _keep(self, network: nn.Module, step: int) -> None:
        import torch

        with atomic_write(self._weights_of(step)) as temporary:
            torch.save({name: value.detach().cpu() for name, value in network.state_dict().items()}, temporary)

    def best(self) -> tuple[int, dict[str, Tensor]]:
        """Step and weights of the best network; of equally good ones, the first."""
        import torch

        step, _ = max(read_tuning(self._path), key=lambda row: -math.inf if math.isnan(row[1]) else row[1])
        return step, torch.load(self._weights_of(step), map_location="cpu", weights_only=True)

    def forget(self) -> None:
        """Remove the weights that were tried, once the best are somewhere else."""
        for path in self._folder.glob("tried-*.pt"):
            path.unlink()


def read_tuning(path: Path) -> list[tuple[int, float]]:
    """Rows of a file that :class:`SelectionWatch` wrote, as `COLUMNS`; none without a file."""
    if not path.exists():
        return []
    return [(int(step), float(found)) for step, found in csv.reader(path.read_text().splitlines()[1:])]
