"""What the gate says about real tissue, which must pass, and about purpose-made bad pairs, none of which may.

    python projects/NeuroDiff/gate.py DATA_FOLDER --volumes phantom fib vnc ac4 --seeds 0 --json gate.json

DATA_FOLDER holds ac4.h5, fib_medulla_train.h5 and vnc_sstem_train.h5 (docs/data.md); the phantom needs none. For every
volume a judge is trained on the train box. Real pairs are boxes of the same size elsewhere with their own labels, with
and without their mitochondria masks; bad ones are made of the first two of them. Fine detail and grey values are fitted
to the train box, as a run does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from connectomics_neurodiff.conditions import membrane_from_labels, smoothed
from connectomics_neurodiff.geometry import Box, is_anisotropic
from connectomics_neurodiff.pairs import (
    Judge,
    JudgeSettings,
    MaskArrays,
    RealTissue,
    judge_pair,
    match_grey_values,
    match_spectrum,
    measure_real,
    train_judge,
)
from connectomics_neurodiff.pairs.tissue import DEPTH_NM, SMOOTHING_NM, depth_in_neurons
from connectomics_neurodiff.provenance import write_json
from connectomics_neurodiff.seeding import rng_for
from connectomics_neurodiff.volume import Volume, grow_phantom, open_volume

MEMBRANE_NM = 25.0


@dataclass(frozen=True)
class Case:
    """A volume of the table: its file, the shape of its boxes, where they begin (the first one is trained on)."""

    file: str
    shape: tuple[int, int, int]
    starts: tuple[tuple[int, int, int], ...]
    other: str


CASES = {
    "phantom": Case("", (16, 160, 160), ((0, 0, 0), (16, 0, 0), (32, 0, 0)), "fib"),
    "fib": Case(
        "fib_medulla_train.h5",
        (32, 192, 192),
        ((0, 0, 0), *((z, y, y) for z, y in product((40, 80, 120), (0, 58)))),
        "ac4",
    ),
    "vnc": Case(
        "vnc_sstem_train.h5",
        (20, 256, 256),
        tuple((0, y, x) for y, x in product((0, 256, 416), (0, 256, 512, 768))),
        "fib",
    ),
    "ac4": Case("ac4.h5", (16, 512, 512), tuple(product((0, 42, 84), (0, 512), (0, 512))), "fib"),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and its masks, in memory."""

    image: np.ndarray
    label: np.ndarray
    membrane: np.ndarray
    mito: np.ndarray | None

    def seen_through(self, index: Any) -> Pair:
        """The same part or order of all arrays."""
        return Pair(
            self.image[index],
            self.label[index],
            self.membrane[index],
            None if self.mito is None else self.mito[index],
        )

    def painted(self, image: np.ndarray) -> Pair:
        """Another image on these masks."""
        return Pair(np.clip(image, 0, 1).astype(np.float32), self.label, self.membrane, self.mito)


def open_case(name: str, folder: Path) -> Volume:
    """The whole volume of a case."""
    return open_volume(folder / CASES[name].file) if CASES[name].file else grow_phantom((48, 160, 160), seed=1)


