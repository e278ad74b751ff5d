"""Running the trainings of a study side by side, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from yacs.config import CfgNode

from ..config import dump_config
from ..errors import UserError
from ..progress import progress_bar
from ..provenance import atomic_write, hash_of, hash_of_file, sidecar_of, write_json
from .plan import Study, Trial, with_values
from .results import SCORES

SYNTHESIS = ("masks", "pairs")
LABELLING = ("pseudo_labels",)
SCORING = ("segmenter", "predictions", "segmentations", "metrics", "report")
#: Files that a job takes from the folders of others.
Taken = Mapping[str, Sequence[str]]
#: What is taken of a denoiser's training, with the judge trained beside it, and of the real arm's.
_DENOISER = (
    "diffusion/loss.csv", "diffusion/following.csv", "diffusion/checkpoint.pt", "judge/loss.csv", "judge/checkpoint.pt",
)  # fmt: skip
_REAL_ARM = ("segmenter/real/loss.csv", "segmenter/real/checkpoint.pt")
#: (arguments of a run, file for what it prints) -> its exit code.
Start = Callable[[list[str], Path], int]
#: Seconds between two looks at how far the trainings are.
_LOOK = 1.0


@dataclass(frozen=True)
class Job:
    """A run of some stages in a folder of its own.

    Attributes
    ----------
    name : str
        Its folder, relative to the study's.
    stages : tuple of str
        What is made.
    leaves : tuple of str
        Files, relative to its folder, that are there when it is done.
    needs : tuple of str
        Names of the jobs whose results it takes.
    cfg : CfgNode
        Its configuration, as far as it is known before.
    configure : callable
        Its configuration, once these are done.
    inputs : callable
        Files of other jobs that its result depends on.
    arm : str
        The arm that it trains; empty for jobs of the synthesis.
    seconds : float
        Expected.
    curve : str
        Loss curve that tells how far it is, relative to its folder; empty where nothing does.
    iterations : int
        Length of that training.
    """

    name: str
    stages: tuple[str, ...]
    leaves: tuple[str, ...]
    needs: tuple[str, ...]
    cfg: CfgNode
    configure: Callable[[], CfgNode]
    inputs: Callable[[], list[Path]]
    arm: str = ""
    seconds: float = 1.0
    curve: str = ""
    iterations: int = 0


def jobs_of(study: Study, seconds_of: Callable[[CfgNode, Sequence[str], str], float]) -> dict[str, Job]:
    """All jobs of a study by name; trials that share a training share its job."""
    jobs: dict[str, Job] = {}

    def add(job: Job) -> None:
        jobs.setdefault(job.name, job)

    def name_of(folder: str | Path) -> str:
        return Path(folder).relative_to(study.output).as_posix()

    def needs_of(taken: Taken) -> tuple[str, ...]:
        return tuple(name_of(folder) for folder in taken)

    for folder, cfg in study.pseudo_labels.items():
        trained = study.real_training_of(folder)
        taken: Taken = {trained: _REAL_ARM} if trained else {}
        add(
            Job(
                name_of(folder), LABELLING, _pseudo_label_files(cfg), needs_of(taken),
                cfg, _with_files(cfg, taken), _artefacts_of(taken),
                seconds=1.0 if trained else seconds_of(cfg, LABELLING, ""),
            )
        )  # fmt: skip
    for folder, cfg in study.denoisers.items():
        labels = study.pseudo_labels_of(cfg)
        taken = {labels: _pseudo_label_files(cfg)} if labels else {}
        add(
            Job(
                name_of(folder), ("diffusion",), ("diffusion/checkpoint.pt",), needs_of(taken),
                cfg, _with_files(cfg, taken), _artefacts_of(taken),
                seconds=seconds_of(cfg, ("diffusion",), ""), curve="diffusion/loss.csv",
                iterations=cfg.NEURODIFF.DIFFUSION.ITERATIONS,
            )
        )  # fmt: skip
    for folder, cfg in study.synthesis.items():
        labels = study.pseudo_labels_of(cfg)
        taken = {study.denoiser_of(folder): _DENOISER} | ({labels: _pseudo_label_files(cfg)} if labels else {})
        add(
            Job(
                name_of(folder), SYNTHESIS, _pair_files(cfg), needs_of(taken),
                cfg, _with_files(cfg, taken), _artefacts_of(taken),
                seconds=seconds_of(cfg, ("pairs",), ""),
            )
        )  # fmt: skip
    for trial in study.trials:
        arm = "mixed" if trial.is_mixed else "real"
        needs = tuple(name_of(folder) for folder in (trial.pairs, trial.pseudo_labels) if folder)
        add(
            Job(
                name_of(trial.folder), SCORING, SCORES, needs, trial.cfg,
                _with_pairs(trial), _pairs_of(trial),
                arm, seconds_of(trial.cfg, ("segmenter",), arm), f"segmenter/{arm}/loss.csv",
                trial.cfg.SOLVER.ITERATION_TOTAL,
            )
        )  # fmt: skip
    return jobs


def _pair_files(cfg: CfgNode) -> tuple[str, ...]:
    from ..pairs import VERDICT
    from ..pipeline.unlabeled import mask_copies

    return tuple(f"pairs/{copy.name}{suffix}" for copy in mask_copies(cfg) for suffix in (".h5", VERDICT))


def _pseudo_label_files(cfg: CfgNode) -> tuple[str, ...]:
    from ..pipeline.unlabeled import pseudo_labelled

    return tuple(path.relative_to(cfg.DATASET.OUTPUT_PATH).as_posix() for path in pseudo_labelled(cfg))


def _nothing() -> list[Path]:
    return []


def _artefacts_of(taken: Taken) -> Callable[[], list[Path]]:
    """Networks and volumes that a job takes from others, once they are there."""

    def artefacts() -> list[Path]:
        paths = [Path(folder) / name for folder, names in taken.items() for name in names]
        return [path for path in paths if path.suffix in (".pt", ".h5") and path.exists()]

    return artefacts


def _with_files(cfg: CfgNode, taken: Taken) -> Callable[[], CfgNode]:
    """The configuration, once the files are in its folder."""

    def configure() -> CfgNode:
        folder = Path(cfg.DATASET.OUTPUT_PATH)
        for source, names in taken.items():
            for name in names:
                _copy_finished(Path(source) / name, folder / name)
        # A folder counts as a run's by its log, which a run opens first.
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.log").touch()
        return cfg

    return configure


def _copy_finished(source: Path, target: Path) -> None:
    """Copy a file, if it is there, and, last, its provenance, without which an artefact counts as unfinished."""
    for one, copy in ((source, target), (sidecar_of(source), sidecar_of(target))):
        if one.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(copy) as temporary:
                shutil.copyfile(one, temporary)


def _pairs_of(trial: Trial) -> Callable[[], list[Path]]:
    """What a training sees beside real patches, once it is there: painted pairs that passed, pseudo-labelled tissue."""
    from ..pipeline.pairs_stage import passed_pairs
    from ..pipeline.unlabeled import pseudo_labelled

    if not trial.pairs and not trial.pseudo_labels:
        return _nothing

    def pairs() -> list[Path]:
        painted = passed_pairs(with_values(trial.cfg, {"DATASET.OUTPUT_PATH": trial.pairs})) if trial.pairs else []
        pseudo = "pseudo" in trial.cfg.AUGMENTOR.SYNTHETIC.SOURCE
        labelled = with_values(trial.cfg, {"DATASET.OUTPUT_PATH": trial.pseudo_labels})
        return [*painted, *(pseudo_labelled(labelled) if pseudo else [])]

    return pairs


def _with_pairs(trial: Trial) -> Callable[[], CfgNode]:
    """The trial's configuration, with what other jobs have made as pairs made before."""
    pairs = _pairs_of(trial)

    def configure() -> CfgNode:
        if not trial.pairs and not trial.pseudo_labels:
            return trial.cfg
        return with_values(trial.cfg, {"AUGMENTOR.SYNTHETIC.PAIRS": [str(path) for path in pairs()]})

    return configure


