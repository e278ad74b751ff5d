"""The native training engine: Lightning drives one network over a stream of samples, and resumes to the same bytes.

Diffusion models and segmenters train alike: a network, a loss, and a dataset whose item i is a pure function of
(seed, i). There are no epochs and no random state to save: after a kill -9 the next call takes the last checkpoint
(weights, averaged weights, optimiser, step) and goes on with the sample that would have come next.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .convolution import use_sound_convolutions
from .errors import CheckpointMismatch, StaleArtifactError, UnknownName, ValueRangeError, did_you_mean
from .memory import kept_memory
from .progress import progress_bar
from .provenance import atomic_write
from .torchvision_repair import repair_torchvision

if TYPE_CHECKING:
    import lightning

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
PRECISIONS = ("auto", "fp32", "bf16")
OPTIMIZERS = ("Adam", "AdamW", "SGD")
SCHEDULES = ("constant", "cosine")


class SampleSource(Protocol):
    """Anything indexed by sample number: item i is a pure function of (seed, i), for every i >= 0."""

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Watch(Protocol):
    """Somebody who looks at a network while it is trained: at a copy of it, so that a look changes nothing.

    Attributes
    ----------
    every : int
        Optimiser steps between two looks; the last step is always looked at.
    """

    every: int

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        """Numbers for the log, of the averaged weights after `step`; the network is in evaluation mode."""


def is_watched(watch: Watch | None, step: int, steps: int) -> bool:
    """Whether a watch looks after this optimiser step of so many."""
    return watch is not None and (step % watch.every == 0 or step == steps)


@torch.no_grad()
def look(watch: Watch, network: nn.Module, step: int, hooked: object = None) -> Mapping[str, float]:
    """What a watch sees in a copy of the network: prediction and synthesis exchange convolutions and layouts in it.

    Whoever has `hooked` into the network is not copied with it.
    """
    return watch(copy.deepcopy(network, {id(hooked): hooked}).eval(), step)


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained.

    Attributes
    ----------
    steps : int
        Optimiser steps in all.
    batch_size, accumulate : int
        Samples per device and forward pass; forward passes per optimiser step.
    learning_rate, warmup_steps, schedule
        Peak rate; steps of linear warm-up; then ``"constant"``, or ``"cosine"`` down to 1 % at the last step.
    optimizer, betas, eps, amsgrad, weight_decay, momentum
        ``"Adam"``, ``"AdamW"`` or ``"SGD"`` and its constants.
    clip_norm : float
        Largest norm of the gradient; 0 turns clipping off.
    ema_decay : float
        Decay of the exponential moving average of the weights, which is what training returns; 0 turns it off.
    precision : str
        ``"fp32"``, ``"bf16"`` (autocast) or ``"auto"``: bf16 where the device computes it natively.
    devices : int
        GPUs per node; 0 trains on the CPU.
    nodes, workers : int
        Machines; data-loading processes per device (0: in the training process).
    checkpoint_every, log_every : int
        Optimiser steps between checkpoints, and between rows of the loss curve.
    sample_voxels : int
        Of a sample, as far as it is known; large ones are trained on with less memory (:func:`.kept_memory`).
    """

    steps: int
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    optimizer: str = "Adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    precision: str = "auto"
    devices: int = 0
    nodes: int = 1
    workers: int = 0
    checkpoint_every: int = 500
    log_every: int = 10
    sample_voxels: int = 0

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                raise UnknownName(f"No {name} '{value}'.{did_you_mean(value, known)} Known: {', '.join(known)}.")
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "nodes"):
            if getattr(self, name) < 1:
                raise ValueRangeError(f"Training needs {name} >= 1. Got {getattr(self, name)}.")


def resolve_precision(precision: str, device: str | torch.device) -> torch.dtype:
    """The type that autocast computes in.

    Parameters
    ----------
    precision : str
        ``"fp32"``, ``"bf16"`` or ``"auto"``. On the CPU, auto takes bf16 only where the processor has instructions for
        it (AMX or AVX512_BF16); elsewhere bf16 is emulated and slower than fp32.
    device : str or torch.device
        Where the network runs.
    """
    if precision not in PRECISIONS:
        raise UnknownName(
            f"No precision '{precision}'.{did_you_mean(precision, PRECISIONS)} Known: {', '.join(PRECISIONS)}."
        )
    if precision == "auto":
        on_cpu = torch.device(device).type == "cpu"
        native = _processor_has_bf16() if on_cpu else torch.cuda.is_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _processor_has_bf16() -> bool:
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_device(gpus: int) -> torch.device:
    """First GPU if `gpus` is not 0 and there is one (-1: all there are), else the CPU."""
    if not -1 <= gpus <= torch.cuda.device_count():
        raise ValueRangeError(
            f"The number of GPUs may be at most {torch.cuda.device_count()} here (0: CPU, -1: all). Got {gpus}."
        )
    return torch.device("cuda" if gpus != 0 and torch.cuda.is_available() else "cpu")


