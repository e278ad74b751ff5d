"""What a run would do, without doing it: ``--dry-run``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..config import dump_config
from ..geometry import tiles
from ..provenance import sidecar_of
from . import networks
from .parts import PHANTOM, missing_inputs, open_extra_volumes, open_parts
from .run import arms_of

if TYPE_CHECKING:
    import torch

#: A training step costs about three forward passes: one forward, two backward.
TRAINING_FACTOR = 3


def artefacts_of(cfg: CfgNode, stage: str, arm: str = "") -> list[Path]:
    """Files that a stage leaves, of all arms or of one."""
    folder = Path(cfg.DATASET.OUTPUT_PATH)
    arms = [arm] if arm else arms_of(cfg)
    copies = [f"copy_{copy:03d}.h5" for copy in range(cfg.NEURODIFF.REMODEL.COPIES)]
    names = {
        "diffusion": ["diffusion/checkpoint.pt"],
        "masks": [f"masks/{name}" for name in copies],
        "pairs": [f"pairs/{name}" for name in copies],
        "segmenter": [f"segmenter/{arm}/checkpoint.pt" for arm in arms],
        "predictions": [f"predictions/{arm}_{part}.h5" for arm in arms for part in ("tune", "test")],
        "segmentations": [
            f"segmentations/{arm}_{method}.h5" for arm in arms for method in cfg.NEURODIFF.SEGMENT.METHODS
        ],
        "metrics": ["metrics.json", "columns.json", "boundaries.json"],
        "report": ["report.html"],
    }
    return [folder / name for name in names[stage]]


def describe_plan(cfg: CfgNode, stages: Sequence[str], arm: str = "") -> str:
    """Text of a dry run: resolved configuration, inputs, stages, networks, estimates of time and memory."""
    missing = missing_inputs(cfg)
    parts = {} if missing else open_parts(cfg)
    lines = [dump_config(cfg).rstrip(), "", "inputs"]
    if missing:
        lines += [f"  missing: {path}" for path in missing]
    else:
        for part in [*parts.values(), *open_extra_volumes(cfg, parts)]:
            where = "embedded phantom" if part.source == PHANTOM else part.source
            lines.append(f"  {part.name}: {where} {part.box.start}-{part.box.stop}, {tuple(part.volume.voxel_nm)} nm")
    lines += ["", "stages"]
    for stage in stages:
        wanted = artefacts_of(cfg, stage, arm)
        there = [p for p in wanted if p.exists() and (sidecar_of(p).exists() or stage in ("metrics", "report"))]
        of_them = f", {len(there)} of them there already (reused if the settings agree)" if there else ""
        lines.append(f"  {stage}: {len(wanted)} file{'s' * (len(wanted) != 1)}{of_them}")
    lines += [
        "",
        "networks and estimates (this machine, from the operations of one pass)",
    ]
    shape = parts["train"].box.shape if parts else None
    lines += [line for estimate in estimates(cfg, stages, shape, arm) for line in estimate.lines]
    return "\n".join(lines)


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take.

    Attributes
    ----------
    stage : str
        Its name.
    seconds, memory : float
        On this machine; bytes.
    network : str
        The network that it needs first, with its parameters; empty if a stage before has named it.
    """

    stage: str
    seconds: float
    memory: float
    network: str = ""

    @property
    def lines(self) -> list[str]:
        """As a dry run prints it."""
        amount = f"{self.seconds / 3600:.1f} h" if self.seconds > 5400 else f"{self.seconds / 60:.1f} min"
        line = f"  {self.stage}: about {amount}, {self.memory / 2**30:.1f} GiB"
        return [f"  {self.network}", line] if self.network else [line]


