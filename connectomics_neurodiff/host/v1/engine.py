"""The host engine: PyTC v1's training loop, monitor and checkpoints drive the trainings of our pipeline.

It takes what :func:`connectomics_neurodiff.engine.fit` takes and gives what that gives, so that the stages do not know
which of the two they run under. Samples, networks, losses, optimiser and schedule are the same; the loop is PyTC's.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from connectomics.config import get_cfg_defaults
from connectomics.engine import trainer as host_trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from ...convolution import use_sound_convolutions
from ...engine import (
    Batch,
    FitSettings,
    Loss,
    LossCurve,
    SampleNumbers,
    SampleSource,
    Watch,
    is_watched,
    learning_rate_factor,
    look,
    make_optimizer,
    resolve_device,
    resolve_precision,
)
from ...errors import StaleArtifactError, ValueRangeError
from ...memory import kept_memory
from ...progress import progress_bar
from .compat import bare, swapped
from .trainer import NeuroDiffTrainer, build_with, last_checkpoint, read_checkpoint


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
    """Train a network with PyTC's loop, or go on where an interrupted training stopped.

    Parameters and result are those of :func:`connectomics_neurodiff.engine.fit`; `folder` keeps
    ``checkpoint_XXXXX.pth.tar`` (the resume point; PyTC's form, with the averaged weights added), ``loss.csv``, PyTC's
    TensorBoard files and, in ``host.log``, what PyTC prints.

    Raises
    ------
    StaleArtifactError
        If `folder` holds the checkpoint of another training.
    ValueRangeError
        If the loss stops being finite.
    """
    if settings.nodes > 1:
        raise ValueRangeError(
            f"The host engine trains on one machine; SYSTEM.NUM_NODES is {settings.nodes}. Use --engine native."
        )
    folder.mkdir(parents=True, exist_ok=True)
    device = resolve_device(settings.devices)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if device.type == "cpu" and resolve_precision(settings.precision, device) == torch.bfloat16:
        use_sound_convolutions(network)
    resume = _resume_point(folder, key)
    first_step = 0 if resume is None else int(read_checkpoint(resume)["iteration"])
    with open(folder / "host.log", "a") as log, redirect_stdout(log), kept_memory(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"connectomics\.")  # of PyTC's own code, about its own prints
        trainer = _FitTrainer(network, loss, dataset, settings, folder, device, first_step, label, key, watch)
        if resume is not None:
            trainer.resume(resume)
        trainer.train()
    trained = trainer.averaged.module if trainer.averaged is not None else bare(trainer.model)
    network.load_state_dict(trained.state_dict())
    return network.cpu().eval()


def check_resume_point(folder: Path, key: str) -> None:
    """Raise if `folder` holds the half-finished training of other settings, or a broken one."""
    _resume_point(folder, key)


def _resume_point(folder: Path, key: str) -> Path | None:
    if (folder / "last.ckpt").exists():
        raise StaleArtifactError(
            f"{folder} holds a training of the native engine. Go on with --engine native, choose another "
            "DATASET.OUTPUT_PATH, or use --force to start anew."
        )
    path = last_checkpoint(folder)
    if path is not None and read_checkpoint(path).get("neurodiff_key") != key:
        raise StaleArtifactError(
            f"{path} belongs to a training with other settings. Choose another DATASET.OUTPUT_PATH, or --force."
        )
    return path


def host_config(settings: FitSettings, folder: Path) -> CfgNode:
    """PyTC's configuration of a training that is ours in all but the loop."""
    cfg = get_cfg_defaults()
    cfg.DATASET.OUTPUT_PATH = str(folder)
    cfg.DATASET.MEAN, cfg.DATASET.STD = 0.0, 1.0  # our images are in [0, 1] as they are
    cfg.MODEL.TARGET_OPT, cfg.MODEL.OUT_PLANES = ["0"], 1
    cfg.SYSTEM.NUM_GPUS = 1
    cfg.SOLVER.ITERATION_TOTAL = settings.steps
    cfg.SOLVER.ITERATION_SAVE = settings.checkpoint_every
    cfg.SOLVER.ITERATION_VAL = settings.steps + 1
    cfg.SOLVER.SAMPLES_PER_BATCH = settings.batch_size
    cfg.MONITOR.ITERATION_NUM = [settings.log_every, 10 * settings.log_every]
    cfg.freeze()
    return cfg


class _FitTrainer(NeuroDiffTrainer):
    """PyTC's Trainer over one of our networks, losses and sample sources."""

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        dataset: SampleSource,
        settings: FitSettings,
        folder: Path,
        device: torch.device,
        first_step: int,
        label: str,
        key: str,
        watch: Watch | None,
    ) -> None:
        self.watch = watch
        self.loss, self.settings, self.label, self.key = loss, settings, label, key
        self.first_step, self.folder = first_step, folder
        self.total, self.count = 0.0, 0  # of the unfinished row of the loss curve
        self.autocast = resolve_precision(settings.precision, device)
        replicas = _replicas(settings, device)
        loader = _loader(dataset, settings, device, first_step, replicas)
        with swapped(
            host_trainer,
            build_model=build_with(network, device, replicas),
            build_optimizer=lambda _cfg, model: make_optimizer(model.parameters(), settings),
            build_lr_scheduler=lambda _cfg, optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: learning_rate_factor(step, settings)
            ),
            build_train_augmentor=lambda _cfg: None,
            build_dataloader=lambda *_args, **_options: loader,
        ):
            super().__init__(host_config(settings, folder), device, "train")
        self.start_iter = first_step
        self.total_iter_nums = settings.steps - first_step
        self.averaged = (
            AveragedModel(bare(self.model), multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
            if settings.ema_decay
            else None
        )
        self.output: Tensor | None = None
        bare(self.model).register_forward_hook(self._remember)

    def _remember(self, _network: nn.Module, _inputs: Any, output: Tensor) -> None:
        """The last output, for the monitor's pictures."""
        self.output = output.detach()

    def resume(self, path: Path) -> None:
        """Take up weights, average, optimiser and schedule."""
        content = read_checkpoint(path)
        bare(self.model).load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.lr_scheduler.load_state_dict(content["lr_scheduler"])
        if self.first_step < self.settings.steps:
            self.lr_scheduler.step()  # PyTC saves a step's checkpoint before the schedule moves on
        self.total, self.count = content["loss_so_far"]
        if self.averaged is not None:
            self.averaged.load_state_dict(content["averaged"])

    def checkpoint_content(self, iteration: int) -> dict[str, Any]:
        """PyTC's content, the key of the training and the averaged weights."""
        content = super().checkpoint_content(iteration)
        content |= {"neurodiff_key": self.key, "loss_so_far": (self.total, self.count)}
        if self.averaged is not None:
            content["averaged"] = self.averaged.state_dict()
        return content

    def save_checkpoint(self, iteration: int, is_best: bool = False) -> None:
        """One checkpoint is kept: the last. PyTC keeps all, of which a resumed training needs none."""
        super().save_checkpoint(iteration, is_best)
        for path in self.folder.glob("checkpoint_*.pth.tar"):
            if path.name != f"checkpoint_{iteration + 1:05d}.pth.tar":
                path.unlink()

    def train(self) -> None:
        """PyTC's loop: every step ends in its ``_train_misc`` (backward pass, monitor, checkpoint, schedule)."""
        self.model.train()
        self.curve = LossCurve(self.folder / "loss.csv", self.first_step)
        if self.first_step:  # a run that was killed while somebody looked looks again
            self._look(self.first_step)
        with progress_bar(label=self.label, total=self.settings.steps, initial=self.first_step) as bar:
            for iteration in range(self.first_step, self.settings.steps):
                self.start_time = time.perf_counter()
                self.optimizer.zero_grad()
                value, batch = self._accumulated()
                self._log(iteration + 1, float(value.detach()) * self.settings.accumulate, bar)
                self._train_misc(value, *self._for_monitor(batch), iteration, {self.label: value.detach()})
                self._look(iteration + 1)
                bar.update()
        if self.settings.steps % self.settings.checkpoint_every:
            self.save_checkpoint(self.settings.steps - 1)

    def _look(self, step: int) -> None:
        """Let the watch look at the averaged weights, without a word to the monitor, which draws what it knows."""
        if self.watch is not None and is_watched(self.watch, step, self.settings.steps):
            output = self.output
            look(self.watch, bare(self.model) if self.averaged is None else self.averaged.module, step, self)
            self.output = output

    def _log(self, step: int, value: float, bar: Any) -> None:
        """Add to the loss curve the mean since the row before, as the native engine does."""
        self.total, self.count = self.total + value, self.count + 1
        if step % self.settings.log_every and step != self.settings.steps:
            return
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        if not math.isfinite(mean):
            raise ValueRangeError(
                f"The {self.label} loss is {mean} around step {step}: it has diverged. Lower the learning rate."
            )
        self.curve.append(step, mean, self.optimizer.param_groups[0]["lr"])
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)

    def _accumulated(self) -> tuple[Tensor, Batch]:
        """Loss of the last micro-step, not yet backward; those before it have added their gradients."""
        self.data_time = 0.0
        for micro_step in range(self.settings.accumulate):
            start = time.perf_counter()
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(self.dataloader).items()}
            self.data_time += time.perf_counter() - start
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast != torch.float32):
                value, _ = self.loss(self.model, batch)
            value = value / self.settings.accumulate
            if micro_step + 1 < self.settings.accumulate:
                value.backward()
        return value, batch

    def _for_monitor(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor], list[list[Tensor]]]:
        """(prediction, volume, target, weight) as PyTC's monitor draws them: one channel of each, bounded."""
        target = batch.get("affinity", batch.get("target"))
        image = batch.get("image", batch.get("noisy"))
        if target is None or image is None:
            raise RuntimeError(f"A batch of {sorted(batch)} has nothing to show.")
        weight = torch.ones_like(target[:, -1:])
        # A loss that asks the network for more than its output, as that of agq, leaves no output to show.
        shown = torch.zeros_like(target) if self.output is None else self.output[:, : target.shape[1]]
        return shown[:, -1:].float(), image, [target[:, -1:]], [[weight]]

    def backward_pass(self, loss: Tensor) -> None:
        """PyTC's step, with clipping, and the average updated."""
        loss.backward()
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(bare(self.model))


def _replicas(settings: FitSettings, device: torch.device) -> int:
    """GPUs side by side; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.device_count() if settings.devices < 0 else settings.devices


def _loader(
    dataset: SampleSource, settings: FitSettings, device: torch.device, first_step: int, replicas: int
) -> Iterator[Batch]:
    """Batches from `first_step` on; one batch holds those of all GPUs, as PyTC's does."""
    numbers = SampleNumbers(first_step * settings.accumulate, settings.batch_size * replicas, 0, 1)
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=numbers,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)