def execute(
    study: Study,
    jobs: Mapping[str, Job],
    workers: int,
    engine: str,
    data_of: Callable[[CfgNode], str],
    *,
    on_scores: Callable[[Mapping[str, str], Collection[str]], object] = lambda _failed, _waiting: None,
) -> dict[str, str]:
    """Run what is not done yet, or was done with other data; a job whose input failed is not begun.

    Parameters
    ----------
    study : Study
        Its folder is used.
    jobs : mapping
        As :func:`jobs_of` gives them.
    workers : int
        Processes side by side, each with one thread.
    engine : str
        Of all trainings, ``"native"`` or ``"host"``.
    data_of : callable
        Hash of the content of all files that a configuration names.
    on_scores : callable
        Called with the runs that have failed and those that are not done yet when a training has been scored; once for
        several that end together.

    Returns
    -------
    dict of str to str
        Failed jobs by name, with the reason in a line.
    """
    order = TopologicalSorter({name: job.needs for name, job in jobs.items()})
    order.prepare()
    failed: dict[str, str] = {}
    running: dict[Future[str], str] = {}
    waiting = set(jobs)
    untold = False
    with _Progress(study, jobs) as progress, ThreadPoolExecutor(workers) as pool, _children(pool) as start:
        while order.is_active():
            for name in order.get_ready():
                lacking = [need for need in jobs[name].needs if need in failed]
                if lacking:
                    failed[name] = f"its {lacking[0]} failed"
                    waiting.discard(name)
                    order.done(name)
                else:
                    running[pool.submit(_reason_of, study, jobs[name], start, engine, data_of)] = name
            done, _ = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            finished = [running.pop(future) for future in done]
            for name, future in zip(finished, done, strict=True):
                if reason := future.result():
                    failed[name] = reason
                progress.finished(name)
                waiting.discard(name)
                order.done(name)
            untold |= any(jobs[name].leaves == SCORES and name not in failed for name in finished)
            if untold and not any(future.done() for future in running):
                on_scores(failed, waiting)
                untold = False
            progress.look(name for future, name in running.items() if future.running())
    return failed


