"""Checks of a configuration that need no file: ranges, sizes, names that belong together. One line per fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

from yacs.config import CfgNode

from ..errors import ConfigError, did_you_mean


def _require(condition: bool, key: str, allowed: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {allowed}. Got {got!r}.")


def _require_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} is '{value}'.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")


def _require_size(key: str, value: Sequence[int]) -> None:
    whole = len(value) == 3 and all(isinstance(v, int) and v > 0 for v in value)
    _require(whole, key, "three whole numbers > 0, (z, y, x)", value)


def _require_numbers(cfg: CfgNode, keys: Sequence[str], low: float, high: float = float("inf")) -> None:
    for key in keys:
        node = cfg
        *parents, leaf = key.split(".")
        for name in parents:
            node = node[name]
        inside = low <= node[leaf] <= high and math.isfinite(node[leaf])
        _require(inside, key, f">= {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]", node[leaf])


def validate(cfg: CfgNode) -> None:
    """Raise :class:`ConfigError` at the first value that cannot work."""
    _validate_numbers(cfg)
    _validate_geometry(cfg)
    _validate_names(cfg)
    _validate_remodelling(cfg)
    _validate_diffusion(cfg)
    _validate_unlabeled(cfg)
    _validate_kinds_of_pairs(cfg)
    _validate_segmenter(cfg)
    _validate_sources(cfg)


def _validate_numbers(cfg: CfgNode) -> None:
    at_least_one = (
        "SYSTEM.NUM_NODES SOLVER.ITERATION_TOTAL SOLVER.ITERATION_SAVE SOLVER.SAMPLES_PER_BATCH SOLVER.ITERATION_STEP "
        "INFERENCE.SAMPLES_PER_BATCH NEURODIFF.REMODEL.COPIES NEURODIFF.DIFFUSION.STEPS NEURODIFF.DIFFUSION.ITERATIONS "
        "NEURODIFF.DIFFUSION.BATCH NEURODIFF.DIFFUSION.ACCUMULATE NEURODIFF.DIFFUSION.SAVE_EVERY "
        "NEURODIFF.DIFFUSION.SAMPLER_STEPS NEURODIFF.PAIRS.SAMPLES NEURODIFF.PAIRS.JUDGE_ITERATIONS "
        "NEURODIFF.FID.BOOTSTRAP NEURODIFF.REMODEL.ATTEMPTS"
    )
    _require_numbers(cfg, at_least_one.split(), 1)
    not_negative = (
        "SYSTEM.NUM_CPUS SYSTEM.NUM_THREADS SOLVER.WARMUP_ITERS SOLVER.CLIP_NORM SOLVER.WEIGHT_DECAY "
        "AUGMENTOR.SYNTHETIC.RATIO NEURODIFF.DIFFUSION.WARMUP NEURODIFF.DIFFUSION.CLIP_NORM "
        "NEURODIFF.SEGMENTER.LABEL_EROSION NEURODIFF.DIFFUSION.COSINE_OFFSET "
        "NEURODIFF.SEGMENTER.SHAPE_SIGMA_NM NEURODIFF.SEGMENTER.SHAPE_WEIGHT NEURODIFF.SEGMENTER.PIXEL_DISCRIMINATION "
        "NEURODIFF.SEGMENTER.COMPONENT_PRIOR NEURODIFF.SEGMENTER.POSITION_LENGTH NEURODIFF.DIFFUSION.GUIDANCE "
        "NEURODIFF.DIFFUSION.GUIDANCE_ABOVE NEURODIFF.DIFFUSION.SNR_GAMMA NEURODIFF.DIFFUSION.FLAT_LEVELS "
        "NEURODIFF.PAIRS.CONTINUITY_LIMIT NEURODIFF.REMODEL.LIMITS.MITO_FRACTION NEURODIFF.REMODEL.MITO_COUNT "
        "NEURODIFF.REMODEL.LIMITS.MEMBRANE_FRACTION NEURODIFF.REMODEL.LIMITS.PROFILE_CHANGE"
    )
    _require_numbers(cfg, not_negative.split(), 0)
    _require_numbers(cfg, ["SYSTEM.NUM_GPUS"], -1)
    _require_numbers(cfg, ["NEURODIFF.SEED", "NEURODIFF.PHANTOM.SEED"], 0, 2**63 - 1)
    fractions = (
        "NEURODIFF.REMODEL.CANDIDATE_FRACTION NEURODIFF.REMODEL.MITO_FRACTION "
        "NEURODIFF.PAIRS.GREY_LIMIT NEURODIFF.PAIRS.LEAST_FOLLOWING NEURODIFF.PAIRS.LEAST_ORDER "
        "NEURODIFF.DIFFUSION.INTENSITY_JITTER NEURODIFF.REMODEL.LIMITS.MITO_HEIGHT_P"
    )
    _require_numbers(cfg, fractions.split(), 0, 1)
    _require_numbers(cfg, ["NEURODIFF.PAIRS.MOST_MISSING"], 0, 0.5)
    for key in ("SPECTRUM_LIMIT", "GRAIN_LIMIT", "DARK_LIMIT"):
        ratio = cfg.NEURODIFF.PAIRS[key]
        _require(ratio == 0 or ratio > 1, f"NEURODIFF.PAIRS.{key}", "a ratio > 1, or 0 for none", ratio)
    _require_numbers(cfg, ["SOLVER.EMA_DECAY", "NEURODIFF.DIFFUSION.EMA_DECAY", "SOLVER.MOMENTUM"], 0, 0.999999)
    positive = "SOLVER.BASE_LR SOLVER.EPS NEURODIFF.DIFFUSION.LEARNING_RATE NEURODIFF.REMODEL.CANDIDATE_FRACTION"
    _require_numbers(cfg, positive.split(), 1e-12)
    _require_numbers(cfg, ["NEURODIFF.MEMBRANE_NM"], 1e-12, 200)
    _require_numbers(cfg, ["NEURODIFF.REMODEL.SIGMA_NM"], 0, 1e5)
    _require_numbers(cfg, ["NEURODIFF.REMODEL.SPACING_NM"], 0.1, 1e5)
    betas = cfg.SOLVER.BETAS
    fit = len(betas) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas)
    _require(fit, "SOLVER.BETAS", "two numbers in [0, 1)", betas)
    for name, node in cfg.AUGMENTOR.items():
        if isinstance(node, CfgNode) and "P" in node:
            _require_numbers(cfg, [f"AUGMENTOR.{name}.P"], 0, 1)
    patches = cfg.NEURODIFF.FID.PATCHES
    _require(patches == 0 or patches >= 2, "NEURODIFF.FID.PATCHES", ">= 2, or 0 for none", patches)
    diffusion = cfg.NEURODIFF.DIFFUSION
    _require(
        diffusion.SAMPLER_STEPS <= diffusion.STEPS,
        "NEURODIFF.DIFFUSION.SAMPLER_STEPS",
        f"at most the {diffusion.STEPS} steps of the schedule",
        diffusion.SAMPLER_STEPS,
    )


#: What an entry of EXTRA_VOLUMES, and one of UNLABELED, may say, and of which type.
EXTRA_KEYS: dict[str, type] = {"IMAGE_NAME": str, "LABEL_NAME": str, "MITO_NAME": str, "VOXEL_NM": list, "BOX": list}
UNLABELED_KEYS: dict[str, type] = {"IMAGE_NAME": str, "BOX": list}
#: In place of a list of them: the rest of the training volume's file.
REST = "rest"
#: Kinds of pairs that a run makes.
SOURCES = ("remodelled", "repainted", "pseudo")


def _validate_remodelling(cfg: CfgNode) -> None:
    """Settings of the masks that exclude each other."""
    node, group = cfg.NEURODIFF.REMODEL, "NEURODIFF.REMODEL"
    for key in ("MITO_FRACTION", "MITO_COUNT"):
        placed = node.MITOCHONDRIA or not node[key]
        _require(placed, f"{group}.{key}", "0 with MITOCHONDRIA False, where none are placed", node[key])


def _validate_diffusion(cfg: CfgNode) -> None:
    """Settings of the denoiser's training that exclude or need each other."""
    node, group = cfg.NEURODIFF.DIFFUSION, "NEURODIFF.DIFFUSION"
    _require_choice(f"{group}.VOLUME_SHARE", node.VOLUME_SHARE, ("voxels", "equal"))
    for key in ("CONDITION_DROPOUT", "VOXEL_SIZE_DROPOUT"):
        _require(0 <= node[key] < 1, f"{group}.{key}", "in [0, 1)", node[key])
    _require_numbers(cfg, [f"{group}.NOISE_MEAN"], -10, 10)
    _require_numbers(cfg, [f"{group}.NOISE_SPREAD"], 0, 10)
    wide = node.NOISE_SPREAD == 0 or node.NOISE_SPREAD >= 0.1
    _require(wide, f"{group}.NOISE_SPREAD", "0, or at least 0.1", node.NOISE_SPREAD)
    even = not (node.LEARN_VARIANCE and node.NOISE_SPREAD)
    _require(
        even, f"{group}.NOISE_SPREAD", "0 with LEARN_VARIANCE, whose bound needs all steps alike", node.NOISE_SPREAD
    )
    told = node.CONDITIONING != "none" or not node.CONDITION_DROPOUT
    _require(told, f"{group}.CONDITION_DROPOUT", "0 with CONDITIONING none, which has no masks", node.CONDITION_DROPOUT)
    guided = node.GUIDANCE == 1 or node.CONDITION_DROPOUT > 0
    _require(guided, f"{group}.GUIDANCE", "1 unless the denoiser is trained with CONDITION_DROPOUT > 0", node.GUIDANCE)
    sized = (node.RGM and node.RPGE) or node.RESOLUTION_EMBEDDING or not node.VOXEL_SIZE_DROPOUT
    _require(
        sized,
        f"{group}.VOXEL_SIZE_DROPOUT",
        "0 without RPGE and RESOLUTION_EMBEDDING, which alone read the voxel size",
        node.VOXEL_SIZE_DROPOUT,
    )
    for number, entry in enumerate(node.EXTRA_VOLUMES):
        _validate_extra_volume(f"{group}.EXTRA_VOLUMES[{number}]", entry)


