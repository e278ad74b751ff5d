"""The floor: scores of a plain watershed of the image on the test part of a run, its smoothing tuned on the tune part.

    python projects/NeuroDiff/watershed.py outputs/fib-0 [--json]

The image is smoothed by a Gaussian (sigma in nm); every local maximum, bright cytoplasm, is a seed; membranes are the
ridges. No network, no labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cc3d
import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.metrics import evaluate, tune_threshold
from connectomics_neurodiff.pipeline.parts import open_parts

#: From finer than a membrane to coarser than a large neurite.
SIGMAS_NM = (10.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0)


def watershed_of_image(image: np.ndarray, voxel_nm: Sequence[float], sigma_nm: float) -> np.ndarray:
    """Segments (z, y, x), from 1, of an image in [0, 1]."""
    bright = gaussian_filter(image, [sigma_nm / nm for nm in voxel_nm])
    seeds = local_maxima(bright, connectivity=3)
    return watershed(-bright, markers=cc3d.connected_components(seeds, connectivity=26).astype(np.int32))


def main() -> None:
    """Tune, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    cfg = load_config(options.run / "config.yaml")
    parts = {name: part.load() for name, part in open_parts(cfg).items()}

    def candidates() -> Iterator[tuple[float, np.ndarray]]:
        for sigma in SIGMAS_NM:
            yield sigma, watershed_of_image(parts["tune"].array("image"), parts["tune"].voxel_nm, sigma)

    tuned = tune_threshold(candidates(), parts["tune"].array("label"), criterion=cfg.NEURODIFF.SEGMENT.CRITERION)
    test = parts["test"]
    scores = evaluate(
        watershed_of_image(test.array("image"), test.voxel_nm, tuned.threshold), test.array("label")
    ).as_dict()
    if options.json:
        print(json.dumps({"sigma_nm": tuned.threshold, **scores}))
    else:
        print(f"sigma {tuned.threshold:g} nm  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
