"""What a run would do, without doing it: ``--dry-run``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..config import dump_config
from ..geometry import tiles
from ..pairs.judge import JUDGE_CHANNELS, JUDGE_CONTEXT, JUDGE_PATCH
from ..provenance import sidecar_of
from . import networks
from .judging import LOOKS
from .parts import PHANTOM, missing_inputs, open_extra_volumes, open_parts
from .run import arms_of
from .unlabeled import mask_copies, open_unlabeled, pseudo_labelled, shapes_of_masks, unlabeled_shapes

if TYPE_CHECKING:
    import torch

#: A training step holds about three times what a forward pass does: activations, gradients, weights.
TRAINING_FACTOR = 3
#: Most voxels (z, y, x) of what a network is timed on without a GPU: a second or two for most networks of the recipes.
TIMED_PIECE = (16, 64, 64)
#: Seconds of a first pass that tell enough: making the kernels of oneDNN may take half a minute on a busy machine.
LONG_PASS = 60.0
#: Bytes a voxel of tissue that is segmented: image, three affinities, fragments, labels, and copies of these two.
LABELLING_BYTES = 4 + 3 * 4 + 7 * 8
#: (z, y, x) voxels.
Shape = tuple[int, int, int]
#: Arguments of a network for images of a size, on a device.
Inputs = Callable[[Sequence[int], str], tuple[Any, ...]]


def artefacts_of(cfg: CfgNode, stage: str, arm: str = "") -> list[Path]:
    """Files that a stage leaves, of all arms or of one."""
    folder = Path(cfg.DATASET.OUTPUT_PATH)
    arms = [arm] if arm else arms_of(cfg)
    copies = [f"{copy.name}.h5" for copy in mask_copies(cfg)]
    names = {
        "pseudo_labels": [path.relative_to(folder).as_posix() for path in pseudo_labelled(cfg)],
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
        for part in [*parts.values(), *open_extra_volumes(cfg, parts), *open_unlabeled(cfg, parts)]:
            where = "embedded phantom" if part.source == PHANTOM else part.source
            lines.append(f"  {part.name}: {where} {part.box.start}-{part.box.stop}, {tuple(part.volume.voxel_nm)} nm")
    lines += ["", "stages"]
    for stage in stages:
        if missing:
            lines.append(f"  {stage}")
            continue
        wanted = artefacts_of(cfg, stage, arm)
        there = [p for p in wanted if p.exists() and (sidecar_of(p).exists() or stage in ("metrics", "report"))]
        of_them = f", {len(there)} of them there already (reused if the settings agree)" if there else ""
        lines.append(f"  {stage}: {len(wanted)} file{'s' * (len(wanted) != 1)}{of_them}")
    lines += [
        "",
        "networks and estimates (this machine, from one pass over a piece of a patch)",
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


def estimates(cfg: CfgNode, stages: Sequence[str], shape: Shape | None, arm: str = "") -> list[Estimate]:
    """Time and memory of the stages with networks; `shape` of the train part, None if it is not there."""
    node = cfg.NEURODIFF.DIFFUSION
    found = []
    if "pseudo_labels" in stages and shape:
        found.append(_labelling_estimate(cfg))
    name = f"{node.ARCHITECTURE} ({node.PRESET})"
    if "diffusion" in stages:
        cost = _cost_of_pass(cfg, "denoiser", node.PATCH, training=True)
        steps = node.ITERATIONS * node.ACCUMULATE * node.BATCH
        seconds = steps * cost.seconds + _seconds_of_looking(cfg)
        found.append(Estimate("diffusion", seconds, node.BATCH * cost.memory, cost.title(name)))
    if "pairs" in stages and shape:
        cost = _cost_of_pass(cfg, "denoiser", node.TILE, training=False)
        passes = sum(len(tiles(one, node.TILE, node.OVERLAP)) for one in shapes_of_masks(cfg, shape))
        passes *= _passes_of_tile(cfg) * cfg.NEURODIFF.PAIRS.SAMPLES
        told = any(one.stage == "diffusion" for one in found)
        found.append(Estimate("pairs", passes * cost.seconds, cost.memory, "" if told else cost.title(name)))
    if "segmenter" in stages:
        trained = "pseudo_labels" in stages  # the real arm's
        arms = [one for one in ([arm] if arm else arms_of(cfg)) if not (trained and one == "real")]
        found.append(_segmenter_estimate(cfg, "segmenter", len(arms)))
    return found


def _passes_of_tile(cfg: CfgNode) -> int:
    """Through the denoiser, to paint a tile."""
    node = cfg.NEURODIFF.DIFFUSION
    return int(node.SAMPLER_STEPS * (1 if node.GUIDANCE == 1 else 2))


def _seconds_of_looking(cfg: CfgNode) -> float:
    """Of the judge's training, and of the tiles that it looks at while the denoiser is trained."""
    node = cfg.NEURODIFF.PAIRS
    if not node.LEAST_FOLLOWING and not node.MOST_MISSING:
        return 0.0
    tile = _cost_of_pass(cfg, "denoiser", cfg.NEURODIFF.DIFFUSION.TILE, training=False)
    patch = _cost_of_pass(cfg, "judge", (2 * JUDGE_CONTEXT + 1, JUDGE_PATCH, JUDGE_PATCH), training=True)
    return node.JUDGE_ITERATIONS * patch.seconds + LOOKS * _passes_of_tile(cfg) * tile.seconds