def _validate_extra_volume(key: str, entry: object) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("IMAGE_NAME"), str) or not entry["IMAGE_NAME"]:
        raise ConfigError(f"{key} must be the name of a volume, or have it as IMAGE_NAME. Got {entry!r}.")
    _validate_entry(key, entry, EXTRA_KEYS)
    _require_voxel_size(f"{key}.VOXEL_NM", entry.get("VOXEL_NM", []))


def _validate_entry(key: str, entry: dict[str, object], known: dict[str, type]) -> None:
    for name, value in entry.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{key} has no key '{name}'.{hint} Known: {', '.join(known)}.")
        _require(isinstance(value, known[name]), f"{key}.{name}", f"a {known[name].__name__}", value)
    box = entry.get("BOX", [])
    assert isinstance(box, list)  # found above
    _require_box(f"{key}.BOX", box)


def _validate_unlabeled(cfg: CfgNode) -> None:
    """Tissue without annotation."""
    for number, entry in enumerate(cfg.DATASET.UNLABELED):
        if entry == REST and len(cfg.DATASET.UNLABELED) == 1:
            continue
        key = f"DATASET.UNLABELED[{number}]"
        alone = entry != REST and entry != {"IMAGE_NAME": REST}
        _require(alone, key, f"'{REST}' only without other entries, or a name or mapping", cfg.DATASET.UNLABELED)
        if not isinstance(entry, dict):
            raise ConfigError(
                f"{key} must be the name of a volume, or a mapping with {' and '.join(UNLABELED_KEYS)}; or all of "
                f"DATASET.UNLABELED be '{REST}'. Got {entry!r}."
            )
        _validate_entry(key, entry, UNLABELED_KEYS)
        named = entry.get("IMAGE_NAME") or entry.get("BOX")
        _require(bool(named), key, "the name of a volume or a BOX of the training volume's file", entry)
        phantom = cfg.DATASET.IMAGE_NAME == "phantom" and bool(entry.get("IMAGE_NAME"))
        _require(not phantom, f"{key}.IMAGE_NAME", "empty while DATASET.IMAGE_NAME is 'phantom'", entry)


