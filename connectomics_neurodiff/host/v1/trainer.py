"""PyTC v1's Trainer with checkpoints that survive a kill; its loop and its monitor stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from connectomics.engine import trainer as host_trainer
from connectomics.engine.trainer import Trainer
from torch import Tensor, nn
from yacs.config import CfgNode

from ...errors import CheckpointMismatch, MissingInput, ValueRangeError
from ...provenance import atomic_write
from .augmentation import AffinityTestAugmentor
from .checks import check_dataset
from .compat import bare, swapped


class NeuroDiffTrainer(Trainer):  # type: ignore[misc]  # PyTC has no types
    """PyTC's Trainer; checkpoints that survive a kill, and affinities turned rightly in test-time augmentation.

    Parameters
    ----------
    cfg : CfgNode
        PyTC's configuration with our groups (:func:`~connectomics_neurodiff.host.v1.add_config`).
    device : torch.device
        Where the network runs; the CPU works.
    mode : {"train", "test"}
        What the trainer is for.
    rank : int, optional
        Rank of a distributed training.
    checkpoint : str, optional
        A checkpoint of PyTC's form to go on from.
    """

    model: Any

    def __init__(
        self,
        cfg: CfgNode,
        device: torch.device,
        mode: str = "train",
        rank: int | None = None,
        checkpoint: str | None = None,
    ) -> None:
        self.project_settings: dict[str, str] = {}
        loader = _checked_loader(host_trainer.build_dataloader)
        with swapped(host_trainer, TestAugmentor=AffinityTestAugmentor, build_dataloader=loader):
            super().__init__(cfg, device, mode, rank, checkpoint)

    def save_checkpoint(self, iteration: int, is_best: bool = False) -> None:
        """PyTC's checkpoint, written atomically, and with any SYSTEM.PARALLEL."""
        if not self.is_main_process:
            return
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "checkpoint_best.pth.tar" if is_best else f"checkpoint_{iteration + 1:05d}.pth.tar"
        with atomic_write(folder / name) as temporary:
            torch.save(self.checkpoint_content(iteration), temporary)

    def checkpoint_content(self, iteration: int) -> dict[str, Any]:
        """What PyTC keeps: iteration, weights, optimiser and schedule."""
        return {
            "iteration": iteration + 1,
            "state_dict": bare(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "neurodiff_settings": self.project_settings,
        }

    def update_checkpoint(self, checkpoint: str | None = None) -> None:
        """PyTC's loading, with any SYSTEM.PARALLEL (it counts on a wrapped model), of weights only, and strict.

        PyTC takes over what fits and leaves the rest as it was. That is kept for a new training that starts from an old
        one's weights (SOLVER.ITERATION_RESTART); a prediction, or a training that goes on, needs all of them.

        Raises
        ------
        CheckpointMismatch
            If the file is none of PyTC's, or belongs to another network.
        """
        if checkpoint is None:
            return
        self._require_weights(Path(checkpoint))
        model, self.model = self.model, SimpleNamespace(module=bare(self.model))
        try:
            with swapped(torch, load=partial(torch.load, weights_only=True)):
                super().update_checkpoint(checkpoint)
        finally:
            self.model = model
        stepwise = self.mode == "train" and self.cfg.SOLVER.LR_SCHEDULER_NAME != "ReduceLROnPlateau"
        if stepwise and self.lr_scheduler.last_epoch < self.start_iter:  # PyTC saves before the schedule moves on
            self.lr_scheduler.step()

    def _require_weights(self, path: Path) -> None:
        content = read_checkpoint(path)
        if not isinstance(content.get("state_dict"), dict):
            raise CheckpointMismatch(f"{path} holds no weights (state_dict), so it is no checkpoint of PyTC's.")
        given = host_trainer.update_state_dict(self.cfg, dict(content["state_dict"]), mode=self.mode)
        shapes = {name: tuple(value.shape) for name, value in bare(self.model).state_dict().items()}
        fit = {name for name, value in given.items() if shapes.get(name) == tuple(value.shape)}
        wrong = sorted((given.keys() ^ shapes.keys()) | (given.keys() & shapes.keys() - fit))
        if self.mode == "train" and self.cfg.SOLVER.ITERATION_RESTART and fit:
            return
        if wrong:
            raise CheckpointMismatch(
                f"{path} belongs to another network: {len(wrong)} of {len(shapes)} weights are missing or of another "
                f"size, the first is {wrong[0]}. MODEL.* must say what it was trained with."
            )

    def backward_pass(self, loss: Tensor) -> None:
        """PyTC's step, if the loss is a number."""
        if not torch.isfinite(loss.detach()).all():
            raise ValueRangeError(
                f"The loss is {float(loss.detach())}: the training has diverged, or the data are not finite. Lower "
                "SOLVER.BASE_LR, or check the images."
            )
        super().backward_pass(loss)


def _checked_loader(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``build_dataloader`` that refuses a training dataset without a sample in it."""

    def build(cfg: CfgNode, augmentor: Any = None, mode: str = "train", **options: Any) -> Any:
        loader = plain(cfg, augmentor, mode, **options)
        if mode == "train" and hasattr(loader, "dataset"):
            check_dataset(loader.dataset)
        return loader

    return build


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest iteration in a folder of PyTC's, None if there is none."""
    found = {}
    for path in folder.glob("checkpoint_*.pth.tar"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pth\.tar", path.name)
        if number:
            found[int(number.group(1))] = path
    return found[max(found)] if found else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of PyTC's form; no code in it is executed.

    Raises
    ------
    MissingInput
        If it is not there.
    CheckpointMismatch
        If it cannot be read, or is not one.
    """
    if not path.is_file():
        raise MissingInput(f"No checkpoint at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way a file can be broken
        raise CheckpointMismatch(f"{path} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("iteration", 0), int):
        raise CheckpointMismatch(f"{path} is no checkpoint of PyTC's: no dictionary with a whole 'iteration'.")
    return content


def build_with(network: nn.Module, device: torch.device, replicas: int) -> Callable[..., nn.Module]:
    """A ``build_model`` that gives this network, on several GPUs side by side if there are to be several."""

    def build(_cfg: CfgNode, _device: torch.device, _rank: int | None = None) -> nn.Module:
        network.to(device)
        return nn.DataParallel(network, device_ids=list(range(replicas))) if replicas > 1 else network

    return build