def _segmenter_estimate(cfg: CfgNode, stage: str, arms: int) -> Estimate:
    """Of training the affinity network that many times."""
    cost = _cost_of_pass(cfg, "segmenter", cfg.MODEL.INPUT_SIZE, training=True)
    batch = cfg.SOLVER.SAMPLES_PER_BATCH
    steps = cfg.SOLVER.ITERATION_TOTAL * cfg.SOLVER.ITERATION_STEP * batch * arms
    return Estimate(stage, steps * cost.seconds, batch * cost.memory, cost.title(cfg.MODEL.ARCHITECTURE))


def _labelling_estimate(cfg: CfgNode) -> Estimate:
    """Of training the real arm's network, and of the tissue that it segments in memory, piece by piece."""
    trained = _segmenter_estimate(cfg, "pseudo_labels", 1)
    shapes = unlabeled_shapes(cfg)
    tile, overlap = cfg.INFERENCE.INPUT_SIZE, networks.tile_overlap(cfg)
    passes = sum(len(tiles(shape, tile, overlap)) for shape in shapes) * (16 if cfg.INFERENCE.FLIP_AUGMENTATION else 1)
    cost = _cost_of_pass(cfg, "segmenter", tile, training=False)
    memory = max(math.prod(shape) for shape in shapes) * LABELLING_BYTES
    return replace(trained, seconds=trained.seconds + passes * cost.seconds, memory=max(trained.memory, memory))


def artefact_bytes(cfg: CfgNode, stages: Sequence[str], shapes: Mapping[str, Shape], arm: str = "") -> int:
    """Bytes that stages leave on the disk, roughly; arrays are compressed where they can be. `shapes` of each part."""
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
    if "pseudo_labels" in stages:
        size += sum(map(math.prod, unlabeled_shapes(cfg))) * (8 + 4)  # label, image
    painted = sum(math.prod(one) for one in shapes_of_masks(cfg, shapes["train"]))
    # Label; membrane, mitochondria, and image or what is dark.
    size += sum(stage in stages for stage in ("masks", "pairs")) * painted * (8 + 3)
    if "segmenter" in stages:
        segmenter = build_segmenter(cfg.MODEL.ARCHITECTURE, **networks.segmenter_options(cfg))
        size += of_training * _parameters(segmenter) * arms
    if "predictions" in stages:
        size += arms * 4 * 3 * (math.prod(shapes["tune"]) + math.prod(shapes["test"]))
    if "segmentations" in stages:
        size += arms * 8 * math.prod(shapes["test"]) * len(node.SEGMENT.METHODS)
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


