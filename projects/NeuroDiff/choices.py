"""What single choices of the denoiser's training are worth, at equal CPU seconds.

    python projects/NeuroDiff/choices.py configs/NeuroDiff-AC4-CPU.yaml DATA_FOLDER SEGMENTER \
        --box 60 256 512 68 512 768 --iterations 300 --json choices.json [--choices recipe l1 huber] [--seed 1]

Every choice is the recipe with one thing changed. A denoiser is trained on the recipe's train part for as long as the
recipe takes for --iterations; what costs more or less than it gets fewer or more of them, by CPU seconds timed by turns
with the recipe's, so that a machine that is busy with something else harms none. Then it paints the masks of --box,
which lies outside of the train part, as the recipe samples. SEGMENTER is one that was trained on the real train part
alone. For every row: iterations, how well the segmenter finds the mask's boundaries (average precision), 3D-FID from
the real image of that mask, share of dark voxels deep inside neurons, power of fine detail over the real one, spread,
CPU seconds of painting. Rows that FILE.json holds are kept.

--start CHECKPOINT begins every training from the weights of a denoiser, as from one of several other tissues.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import Scorer, kept_rows, write_rows
from torch import Tensor, nn

from connectomics_neurodiff.checkpoints import load_checkpoint, load_weights
from connectomics_neurodiff.conditions import membrane_from_labels, organelles, with_background
from connectomics_neurodiff.config import dump_config, load_config
from connectomics_neurodiff.engine import Batch, Loss, fit
from connectomics_neurodiff.errors import ConfigError, UserError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.pipeline import networks
from connectomics_neurodiff.pipeline.parts import open_extra_volumes, open_parts
from connectomics_neurodiff.pipeline.stages import diffusion_loss
from connectomics_neurodiff.provenance import hash_of
from connectomics_neurodiff.synthesis import (
    DiffusionCrops,
    DiffusionProcess,
    GuidedDenoiser,
    build_denoiser,
    cosine_betas,
    synthesise,
    velocity_weight,
)
from connectomics_neurodiff.volume import Volume

#: Weight of a voxel on a membrane against one elsewhere, where membranes are weighed.
MEMBRANE_WEIGHT = 3.0
#: Where parts of x_t are hidden: share of the samples, share of their squares, side of a square in pixels.
HIDDEN_SAMPLES, HIDDEN_SQUARES, HIDDEN_SIDE = 0.5, 0.5, 16
#: Keys that leave an iteration as long as it was.
FREE_KEYS = {"LOSS", "PREDICTION", "NOISE_SPREAD", "SNR_GAMMA", "SCHEDULE", "EMA_DECAY"}
#: Arguments that say which rows are made, not how.
ROWS = ("choices",)
#: Share of the time that goes to another training before or after the recipe's own.
STAGE_SHARE = 0.3


@dataclass(frozen=True)
class Choice:
    """What differs from the recipe: keys of NEURODIFF.DIFFUSION, the network, the learning rate, the loss."""

    keys: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    error: Callable[[Tensor], Tensor] = torch.square
    on_membrane: float = 1.0
    hidden: bool = False
    small_crops: bool = False
    half_first: bool = False
    distilled: bool = False

    @property
    def has_own_loss(self) -> bool:
        """Whether `weighed_loss` stands in for the recipe's."""
        return self.error is not torch.square or self.on_membrane != 1

    @property
    def is_free(self) -> bool:
        """Whether an iteration takes as long as one of the recipe."""
        return not self.options and not self.small_crops and set(self.keys) <= FREE_KEYS


def huber(error: Tensor) -> Tensor:
    """Squared up to 1, the spread of the image, then in proportion; as large as the square where it is that."""
    return 2 * nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


