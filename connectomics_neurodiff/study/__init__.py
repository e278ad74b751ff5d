"""Studies: arms x seeds of one recipe, trained side by side, compared with error bars.

``plan.py`` reads a study file and says which trainings it asks for, ``execute.py`` runs them in processes of their own
(``worker.py``), ``results.py`` compares what they left by ``statistics.py``, and ``tables.py`` and ``page.py`` show it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..config import as_dict
from ..errors import ConfigError, MissingInput, OutputExists, UserError
from ..provenance import atomic_write, hash_of

if TYPE_CHECKING:
    from .execute import Job
    from .plan import Study

logger = logging.getLogger(__name__)

#: Shape of each part of the data, (z, y, x) voxels.
Shapes = dict[str, tuple[int, int, int]]
#: (configuration, stages, arm) -> expected seconds.
Seconds = Callable[[CfgNode, Sequence[str], str], float]


def run_study(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    jobs: int = 0,
    dry_run: bool = False,
    only_tables: bool = False,
) -> dict[str, Any]:
    """Run a study, or go on where it stopped; with `dry_run` print what it would take.

    Parameters
    ----------
    path : path
        Study file, see :mod:`connectomics_neurodiff.study.plan`.
    overrides : sequence of str
        KEY VALUE pairs for every arm.
    jobs : int
        Trainings side by side, one thread each; 0: as many as there are cores and memory for; one on a GPU.
    dry_run : bool
        Say how many trainings, hours and bytes, and do nothing.
    only_tables : bool
        Write the results of the trainings that are there, whichever machine made them, and train nothing. Their data
        is not looked at.

    Returns
    -------
    dict
        Content of study.json; empty for a dry run.

    Raises
    ------
    UserError
        Before any work, if the study file, an arm or its data cannot be used; after all else has been done and
        written, if a training failed.
    """
    import torch

    from ..pipeline.engines import choose_engine, load_engine
    from .execute import execute, jobs_of
    from .plan import read_study
    from .results import is_scored, write_results

    study = read_study(path, overrides)
    if only_tables:
        if not any(is_scored(trial) for trial in study.trials):
            raise MissingInput(f"No training of {path} is scored in {study.output / 'trainings'}; --tables makes none.")
        with _claimed(study, Path(path)):
            return write_results(study)
    torch.set_num_threads(1)  # as the trainings have it, whose time is estimated
    engine = choose_engine("auto")
    load_engine(engine)
    shapes = _check_data(study)
    cores = len(os.sched_getaffinity(0))
    if not 0 <= jobs <= cores:
        raise ConfigError(f"--jobs may be at most {cores} on this machine (0: as many). Got {jobs}.")
    planned = jobs_of(study, expected_seconds(shapes))
    workers = jobs or _workers_that_fit(study, planned, shapes, cores)
    if dry_run:
        print(describe(study, planned, shapes, workers))
        return {}
    with _claimed(study, Path(path)):
        failed = execute(study, planned, workers, engine, _Contents(), on_scores=partial(_write_so_far, study))
        content = write_results(study, failed)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items()))
        raise UserError(f"{len(failed)} of the study's runs failed (logs in {study.output / 'jobs'}): {reasons}")
    return content


def _write_so_far(study: Study, failed: Mapping[str, str], waiting: Collection[str]) -> None:
    """The results of the trainings that have been scored; a page that cannot be written now ends none of the others."""
    from .results import write_results

    try:
        write_results(study, failed, waiting)
    except (UserError, OSError) as error:
        logger.warning("The results so far could not be written, the study goes on: %s", error)


def _check_data(study: Study) -> dict[str, Shapes]:
    """Open the data of every arm: parts must be disjoint, and all arms of a condition scored on the same tissue.

    Returns
    -------
    dict
        Shapes of the parts by :func:`_data_of` a configuration.
    """
    from ..pipeline import networks
    from ..pipeline.parts import check_pairs, missing_inputs, open_extra_volumes, open_parts
    from ..pipeline.segmentations_stage import check_blocks
    from ..pipeline.unlabeled import open_unlabeled

    scored: dict[str, tuple[str, tuple[str, str]]] = {}
    shapes: dict[str, Shapes] = {}
    identities: dict[str, tuple[str, str]] = {}
    for condition in study.conditions:
        for arm in study.arms:
            trial = study.row(arm, condition)[0]
            try:
                if not trial.cfg.NEURODIFF.SPLIT.SCORED:
                    raise ConfigError("a study scores its trainings: NEURODIFF.SPLIT.SCORED must be true.")
                networks.check_networks(trial.cfg)
                if missing := missing_inputs(trial.cfg):
                    raise MissingInput(f"missing input: {', '.join(missing)}.")
                data = _data_of(trial.cfg)
                if data not in shapes:
                    parts = open_parts(trial.cfg)
                    check_blocks(trial.cfg, parts)
                    open_extra_volumes(trial.cfg, parts)
                    open_unlabeled(trial.cfg, parts)
                    shapes[data] = {name: part.box.shape for name, part in parts.items()}
                    identities[data] = parts["tune"].identity, parts["test"].identity
                    check_pairs(trial.cfg, parts["train"].volume)
            except UserError as error:
                raise type(error)(f"'{trial.name}': {error}") from error
            first, scored_on = scored.setdefault(condition, (trial.name, identities[data]))
            if scored_on != identities[data]:
                raise ConfigError(
                    f"Arms are compared on the same tune and test part; '{trial.name}' has others than '{first}'."
                )
    return shapes


def _data_of(cfg: CfgNode) -> str:
    """Hash of what decides which voxels a configuration reads."""
    node = cfg.NEURODIFF
    return hash_of(
        [
            {name: value for name, value in as_dict(cfg.DATASET).items() if name != "OUTPUT_PATH"},
            as_dict(cfg.AUGMENTOR.SYNTHETIC),
            *(as_dict(node[name]) for name in ("VOXEL_NM", "MITO_NAME", "DARK_BODIES", "SPLIT", "PHANTOM")),
            [as_dict(volume) for volume in node.DIFFUSION.EXTRA_VOLUMES],
            node.SEGMENTER.LABEL_EROSION,
            [list(node.SEGMENT.METHODS), as_dict(cfg.INFERENCE), list(cfg.MODEL.INPUT_SIZE)],
        ]
    )


class _Contents:
    """Hash of the content of all files that a configuration names; a file is read once per study."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, cfg: CfgNode) -> str:
        """Of volumes, library and pairs."""
        from ..pipeline.parts import hash_of_source, input_paths

        paths = input_paths(cfg)
        with self._lock:
            for path in set(paths) - set(self._known):
                self._known[path] = hash_of_source(path)
        return hash_of([self._known[path] for path in paths])


