"""What sampler, steps and guidance cost and give: one mask painted in every way that is asked for.

    RUN=outputs/fib
    python projects/NeuroDiff/sampling.py $RUN/diffusion/checkpoint.pt fib.h5 $RUN/segmenter/real/checkpoint.pt \
        --box 40 0 0 72 192 192 --samplers ddpm ddim dpmpp --steps 5 10 20 50 100 250 --json steps.json

For every row: 3D-FID from the real image of the same mask, with a bootstrap interval; how well the segmenter, trained
on real data only, finds the mask's boundaries in it (average precision), and the adapted Rand error of what it finds,
by waterz; share of dark voxels deep inside neurons; power of fine detail over the real one; grey-value spread; CPU
seconds. Rows that FILE.json holds already are not painted again.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from connectomics_neurodiff.agglomerate import segment
from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.conditions import membrane_from_labels, organelles, with_background, with_dark_bodies
from connectomics_neurodiff.errors import ConfigError, UserError
from connectomics_neurodiff.geometry import Box
from connectomics_neurodiff.metrics import (
    bootstrap_interval,
    boundary_precision,
    evaluate,
    frechet_distance,
    patch_features,
)
from connectomics_neurodiff.pairs import dark_shares
from connectomics_neurodiff.pipeline.networks import trained_segmenter
from connectomics_neurodiff.predict import predict_affinities
from connectomics_neurodiff.provenance import hash_of_file, write_json
from connectomics_neurodiff.seeding import rng_for
from connectomics_neurodiff.synthesis import SAMPLERS, denoiser_from_checkpoint, grey_scale_for, guided, synthesise
from connectomics_neurodiff.volume import Volume, open_volume, write_volume

#: Arguments that say which rows are made, not how.
ROWS = ("samplers", "steps", "guidance")


class Scorer:
    """What a segmenter trained on real data, and the gate, say about an image of one mask."""

    def __init__(self, options: argparse.Namespace, volume: Volume, membrane: np.ndarray) -> None:
        self.volume, self.membrane, self.threshold = volume, membrane, options.threshold
        checkpoint = load_checkpoint(options.segmenter, kind="segmenter")
        self.network, self.tile = trained_segmenter(checkpoint), checkpoint.patch
        rng = rng_for(options.seed, "patches")
        size = [min(p, n) for p, n in zip(options.patch, volume.shape, strict=True)]
        starts = [
            [int(rng.integers(n - s + 1)) for n, s in zip(volume.shape, size, strict=True)]
            for _ in range(options.patches)
        ]
        self.boxes = [Box((z, y, x), (z + size[0], y + size[1], x + size[2])) for z, y, x in starts]
        self.precision, self.seed = options.precision, options.seed
        self.real = self.features(volume.array("image"))

    def features(self, image: np.ndarray) -> np.ndarray:
        """(patches, features)."""
        return patch_features(self.network, image, self.boxes, precision=self.precision)

    def row(self, image: np.ndarray) -> dict[str, Any]:
        """All numbers of an image."""
        found = self.features(image)
        overlap = tuple(size // 2 for size in self.tile)
        affinities = predict_affinities(
            self.network, image, tile=self.tile, overlap=overlap, precision=self.precision, label="affinities"
        )
        label = segment(np.asarray(affinities, np.float32), "waterz", self.threshold, self.volume.voxel_nm)
        truth = self.volume.array("label")
        interval = bootstrap_interval(self.real, found, 100, rng_for(self.seed, "bootstrap"))
        dark = dark_shares(image, truth, self.membrane, None, self.volume.voxel_nm)
        scores = evaluate(label, truth)
        return {
            "fid3d": frechet_distance(self.real, found),
            "fid3d_interval": list(interval),
            "average_precision": boundary_precision(np.asarray(affinities), truth, self.volume.voxel_nm),
            "dark_share": dark.all,
            "fine_power": fine_power(image) / fine_power(self.volume.array("image")),
            "arand": scores.arand,
            "voi": scores.voi,
            "grey_mean": float(image.mean()),
            "grey_std": float(image.std()),
        }


def fine_power(image: np.ndarray) -> float:
    """Variance of what smoothing by a pixel takes away from sections."""
    return float(np.var(image - ndimage.gaussian_filter(image, (0, 1, 1))))


def paint(
    options: argparse.Namespace, volume: Volume, outside: np.ndarray, sampler: str, steps: int, scale: float
) -> tuple[np.ndarray, float]:
    """An image, and the CPU seconds that it took."""
    checkpoint = load_checkpoint(options.checkpoint, kind="denoiser")
    network, process = denoiser_from_checkpoint(checkpoint)
    tile = tuple(options.tile or checkpoint.patch)
    start = time.process_time()
    image = synthesise(
        guided(network, scale, checkpoint, process.step_at(options.guidance_above)),
        process,
        outside,
        organelles(volume.mito_array, volume.dark_array),
        volume.voxel_nm,
        seed=options.seed,
        grey=grey_scale_for(checkpoint, volume.voxel_nm),
        sampler=sampler,
        steps=steps,
        tile=tile,
        overlap=tuple(size // 4 for size in tile),
        precision=options.precision,
        label=f"{sampler}, {steps} steps, guidance {scale:g}",
    )
    return np.asarray(image), time.process_time() - start


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by name."""
    volume = open_volume(options.volume)
    volume = volume.crop(Box.of(options.box)) if options.box else volume.load()
    extra = load_checkpoint(options.checkpoint, kind="denoiser").extra
    thickness = extra["membrane_nm"]
    if extra.get("knows_dark"):
        volume = with_dark_bodies(volume, thickness)
    membrane = membrane_from_labels(volume.array("label"), volume.voxel_nm, thickness)
    rows = kept_rows(options, ROWS)
    scorer = Scorer(options, volume, membrane)
    if "real" not in rows:
        rows["real"] = scorer.row(volume.array("image"))
    for sampler, steps, scale in product(options.samplers, options.steps, options.guidance):
        name = f"{sampler} {steps} steps, guidance {scale:g}"
        if name in rows:
            continue
        outside = with_background(membrane, volume.array("label"))
        image, seconds = paint(options, volume, outside, sampler, steps, scale)
        rows[name] = {**scorer.row(image), "cpu_seconds": seconds}
        if options.images:
            write_volume(options.images / f"{sampler}-{steps}-{scale:g}.h5", {"image": image}, volume.voxel_nm)
        write_rows(options, ROWS, rows)
    return rows


