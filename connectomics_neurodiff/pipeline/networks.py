"""From the configuration to networks and training settings; the configuration goes no further than here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from ..conditions import DARK_LEVEL
from ..config import as_dict
from ..config.project import HOST_ARCHITECTURES
from ..engine import FitSettings, resolve_device, resolve_precision
from ..errors import CheckpointMismatch, ConfigError, ValueRangeError
from ..geometry import ZYX, is_anisotropic, same_voxel_size, voxel_size
from ..pairs import last_synthetic
from .parts import makes_pairs

if TYPE_CHECKING:
    import torch

    from ..checkpoints import Checkpoint
    from ..training import AuxiliaryTargets

#: Keys of NEURODIFF.DIFFUSION that the images depend on, but not the denoiser.
SAMPLING_KEYS = ("SAMPLER", "SAMPLER_STEPS", "GUIDANCE", "GUIDANCE_ABOVE", "TILE", "OVERLAP", "MARGIN")


def device_and_precision(cfg: CfgNode) -> tuple[torch.device, str]:
    """Where networks run, and the arithmetic that "auto" stands for there."""
    import torch

    device = resolve_device(cfg.SYSTEM.NUM_GPUS)
    bf16 = resolve_precision(cfg.SYSTEM.PRECISION, device) == torch.bfloat16
    return device, "bf16" if bf16 else "fp32"


def check_networks(cfg: CfgNode) -> None:
    """Build the networks without memory or numbers, so that a wrong name or size is told before any work.

    Raises
    ------
    UserError
        If a network cannot be built, or the device or launcher asked for is not there.
    """
    import torch

    from ..segmenters import build_segmenter
    from ..synthesis import build_denoiser

    device_and_precision(cfg)
    if cfg.SYSTEM.NUM_NODES > 1 and not {"MASTER_ADDR", "SLURM_JOB_ID"} & os.environ.keys():
        raise ConfigError(
            f"SYSTEM.NUM_NODES {cfg.SYSTEM.NUM_NODES} needs a launcher such as torchrun or srun on every machine; "
            "without one the training would wait for the others for ever."
        )
    filters, z_pool = cfg.MODEL.FILTERS, cfg.MODEL.ISOTROPY
    if not all(type(n) is int for n in filters) or not all(type(pool) is bool for pool in z_pool):
        raise ConfigError(
            f"MODEL.FILTERS must be whole numbers and MODEL.ISOTROPY true or false. Got {filters} and {z_pool}."
        )
    provide_architecture(cfg.MODEL.ARCHITECTURE)
    with torch.device("meta"):
        try:
            build_segmenter(cfg.MODEL.ARCHITECTURE, **segmenter_options(cfg))
        except ValueRangeError as error:  # networks know their options, not the keys
            raise ConfigError(f"MODEL.FILTERS (filters) and MODEL.ISOTROPY (z_pool) must fit. {error}") from error
        if cfg.AUGMENTOR.SYNTHETIC.ENABLED:
            last_synthetic_sample(cfg)
        if makes_pairs(cfg):
            build_denoiser(cfg.NEURODIFF.DIFFUSION.ARCHITECTURE, **denoiser_options(cfg))


def provide_architecture(name: str) -> None:
    """Let `build_segmenter` know a network of the host's, where the host is installed.

    Raises
    ------
    MissingDependency
        If it is one of the host's, and the host is not there.
    """
    if name in HOST_ARCHITECTURES:
        from ..host.v1 import provide_host_networks

        provide_host_networks()


def trained_segmenter(checkpoint: Checkpoint) -> torch.nn.Module:
    """The segmenter that a checkpoint holds, one of the host's included, in evaluation mode."""
    from ..segmenters import segmenter_from_checkpoint

    provide_architecture(checkpoint.architecture)
    return segmenter_from_checkpoint(checkpoint)


def load_segmenter(path: str) -> torch.nn.Module:
    """The segmenter in a checkpoint file, as :func:`trained_segmenter`."""
    from ..checkpoints import load_checkpoint

    return trained_segmenter(load_checkpoint(path, kind="segmenter"))


def world_size(cfg: CfgNode) -> dict[str, int]:
    """How many devices train together, as a setting of what they train: their batches add up. Nothing for one."""
    import torch

    device, _ = device_and_precision(cfg)
    gpus = cfg.SYSTEM.NUM_GPUS if cfg.SYSTEM.NUM_GPUS > 0 else torch.cuda.device_count()
    world = cfg.SYSTEM.NUM_NODES * (gpus if device.type == "cuda" else 1)
    return {"WORLD_SIZE": world} if world > 1 else {}