def estimates(cfg: CfgNode, stages: Sequence[str], shape: tuple[int, int, int] | None, arm: str = "") -> list[Estimate]:
    """Time and memory of the stages with networks; `shape` of the train part, None if it is not there."""
    from ..segmenters import build_segmenter
    from ..synthesis import build_denoiser

    speed = _operations_per_second(cfg)
    node = cfg.NEURODIFF.DIFFUSION
    found = []
    if "diffusion" in stages or "pairs" in stages:
        denoiser = build_denoiser(node.ARCHITECTURE, **networks.denoiser_options(cfg))
        flops, memory = _cost_of_pass(denoiser, lambda device: _denoiser_inputs(node.PATCH, device))
        name = f"{node.ARCHITECTURE} ({node.PRESET}): {_parameters(denoiser):,} parameters"
        steps = node.ITERATIONS * node.ACCUMULATE * node.BATCH
        seconds, memory = TRAINING_FACTOR * flops * steps / speed, TRAINING_FACTOR * memory * node.BATCH
        found.append(Estimate("diffusion", seconds, memory, name))
        if shape:
            flops, memory = _cost_of_pass(denoiser, lambda device: _denoiser_inputs(node.TILE, device))
            images = cfg.NEURODIFF.REMODEL.COPIES * cfg.NEURODIFF.PAIRS.SAMPLES
            passes = len(tiles(shape, node.TILE, node.OVERLAP)) * node.SAMPLER_STEPS * images
            passes *= 1 if node.GUIDANCE == 1 else 2
            found.append(Estimate("pairs", flops * passes / speed, memory))
    segmenter = build_segmenter(cfg.MODEL.ARCHITECTURE, **networks.segmenter_options(cfg))
    flops, memory = _cost_of_pass(segmenter, lambda device: _segmenter_inputs(cfg.MODEL.INPUT_SIZE, device))
    name = f"{cfg.MODEL.ARCHITECTURE}: {_parameters(segmenter):,} parameters"
    arms = 1 if arm else len(arms_of(cfg))
    batch = cfg.SOLVER.SAMPLES_PER_BATCH
    steps = cfg.SOLVER.ITERATION_TOTAL * cfg.SOLVER.ITERATION_STEP * batch * arms
    seconds = TRAINING_FACTOR * flops * steps / speed
    return [*found, Estimate("segmenter", seconds, TRAINING_FACTOR * memory * batch, name)]


def artefact_bytes(cfg: CfgNode, stages: Sequence[str], voxels: Mapping[str, int], arm: str = "") -> int:
    """Bytes that stages leave on the disk, roughly; arrays are compressed where they can be. `voxels` of each part."""
    from ..segmenters import build_segmenter
    from ..synthesis import build_denoiser

    node = cfg.NEURODIFF
    arms = 1 if arm else len(arms_of(cfg))
    # Weights and, in the resume point, weights, three moments (with AMSGrad) and their average.
    of_training = 4 * 6
    size = 0
    if "diffusion" in stages:
        denoiser = build_denoiser(node.DIFFUSION.ARCHITECTURE, **networks.denoiser_options(cfg))
        size += of_training * _parameters(denoiser)
    copies = sum(stage in stages for stage in ("masks", "pairs")) * node.REMODEL.COPIES
    size += copies * voxels["train"] * (8 + 3)  # label; membrane, mitochondria, and image or what is dark
    if "segmenter" in stages:
        segmenter = build_segmenter(cfg.MODEL.ARCHITECTURE, **networks.segmenter_options(cfg))
        size += of_training * _parameters(segmenter) * arms
    if "predictions" in stages:
        size += arms * 4 * 3 * (voxels["tune"] + voxels["test"])
    if "segmentations" in stages:
        size += arms * 8 * voxels["test"] * len(node.SEGMENT.METHODS)
    return size


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _segmenter_inputs(size: Sequence[int], device: str) -> tuple[Any, ...]:
    import torch

    return (torch.zeros(1, 1, *size, device=device),)


def _denoiser_inputs(size: Sequence[int], device: str) -> tuple[Any, ...]:
    import torch

    return (
        torch.zeros(1, 1, *size, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        torch.zeros(1, 2, *size, device=device),
        torch.ones(1, 3, device=device),
    )


def _cost_of_pass(network: torch.nn.Module, inputs: Callable[[str], tuple[Any, ...]]) -> tuple[float, float]:
    """Floating-point operations of one forward pass, and bytes of all its activations, without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = network.to("meta")
    sizes: list[int] = []

    def remember(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    hooks = [m.register_forward_hook(remember) for m in network.modules() if not list(m.children())]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs("meta"))
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), float(sum(sizes))


def _operations_per_second(cfg: CfgNode) -> float:
    """Speed of a typical convolution on the run's device."""
    device, precision = networks.device_and_precision(cfg)
    return _measured_speed(device, precision)


@cache
def _measured_speed(device: torch.device, precision: str) -> float:
    import torch

    convolution = torch.nn.Conv3d(32, 32, 3, padding=1).to(device)
    image = torch.zeros(1, 32, 16, 64, 64, device=device).contiguous(memory_format=torch.channels_last_3d)
    repeats = 4
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        convolution(image)
        start = time.perf_counter()
        for _ in range(repeats):
            value = convolution(image)
        float(value[0, 0, 0, 0, 0])
    return repeats * 2 * 27 * 32 * 32 * image[0, 0].numel() / (time.perf_counter() - start)