CHOICES: dict[str, Choice] = {
    "recipe": Choice(),
    "l1": Choice({"LOSS": "l1"}),
    "huber": Choice(error=huber),
    "membranes": Choice(on_membrane=MEMBRANE_WEIGHT),
    "hidden image": Choice(hidden=True),
    "velocity": Choice({"PREDICTION": "velocity"}),
    "even levels": Choice({"NOISE_SPREAD": 0.0}),
    "narrow levels": Choice({"NOISE_SPREAD": 1.2}),
    "min-SNR": Choice({"SNR_GAMMA": 5.0}),
    "small crops": Choice(small_crops=True),
    "rate halved": Choice(rate=0.5),
    "rate doubled": Choice(rate=2.0),
    "constant rate": Choice({"SCHEDULE": "constant"}),
    "short average": Choice({"EMA_DECAY": 0.95}),
    "long average": Choice({"EMA_DECAY": 0.995}),
    "tiny network": Choice(options={"multipliers": (2, 3, 4)}),
    "small network": Choice(options={"multipliers": (3, 4, 6)}),
    "large network": Choice(options={"multipliers": (4, 6, 8)}),
    "single pixels": Choice(options={"multipliers": (2, 3, 4, 6), "pixels": 1, "condition_channels": (16, 32, 48, 64)}),
    "one group": Choice(options={"groups": 1}),
    "concat": Choice({"CONDITIONING": "concat"}),
    "msc": Choice({"CONDITIONING": "msc"}),
    "no rgm": Choice({"RGM": False}),
    "half resolution first": Choice(half_first=True),
    "distilled": Choice(distilled=True),
    # For recipes with several voxel sizes.
    "no embedding": Choice(options={"resolution_embedding": False}),
    "no rpge": Choice({"RPGE": False}),
    "no voxel size": Choice({"RPGE": False}, options={"resolution_embedding": False}),
}


