"""The main job at the smallest size that still passes through every stage, for tests of the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY
from torch import nn

from connectomics_neurodiff.synthesis import build_denoiser

TINY = {
    "DATASET.IMAGE_NAME": "phantom",
    "AUGMENTOR.SYNTHETIC": "True",
    "SYSTEM.NUM_THREADS": "1",
    "SYSTEM.NUM_GPUS": "0",
    "SYSTEM.PRECISION": "fp32",
    "MODEL.FILTERS": "[8, 12]",
    "MODEL.ISOTROPY": "[False]",
    "MODEL.INPUT_SIZE": "[6, 32, 40]",
    "SOLVER.BASE_LR": "0.01",
    "SOLVER.EPS": "1e-8",
    "SOLVER.ITERATION_TOTAL": "30",
    "SOLVER.ITERATION_SAVE": "5",
    "INFERENCE.INPUT_SIZE": "[8, 48, 64]",
    "INFERENCE.STRIDE": "[4, 32, 40]",
    "NEURODIFF.PHANTOM.SHAPE": "[20, 72, 88]",
    "NEURODIFF.PHANTOM.VOXEL_NM": "[29, 6, 6]",
    "NEURODIFF.SPLIT.TRAIN.BOX": "[0, 0, 0, 8, 72, 88]",
    "NEURODIFF.SPLIT.TUNE.BOX": "[8, 0, 0, 13, 72, 88]",
    "NEURODIFF.SPLIT.TEST.BOX": "[13, 0, 0, 20, 72, 88]",
    "NEURODIFF.DIFFUSION.PRESET": "small",
    "NEURODIFF.DIFFUSION.PATCH": "[4, 24, 32]",
    "NEURODIFF.DIFFUSION.ITERATIONS": "8",
    "NEURODIFF.DIFFUSION.SAVE_EVERY": "2",
    "NEURODIFF.DIFFUSION.SAMPLER_STEPS": "4",
    "NEURODIFF.DIFFUSION.TILE": "[8, 48, 48]",
    "NEURODIFF.DIFFUSION.OVERLAP": "[2, 8, 8]",
    "NEURODIFF.PAIRS.GREY_LIMIT": "1.0",
    "NEURODIFF.PAIRS.LEAST_FOLLOWING": "0.0",
    "NEURODIFF.PAIRS.MOST_MISSING": "0.0",
    "NEURODIFF.PAIRS.SPECTRUM_LIMIT": "0.0",
    "NEURODIFF.PAIRS.GRAIN_LIMIT": "0.0",
    "NEURODIFF.PAIRS.DARK_LIMIT": "0.0",
    "NEURODIFF.PAIRS.CONTINUITY_LIMIT": "0.0",
    "NEURODIFF.PAIRS.LEAST_ORDER": "0.0",
    "NEURODIFF.FID.PATCH": "[4, 24, 32]",
    "NEURODIFF.FID.PATCHES": "16",
    "NEURODIFF.FID.BOOTSTRAP": "20",
    "NEURODIFF.SEGMENT.WATERZ_THRESHOLDS": "[0.2, 0.5]",
    "NEURODIFF.SEGMENT.MULTICUT_THRESHOLDS": "[0.3, 0.6]",
}


def settings(folder: Path, **changes: str) -> list[str]:
    """KEY VALUE arguments of the tiny job; `changes` are named like NEURODIFF__SEED."""
    merged = {**TINY, "DATASET.OUTPUT_PATH": str(folder), **{k.replace("__", "."): v for k, v in changes.items()}}
    return [text for pair in merged.items() for text in pair]


def command(folder: Path, *options: str, **changes: str) -> list[str]:
    """The tiny job as a command."""
    return [sys.executable, "-m", "connectomics_neurodiff", "run", *options, *settings(folder, **changes)]


def neurodiff(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run a command of the package and return what it printed."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    arguments_of = [sys.executable, "-m", "connectomics_neurodiff", *arguments]
    return subprocess.run(arguments_of, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


#: Options of the smallest denoiser that has every part.
TINY_DENOISER: dict[str, Any] = {
    "preset": "small",
    "base_channels": 32,
    "multipliers": [1, 1],
    "condition_channels": [32, 32],
    "rgm_reductions": [2],
    "time_channels": 32,
}


def awake_denoiser(**options: Any) -> nn.Module:
    """A denoiser none of whose branches begins at zero: its prediction depends on all of a tile."""
    torch.manual_seed(0)
    network = build_denoiser("neurodiff", **TINY_DENOISER, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network.eval()
