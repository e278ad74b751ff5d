"""A run: its folder, its lock, its log, and which of its stages are done."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..agglomerate import SCRATCH_PREFIX
from ..config import dump_config
from ..errors import CheckpointMismatch, MissingInput, NotWritable, OutputExists, StaleArtifactError, UserError
from ..provenance import Provenance, atomic_write, hash_of_file, is_reusable, sidecar_of, write_json, write_provenance
from .engines import Engine, load_engine
from .parts import Part

logger = logging.getLogger("connectomics_neurodiff")


@dataclass
class Run:
    """One run of the pipeline.

    Attributes
    ----------
    cfg : CfgNode
        Frozen configuration.
    folder : pathlib.Path
        DATASET.OUTPUT_PATH; everything is written below it.
    parts : dict of str to Part
        train, tune, test.
    extra : list of Part
        What the denoiser is trained on beside the train part.
    unlabeled : list of Part
        Tissue that nobody has annotated.
    force : bool
        Make again what was made with other settings, where otherwise the run would stop.
    checkpoint : str
        Segmenter to use in place of the run's own; empty: the run's own.
    checkpoint_arm : str
        Which arm that segmenter stands for; without synthetic pairs there is only one.
    engine_name : str
        ``"native"`` or ``"host"``.
    only : str
        The one arm to train and score; empty: all of them.
    """

    cfg: CfgNode
    folder: Path
    parts: dict[str, Part]
    force: bool = False
    checkpoint: str = ""
    checkpoint_arm: str = ""
    engine_name: str = "native"
    extra: list[Part] = field(default_factory=list)
    unlabeled: list[Part] = field(default_factory=list)
    only: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recorded = self.folder / "seconds.json"
        if recorded.exists():
            self.seconds = json.loads(recorded.read_text())

    @property
    def engine(self) -> Engine:
        """What trains the networks."""
        return load_engine(self.engine_name)

    def engine_settings(self) -> dict[str, str]:
        """The engine as a setting of what it trains; nothing for our own."""
        return {} if self.engine_name == "native" else {"ENGINE": self.engine_name}

    @property
    def arms(self) -> list[str]:
        """What the segmenter is trained on: real pairs, and real and synthetic mixed."""
        arms = [self.only] if self.only else arms_of(self.cfg)
        return [self.checkpoint_arm] if self.checkpoint and len(arms) > 1 else arms

    def provenance(self, stage: str, settings: Mapping[str, Any], **parents: str) -> Provenance:
        """Provenance of an artefact of this run."""
        return Provenance(stage, dict(settings), parents, int(self.cfg.NEURODIFF.SEED))

    def is_done(self, artefact: Path, provenance: Provenance) -> bool:
        """Whether the artefact is there and made this way; what is stale is an error, or removed if forced."""
        try:
            return is_reusable(artefact, provenance)
        except StaleArtifactError:
            if not self.force:
                raise
            logger.info("making %s again: its settings have changed", artefact.relative_to(self.folder))
            sidecar_of(artefact).unlink()
            artefact.unlink()
            return False

    def finish(self, artefact: Path, provenance: Provenance) -> None:
        """Mark an artefact as complete."""
        write_provenance(artefact, provenance)

    def hash_of(self, relative: str) -> str:
        """Content hash of an artefact that an earlier stage made."""
        path = self.folder / relative
        if not (path.exists() and sidecar_of(path).exists()):
            stage = relative.split("/")[0]
            raise MissingInput(f"{path} is not there yet: run the stage '{stage}' first.")
        return hash_of_file(path)

    def segmenter_of(self, arm: str) -> tuple[str, str]:
        """Path and content hash of the segmenter that stands for an arm: the user's, or the run's own."""
        if self.checkpoint:
            return self.checkpoint, hash_of_file(self.checkpoint)
        relative = f"segmenter/{arm}/checkpoint.pt"
        return str(self.folder / relative), self.hash_of(relative)

    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json; empty before that stage has run."""
        return self._read("metrics.json")

    def columns(self) -> dict[str, Any]:
        """Content of columns.json, scores of columns by arm and method; empty before that stage has run."""
        return self._read("columns.json")

    def boundaries(self) -> dict[str, Any]:
        """Content of boundaries.json, average precision of boundary edges by arm, whole and in columns."""
        return self._read("boundaries.json")

    def rounding(self) -> dict[str, Any]:
        """By arm and method, scores of affinities that were moved as rounding moves them."""
        return {arm: content["scores"] for arm, content in self._read("rounding.json").items()}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to a stage's wall time; a resumed stage counts all its attempts that ended."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 2)
        write_json(self.folder / "seconds.json", self.seconds)


def arms_of(cfg: CfgNode) -> list[str]:
    """Arms that a configuration trains; without scores there is nothing to compare with."""
    if not cfg.AUGMENTOR.SYNTHETIC.ENABLED:
        return ["real"]
    return ["real", "mixed"] if cfg.NEURODIFF.SPLIT.SCORED else ["mixed"]


@contextmanager
def timed(run: Run, stage: str) -> Iterator[None]:
    """Add the wall time of the block to the stage."""
    start = time.perf_counter()
    yield
    run.add_seconds(stage, time.perf_counter() - start)


@contextmanager
def run_folder(cfg: CfgNode) -> Iterator[Path]:
    """The run's folder: made, locked against a second run, with the log and the resolved configuration in it.

    Raises
    ------
    OutputExists
        If the folder holds something but is not a run's folder.
    NotWritable
        If it cannot be made, or not be written in.
    UserError
        If another run works in it.
    """
    folder = Path(cfg.DATASET.OUTPUT_PATH)
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"DATASET.OUTPUT_PATH {folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.log").exists():
        raise OutputExists(f"DATASET.OUTPUT_PATH {folder} is not empty and not a run's folder (no run.log in it).")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / "run.log", "a")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise NotWritable(f"DATASET.OUTPUT_PATH {folder} cannot be written: {error.strerror}.") from error
    with opened as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another run is working in {folder}; wait for it, or choose another folder.") from error
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            _remove_leftovers(folder)
            if not (folder / "config.yaml").exists():
                write_config(folder, cfg)
            yield folder
            write_config(folder, cfg)  # only now does all that is in the folder agree with it
        except Exception:
            logger.exception("the run stopped")
            raise
        except KeyboardInterrupt:
            logger.info("interrupted")
            raise
        finally:
            logger.removeHandler(handler)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; under the lock nobody else is writing here."""
    for path in (folder / "segmentations").glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(path)
    for path in folder.rglob(".*.part*"):
        if re.fullmatch(r"\..+\.\d+\.part(\.\w+)?", path.name):
            path.unlink()


def write_config(folder: Path, cfg: CfgNode) -> None:
    """Write the resolved configuration."""
    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(dump_config(cfg))


def forget_other_training(run: Run, folder: Path, key: str) -> None:
    """With --force, a half-finished training of other settings is discarded; without, the engine refuses it."""
    if run.force:
        try:
            run.engine.check_resume_point(folder, key)
        except (StaleArtifactError, CheckpointMismatch):
            discard_training(folder)


def discard_training(folder: Path) -> None:
    """Remove the resume point and logs of a training that is to start anew."""
    for path in [
        folder / "last.ckpt",
        folder / "loss.csv",
        folder / "following.csv",
        folder / "tuning.csv",
        *folder.glob("tried-*.pt"),
        *folder.glob("checkpoint_*.pth.tar"),
    ]:
        path.unlink(missing_ok=True)
    for path in [folder / "tensorboard", *folder.glob("log????-??-??_*")]:
        shutil.rmtree(path, ignore_errors=True)
