"""Whether a denoiser heeds the voxel size: one mask and one seed, painted with the true, a wrong and no voxel size.

    python projects/NeuroDiff/resolution.py outputs/resolution/diffusion/checkpoint.pt vnc.h5 --box 0 288 0 20 416 128 \
        [--wrong-nm 8 8 8] [--images FOLDER] [--json]

Prints texture statistics of the real image and of the three painted ones. With --images they are written as volumes, to
be looked at (neurodiff view) or scored (neurodiff fid REAL SYNTHETIC --checkpoint SEGMENTER).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.conditions import membrane_from_labels, organelles, with_background, with_dark_bodies
from connectomics_neurodiff.errors import UserError
from connectomics_neurodiff.geometry import Box, voxel_size
from connectomics_neurodiff.synthesis import denoiser_from_checkpoint, grey_scale_for, synthesise
from connectomics_neurodiff.volume import Volume, open_volume, write_volume

#: Octaves of spatial frequency within sections, cycles per voxel: from coarse shapes to single voxels.
BANDS = ((1 / 32, 1 / 16), (1 / 16, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2))


def radial_power(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power within sections by frequency: radius in cycles per voxel, mean power over z; both (y, x)."""
    window = np.hanning(image.shape[1])[:, None] * np.hanning(image.shape[2])
    sections = (image - image.mean(axis=(1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(sections)) ** 2).mean(axis=0)
    radius = np.hypot(np.fft.fftfreq(image.shape[1])[:, None], np.fft.fftfreq(image.shape[2]))
    return radius, power


def texture_statistics(image: np.ndarray) -> dict[str, float]:
    """Numbers that tell one texture from another.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x) in [0, 1], sections of at least 32 voxels.

    Returns
    -------
    dict of str to float
        ``mean``, ``std`` of the grey values; ``gradient_z``, ``gradient_yx``: mean squared difference of neighbours
        across and within sections; ``band_1/32`` ...: share of the power within sections in each of `BANDS`, by its
        lower end; ``slope`` of log power over log frequency across them, power per frequency.
    """
    radius, power = radial_power(image)
    inside = [(radius >= low) & (radius < high) for low, high in BANDS]
    shares = np.array([power[band].sum() for band in inside]) / power[radius > 0].sum()
    density = [power[band].mean() for band in inside]
    middle = [math.log(math.sqrt(low * high)) for low, high in BANDS]
    found = {
        "mean": image.mean(),
        "std": image.std(),
        "gradient_z": (np.diff(image, axis=0) ** 2).mean() if len(image) > 1 else 0.0,
        "gradient_yx": ((np.diff(image, axis=1) ** 2).mean() + (np.diff(image, axis=2) ** 2).mean()) / 2,
        **{f"band_1/{round(1 / low)}": share for (low, _), share in zip(BANDS, shares, strict=True)},
        "slope": np.polyfit(middle, np.log(density), 1)[0],
    }
    return {name: float(value) for name, value in found.items()}


def farthest(voxel_nm: Sequence[float], trained: Sequence[Sequence[float]]) -> Sequence[float]:
    """The voxel size of the training that is least like this one, by the logarithm of the ratios."""
    return max(trained, key=lambda size: float(np.square(np.log(np.array(size) / voxel_nm)).sum()))


def paint(options: argparse.Namespace, volume: Volume) -> dict[str, dict[str, Any]]:
    """Image and told voxel size by what is told: the truth, something wrong, nothing."""
    checkpoint = load_checkpoint(options.checkpoint, kind="denoiser")
    network, process = denoiser_from_checkpoint(checkpoint)
    wrong = options.wrong_nm or farthest(volume.voxel_nm, checkpoint.extra["voxel_nm"])
    if np.allclose(wrong, volume.voxel_nm):
        raise UserError("The denoiser was trained on this voxel size alone; name another one with --wrong-nm.")
    if checkpoint.extra.get("knows_dark"):
        volume = with_dark_bodies(volume, checkpoint.extra["membrane_nm"])
    label = volume.array("label")
    membrane = membrane_from_labels(label, volume.voxel_nm, checkpoint.extra["membrane_nm"])
    tile = options.tile or checkpoint.extra["patch"]
    painted = {}
    for name, told in (("true", volume.voxel_nm), ("wrong", voxel_size(wrong)), ("none", None)):
        image = synthesise(
            network,
            process,
            with_background(membrane, label),
            organelles(volume.mito_array, volume.dark_array),
            told,
            seed=options.seed,
            grey=grey_scale_for(checkpoint, volume.voxel_nm),
            sampler=options.sampler,
            steps=options.steps,
            tile=tile,
            overlap=tuple(size // 4 for size in tile),
            precision=options.precision,
            label=f"voxel size: {name}",
        )
        painted[name] = {"voxel_nm": list(told or (0.0, 0.0, 0.0)), "image": np.asarray(image)}
    return painted


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Statistics of the real image and of the painted ones; ``change`` is the root mean square from the true one."""
    volume = open_volume(options.volume)
    box = Box.of(options.box) if options.box else Box((0, 0, 0), volume.shape)
    volume = volume.crop(box)
    real = volume.array("image")
    rows: dict[str, dict[str, Any]] = {"real": {"voxel_nm": list(volume.voxel_nm), **texture_statistics(real)}}
    painted = paint(options, volume)
    for name, entry in painted.items():
        image = entry["image"]
        change = float(np.sqrt(np.square(image - painted["true"]["image"]).mean()))
        rows[name] = {"voxel_nm": entry["voxel_nm"], **texture_statistics(image), "change": change}
        if options.images:
            told = {"told_nm": entry["voxel_nm"]}
            write_volume(options.images / f"{name}.h5", {"image": image}, volume.voxel_nm, told)
    return rows


def main() -> None:
    """Paint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="denoiser, best trained on several voxel sizes")
    parser.add_argument("volume", help="volume with image and label")
    parser.add_argument("--box", nargs=6, type=int, metavar="N", help="z0 y0 x0 z1 y1 x1; all of it by default")
    parser.add_argument("--wrong-nm", nargs=3, type=float, metavar="NM", help="default: the least alike trained on")
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tile", nargs=3, type=int, metavar="N", help="voxels; the training patch by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=Path, help="folder for the painted volumes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    try:
        rows = compare(options)
    except UserError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(rows))
        return
    names = [name for name in rows["true"] if name != "voxel_nm"]
    for row in [["told", "nm", *names], ["---"] * (len(names) + 2)]:
        print("| " + " | ".join(row) + " |")
    for told, values in rows.items():
        size = " x ".join(f"{nm:g}" for nm in values["voxel_nm"])
        print(f"| {told} | {size} | " + " | ".join(f"{values[n]:.4g}" if n in values else "" for n in names) + " |")


if __name__ == "__main__":
    main()