def learning_rate_factor(step: int, settings: FitSettings) -> float:
    """Factor on the peak learning rate at optimiser step `step`, in [0, 1]."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class SampleNumbers(torch.utils.data.Sampler[list[int]]):
    """Endless batches of sample numbers from micro-step `first` on; each device takes every world-th batch.

    It has no length on purpose: the trainer stops by step count, and a resumed stream needs no fast-forward.
    """

    def __init__(self, first: int, batch_size: int, rank: int, world: int) -> None:
        self.first, self.batch_size, self.rank, self.world = first, batch_size, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        micro_step = self.first
        while True:
            start = (micro_step * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))
            micro_step += 1


def make_optimizer(parameters: Any, settings: FitSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over `parameters`."""
    shared: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "SGD":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **shared)
    kind = torch.optim.Adam if settings.optimizer == "Adam" else torch.optim.AdamW
    return kind(parameters, betas=settings.betas, eps=settings.eps, amsgrad=settings.amsgrad, **shared)


def _make_module(network: nn.Module, loss: Loss, settings: FitSettings) -> lightning.LightningModule:
    """Lightning's view of a network and its loss."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.averaged = (
                torch.optim.swa_utils.AveragedModel(
                    network,
                    multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema_decay),
                    use_buffers=True,
                )
                if settings.ema_decay
                else None
            )

        def training_step(self, batch: Batch, _index: int) -> Tensor:
            value, _ = loss(self.network, batch)
            return value

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.averaged is not None:
                self.averaged.update_parameters(self.network)

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self.network.parameters(), settings)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


class LossCurve:
    """The loss curve of a training as a CSV file (step, loss, learning rate); survives a kill in mid-row."""

    COLUMNS = ("step", "loss", "learning_rate")

    def __init__(self, path: Path, first_step: int) -> None:
        """Keep the rows up to `first_step`; a resumed training writes the later ones again."""
        self.path = path
        kept = [row for row in read_loss_curve(path) if row[0] <= first_step]
        with atomic_write(path) as temporary, open(temporary, "w", newline="") as handle:
            csv.writer(handle).writerows([self.COLUMNS, *kept])

    def append(self, step: int, loss: float, learning_rate: float) -> None:
        """Add a row."""
        with open(self.path, "a", newline="") as handle:
            csv.writer(handle).writerow([step, repr(loss), repr(learning_rate)])


def read_loss_curve(path: Path) -> list[tuple[int, float, float]]:
    """Rows (step, loss, learning rate) of a loss curve; none without a file; a half-written row is left out."""
    if not path.exists():
        return []
    # Only a row that ends in a line break has been written whole: "0.4,1e" would else be a number.
    written = path.read_text().rpartition("\n")[0].splitlines()[1:]
    return [(int(step), float(loss), float(rate)) for step, loss, rate in csv.reader(written)]


def _make_callbacks(
    settings: FitSettings, folder: Path, key: str, label: str, first_step: int, watch: Watch | None
) -> list[Any]:
    import lightning

    class Keeper(lightning.Callback):
        """Checkpoints, loss curve, progress bar, and the check that the loss is finite."""

        def __init__(self) -> None:
            self.total = torch.zeros(())
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            """The unfinished mean of the loss curve: a resumed one has the same rows."""
            return {"total": float(self.total), "count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.total, self.count = torch.tensor(state_dict["total"]), int(state_dict["count"])

        def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.total = self.total.to(module.device)
            if trainer.is_global_zero:
                self.curve = LossCurve(folder / "loss.csv", first_step)
                self.bar = progress_bar(label=label, total=settings.steps, initial=first_step)

        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["neurodiff_key"] = key

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.total += outputs["loss"].detach().float() * settings.accumulate
            self.count += 1
            if self.count % settings.accumulate:
                return
            step = trainer.global_step
            if step % settings.log_every == 0 or step == settings.steps:
                self.log_loss(trainer, step)
            if trainer.is_global_zero and is_watched(watch, step, settings.steps):
                self.look(trainer, module, step)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save_resume_point(trainer, folder / "last.ckpt")
            if trainer.is_global_zero:
                self.bar.update()

        def look(self, trainer: Any, module: Any, step: int) -> None:
            """Before the checkpoint: a run that is killed while somebody looks, looks again."""
            assert watch is not None
            numbers = look(watch, module.network if module.averaged is None else module.averaged.module, step)
            trainer.logger.log_metrics(dict(numbers), step)

        def log_loss(self, trainer: Any, step: int) -> None:
            mean = float(self.total) / self.count
            self.total.zero_()
            self.count = 0
            if not math.isfinite(mean):
                raise ValueRangeError(
                    f"The {label} loss is {mean} around step {step}: it has diverged. Lower the learning rate."
                )
            if trainer.is_global_zero:
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                self.curve.append(step, mean, rate)
                trainer.logger.log_metrics({"loss": mean, "learning_rate": rate}, step)
                self.bar.set_postfix(loss=f"{mean:.4f}", refresh=False)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if trainer.is_global_zero:
                self.bar.close()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            if trainer.is_global_zero and hasattr(self, "bar"):
                self.bar.close()

    return [Keeper()]


def save_resume_point(trainer: lightning.Trainer, path: Path) -> None:
    """Write Lightning's full training state atomically (all ranks must call it)."""
    if trainer.world_size > 1:
        trainer.save_checkpoint(path.with_suffix(".next"))
        if trainer.is_global_zero:
            path.with_suffix(".next").replace(path)
        return
    with atomic_write(path) as temporary:
        trainer.save_checkpoint(temporary)


