"""What single choices of the denoiser's training are worth, at equal CPU seconds.

    python projects/NeuroDiff/choices.py configs/NeuroDiff-AC4-CPU.yaml DATA_FOLDER SEGMENTER \
        --box 60 256 512 68 512 768 --seconds 240 --json choices.json [--choices recipe l1 huber]

Every choice is the recipe with one thing changed. A denoiser is trained on the recipe's train part for as many
iterations as fit into the seconds, timed first; then it paints the masks of --box, which lies outside of it, as the
recipe samples. SEGMENTER is one that was trained on the real train part alone. For every row: iterations, how well the
segmenter finds the mask's boundaries (average precision), 3D-FID from the real image of that mask, share of dark voxels
deep inside neurons, power of fine detail over the real one, grey spread. Rows that FILE.json holds are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import Judge
from torch import Tensor, nn

from connectomics_neurodiff.conditions import membrane_from_labels, organelles, with_background, with_dark_bodies
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.engine import Batch, Loss, fit
from connectomics_neurodiff.errors import UserError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.pipeline import networks
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.pipeline.stages import diffusion_loss
from connectomics_neurodiff.provenance import write_json
from connectomics_neurodiff.synthesis import (
    DiffusionCrops,
    DiffusionProcess,
    GuidedDenoiser,
    build_denoiser,
    cosine_betas,
    synthesise,
    velocity_weight,
)
from connectomics_neurodiff.volume import Volume, open_volume

#: Keys of NEURODIFF.DIFFUSION that a choice changes.
CHOICES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "l1": {"LOSS": "l1"},
    "huber": {},
    "membranes": {},
    "rate halved": {},
    "rate doubled": {},
    "constant rate": {"SCHEDULE": "constant"},
    "short average": {"EMA_DECAY": 0.95},
    "long average": {"EMA_DECAY": 0.995},
    "small crops": {},
    "concat": {"CONDITIONING": "concat"},
    "msc": {"CONDITIONING": "msc"},
    "no rgm": {"RGM": False},
    "narrow levels": {"NOISE_SPREAD": 1.2},
    "even levels": {"NOISE_SPREAD": 0.0},
    "velocity": {"PREDICTION": "velocity"},
    "min-SNR": {"SNR_GAMMA": 5.0},
}
#: Weight of a voxel on a membrane against one elsewhere, of the choice "membranes".
MEMBRANE_WEIGHT = 3.0


def weighed_loss(
    network: nn.Module, batch: Batch, *, weight: Tensor, size: Callable[[Tensor], Tensor], on_membrane: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss with another size of an error, and membranes weighed otherwise."""
    predicted = network(batch["noisy"], batch["t"], batch["condition"], batch["voxel_nm"]).float()
    errors = size(predicted - batch["target"].float()) * weight[batch["t"]].view(-1, 1, 1, 1, 1)
    voxels = 1 + (on_membrane - 1) * (batch["condition"][:, :1] == 1)
    return (errors * voxels).sum() / voxels.sum(), {}


def huber(error: Tensor) -> Tensor:
    """Squared up to 1, the spread of the image, then in proportion; as large as the square where it is that."""
    return 2 * nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


def loss_of(choice: str, cfg: Any, process: DiffusionProcess) -> Loss:
    """What a choice trains on."""
    own = partial(weighed_loss, weight=velocity_weight(process, "l2"))
    if choice == "huber":
        return partial(own, size=huber, on_membrane=1.0)
    if choice == "membranes":
        return partial(own, size=torch.square, on_membrane=MEMBRANE_WEIGHT)
    return diffusion_loss(cfg, process)


def config_of(choice: str, options: argparse.Namespace) -> Any:
    """The recipe with one thing changed."""
    cfg = load_config(options.recipe, overrides=["DATASET.INPUT_PATH", options.data, *options.set])
    node = cfg.NEURODIFF.DIFFUSION
    for key, value in CHOICES[choice].items():
        node[key] = value
    if choice == "small crops":  # as many voxels of an iteration, of two places
        node["PATCH"], node["BATCH"] = [node.PATCH[0], *(round(n / 2**0.5 / 8) * 8 for n in node.PATCH[1:])], 2
    if choice.startswith("rate"):
        node["LEARNING_RATE"] *= {"rate halved": 0.5, "rate doubled": 2.0}[choice]
    return cfg


