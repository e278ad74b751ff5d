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
from torch import nn
from yacs.config import CfgNode

from ...errors import CheckpointMismatch
from ...provenance import atomic_write
from .augmentation import AffinityTestAugmentor
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
        with swapped(host_trainer, TestAugmentor=AffinityTestAugmentor):
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
        }

    def update_checkpoint(self, checkpoint: str | None = None) -> None:
        """PyTC's loading, with any SYSTEM.PARALLEL (it counts on a wrapped model), and of weights only."""
        if checkpoint is None and self.mode == "train":
            return
        model, self.model = self.model, SimpleNamespace(module=bare(self.model))
        try:
            with swapped(torch, load=partial(torch.load, weights_only=True)):
                super().update_checkpoint(checkpoint)
        finally:
            self.model = model


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest iteration in a folder of PyTC's, None if there is none."""
    found = {}
    for path in folder.glob("checkpoint_*.pth.tar"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pth\.tar", path.name)
        if number:
            found[int(number.group(1))] = path
    return found[max(found)] if found else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of PyTC's form; no code in it is executed."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way a file can be broken
        raise CheckpointMismatch(
            f"{path} cannot be read ({type(error).__name__}); remove it, or use --force."
        ) from error
    return content


def build_with(network: nn.Module, device: torch.device, replicas: int) -> Callable[..., nn.Module]:
    """A ``build_model`` that gives this network, on several GPUs side by side if there are to be several."""

    def build(_cfg: CfgNode, _device: torch.device, _rank: int | None = None) -> nn.Module:
        network.to(device)
        return nn.DataParallel(network, device_ids=list(range(replicas))) if replicas > 1 else network

    return build