def _validate_kinds_of_pairs(cfg: CfgNode) -> None:
    """What the run makes its pairs of."""
    key, sources = "AUGMENTOR.SYNTHETIC.SOURCE", cfg.AUGMENTOR.SYNTHETIC.SOURCE
    named = bool(sources) and all(isinstance(source, str) for source in sources)
    _require(
        named and len(set(sources)) == len(sources), key, "a list of one or more kinds of pairs, each once", sources
    )
    for source in sources:
        _require_choice(key, source, SOURCES)
    lacking = [source for source in sources if source != SOURCES[0] and not cfg.DATASET.UNLABELED]
    _require(not lacking, key, "['remodelled'] without DATASET.UNLABELED, which the others are made of", sources)
    agglomerates = list(sources) == [SOURCES[0]] or set(cfg.NEURODIFF.SEGMENT.METHODS) != {"agq"}
    methods = "one that agglomerates affinities beside agq"
    _require(agglomerates, "NEURODIFF.SEGMENT.METHODS", f"{methods}, for {key} {sources}", ["agq"])
    own = not cfg.AUGMENTOR.SYNTHETIC.PAIRS
    weighted = cfg.NEURODIFF.SEGMENTER.RELIABILITY_WEIGHTS and "pseudo" in sources and own
    _require(not weighted, "NEURODIFF.SEGMENTER.RELIABILITY_WEIGHTS", f"false with {key} pseudo, which has none", True)