def step_of_resume_point(path: Path, key: str) -> int:
    """Optimiser step of a resume point, 0 if there is none; checks that it belongs to this training and engine."""
    if any(path.parent.glob("checkpoint_*.pth.tar")):
        raise StaleArtifactError(
            f"{path.parent} holds a training of the host engine. Go on with --engine host, choose another "
            "DATASET.OUTPUT_PATH, or use --force to start anew."
        )
    if not path.exists():
        return 0
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way a file can be broken
        raise CheckpointMismatch(
            f"{path} cannot be read ({type(error).__name__}); remove it, or use --force."
        ) from error
    if content.get("neurodiff_key") != key:
        raise StaleArtifactError(
            f"{path} belongs to a training with other settings. Choose another DATASET.OUTPUT_PATH, or --force."
        )
    return int(content["global_step"])


def check_resume_point(folder: Path, key: str) -> None:
    """Raise if `folder` holds the half-finished training of other settings, or a broken one."""
    step_of_resume_point(folder / "last.ckpt", key)


def fit(
    network: nn.Module,
    loss: Loss,
    dataset: SampleSource,
    settings: FitSettings,
    folder: Path,
    *,
    label: str,
    key: str = "",
    watch: Watch | None = None,
) -> nn.Module:
    """Train a network, or go on where an interrupted training stopped.

    Parameters
    ----------
    network : torch.nn.Module
        Trained in place.
    loss : callable
        ``loss(network, batch) -> (scalar, {name: scalar})``.
    dataset : SampleSource
        Item i is a pure function of (seed, i).
    settings : FitSettings
        How to train.
    folder : pathlib.Path
        Keeps ``last.ckpt`` (the resume point), ``loss.csv`` and TensorBoard's files.
    label : str
        Name on the progress bar.
    key : str
        Identifies the training; a resume point with another key is refused.
    watch : Watch, optional
        Looks at the network every so often; its numbers go to TensorBoard.

    Returns
    -------
    torch.nn.Module
        The same network on the CPU, in evaluation mode, with averaged weights if ``ema_decay`` > 0.

    Raises
    ------
    StaleArtifactError
        If `folder` holds the resume point of another training.
    ValueRangeError
        If the loss stops being finite.
    MissingDependency
        If Lightning would stumble over a torchvision made for another torch.
    """
    repair_torchvision()
    folder.mkdir(parents=True, exist_ok=True)
    resume_point = folder / "last.ckpt"
    first_step = step_of_resume_point(resume_point, key)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # twice as fast on the CPU
    device = resolve_device(settings.devices)
    autocast = resolve_precision(settings.precision, device)
    if device.type == "cpu":
        use_sound_convolutions(network)
    module = _make_module(network, loss, settings)
    if first_step < settings.steps:
        callbacks = _make_callbacks(settings, folder, key, label, first_step, watch)
        with _quiet_lightning(), kept_memory(settings.batch_size * settings.sample_voxels):
            trainer = _make_trainer(settings, folder, device, autocast, callbacks, first_step)
            loader = _make_loader(dataset, settings, device, trainer, first_step)
            try:
                trainer.fit(module, loader, ckpt_path=resume_point if first_step else None, weights_only=True)
            except SystemExit as stop:
                # Lightning ends the process: on Ctrl-C with 1 and no word, on SIGTERM with 0, as if all were well.
                raise KeyboardInterrupt from stop
    else:
        module.load_state_dict(torch.load(resume_point, map_location="cpu", weights_only=True)["state_dict"])
    if module.averaged is not None:
        averaged: Any = module.averaged
        network.load_state_dict(averaged.module.state_dict())
    return network.cpu().eval()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without the advice of Lightning that does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Few workers are a choice here: sample i costs milliseconds, and two cores have none to spare.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Our stream starts at the right sample by itself (SampleNumbers), so nothing is lost in mid-epoch.
        warnings.filterwarnings("ignore", message=".*mid-epoch.*|.*resuming from a checkpoint.*")
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _make_trainer(
    settings: FitSettings,
    folder: Path,
    device: torch.device,
    autocast: torch.dtype,
    callbacks: list[Any],
    first_step: int,
) -> lightning.Trainer:
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    return lightning.Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=settings.devices if device.type == "cuda" else 1,
        num_nodes=settings.nodes,
        precision="bf16-mixed" if autocast == torch.bfloat16 else "32-true",
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip_norm or None,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name="tensorboard", version="", purge_step=first_step),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _make_loader(
    dataset: SampleSource, settings: FitSettings, device: torch.device, trainer: lightning.Trainer, first_step: int
) -> torch.utils.data.DataLoader[Batch]:
    numbers = SampleNumbers(
        first_step * settings.accumulate, settings.batch_size, trainer.global_rank, trainer.world_size
    )
    return torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=numbers,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
    )
