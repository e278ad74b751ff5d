"""From the configuration to networks and training settings; the configuration goes no further than here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..config import as_dict
from ..engine import FitSettings, resolve_device, resolve_precision

if TYPE_CHECKING:
    import torch


def device_and_precision(cfg: CfgNode) -> tuple[torch.device, str]:
    """Where networks run, and the arithmetic that "auto" stands for there."""
    import torch

    device = resolve_device(cfg.SYSTEM.NUM_GPUS)
    bf16 = resolve_precision(cfg.SYSTEM.PRECISION, device) == torch.bfloat16
    return device, "bf16" if bf16 else "fp32"


def _device_settings(cfg: CfgNode) -> dict[str, Any]:
    device, precision = device_and_precision(cfg)
    return {
        "devices": cfg.SYSTEM.NUM_GPUS if device.type == "cuda" else 0,
        "nodes": cfg.SYSTEM.NUM_NODES,
        "workers": cfg.SYSTEM.NUM_WORKERS,
        "precision": precision,
    }


def diffusion_fit_settings(cfg: CfgNode) -> FitSettings:
    """How the denoiser is trained."""
    node = cfg.NEURODIFF.DIFFUSION
    return FitSettings(
        steps=node.ITERATIONS,
        batch_size=node.BATCH,
        accumulate=node.ACCUMULATE,
        learning_rate=node.LEARNING_RATE,
        warmup_steps=node.WARMUP,
        schedule=node.SCHEDULE,
        clip_norm=node.CLIP_NORM,
        ema_decay=node.EMA_DECAY,
        checkpoint_every=node.SAVE_EVERY,
        **_device_settings(cfg),
    )


def segmenter_fit_settings(cfg: CfgNode) -> FitSettings:
    """How the affinity network is trained."""
    node = cfg.SOLVER
    return FitSettings(
        steps=node.ITERATION_TOTAL,
        batch_size=node.SAMPLES_PER_BATCH,
        accumulate=node.ITERATION_STEP,
        learning_rate=node.BASE_LR,
        warmup_steps=node.WARMUP_ITERS,
        schedule=node.LR_SCHEDULER_NAME,
        optimizer=node.NAME,
        betas=(node.BETAS[0], node.BETAS[1]),
        eps=node.EPS,
        amsgrad=node.AMSGRAD,
        weight_decay=node.WEIGHT_DECAY,
        momentum=node.MOMENTUM,
        clip_norm=node.CLIP_NORM,
        ema_decay=node.EMA_DECAY,
        checkpoint_every=node.ITERATION_SAVE,
        **_device_settings(cfg),
    )


def denoiser_options(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.synthesis.build_denoiser`."""
    node = cfg.NEURODIFF.DIFFUSION
    return {
        "preset": node.PRESET,
        "conditioning": node.CONDITIONING,
        "rgm": node.RGM,
        "rpge": node.RPGE,
        "scan_directions": node.SCAN_DIRECTIONS,
    }


def segmenter_options(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.segmenters.build_segmenter`."""
    return {
        "in_channels": cfg.MODEL.IN_PLANES,
        "out_channels": cfg.MODEL.OUT_PLANES,
        "filters": list(cfg.MODEL.FILTERS),
        "z_pool": list(cfg.MODEL.ISOTROPY),
        "norm": cfg.MODEL.NORM_MODE,
    }


def augment_probabilities(cfg: CfgNode) -> dict[str, float]:
    """Keyword arguments of :class:`~connectomics_neurodiff.training.AugmentOptions`, 0 where off."""
    names = {
        "SECTIONGRAYSCALE": "section_grayscale",
        "MISSINGSECTION": "missing_section",
        "MISSINGPARTS": "missing_parts",
        "MOTIONBLUR": "motion_blur",
        "CUTBLUR": "cut_blur",
        "CUTNOISE": "cut_noise",
    }
    groups = {name: node for name, node in cfg.AUGMENTOR.items() if isinstance(node, CfgNode) and "P" in node}
    return {names.get(name, name.lower()): node.P * cfg.AUGMENTOR.ENABLED for name, node in groups.items()}


def training_keys(node: CfgNode, leave_out: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a group that a result depends on."""
    return {name: value for name, value in as_dict(node).items() if name not in leave_out}