def _require_voxel_size(key: str, voxel: Sequence[float]) -> None:
    sizes = not voxel or (len(voxel) == 3 and all(isinstance(v, int | float) and v > 0 for v in voxel))
    _require(sizes, key, "three numbers > 0 in nm, (z, y, x)", voxel)


def _require_box(key: str, box: Sequence[int]) -> None:
    whole = not box or (len(box) == 6 and all(isinstance(v, int) and v >= 0 for v in box))
    ordered = whole and all(a < b for a, b in zip(box[:3], box[3:], strict=True))
    _require(ordered, key, "[z0, y0, x0, z1, y1, x1] with z0 < z1, y0 < y1, x0 < x1", box)


def _validate_segmenter(cfg: CfgNode) -> None:
    """Options of single segmenters, whichever is chosen."""
    node = cfg.NEURODIFF.SEGMENTER
    swin = cfg.MODEL.SWIN_UNETR_FEATURE_SIZE
    _require(swin > 0 and swin % 12 == 0, "MODEL.SWIN_UNETR_FEATURE_SIZE", "a multiple of 12, > 0", swin)
    _require(
        node.SCAN_ORIENTATIONS in (1, 3), "NEURODIFF.SEGMENTER.SCAN_ORIENTATIONS", "1 or 3", node.SCAN_ORIENTATIONS
    )
    _require_numbers(cfg, ["NEURODIFF.SEGMENTER.CHECKPOINTS"], 1)
    _require(
        node.CHECKPOINTS == 1 or cfg.NEURODIFF.SPLIT.SCORED,
        "NEURODIFF.SEGMENTER.CHECKPOINTS",
        "1 without a tune part (NEURODIFF.SPLIT.SCORED)",
        node.CHECKPOINTS,
    )
    width = node.QUERY_WIDTH
    _require(width > 0 and width % 8 == 0, "NEURODIFF.SEGMENTER.QUERY_WIDTH", "a multiple of 8, > 0", width)
    _require_numbers(cfg, ["NEURODIFF.SEGMENTER.LEARNED_QUERIES"], 2)
    _require_numbers(cfg, ["NEURODIFF.SEGMENTER.GUIDED_QUERIES", "NEURODIFF.SEGMENTER.SMALLEST_COMPONENT"], 0)
    length = node.POSITION_LENGTH
    _require(not 0 < length < 1, "NEURODIFF.SEGMENTER.POSITION_LENGTH", "0, or at least 1 voxel", length)
    threshold = node.COMPONENT_THRESHOLD
    _require(0 <= threshold <= 1, "NEURODIFF.SEGMENTER.COMPONENT_THRESHOLD", "from 0 to 1", threshold)
    for offset in node.LONG_RANGE:
        listed = isinstance(offset, list | tuple) and len(offset) == 3
        fit = listed and all(
            type(n) is int and 0 <= n < size for n, size in zip(offset, cfg.MODEL.INPUT_SIZE, strict=True)
        )
        _require(
            fit and sum(offset) > 1,
            "NEURODIFF.SEGMENTER.LONG_RANGE",
            f"distances [z, y, x] beyond the direct neighbour and below MODEL.INPUT_SIZE {cfg.MODEL.INPUT_SIZE}",
            node.LONG_RANGE,
        )
    if cfg.MODEL.ARCHITECTURE == "agq":
        for key in ("LONG_RANGE", "SHAPE_SIGMA_NM", "RELIABILITY_WEIGHTS"):
            _require(
                not node[key],
                f"NEURODIFF.SEGMENTER.{key}",
                "empty, 0 or false for agq, which learns neurons",
                node[key],
            )
        alone = "WeightedBCEWithLogitsLoss alone for agq, whose other terms are its own"
        _require(
            cfg.MODEL.LOSS_OPTION == ["WeightedBCEWithLogitsLoss"], "MODEL.LOSS_OPTION", alone, cfg.MODEL.LOSS_OPTION
        )
    if cfg.MODEL.ARCHITECTURE == "swin_unetr":
        whose = "empty for swin_unetr, whose size is MODEL.SWIN_UNETR_FEATURE_SIZE"
        _require(not cfg.MODEL.FILTERS, "MODEL.FILTERS", whose, cfg.MODEL.FILTERS)