@contextmanager
def _claimed(study: Study, path: Path) -> Iterator[None]:
    """The study's folder, for this study file and this process alone."""
    mark = study.output / "jobs" / "study.txt"
    told = f"{path.name} of the recipe {study.recipe}"
    if not mark.exists():
        if study.output.exists() and (not study.output.is_dir() or any(study.output.iterdir())):
            raise OutputExists(f"OUTPUT {study.output} is not empty and not a study's folder. Name another.")
        with atomic_write(mark) as temporary:
            temporary.write_text(told)
    elif (before := mark.read_text()) != told:
        raise OutputExists(f"OUTPUT {study.output} holds the study {before}; this one is {told}. Name another.")
    with open(mark) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another study is working in {study.output}; wait for it, or name another.") from error
        yield


def _workers_that_fit(study: Study, planned: Mapping[str, Job], shapes: Mapping[str, Shapes], cores: int) -> int:
    """Trainings side by side that the machine has cores and memory for; one where they share a GPU."""
    import psutil

    from ..engine import resolve_device

    if any(resolve_device(trial.cfg.SYSTEM.NUM_GPUS).type == "cuda" for trial in study.trials):
        return 1
    largest = max(_memory_of(job, shapes) for job in planned.values())
    return max(1, min(cores, int(psutil.virtual_memory().available // largest)))


def _memory_of(job: Job, shapes: Mapping[str, Shapes]) -> float:
    """Bytes that a job needs, as a dry run of it estimates; a process with torch in it has 500 MiB before it starts."""
    from ..pipeline.plan import estimates

    found = estimates(job.cfg, job.stages, shapes[_data_of(job.cfg)]["train"], job.arm)
    return float(max([one.memory for one in found if one.stage in job.stages], default=0.0)) + (500 << 20)


def expected_seconds(shapes: Mapping[str, Shapes]) -> Seconds:
    """Function that says what a job takes on one core of this machine, as a dry run of it estimates.

    Parameters
    ----------
    shapes : mapping
        Of the parts, by :func:`_data_of` a configuration.
    """
    from ..pipeline.plan import estimates

    known: dict[str, float] = {}

    def seconds(cfg: CfgNode, stages: Sequence[str], arm: str) -> float:
        content = as_dict(cfg)
        del content["DATASET"]["OUTPUT_PATH"], content["NEURODIFF"]["SEED"]
        key = hash_of([content, list(stages), arm])  # seeds take alike
        if key not in known:
            found = estimates(cfg, stages, shapes[_data_of(cfg)]["train"], arm)
            known[key] = max(1.0, sum(one.seconds for one in found if one.stage in stages))
        return known[key]

    return seconds


def describe(study: Study, planned: Mapping[str, Job], shapes: Mapping[str, Shapes], workers: int) -> str:
    """Text of a dry run: trainings, hours, bytes."""
    from ..pipeline.plan import artefact_bytes

    trainings = len({str(trial.folder) for trial in study.trials})
    labelled = f", {len(study.pseudo_labels)} sets of pseudo-labels" if study.pseudo_labels else ""
    hours = sum(job.seconds for job in planned.values()) / 3600
    size = 0
    for job in planned.values():
        size += artefact_bytes(job.cfg, job.stages, shapes[_data_of(job.cfg)], job.arm)
    lines = [
        f"arms: {len(study.arms)}, conditions: {len(study.conditions)}, seeds: {len(study.seeds)}",
        f"{len(study.denoisers)} denoisers, {len(study.synthesis)} sets of pairs, {trainings} segmenters to train"
        + labelled,
        f"about {hours:.1f} core hours of training and painting, {hours / workers:.1f} h with {workers} side by side",
        f"about {size / 2**30:.1f} GiB on the disk",
        "",
    ]
    lines += [f"  {name}: {job.seconds / 60:.1f} min, {', '.join(job.stages)}" for name, job in planned.items()]
    return "\n".join(lines)