@dataclass(frozen=True)
class Cost:
    """Of one sample: seconds, bytes; and how many parameters the network has."""

    seconds: float
    memory: float
    parameters: int

    def title(self, name: str) -> str:
        """The network as a dry run names it."""
        return f"{name}: {self.parameters:,} parameters"


def _cost_of_pass(cfg: CfgNode, kind: str, size: Sequence[int], *, training: bool) -> Cost:
    """Of the denoiser, the segmenter or the judge of a configuration."""
    import torch

    name, options = {
        "denoiser": (cfg.NEURODIFF.DIFFUSION.ARCHITECTURE, networks.denoiser_options),
        "segmenter": (cfg.MODEL.ARCHITECTURE, networks.segmenter_options),
        "judge": ("boundary", lambda _: {"context": JUDGE_CONTEXT, "channels": JUDGE_CHANNELS}),
    }[kind]
    machine = (*networks.device_and_precision(cfg), torch.get_num_threads())
    return _measured_cost(kind, name, json.dumps(options(cfg)), tuple(size), training, *machine)


@cache
def _measured_cost(
    kind: str,
    name: str,
    options: str,
    size: tuple[int, ...],
    training: bool,
    device: torch.device,
    precision: str,
    _threads: int,
) -> Cost:
    """A study asks for the same network again and again."""
    import torch

    from ..pairs.boundary_network import BoundaryNetwork
    from ..segmenters import build_segmenter
    from ..synthesis import build_denoiser

    kinds: dict[str, tuple[Callable[..., torch.nn.Module], Inputs]] = {
        "denoiser": (build_denoiser, _denoiser_inputs),
        "segmenter": (build_segmenter, _segmenter_inputs),
        "judge": (lambda _, **sizes: BoundaryNetwork(**sizes), _segmenter_inputs),
    }
    build, inputs = kinds[kind]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network = build(name, **json.loads(options))
        seconds = seconds_of_pass(network, inputs, size, device, precision, training=training)
    memory = _bytes_of_pass(network, inputs, size) * (TRAINING_FACTOR if training else 1)
    return Cost(seconds, memory, _parameters(network))


def seconds_of_pass(
    network: torch.nn.Module,
    inputs: Inputs,
    size: Sequence[int],
    device: torch.device,
    precision: str,
    *,
    training: bool,
) -> float:
    """What a network takes for one sample: measured on a piece of it, on a GPU on all of it.

    Parameters
    ----------
    network : torch.nn.Module
        Moved to the device and set to train or not, in place.
    inputs : callable
        Its arguments for a size and a device.
    size : sequence of 3 ints
        (z, y, x) voxels of the sample.
    device : torch.device
        Where to compute.
    precision : str
        ``"fp32"`` or ``"bf16"``.
    training : bool
        Forward and backward, or forward alone.
    """
    import torch

    from ..convolution import use_sound_convolutions
    from ..memory import kept_memory

    network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.train(training)
    piece = list(size)
    if device.type == "cpu":
        piece = [min(n, most) for n, most in zip(size, TIMED_PIECE, strict=True)]
        use_sound_convolutions(network)
    arguments = inputs(piece, str(device))

    def run() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = network(*arguments).float().mean()
        if training:
            value.backward()
        float(value.detach())  # waits for the device
        return time.perf_counter() - start

    with kept_memory(math.prod(piece)), torch.set_grad_enabled(training):
        first = run()  # makes oneDNN's kernels
        seconds = first if first > LONG_PASS else run()
    return seconds * math.prod(size) / math.prod(piece)


def _bytes_of_pass(network: torch.nn.Module, inputs: Inputs, size: Sequence[int]) -> float:
    """Bytes of all activations of one forward pass, without computing anything; leaves the network without numbers."""
    import torch

    network = network.to("meta")
    sizes: list[int] = []

    def remember(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    hooks = [m.register_forward_hook(remember) for m in network.modules() if not list(m.children())]
    with torch.no_grad():
        network(*inputs(size, "meta"))
    for hook in hooks:
        hook.remove()
    return float(sum(sizes))