def iterations_in(
    seconds: float, network: nn.Module, loss: Loss, crops: DiffusionCrops, batch: int, precision: str
) -> int:
    """How many iterations of a training fit into CPU seconds; the network is left as it was."""
    trial = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(trial.parameters())
    times = []
    for step in range(8):
        start = time.process_time()
        samples = [crops[step * batch + i] for i in range(batch)]
        stacked = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss(trial, stacked)[0]
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.process_time() - start)
    return max(1, round(seconds / float(np.median(times[2:]))))


def row_of(choice: str, options: argparse.Namespace, held_out: Volume, judge: Judge) -> dict[str, Any]:
    """Train, paint, judge."""
    cfg = config_of(choice, options)
    node = cfg.NEURODIFF.DIFFUSION
    train = open_parts(cfg)["train"].load()
    torch.manual_seed(options.seed)
    network = build_denoiser(node.ARCHITECTURE, **networks.denoiser_options(cfg))
    process = DiffusionProcess(cosine_betas(node.STEPS, node.COSINE_OFFSET), node.PREDICTION)
    crops = DiffusionCrops([train], tuple(node.PATCH), options.seed, process, **networks.diffusion_crop_options(cfg))
    loss = loss_of(choice, cfg, process)
    settings = networks.diffusion_fit_settings(cfg)
    steps = iterations_in(options.seconds, network, loss, crops, node.BATCH, settings.precision)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        network = fit(network, loss, crops, replace(settings, steps=steps), Path(folder), label=choice)
    seconds = time.process_time() - start
    membrane = membrane_from_labels(held_out.array("label"), held_out.voxel_nm, cfg.NEURODIFF.MEMBRANE_NM)
    image = synthesise(
        GuidedDenoiser(network, node.GUIDANCE, process.step_at(node.GUIDANCE_ABOVE)),
        process,
        with_background(membrane, held_out.array("label")),
        organelles(held_out.mito_array, held_out.dark_array),
        held_out.voxel_nm,
        seed=options.seed,
        grey=crops.scales[0],
        tile=held_out.shape,
        overlap=(0, 0, 0),
        label=f"{choice}, painting",
        **networks.sampling_arguments(cfg),
    )
    return {"iterations": steps, "cpu_seconds": seconds, **judge.row(np.asarray(image))}


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="configuration file")
    parser.add_argument("data", help="folder of its volumes")
    parser.add_argument("segmenter", type=Path, help="trained on the real train part only")
    parser.add_argument("--box", type=int, nargs=6, required=True, metavar="N", help="z0 y0 x0 z1 y1 x1, held out")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU seconds of each training")
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="settings that the recipe lacks")
    parser.add_argument("--patch", nargs=3, type=int, default=(8, 64, 64), metavar="N", help="of the 3D-FID")
    parser.add_argument("--patches", type=int, default=96)
    parser.add_argument("--threshold", type=float, default=0.1, help="of waterz")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows; those that are there are not made again")
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    options = parse()
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())
    try:
        cfg = config_of("recipe", options)
        volume = open_parts(cfg)["train"].volume
        box = Box(tuple(options.box[:3]), tuple(options.box[3:]))
        held_out = with_dark_bodies(open_volume(volume.path).crop(box), cfg.NEURODIFF.MEMBRANE_NM)
        membrane = membrane_from_labels(held_out.array("label"), held_out.voxel_nm, cfg.NEURODIFF.MEMBRANE_NM)
        judge = Judge(options, held_out, membrane)
        rows.setdefault("real", judge.row(held_out.array("image")))
        for choice in options.choices:
            if choice not in rows:
                rows[choice] = row_of(choice, options, held_out, judge)
                if options.json:
                    write_json(options.json, rows)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    names = ("iterations", "average_precision", "fid3d", "dark_share", "fine_power", "grey_std")
    print(f"| {'choice':16} | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for row, values in rows.items():
        print(f"| {row:16} | " + " | ".join(f"{values[n]:.3f}" if n in values else "" for n in names) + " |")


if __name__ == "__main__":
    main()