def pair_at(volume: Volume, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Pair:
    """Real tissue with its own masks; membranes as in the whole volume of the box."""
    part = volume.crop(Box(start, tuple(a + n for a, n in zip(start, shape, strict=True))))  # type: ignore[arg-type]
    label = part.array("label")
    return Pair(part.array("image"), label, membrane_from_labels(label, part.voxel_nm, MEMBRANE_NM), part.mito_array)


def with_values_of(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image with the grey values of another, in the order of its own."""
    out = np.empty(image.size, dtype=np.float32)
    positions = np.linspace(0, values.size - 1, image.size).astype(int)
    out[np.argsort(image, axis=None, kind="stable")] = np.sort(values, axis=None)[positions]
    return out.reshape(image.shape)


def clouds(pair: Pair, rng: np.random.Generator) -> Pair:
    """Coloured noise with the spectrum and the grey values of the image."""
    noise = np.fft.rfftn(rng.standard_normal(pair.image.shape))
    own = np.abs(np.fft.rfftn(pair.image - pair.image.mean()))
    coloured = np.fft.irfftn(own * noise / np.maximum(np.abs(noise), 1e-9), s=pair.image.shape, axes=(0, 1, 2))
    return pair.painted(with_values_of(coloured, pair.image))


def painted_over(
    image: np.ndarray, where: np.ndarray, source: np.ndarray, voxel_nm: Any, rng: np.random.Generator
) -> np.ndarray:
    """`where` filled with what `source` looks like: its mean nearby, and its texture from further away."""
    sigma = [0.0 if is_anisotropic(voxel_nm) and axis == 0 else 40.0 / nm for axis, nm in enumerate(voxel_nm)]
    share = ndimage.gaussian_filter(source.astype(np.float32), sigma)
    mean = ndimage.gaussian_filter(np.where(source, image, 0), sigma) / np.maximum(share, 1e-3)
    mean = np.where(share > 1e-3, mean, image[source].mean())
    texture, out, left = np.where(source, image - mean, 0), image.copy(), where.copy()
    for _ in range(24):
        shift = rng.integers(20, 120, 2) * rng.choice((-1, 1), 2)
        here = left & np.roll(source, shift, axis=(1, 2))
        out[here] = (mean + np.roll(texture, shift, axis=(1, 2)))[here]
        left &= ~here
    out[left] = mean[left]
    return np.clip(out, 0, 1)


@dataclass(frozen=True, eq=False)
class Contacts:
    """Where neurons touch: the number of a contact at each voxel of membrane, and the two neurons of a contact."""

    at: np.ndarray
    neurons: np.ndarray

    def some(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Numbers of contacts, drawn one by one until they make up that share of all."""
        numbers, sizes = np.unique(self.at[self.at > 0], return_counts=True)
        order = rng.permutation(len(numbers))
        return np.asarray(numbers[order[np.cumsum(sizes[order]) <= share * sizes.sum()]])


def contacts_of(pair: Pair, voxel_nm: Any) -> Contacts:
    """Contacts of the neurons within 40 nm of each voxel of membrane; the two of largest and least number count."""
    on = pair.membrane > 0
    reach = [0 if is_anisotropic(voxel_nm) and axis == 0 else int(40.0 / nm) for axis, nm in enumerate(voxel_nm)]
    width = [2 * n + 1 for n in reach]
    ids, numbers = np.unique(np.where(on, 0, pair.label), return_inverse=True)
    inside = numbers.reshape(on.shape)
    high = ndimage.maximum_filter(inside, size=width)
    low = len(ids) - ndimage.maximum_filter(np.where(inside > 0, len(ids) - inside, 0), size=width)
    touching = on & (high > 0) & (low < len(ids)) & (low != high)
    pairs, at = np.unique(np.where(touching, low * len(ids) + high, 0), return_inverse=True)
    return Contacts(at.reshape(on.shape), ids[np.stack(np.divmod(pairs, len(ids)), axis=1)])


def without_half_of_its_membranes(pair: Pair, voxel_nm: Any, rng: np.random.Generator) -> Pair:
    """Membranes between neurons painted over with cytoplasm, contact by contact, until half of them is gone."""
    contacts = contacts_of(pair, voxel_nm)
    where = np.isin(contacts.at, contacts.some(0.5, rng))
    where = ndimage.binary_dilation(where, structure=np.ones((1, 3, 3)))
    bright = smoothed(pair.image, voxel_nm, SMOOTHING_NM)
    source = ~(pair.membrane > 0) & (pair.label > 0)
    source &= bright > np.median(bright[source])
    return pair.painted(painted_over(pair.image, where, source, voxel_nm, rng))


def with_joined_neurons(pair: Pair, voxel_nm: Any, rng: np.random.Generator) -> Pair:
    """Neurons joined in the mask, contact by contact, and with them all they touch; the image keeps its membranes."""
    contacts = contacts_of(pair, voxel_nm)
    links = contacts.neurons[contacts.some(0.3, rng)]
    ids = np.unique(pair.label)
    graph = coo_matrix((np.ones(len(links)), np.searchsorted(ids, links).T), shape=(len(ids), len(ids)))
    joined = np.where(ids > 0, connected_components(graph, directed=False)[1] + 1, 0)
    low, high = (joined[np.searchsorted(ids, contacts.neurons[:, side])] for side in (0, 1))
    gone = (contacts.at > 0) & (low == high)[contacts.at]
    label = np.where(gone, low[contacts.at], joined[np.searchsorted(ids, pair.label)])
    return Pair(pair.image, label.astype(np.uint32), np.where(gone, 0, pair.membrane), pair.mito)


def without_organelles(pair: Pair, voxel_nm: Any, rng: np.random.Generator) -> Pair:
    """All that is dark inside neurons painted over with cytoplasm."""
    depth, smooth = depth_in_neurons(pair.label, pair.membrane, voxel_nm), smoothed(pair.image, voxel_nm, SMOOTHING_NM)
    deep = depth > DEPTH_NM
    dark = smooth < 0.4 * np.median(smooth[pair.membrane > 0]) + 0.6 * np.median(smooth[deep])
    where = ndimage.binary_dilation(dark & (depth > DEPTH_NM / 2), structure=np.ones((1, 3, 3))) & (depth > 0)
    return pair.painted(painted_over(pair.image, where, deep & ~where, voxel_nm, rng))


def membranes_on(pair: Pair, texture: np.ndarray, texture_nm: Any, voxel_nm: Any) -> Pair:
    """The mask's membranes drawn onto another tissue, resampled to this voxel size, with this volume's grey values."""
    zoomed = ndimage.zoom(texture, [a / b for a, b in zip(texture_nm, voxel_nm, strict=True)], order=1)
    padding = [(0, max(0, n - m)) for n, m in zip(pair.image.shape, zoomed.shape, strict=True)]
    canvas = np.pad(zoomed, padding, mode="symmetric")[tuple(slice(0, n) for n in pair.image.shape)]
    flat = is_anisotropic(voxel_nm)
    sigma = [0.0 if flat and axis == 0 else 5.0 / nm for axis, nm in enumerate(voxel_nm)]
    lines = ndimage.gaussian_filter((pair.membrane > 0).astype(np.float32), sigma)
    canvas = with_values_of(canvas, pair.image)
    dark = np.percentile(pair.image, 15)
    return pair.painted(with_values_of(canvas * (1 - lines) + dark * lines, pair.image))


def bad_pairs(pair: Pair, elsewhere: Pair, other: Volume, voxel_nm: Any, seed: int) -> Iterator[tuple[str, Pair]]:
    """Every kind of bad pair, by name."""
    rng = rng_for(seed, "bad pairs")
    flat = is_anisotropic(voxel_nm)
    noise = clouds(pair, rng)
    yield "clouds", noise
    corner = np.zeros(pair.image.shape, bool)
    corner[:, : corner.shape[1] // 2, : corner.shape[2] // 2] = True
    yield "clouds in a quarter", pair.painted(np.where(corner, noise.image, pair.image))
    sigma = [0.0 if flat and axis == 0 else 12.0 / nm for axis, nm in enumerate(voxel_nm)]
    yield "blurred by 12 nm", pair.painted(ndimage.gaussian_filter(pair.image, sigma))
    yield "inverted", pair.painted(1 - pair.image)
    yield "mask of another place", elsewhere.painted(pair.image)
    yield "half the membranes erased", without_half_of_its_membranes(pair, voxel_nm, rng)
    yield "neurons joined in the mask", with_joined_neurons(pair, voxel_nm, rng)
    masks = (pair.label, pair.membrane, pair.mito)
    moved = (None if mask is None else np.roll(mask, (5, 5), axis=(1, 2)) for mask in masks)
    yield "labels shifted by 5 voxels", Pair(pair.image, *moved)
    box = Box((0, 0, 0), tuple(min(n, 128) if axis else min(n, 40) for axis, n in enumerate(other.shape)))  # type: ignore[arg-type]
    texture = other.crop(box).array("image")
    yield "membranes on other tissue", membranes_on(pair, texture, other.voxel_nm, voxel_nm)
    yield "sections shuffled", pair.seen_through(rng.permutation(len(pair.image)))
    yield "no organelles", without_organelles(pair, voxel_nm, rng)


def describe(line: dict[str, Any]) -> str:
    """The same for people."""
    following, checks = line["following"] or {}, line["checks"]
    powers = [check["got"] for name, check in checks.items() if name.startswith("power")]
    failed = ", ".join(name for name, check in checks.items() if not check["passed"])
    shares = (c["got"] for name, c in checks.items() if name.startswith("dark") and c["high"] is not None)
    dark = " ".join(f"{share:.3f}" for share in shares)
    right = "" if line["passed"] == line["must_pass"] else "WRONG "
    return (
        f"| {line['volume']} | {line['kind']} | {following.get('average_precision', 0):.2f} | "
        f"{following.get('share', 0):.2f} | {following.get('missing', 0):.2f}, "
        f"{following.get('missing_at_worst', 0):.2f} | {following.get('cut', 0):.3f} | {checks['grey']['got']:.3f} | "
        f"{' '.join(f'{power:.2f}' for power in powers)} | {checks['grain']['got'] / checks['grain']['real']:.2f} | "
        f"{checks['continuity']['got']:.2f} | "
        f"{checks['order']['got']:.2f} | {dark} | "
        f"{right}{'passes' if line['passed'] else failed} |"
    )


@dataclass(frozen=True, eq=False)
class Examiner:
    """The gate of one train box."""

    name: str
    train: Pair
    judge: Judge
    tissue: RealTissue
    with_mito: bool

    def line(self, kind: str, pair: Pair, must_pass: bool) -> dict[str, Any]:
        """The line of one pair, printed."""
        start = time.process_time()
        mask = MaskArrays(pair.label, pair.membrane, pair.mito if self.with_mito else None)
        image = match_spectrum(pair.image, self.train.image, self.tissue.voxel_nm)
        image = match_grey_values(image, self.train.image)
        report = judge_pair(image, mask, real=self.tissue, judge=self.judge)
        kind += ", no mito masks" if self.train.mito is not None and not self.with_mito else ""
        what = {"volume": self.name, "kind": kind, "must_pass": must_pass}
        line = {**what, "seconds": time.process_time() - start, **report.as_dict()}
        print(describe(line), flush=True)
        return line


def examine(name: str, folder: Path, seed: int, steps: int) -> list[dict[str, Any]]:
    """All lines of one volume and seed."""
    case, volume = CASES[name], open_case(name, folder)
    train, *held_out = (pair_at(volume, at, case.shape) for at in case.starts)
    part = Volume(train.image, train.label, train.mito, volume.voxel_nm)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        settings = JudgeSettings(steps=steps)
        judge = train_judge(part, membrane_nm=MEMBRANE_NM, seed=seed, folder=Path(scratch), settings=settings)
    print(
        f"{name}, seed {seed}: judge trained in {time.process_time() - start:.0f} CPU seconds; average precision "
        f"{judge.real.average_precision:.3f}, masks of elsewhere {judge.real.null:.3f}, missing "
        f"{judge.real.missing:.3f}, cut off {judge.real.cut:.3f} {judge.defect}"
    )
    lines = []
    for with_mito in [True, False] if train.mito is not None else [False]:
        mito = train.mito if with_mito else None
        tissue = measure_real(train.image, train.label, train.membrane, mito, part.voxel_nm)
        examiner = Examiner(name, train, judge, tissue, with_mito)
        for at, pair in zip(case.starts[1:], held_out, strict=True):
            lines.append(examiner.line(f"real tissue at {at[0]}, {at[1]}, {at[2]}", pair, True))
        for kind, pair in bad_pairs(held_out[0], held_out[1], open_case(case.other, folder), part.voxel_nm, seed):
            lines.append(examiner.line(kind, pair, False))
    return lines


def main() -> None:
    """Print the table; write every number to --json. Exit status 1 if a verdict is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the real volumes")
    parser.add_argument("--volumes", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=JudgeSettings().steps, help="of the judge's training")
    parser.add_argument("--json", type=Path, help="all numbers")
    options = parser.parse_args()
    print(
        "| volume | pair | AP | following | missing, at worst | cut off | grey | power | grain | continuity | "
        "order | dark | gate |\n|" + " --- |" * 13
    )
    lines = []
    for name, seed in product(options.volumes, options.seeds):
        lines += [{"seed": seed, **line} for line in examine(name, options.data, seed, options.steps)]
        if options.json:
            write_json(options.json, lines)
    wrong = [line for line in lines if line["passed"] != line["must_pass"]]
    print(f"\n{len(lines) - len(wrong)} of {len(lines)} as they must be.")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