def arguments_of(options: argparse.Namespace, rows: tuple[str, ...]) -> dict[str, str]:
    """All that every row depends on, as text; files by their content."""
    apart = {"json", "images", *rows}
    values = {name: value for name, value in sorted(vars(options).items()) if name not in apart}
    return {
        name: hash_of_file(value) if isinstance(value, Path) and value.is_file() else str(value)
        for name, value in values.items()
    }


def kept_rows(options: argparse.Namespace, rows: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Rows of --json that were made before, with the same arguments but for `rows`, which choose among them.

    Raises
    ------
    ConfigError
        If the file holds rows that were made otherwise.
    """
    if not options.json or not options.json.exists():
        return {}
    content: dict[str, dict[str, Any]] = json.loads(options.json.read_text())
    before, now = content.pop("arguments", {}), arguments_of(options, rows)
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise ConfigError(f"{options.json} holds rows made with another {', '.join(differing)}. Name another file.")
    return content


def write_rows(options: argparse.Namespace, rows: tuple[str, ...], content: dict[str, dict[str, Any]]) -> None:
    """Write what there is so far to --json, if that is given."""
    if options.json:
        write_json(options.json, {"arguments": arguments_of(options, rows), **content})


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="denoiser")
    parser.add_argument("volume", type=Path, help="real image and label of the masks to paint")
    parser.add_argument("segmenter", type=Path, help="trained on real data only")
    parser.add_argument(
        "--box", type=int, nargs=6, metavar=("Z0", "Y0", "X0", "Z1", "Y1", "X1"), help="part of the volume"
    )
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS.names(), default=["ddpm"])
    parser.add_argument("--steps", nargs="+", type=int, default=[32])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0])
    parser.add_argument(
        "--guidance-above", type=float, default=1.0, help="noise level below which steps are not guided"
    )
    parser.add_argument(
        "--tile", nargs=3, type=int, metavar=("Z", "Y", "X"), help="default: as trained; a quarter overlaps"
    )
    parser.add_argument(
        "--patch", nargs=3, type=int, default=(16, 64, 64), metavar=("Z", "Y", "X"), help="of the 3D-FID"
    )
    parser.add_argument("--patches", type=int, default=96)
    parser.add_argument("--threshold", type=float, default=0.1, help="of waterz, as tuned for the segmenter")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="write the images there, as volumes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows; those that are there are not painted again")
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    try:
        rows = compare(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    names = ("fid3d", "average_precision", "dark_share", "fine_power", "arand", "grey_std", "cpu_seconds")
    print(f"{'':32}" + "".join(f"{name:>20}" for name in names))
    for row, values in rows.items():
        print(f"{row:32}" + "".join(f"{values[name]:20.4f}" if name in values else " " * 20 for name in names))


if __name__ == "__main__":
    main()