def weighed_loss(
    network: nn.Module, batch: Batch, *, weight: Tensor, size: Callable[[Tensor], Tensor], on_membrane: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss with another size of an error, and membranes weighed otherwise."""
    predicted = network(batch["noisy"], batch["t"], batch["condition"], batch["voxel_nm"]).float()
    errors = size(predicted - batch["target"].float()) * weight[batch["t"]].view(-1, 1, 1, 1, 1)
    voxels = 1 + (on_membrane - 1) * (batch["condition"][:, :1] == 1)
    return (errors * voxels).sum() / voxels.sum(), {}


def blindfolded(loss: Loss, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss where squares of x_t are blank, through all sections: only the mask tells what is there."""
    noisy = batch["noisy"]
    b, _, _, y, x = noisy.shape
    squares = (b, 1, 1, -(-y // HIDDEN_SIDE), -(-x // HIDDEN_SIDE))
    hidden = (torch.rand(squares) < HIDDEN_SQUARES) & (torch.rand(b, 1, 1, 1, 1) < HIDDEN_SAMPLES)
    hidden = hidden.repeat_interleave(HIDDEN_SIDE, 3).repeat_interleave(HIDDEN_SIDE, 4)[..., :y, :x]
    return loss(network, {**batch, "noisy": noisy.masked_fill(hidden, 0)})


def distilling_loss(network: nn.Module, batch: Batch, *, teacher: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of one pass against the guided prediction, which takes two (Meng et al. 2023, first stage)."""
    given = [batch[name] for name in ("noisy", "t", "condition", "voxel_nm")]
    with torch.no_grad():
        target = teacher(*given)
    return (network(*given) - target).float().square().mean(), {}


def loss_of(choice: Choice, cfg: Any, process: DiffusionProcess) -> Loss:
    """What a choice trains on."""
    loss = diffusion_loss(cfg, process)
    if choice.has_own_loss:
        weight = velocity_weight(process, "l2")
        loss = partial(weighed_loss, weight=weight, size=choice.error, on_membrane=choice.on_membrane)
    return partial(blindfolded, loss) if choice.hidden else loss


def config_of(choice: Choice, options: argparse.Namespace) -> Any:
    """The recipe with one thing changed."""
    cfg = load_config(options.recipe, overrides=["DATASET.INPUT_PATH", options.data, *options.set])
    node = cfg.NEURODIFF.DIFFUSION
    for key, value in choice.keys.items():
        node[key] = value
    if choice.small_crops:  # as many voxels of an iteration, of two places
        node["PATCH"], node["BATCH"] = [node.PATCH[0], *(round(n / 2**0.5 / 8) * 8 for n in node.PATCH[1:])], 2
    node["LEARNING_RATE"] *= choice.rate
    return cfg


def at_half_resolution(volume: Volume) -> Volume:
    """Sections of half as many rows and columns: the image by means of four pixels, masks by one of them."""
    y, x = (n // 2 * 2 for n in volume.shape[1:])
    image = volume.array("image")[:, :y, :x].reshape(-1, y // 2, 2, x // 2, 2).mean((2, 4))
    masks = {role: np.asarray(array[:, :y:2, :x:2]) for role, array in volume.arrays.items() if role != "image"}
    z_nm, y_nm, x_nm = volume.voxel_nm
    return replace(volume, image=image.astype(np.float32), **masks, voxel_nm=(z_nm, 2 * y_nm, 2 * x_nm))


class Training:
    """One choice: its network, and how long it is trained."""

    def __init__(self, choice: Choice, options: argparse.Namespace) -> None:
        self.choice, self.options, self.cfg = choice, options, config_of(choice, options)
        node = self.cfg.NEURODIFF.DIFFUSION
        self.process = DiffusionProcess(cosine_betas(node.STEPS, node.COSINE_OFFSET), node.PREDICTION)
        parts = open_parts(self.cfg)
        self.volumes = [part.load() for part in (parts["train"], *open_extra_volumes(self.cfg, parts))]
        torch.manual_seed(options.seed)
        network_options = {**networks.denoiser_options(self.cfg), **choice.options}
        self.network = build_denoiser(node.ARCHITECTURE, **network_options)
        if options.start:
            load_weights(self.network, load_checkpoint(options.start, kind="denoiser"))
        self.loss = loss_of(choice, self.cfg, self.process)
        self.iterations: list[int] = []

    def run(self) -> None:
        """Train for as long as there is time."""
        time_left = float(self.options.iterations)
        if not self.choice.is_free:
            time_left *= speed_beside_recipe(self, self.options)
        if self.choice.half_first:
            self._fit([at_half_resolution(v) for v in self.volumes], self.loss, STAGE_SHARE * time_left)
        other = self.choice.half_first or self.choice.distilled
        self._fit(self.volumes, self.loss, (1 - STAGE_SHARE * other) * time_left)
        if self.choice.distilled:
            teacher = copy.deepcopy(self.guided()).eval()
            loss = partial(distilling_loss, teacher=teacher)
            # Two passes of the teacher beside a pass there and twice as much back.
            self._fit(self.volumes, loss, STAGE_SHARE * time_left * 3 / 5)

    def _fit(self, volumes: list[Volume], loss: Loss, iterations: float) -> None:
        settings = replace(networks.diffusion_fit_settings(self.cfg), steps=max(1, round(iterations)))
        crops = self.crops(volumes)
        with tempfile.TemporaryDirectory() as folder:
            self.network = fit(self.network, loss, crops, settings, Path(folder), label="denoiser")
        self.iterations.append(settings.steps)
        self.grey = crops.scales[0]

    def crops(self, volumes: list[Volume]) -> DiffusionCrops:
        """What it learns from."""
        patch, arguments = tuple(self.cfg.NEURODIFF.DIFFUSION.PATCH), networks.diffusion_crop_options(self.cfg)
        return DiffusionCrops(volumes, patch, self.options.seed, self.process, **arguments)

    def seconds_of_step(self, crops: DiffusionCrops, step: int) -> float:
        """CPU seconds of an iteration but for the optimiser's."""
        node = self.cfg.NEURODIFF.DIFFUSION
        precision = networks.diffusion_fit_settings(self.cfg).precision
        start = time.process_time()
        samples = [crops[step * node.BATCH + i] for i in range(node.BATCH)]
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = self.loss(self.network, batch)[0]
        value.backward()
        seconds = time.process_time() - start
        self.network.zero_grad()
        return seconds

    def guided(self) -> nn.Module:
        """The network with the recipe's guidance."""
        node = self.cfg.NEURODIFF.DIFFUSION
        return GuidedDenoiser(self.network, node.GUIDANCE, self.process.step_at(node.GUIDANCE_ABOVE))

    def paint(self, volume: Volume) -> np.ndarray:
        """The image of a volume's masks."""
        membrane = membrane_from_labels(volume.array("label"), volume.voxel_nm, self.cfg.NEURODIFF.MEMBRANE_NM)
        image = synthesise(
            self.network if self.choice.distilled else self.guided(),
            self.process,
            with_background(membrane, volume.array("label")),
            organelles(volume.mito_array, volume.dark_array),
            volume.voxel_nm,
            seed=self.options.seed,
            grey=self.grey,
            tile=volume.shape,
            overlap=(0, 0, 0),
            **networks.sampling_arguments(self.cfg),
        )
        return np.asarray(image)


def speed_beside_recipe(training: Training, options: argparse.Namespace) -> float:
    """Iterations of a training in the time of one of the recipe's: the two by turns, the fastest of each."""
    both = [Training(CHOICES["recipe"], options), training]
    for one in both:
        one.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    crops = [one.crops(one.volumes) for one in both]
    times = [[one.seconds_of_step(of, step) for one, of in zip(both, crops, strict=True)] for step in range(8)]
    recipe, choice = np.min(times[2:], axis=0)
    return float(recipe / choice)


def row_of(choice: Choice, options: argparse.Namespace, held_out: Volume, scorer: Scorer) -> dict[str, Any]:
    """Train, paint, judge."""
    training = Training(choice, options)
    start = time.process_time()
    training.run()
    trained = time.process_time()
    image = training.paint(held_out)
    painted = time.process_time()
    return {
        "iterations": sum(training.iterations),
        "cpu_seconds": trained - start,
        "painting": painted - trained,
        **scorer.row(image),
    }


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="configuration file")
    parser.add_argument("data", help="folder of its volumes")
    parser.add_argument("segmenter", type=Path, help="trained on the real train part only")
    parser.add_argument("--box", type=int, nargs=6, required=True, metavar="N", help="z0 y0 x0 z1 y1 x1, held out")
    parser.add_argument("--iterations", type=int, default=300, help="of the recipe; the others take as long")
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="denoiser whose weights trainings begin with")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="settings that the recipe lacks")
    parser.add_argument("--patch", nargs=3, type=int, default=(8, 64, 64), metavar="N", help="of the 3D-FID")
    parser.add_argument("--patches", type=int, default=96)
    parser.add_argument("--threshold", type=float, default=0.1, help="of waterz")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows; those that are there are not made again")
    return parser.parse_args()


def held_out_part(options: argparse.Namespace, cfg: Any) -> Volume:
    """The box to paint, as the recipe's train part is read: with its masks, and with what is dark if the recipe asks.

    Raises
    ------
    ConfigError
        If the denoisers are trained on some of it.
    """
    box, train = Box.of(options.box), open_parts(cfg)["train"]
    if box.overlaps(train.box):
        raise ConfigError(f"--box must lie outside the train part, {list(train.box.start)} to {list(train.box.stop)}.")
    return replace(train, box=box).load()


def main() -> None:
    """Print a table."""
    options = parse()
    try:
        cfg = config_of(CHOICES["recipe"], options)
        options.config = hash_of(dump_config(cfg))  # with the files that the recipe builds on
        rows = kept_rows(options, ROWS)
        held_out = held_out_part(options, cfg)
        membrane = membrane_from_labels(held_out.array("label"), held_out.voxel_nm, cfg.NEURODIFF.MEMBRANE_NM)
        scorer = Scorer(options, held_out, membrane)
        rows.setdefault("real", scorer.row(held_out.array("image")))
        for name in options.choices:
            if name not in rows:
                rows[name] = row_of(CHOICES[name], options, held_out, scorer)
                write_rows(options, ROWS, rows)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    names = ("iterations", "average_precision", "fid3d", "dark_share", "fine_power", "grey_std", "painting")
    print(f"| {'choice':21} | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for row in [name for name in ("real", *CHOICES) if name in rows]:
        values = rows[row]
        print(f"| {row:21} | " + " | ".join(f"{values[n]:.3f}" if n in values else "" for n in names) + " |")


if __name__ == "__main__":
    main()