def _validate_geometry(cfg: CfgNode) -> None:
    diffusion, phantom = cfg.NEURODIFF.DIFFUSION, cfg.NEURODIFF.PHANTOM
    for key, size in (
        ("MODEL.INPUT_SIZE", cfg.MODEL.INPUT_SIZE),
        ("INFERENCE.INPUT_SIZE", cfg.INFERENCE.INPUT_SIZE),
        ("INFERENCE.STRIDE", cfg.INFERENCE.STRIDE),
        ("NEURODIFF.DIFFUSION.PATCH", diffusion.PATCH),
        ("NEURODIFF.DIFFUSION.TILE", diffusion.TILE),
        ("NEURODIFF.PHANTOM.SHAPE", phantom.SHAPE),
        ("NEURODIFF.FID.PATCH", cfg.NEURODIFF.FID.PATCH),
    ):
        _require_size(key, size)
    strides = all(s <= t for s, t in zip(cfg.INFERENCE.STRIDE, cfg.INFERENCE.INPUT_SIZE, strict=True))
    _require(
        strides, "INFERENCE.STRIDE", f"at most INFERENCE.INPUT_SIZE {cfg.INFERENCE.INPUT_SIZE}", cfg.INFERENCE.STRIDE
    )
    overlap = len(diffusion.OVERLAP) == 3 and all(
        isinstance(o, int) and 0 <= o < t for o, t in zip(diffusion.OVERLAP, diffusion.TILE, strict=True)
    )
    _require(
        overlap, "NEURODIFF.DIFFUSION.OVERLAP", f"three whole numbers below TILE {diffusion.TILE}", diffusion.OVERLAP
    )
    margin = len(diffusion.MARGIN) == 3 and all(
        isinstance(m, int) and 0 <= m <= t for m, t in zip(diffusion.MARGIN, diffusion.TILE, strict=True)
    )
    allowed = f"three whole numbers from 0 to TILE {diffusion.TILE}"
    _require(margin, "NEURODIFF.DIFFUSION.MARGIN", allowed, diffusion.MARGIN)
    _require_voxel_size("NEURODIFF.VOXEL_NM", cfg.NEURODIFF.VOXEL_NM)
    _require(bool(phantom.VOXEL_NM), "NEURODIFF.PHANTOM.VOXEL_NM", "three numbers > 0 in nm, (z, y, x)", [])
    _require_voxel_size("NEURODIFF.PHANTOM.VOXEL_NM", phantom.VOXEL_NM)
    for name in ("TRAIN", "TUNE", "TEST"):
        _require_box(f"NEURODIFF.SPLIT.{name}.BOX", cfg.NEURODIFF.SPLIT[name].BOX)