def _reason_of(study: Study, job: Job, start: Start, engine: str, data_of: Callable[[CfgNode], str]) -> str:
    """Run a job unless it is done; why it failed, or nothing. One that fails leaves the others alone."""
    try:
        return _run_job(study, job, start, engine, data_of(job.cfg))
    except (UserError, OSError) as error:
        return str(error)


def _run_job(study: Study, job: Job, start: Start, engine: str, data: str) -> str:
    cfg = with_values(job.configure(), {"SYSTEM.NUM_THREADS": 1})
    inputs = [hash_of_file(path) for path in job.inputs()]
    wanted = {"config": hash_of(dump_config(cfg)), "inputs": inputs, "data": data, "engine": engine}
    note = study.output / "jobs" / f"{job.name.replace('/', '-')}.json"
    there = all((study.output / job.name / name).exists() for name in job.leaves)
    if there and note.exists() and json.loads(note.read_text()) == wanted:
        return ""
    config, log = note.with_suffix(".yaml"), note.with_suffix(".log")
    with atomic_write(config) as temporary:
        temporary.write_text(dump_config(cfg))
    # All that is in the folder was made by the study: what other data or another engine have made is made anew.
    command = ["--config-file", str(config), "--stages", ",".join(job.stages), "--engine", engine, "--force"]
    code = start([*command, "--arm", job.arm] if job.arm else command, log)
    if code:
        return _reason_in(log, code)
    write_json(note, wanted)
    return ""


def _reason_in(log: Path, code: int) -> str:
    """What a failed run said last; a progress bar is no reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line.removeprefix("neurodiff: error: ") for line in lines if line.startswith("neurodiff: error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"ended by signal {-code}, {signal.Signals(-code).name}: memory may have run out"
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return f"{raised[-1]} (see {log})" if raised else f"it ended with code {code} (see {log})"


@contextmanager
def _children(pool: ThreadPoolExecutor) -> Iterator[Start]:
    """Function that starts a run in a process of its own; all of them end when this process does, however it ends."""
    started: list[subprocess.Popen[bytes]] = []
    lock = threading.Lock()
    stopped = threading.Event()

    def start(arguments: list[str], log: Path) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "connectomics_neurodiff.study.worker", *arguments]
        with open(log, "wb") as output:
            with lock:
                if stopped.is_set():
                    return 1
                # The pipe is a leash: when this process dies, its end closes, and the worker reads the end of the file.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment
                )
                started.append(process)
            return process.wait()

    try:
        yield start
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        with lock:
            stopped.set()
            for process in started:
                process.terminate()
        raise


class _Progress:
    """One line over all jobs: expected seconds of what is done, and what is left."""

    def __init__(self, study: Study, jobs: Mapping[str, Job]) -> None:
        self._study, self._jobs = study, jobs
        self._shares = dict.fromkeys(jobs, 0.0)
        self._ended: set[str] = set()

    def __enter__(self) -> _Progress:
        self._bar = progress_bar(label="study", total=max(1, round(sum(job.seconds for job in self._jobs.values()))))
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def finished(self, name: str) -> None:
        """A job has ended, well or not."""
        self._shares[name] = 1.0
        self._ended.add(name)

    def look(self, running: Iterable[str]) -> None:
        """See how far the running jobs are."""
        names = list(running)
        for name in names:
            job = self._jobs[name]
            if job.curve:
                self._shares[name] = _last_step(self._study.output / name / job.curve) / max(job.iterations, 1)
        self._bar.n = round(sum(job.seconds * min(self._shares[name], 1.0) for name, job in self._jobs.items()))
        self._bar.set_postfix_str(f"{len(self._ended)} of {len(self._jobs)} runs, {len(names)} at work", refresh=False)
        self._bar.update(0)


def _last_step(curve: Path) -> int:
    from ..engine import read_loss_curve

    rows = read_loss_curve(curve)
    return rows[-1][0] if rows else 0