def _device_settings(cfg: CfgNode) -> dict[str, Any]:
    device, precision = device_and_precision(cfg)
    return {
        "devices": cfg.SYSTEM.NUM_GPUS if device.type == "cuda" else 0,
        "nodes": cfg.SYSTEM.NUM_NODES,
        "workers": cfg.SYSTEM.NUM_CPUS,
        "precision": precision,
    }


def diffusion_fit_settings(cfg: CfgNode) -> FitSettings:
    """How the denoiser is trained."""
    node = cfg.NEURODIFF.DIFFUSION
    return FitSettings(
        sample_voxels=math.prod(node.PATCH),
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
        sample_voxels=math.prod(cfg.MODEL.INPUT_SIZE),
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


def segmenter_samples(cfg: CfgNode) -> int:
    """Samples that an arm of the segmenter sees in all, on all devices together."""
    settings = segmenter_fit_settings(cfg)
    return settings.steps * settings.accumulate * settings.batch_size * world_size(cfg).get("WORLD_SIZE", 1)


def last_synthetic_sample(cfg: CfgNode) -> int | None:
    """Number of the sample from which on all are real; None if none is."""
    try:
        return last_synthetic(cfg.AUGMENTOR.SYNTHETIC.UNTIL, segmenter_samples(cfg))
    except ValueRangeError as error:  # told by its key
        raise ConfigError(f"AUGMENTOR.SYNTHETIC.UNTIL is too small. {error}") from error


def denoiser_options(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.synthesis.build_denoiser`."""
    node = cfg.NEURODIFF.DIFFUSION
    return {
        "preset": node.PRESET,
        "conditioning": node.CONDITIONING,
        "flat_levels": node.FLAT_LEVELS,
        "rgm": node.RGM,
        "rpge": node.RPGE,
        "scan_directions": node.SCAN_DIRECTIONS,
        # Eq. 3 alone moves an output by a thousandth: with several voxel sizes, they must reach the network.
        "resolution_embedding": node.RESOLUTION_EMBEDDING or bool(node.EXTRA_VOLUMES),
        "learn_variance": node.LEARN_VARIANCE,
        "checkpointing": node.CHECKPOINTING,
    }


def diffusion_training_settings(cfg: CfgNode) -> dict[str, Any]:
    """The settings that a trained denoiser depends on; its volumes are parents instead."""
    node = cfg.NEURODIFF.DIFFUSION
    keys = training_keys(node, (*SAMPLING_KEYS, "SAVE_EVERY", "EXTRA_VOLUMES"))
    return keys | {
        "MEMBRANE_NM": cfg.NEURODIFF.MEMBRANE_NM,
        **dark_settings(cfg),
        "PRECISION": device_and_precision(cfg)[1],
        **world_size(cfg),
    }


def dark_settings(cfg: CfgNode) -> dict[str, Any]:
    """What masks and denoiser depend on of how they are told what is dark inside neurons."""
    return {"DARK_LEVEL": DARK_LEVEL if cfg.NEURODIFF.DARK_BODIES else 0.0}


def diffusion_crop_options(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :class:`~connectomics_neurodiff.synthesis.DiffusionCrops`."""
    node = cfg.NEURODIFF.DIFFUSION
    return {
        "thickness_nm": cfg.NEURODIFF.MEMBRANE_NM,
        "flips": node.FLIPS,
        "transpose": node.TRANSPOSE,
        "intensity_jitter": node.INTENSITY_JITTER,
        "share": node.VOLUME_SHARE,
        "condition_dropout": node.CONDITION_DROPOUT,
        "voxel_size_dropout": node.VOXEL_SIZE_DROPOUT,
        "noise_mean": node.NOISE_MEAN,
        "noise_spread": node.NOISE_SPREAD,
    }


def sampling_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.synthesis.synthesise`, whatever it paints."""
    node = cfg.NEURODIFF.DIFFUSION
    device, precision = device_and_precision(cfg)
    return {
        "sampler": node.SAMPLER,
        "steps": node.SAMPLER_STEPS,
        "margin": tuple(node.MARGIN),
        "precision": precision,
        "device": device,
    }


def prediction_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.predict.predict_affinities`, whatever it predicts."""
    device, precision = device_and_precision(cfg)
    return {
        "tile": tuple(cfg.INFERENCE.INPUT_SIZE),
        "overlap": tile_overlap(cfg),
        "batch": cfg.INFERENCE.SAMPLES_PER_BATCH,
        "precision": precision,
        "device": device,
    }


def segmenter_options(cfg: CfgNode) -> dict[str, Any]:
    """Keyword arguments of :func:`~connectomics_neurodiff.segmenters.build_segmenter`."""
    from ..segmenters import options_of

    return options_of(
        cfg.MODEL.ARCHITECTURE,
        {
            "in_channels": cfg.MODEL.IN_PLANES,
            "out_channels": cfg.MODEL.OUT_PLANES + auxiliary_targets(cfg).channels,
            "filters": list(cfg.MODEL.FILTERS),
            "z_pool": list(cfg.MODEL.ISOTROPY),
            "norm": cfg.MODEL.NORM_MODE,
            "block_type": cfg.MODEL.BLOCK_TYPE,
            **shared_options(cfg),
        },
    )


#: Options that are younger than the first trainings, at the values that change nothing: these are not recorded, so that
#: a training made before stays valid.
_NEUTRAL_OPTIONS = {"component_threshold": 0.0, "coordinates": True}


def segmenter_identity(options: dict[str, Any]) -> dict[str, Any]:
    """Of a segmenter's options, those that its training is recorded with."""
    return {n: value for n, value in options.items() if n not in _NEUTRAL_OPTIONS or value != _NEUTRAL_OPTIONS[n]}


def auxiliary_targets(cfg: CfgNode) -> AuxiliaryTargets:
    """What the segmenter learns beside the affinities."""
    from ..training import AuxiliaryTargets

    node = cfg.NEURODIFF.SEGMENTER
    return AuxiliaryTargets(tuple((z, y, x) for z, y, x in node.LONG_RANGE), node.SHAPE_SIGMA_NM, node.SHAPE_WEIGHT)


def shared_options(cfg: CfgNode) -> dict[str, Any]:
    """Options of single segmenters, from keys that have the same meaning in the host's configuration."""
    node = cfg.NEURODIFF.SEGMENTER
    return {
        "feature_size": cfg.MODEL.SWIN_UNETR_FEATURE_SIZE,
        "orientations": node.SCAN_ORIENTATIONS,
        "residual": node.SCAN_RESIDUAL,
        "checkpointing": node.CHECKPOINTING,
        "width": node.QUERY_WIDTH,
        "learned_queries": node.LEARNED_QUERIES,
        "guided_queries": node.GUIDED_QUERIES,
        "smallest_component": node.SMALLEST_COMPONENT,
        "centred": node.CENTRED_FEATURES,
        "component_prior": node.COMPONENT_PRIOR,
        "position_length": node.POSITION_LENGTH,
        "component_threshold": node.COMPONENT_THRESHOLD,
        "coordinates": node.COORDINATES,
    }


def trained_voxels(checkpoint: Checkpoint, otherwise: ZYX) -> list[ZYX]:
    """Voxel sizes that a segmenter was trained on; `otherwise` for one that does not say."""
    given = checkpoint.extra.get("voxel_nm") or [otherwise]
    try:
        return [voxel_size(size) for size in given]
    except (TypeError, ValueError, ValueRangeError) as error:
        raise CheckpointMismatch(
            f"The segmenter's checkpoint is damaged: its voxel_nm must be a list of sizes (z, y, x) in nm. "
            f"Got {given!r}."
        ) from error


def other_voxels(checkpoint: Checkpoint, voxel_nm: ZYX) -> str:
    """What to say of voxels that a segmenter was not trained on; nothing of those it was, or if it does not say."""
    trained = trained_voxels(checkpoint, voxel_nm)
    if any(same_voxel_size(voxel_nm, size) for size in trained):
        return ""
    sizes = " and ".join(f"{tuple(size)}" for size in trained)
    return f"has voxels of {tuple(voxel_nm)} nm; the segmenter was trained on {sizes} nm"


def trained_erosion(checkpoint: Checkpoint, otherwise: int = 0) -> int:
    """By how many voxels the labels of a segmenter's training were eroded; `otherwise` for one that does not say."""
    erosion = checkpoint.extra.get("label_erosion", otherwise)
    if type(erosion) is not int or erosion < 0:
        raise CheckpointMismatch(
            f"The segmenter's checkpoint is damaged: its label_erosion must be a whole number >= 0. Got {erosion!r}."
        )
    return erosion


def label_growth(erosion: int, voxel_nm: Sequence[float]) -> tuple[int, int, int]:
    """Voxels (z, y, x) by which instances grow to undo the label erosion of a training on such voxels."""
    return 0 if is_anisotropic(voxel_nm) else erosion, erosion, erosion


def tile_overlap(cfg: CfgNode) -> list[int]:
    """Voxels (z, y, x) that neighbouring tiles of the inference share."""
    return [size - step for size, step in zip(cfg.INFERENCE.INPUT_SIZE, cfg.INFERENCE.STRIDE, strict=True)]


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
