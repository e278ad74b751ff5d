"""AGQ against affinities with waterz: accuracy and seconds side by side; and stitched blocks against one block.

    python projects/AGQ/compare.py outputs/agq-fib outputs/fib-0 [--arm mixed] [--region 56 220 220] [--json]

Seconds are wall seconds from the image to the labels, on this machine, of one process, after a pass over one tile that
does not count. The region is the middle of the test part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from connectomics_neurodiff.agglomerate import segment, segment_image
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.metrics import evaluate
from connectomics_neurodiff.pipeline import networks
from connectomics_neurodiff.pipeline.parts import open_parts
from connectomics_neurodiff.predict import predict_affinities


def instances(
    cfg: CfgNode, network: Any, image: np.ndarray, voxel_nm: Sequence[float], block: Sequence[int] | None = None
) -> np.ndarray:
    """Labels of AGQ; in one block, or in those of the configuration."""
    node = cfg.INFERENCE
    overlap = [0, 0, 0] if block else networks.tile_overlap(cfg)
    device, precision = networks.device_and_precision(cfg)
    return np.asarray(
        segment_image(
            network,
            image,
            block=block or node.INPUT_SIZE,
            overlap=overlap,
            precision=precision,
            device=device,
            min_fraction=cfg.NEURODIFF.SEGMENT.STITCH_FRACTION,
            growth=networks.label_growth(cfg.NEURODIFF.SEGMENTER.LABEL_EROSION, voxel_nm),
        )
    )


def waterz_labels(cfg: CfgNode, network: Any, image: np.ndarray, voxel_nm: Any, threshold: float) -> np.ndarray:
    """Labels of a network's affinities, agglomerated at the threshold tuned by its run."""
    node = cfg.INFERENCE
    device, precision = networks.device_and_precision(cfg)
    overlap = networks.tile_overlap(cfg)
    affinities = predict_affinities(
        network, image, tile=node.INPUT_SIZE, overlap=overlap, precision=precision, device=device
    )
    return np.asarray(segment(np.asarray(affinities), "waterz", threshold, voxel_nm))


def middle_of(shape: Sequence[int], region: Sequence[int]) -> tuple[slice, ...]:
    """Index of the middle `region` voxels (z, y, x) of an array of that shape."""
    if any(not 0 < size <= n for n, size in zip(shape, region, strict=True)):
        raise SystemExit(f"--region must be from 1 to {tuple(shape)} voxels, the test part. Got {tuple(region)}.")
    return tuple(slice((n - size) // 2, (n + size) // 2) for n, size in zip(shape, region, strict=True))


def tuned_threshold(folder: Path, arm: str) -> float:
    """The threshold of waterz that a finished run has tuned."""
    path = folder / "segmentations" / f"{arm}_waterz.tuning.json"
    if not path.is_file():
        raise SystemExit(f"The run needs segmentations of the arm '{arm}' by waterz. Got no {path}.")
    return float(json.loads(path.read_text())["threshold"])


def rows_of_run(folder: Path, arm: str, region: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row per way from the image to labels: scores, and seconds."""
    cfg = load_config(folder / "config.yaml")
    test = open_parts(cfg)["test"].load()
    image, truth = test.array("image"), test.array("label")
    name = cfg.MODEL.ARCHITECTURE
    middle = middle_of(image.shape, region) if name == "agq" else ()
    network = networks.load_segmenter(str(folder / "segmenter" / arm / "checkpoint.pt"))
    threshold = tuned_threshold(folder, arm)
    first = image[tuple(slice(0, size) for size in cfg.INFERENCE.INPUT_SIZE)]
    waterz_labels(cfg, network, first, test.voxel_nm, threshold)  # makes oneDNN's kernels

    def row(title: str, work: Callable[[], np.ndarray], against: np.ndarray) -> dict[str, Any]:
        start = time.perf_counter()
        labels = work()
        seconds = time.perf_counter() - start
        return {"method": f"{name}, {title}", "seconds": seconds, **evaluate(labels, against).as_dict()}

    yield row("waterz", lambda: waterz_labels(cfg, network, image, test.voxel_nm, threshold), truth)
    if name == "agq":
        yield row("stitched blocks", lambda: instances(cfg, network, image, test.voxel_nm), truth)
        part = np.ascontiguousarray(image[middle])
        yield row("stitched blocks, region", lambda: instances(cfg, network, part, test.voxel_nm), truth[middle])
        yield row("one block, region", lambda: instances(cfg, network, part, test.voxel_nm, region), truth[middle])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs with the same test part")
    parser.add_argument("--arm", choices=("real", "mixed"), default="mixed")
    parser.add_argument("--region", nargs=3, type=int, default=[56, 220, 220], metavar=("Z", "Y", "X"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = [row for run in options.runs for row in rows_of_run(run, options.arm, options.region)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| method | seconds | VOI split | VOI merge | VOI | ARAND |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        scores = " | ".join(f"{row[key]:.4f}" for key in ("voi_split", "voi_merge", "voi", "arand"))
        print(f"| {row['method']} | {row['seconds']:.1f} | {scores} |")


if __name__ == "__main__":
    main()