def _validate_names(cfg: CfgNode) -> None:
    diffusion, segment = cfg.NEURODIFF.DIFFUSION, cfg.NEURODIFF.SEGMENT
    _require_choice("SYSTEM.PRECISION", cfg.SYSTEM.PRECISION, ("auto", "fp32", "bf16"))
    _require_choice("SOLVER.NAME", cfg.SOLVER.NAME, ("Adam", "AdamW", "SGD"))
    _require_choice("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, ("constant", "cosine"))
    _require_choice("NEURODIFF.DIFFUSION.SCHEDULE", diffusion.SCHEDULE, ("constant", "cosine"))
    _require_choice("NEURODIFF.DIFFUSION.PREDICTION", diffusion.PREDICTION, ("noise", "velocity", "image"))
    _require_choice("NEURODIFF.DIFFUSION.LOSS", diffusion.LOSS, ("l1", "l2"))
    _require_choice("NEURODIFF.DIFFUSION.SAMPLER", diffusion.SAMPLER, ("ddpm", "ddim", "dpmpp"))
    _require_choice("NEURODIFF.DIFFUSION.CONDITIONING", diffusion.CONDITIONING, ("msc", "concat", "both", "none"))
    _require(
        diffusion.SCAN_DIRECTIONS in (1, 2), "NEURODIFF.DIFFUSION.SCAN_DIRECTIONS", "1 or 2", diffusion.SCAN_DIRECTIONS
    )
    _require_choice("MODEL.NORM_MODE", cfg.MODEL.NORM_MODE, ("batch", "group", "instance", "none"))
    for loss in cfg.MODEL.LOSS_OPTION:
        _require_choice("MODEL.LOSS_OPTION", loss, ("WeightedBCEWithLogitsLoss", "DiceLoss"))
    weights = cfg.MODEL.LOSS_WEIGHT
    fit = len(weights) == len(set(cfg.MODEL.LOSS_OPTION)) == len(cfg.MODEL.LOSS_OPTION) > 0
    fit = fit and all(isinstance(w, int | float) and 0 < w < math.inf for w in weights)
    _require(fit, "MODEL.LOSS_WEIGHT", f"a number > 0 for each of MODEL.LOSS_OPTION {cfg.MODEL.LOSS_OPTION}", weights)
    _require(cfg.MODEL.TARGET_OPT == ["2"], "MODEL.TARGET_OPT", "['2'] (affinity z, y, x)", cfg.MODEL.TARGET_OPT)
    _require(cfg.MODEL.IN_PLANES == 1, "MODEL.IN_PLANES", "1 (one grey image)", cfg.MODEL.IN_PLANES)
    _require(cfg.MODEL.OUT_PLANES == 3, "MODEL.OUT_PLANES", "3 (affinity z, y, x)", cfg.MODEL.OUT_PLANES)
    _require(
        bool(segment.METHODS), "NEURODIFF.SEGMENT.METHODS", "a list of waterz, mean, multicut and agq", segment.METHODS
    )
    fraction = segment.STITCH_FRACTION
    _require(0 < fraction <= 1, "NEURODIFF.SEGMENT.STITCH_FRACTION", "above 0, at most 1", fraction)
    for method in segment.METHODS:
        _require_choice("NEURODIFF.SEGMENT.METHODS", method, ("waterz", "mean", "multicut", "agq"))
    _require(len(set(segment.METHODS)) == len(segment.METHODS), "NEURODIFF.SEGMENT.METHODS", "unique", segment.METHODS)
    for method in segment.METHODS:
        if method == "agq":  # the segmenter's own instances, without a threshold
            key, architecture = "MODEL.ARCHITECTURE", cfg.MODEL.ARCHITECTURE
            _require(architecture == "agq", key, "agq for the method agq", architecture)
            continue
        key = f"{method.upper()}_THRESHOLDS"
        inside = bool(segment[key]) and all(isinstance(t, int | float) and 0 <= t <= 1 for t in segment[key])
        _require(inside, f"NEURODIFF.SEGMENT.{key}", "a list of numbers in [0, 1]", segment[key])
        # multicut takes the logarithm of beta / (1 - beta).
        open_ended = method != "multicut" or not {0, 1} & set(segment[key])
        _require(open_ended, f"NEURODIFF.SEGMENT.{key}", "inside (0, 1)", segment[key])
    _require_choice("NEURODIFF.SEGMENT.CRITERION", segment.CRITERION, ("voi", "arand"))


def _validate_sources(cfg: CfgNode) -> None:
    """Names of inputs that would be ignored, or that name nothing, are slips."""
    data, split = cfg.DATASET, cfg.NEURODIFF.SPLIT
    _require(bool(data.IMAGE_NAME), "DATASET.IMAGE_NAME", "the name of a volume, or 'phantom'", data.IMAGE_NAME)
    until = cfg.AUGMENTOR.SYNTHETIC.UNTIL
    _require(0 < until <= 1, "AUGMENTOR.SYNTHETIC.UNTIL", "a part of the training, in (0, 1]", until)
    pairs = cfg.AUGMENTOR.SYNTHETIC.PAIRS
    named = all(isinstance(path, str) and path for path in pairs)
    _require(named, "AUGMENTOR.SYNTHETIC.PAIRS", "a path or a list of paths", pairs)
    for part in ("TUNE", "TEST"):
        node, key = split[part], f"NEURODIFF.SPLIT.{part}"
        orphan = bool(node.LABEL_NAME) and not node.IMAGE_NAME
        _require(not orphan, f"{key}.LABEL_NAME", f"empty without {key}.IMAGE_NAME", node.LABEL_NAME)
    if data.IMAGE_NAME == "phantom":
        unused = {
            "DATASET.LABEL_NAME": data.LABEL_NAME,
            "NEURODIFF.MITO_NAME": cfg.NEURODIFF.MITO_NAME,
            "NEURODIFF.SPLIT.TUNE.IMAGE_NAME": split.TUNE.IMAGE_NAME,
            "NEURODIFF.SPLIT.TEST.IMAGE_NAME": split.TEST.IMAGE_NAME,
            "NEURODIFF.VOXEL_NM": cfg.NEURODIFF.VOXEL_NM,
        }
        for key, name in unused.items():
            _require(not name, key, "empty while DATASET.IMAGE_NAME is 'phantom', which brings its own", name)
