"""Synthetic pairs in the host's training, switched on by ``data.train.dataset_type: neurodiff_pairs``.

Real patches come from the host's own dataset, synthetic ones from our pairs, and both pass through the host's own
transforms: its normalisation, its augmentations, its targets. So a project keeps all of its configuration. Whether
sample i is synthetic is a pure function of i, and what it looks like one of (``system.seed``, i): the host draws from
global generators, which are set for the duration of one sample.

The host's configuration refuses unknown keys. Which pairs, and in which ratio, says the file that ``data.train.json``
names (the host's place for lists of files, unused by other volume datasets), or the arguments of
:func:`connectomics_neurodiff.host.v2.register`.
"""

from __future__ import annotations

import glob
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fastremap
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ...errors import (
    ConfigError,
    MissingInput,
    UnknownName,
    ValueRangeError,
    VolumeFormatError,
    VoxelSizeMissing,
    did_you_mean,
)
from ...geometry import ZYX, voxel_size
from ...pairs import is_synthetic, open_pair
from ...seeding import rng_for
from ...volume import ArrayLike, open_array, read_voxel_size
from ...volume.roles import ROLE_NAMES
from .config import look_up, plain

DATASET_TYPE = "neurodiff_pairs"
_KEYS = ("pairs", "ratio")
CreateDatamodule = Callable[..., Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSettings:
    """Which synthetic pairs, and how many of them.

    Attributes
    ----------
    paths : tuple of pathlib.Path
        Pair files, each with an image and a label.
    ratio : float
        Synthetic : real, >= 0.

    Raises
    ------
    ValueRangeError
        If the ratio is not a finite number >= 0.
    MissingInput
        If there is no file though the ratio is above 0, or one does not exist.
    """

    paths: tuple[Path, ...]
    ratio: float = 1.0

    def __post_init__(self) -> None:
        is_synthetic(0, self.ratio)  # refuses a ratio that is not one
        if self.ratio > 0 and not self.paths:
            raise MissingInput(f"A ratio of {self.ratio:g} synthetic : real needs synthetic pairs. Got none.")
        for path in self.paths:
            if not path.exists():
                siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                raise MissingInput(f"The synthetic pair {path} does not exist.{did_you_mean(path.name, siblings)}")


def settings_from_file(path: str | Path) -> PairSettings:
    """Read the JSON file that ``data.train.json`` names.

    Parameters
    ----------
    path : path
        ``{"pairs": "pairs/*.h5", "ratio": 1.0}``: a path or a list of paths, with ``*`` and ``?`` if wanted, relative
        to the file's own folder; the ratio synthetic : real is 1 if it is left out.

    Raises
    ------
    MissingInput
        If the file, or a pair, does not exist, or a pattern matches nothing.
    ConfigError, UnknownName, ValueRangeError
        If it does not hold what is described; the message suggests the nearest key.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingInput(f"{file}, named by data.train.json, does not exist.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f'{file} must be JSON: {{"pairs": "pairs/*.h5", "ratio": 1.0}}. Got: {error}.') from error
    if not isinstance(content, dict):
        raise ConfigError(f'{file} must hold {{"pairs": ..., "ratio": ...}}. Got {type(content).__name__}.')
    for key in content:
        if key not in _KEYS:
            raise UnknownName(f"{file} has no key '{key}'.{did_you_mean(key, _KEYS)} Known: {', '.join(_KEYS)}.")
    named, ratio = content.get("pairs", []), content.get("ratio", 1.0)
    patterns = [named] if isinstance(named, str) else named
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"'pairs' in {file} must be a path or a list of paths. Got {named!r}.")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise ConfigError(f"'ratio' in {file} must be a number. Got {ratio!r}.")
    return PairSettings(expand(patterns, file.parent), float(ratio))


def expand(patterns: Sequence[str | Path], folder: Path) -> tuple[Path, ...]:
    """Files that the patterns stand for, those of one pattern sorted; relative ones start at `folder`.

    Raises
    ------
    MissingInput
        If a pattern with ``*`` or ``?`` matches nothing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        full = folder / pattern
        if not any(sign in str(pattern) for sign in "*?"):
            paths.append(full)
            continue
        found = sorted(glob.glob(str(full), recursive=True))
        if not found:
            raise MissingInput(f"No synthetic pair matches {full}.")
        paths.extend(Path(path) for path in found)
    return tuple(paths)


def settings_for(cfg: Any, given: PairSettings | None) -> PairSettings | None:
    """Settings of a training; None if the configuration does not ask for pairs.

    Parameters
    ----------
    cfg : object
        The host's configuration.
    given : PairSettings, optional
        Arguments of ``register``.

    Raises
    ------
    UnknownName
        If ``data.train.dataset_type`` is nearly ours: the host would ignore it and train on real data alone.
    ConfigError
        If pairs are given but not switched on, switched on but not given, or given twice.
    MissingInput, ValueRangeError
        As :class:`PairSettings` and :func:`settings_from_file`.
    """
    kind = str(look_up(cfg, "data.train.dataset_type", ""))
    if kind != DATASET_TYPE:
        if kind.lower().startswith("neurodif") or get_close_matches(kind.lower(), [DATASET_TYPE], cutoff=0.8):
            raise UnknownName(f"No data.train.dataset_type '{kind}'.{did_you_mean(kind, [DATASET_TYPE])}")
        if given is not None:
            raise ConfigError(
                f"Pairs were given to register(): switch them on, data.train.dataset_type: {DATASET_TYPE}."
            )
        return None
    file = look_up(cfg, "data.train.json")
    if file and given is not None:
        raise ConfigError(f"Pairs are given twice: by data.train.json ({file}) and to register(). Remove one.")
    if given is not None:
        return given
    if not file:
        raise ConfigError(
            f"data.train.dataset_type: {DATASET_TYPE} needs pairs: data.train.json: a file with "
            '{"pairs": "pairs/*.h5", "ratio": 1.0}, or register(pairs=[...]).'
        )
    return settings_from_file(file)


@dataclass(frozen=True)
class StoredPair:
    """A pair as it is stored, read when indexed: image and label, (z, y, x)."""

    path: Path
    image: ArrayLike
    label: ArrayLike


def open_stored(settings: PairSettings, cfg: Any) -> list[StoredPair]:
    """Open and check the pairs of a training; nothing but headers is read.

    Raises
    ------
    VoxelSizeMissing
        If the voxel size of the real volume is not known.
    ValueRangeError
        If a pair has another voxel size.
    UserError
        If a pair is no volume with image and label.
    """
    if not settings.paths:
        return []
    size = real_voxel_size(cfg)
    for path in settings.paths:
        open_pair(path, size)
    return [
        StoredPair(path, open_array(path, ROLE_NAMES["image"]), open_array(path, ROLE_NAMES["label"]))
        for path in settings.paths
    ]


def real_voxel_size(cfg: Any) -> ZYX:
    """Voxel size of the real training volume: ``data.train.resolution``, or what the first image file states."""
    given = look_up(cfg, "data.train.resolution")
    if given is not None:
        return voxel_size(plain(given))
    images = plain(look_up(cfg, "data.train.image", []))
    first = images if isinstance(images, str) else next(iter(images), "")
    try:
        return read_voxel_size(first)
    except (VoxelSizeMissing, VolumeFormatError) as error:  # the host reads formats that we do not
        raise VoxelSizeMissing(
            f"{first} does not state its voxel size: set data.train.resolution: [z, y, x] in nm, e.g. [30, 6, 6]."
        ) from error


class PairPatches(Dataset[dict[str, Any]]):
    """Patches of synthetic pairs, untransformed, in the form of those of the host's dataset.

    Parameters
    ----------
    pairs : sequence of StoredPair
        A pair is drawn in proportion to its voxels, a position uniformly.
    real : object
        The host's dataset, for its `patch_size` (z, y, x), `foreground_threshold` and `max_attempts`.
    like : mapping
        One untransformed patch of it: type of the label, whether there is a mask.
    seed : int
        Seed of the run.
    """

    def __init__(self, pairs: Sequence[StoredPair], real: Any, like: Mapping[str, Any], seed: int) -> None:
        self.pairs = list(pairs)
        self.patch = tuple(int(n) for n in real.patch_size)
        self.foreground = float(real.foreground_threshold)
        self.attempts = max(1, int(real.max_attempts))
        self.label_type = like["label"].dtype
        self.with_mask = like.get("mask") is not None
        self.seed = seed
        sizes = np.array([np.prod(pair.image.shape) for pair in self.pairs], dtype=float)
        self._chances = sizes / sizes.sum()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`: image, label and, beside masks, mask; (1, z, y, x), types as stored."""
        rng = rng_for(self.seed, "pair patch", index)
        for _ in range(self.attempts):
            sample = self._draw(rng)
            if np.count_nonzero(sample["label"]) >= self.foreground * sample["label"].size:
                break
        return sample

    def _draw(self, rng: np.random.Generator) -> dict[str, Any]:
        pair = self.pairs[int(rng.choice(len(self.pairs), p=self._chances))]
        box, margin = [], []
        for size, wanted in zip(pair.image.shape, self.patch, strict=True):
            start = int(rng.integers(max(0, size - wanted) + 1))
            box.append(slice(start, start + wanted))
            missing = max(0, wanted - size)
            margin.append((missing // 2, missing - missing // 2))
        # A pair smaller than the patch is mirrored, image and label alike, as the host mirrors small volumes.
        image = np.pad(pair.image[tuple(box)], margin, mode="reflect")
        label = np.pad(pair.label[tuple(box)], margin, mode="reflect")
        # Only equality matters, and the host's tensors are float32: ids above 2^24 would run together.
        small, _ = fastremap.renumber(label, preserve_zero=True)
        kind = np.result_type(self.label_type, np.min_scalar_type(small.max(initial=0)))
        sample = {"image": image[None], "label": small.astype(kind)[None]}
        if self.with_mask:
            sample["mask"] = np.ones_like(image[None])
        return sample


class MixedPatches(Dataset[dict[str, Any]]):
    """Real and synthetic samples in an exact ratio, transformed; sample i is a pure function of (seed, i).

    Parameters
    ----------
    real, synthetic : dataset
        ``dataset[i]``: an untransformed patch; it may draw from the generators of `random`, numpy and torch.
    transforms : callable
        The host's, which are MONAI's and draw from generators of their own.
    ratio : float
        Synthetic : real (:func:`connectomics_neurodiff.pairs.is_synthetic`).
    seed : int
        Seed of the run.
    """

    def __init__(self, real: Any, synthetic: Any, transforms: Any, *, ratio: float, seed: int) -> None:
        self.real, self.synthetic, self.transforms = real, synthetic, transforms
        self.ratio, self.seed = ratio, seed

    def __len__(self) -> int:
        """Samples per epoch; numbers go on beyond it (:class:`SampleNumbers`)."""
        return len(self.real)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = self.synthetic if is_synthetic(index, self.ratio) else self.real
        with drawn_for(self.seed, index) as own_seed:
            patch = source[index]
            # Not earlier: MONAI seeds all transforms anew, from the operating system, when asked for their number.
            self.transforms.set_random_state(seed=own_seed)
            sample: dict[str, Any] = self.transforms(patch)
        return sample


@contextmanager
def drawn_for(seed: int, index: int) -> Iterator[int]:
    """Let the global generators depend on (seed, index) alone for a while; they are put back afterwards.

    Parameters
    ----------
    seed : int
        Seed of the run.
    index : int
        Number of the sample.

    Yields
    ------
    int
        A seed for generators that are not global.
    """
    python, numpy_, torch_, own = (int(n) for n in rng_for(seed, "host sample", index).integers(2**32, size=4))
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(python)
        np.random.seed(numpy_)
        torch.manual_seed(torch_)
        try:
            yield own
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class SampleNumbers(DistributedSampler[int]):
    """Numbers of the samples of one epoch: epoch e of n samples counts from e n, each device takes every world-th.

    Lightning calls `set_epoch`, also after a resume; and it leaves a DistributedSampler as it is, where it would wrap
    any other so that every epoch drew the same samples again.
    """

    def __init__(self, length: int) -> None:
        super().__init__(range(length), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        rank, world = _place()
        start = self.epoch * self.length
        return iter(range(start + rank, start + len(self) * world, world))

    def __len__(self) -> int:
        return self.length // _place()[1]


def _place() -> tuple[int, int]:
    """Rank and number of the devices, asked late: the host makes its loaders before it starts the process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_training(cfg: Any, given: PairSettings | None) -> None:
    """Raise what :func:`mixed_datamodule` would raise about pairs, before the host has read anything."""
    settings = settings_for(cfg, given)
    if settings is not None:
        open_stored(settings, cfg)


def mixed_datamodule(create: CreateDatamodule, cfg: Any, settings: PairSettings, **options: Any) -> Any:
    """The host's training data with synthetic pairs mixed in.

    Parameters
    ----------
    create : callable
        The host's own ``create_datamodule``.
    cfg : object
        The host's configuration.
    settings : PairSettings
        Which pairs, and how many.
    **options
        What the host passes to `create` besides.

    Returns
    -------
    object
        Data module with our training loader and the host's validation loader.

    Raises
    ------
    UserError
        If the pairs do not fit the training; see :func:`open_stored` and :func:`_require_plain_patches`.
    """
    from connectomics.training.lightning.data import SimpleDataModule

    pairs = open_stored(settings, cfg)
    host = create(cfg, **options)
    loader = host.train_dataloader()
    real = loader.dataset
    like = _require_plain_patches(real, cfg)
    for pair in pairs:
        if pair.image.dtype != like["image"].dtype:
            raise ValueRangeError(
                f"The image of {pair.path} must have the type of the real image, {like['image'].dtype}, or its grey "
                f"values mean something else. Got {pair.image.dtype}."
            )
    seed = int(look_up(cfg, "system.seed", 0))
    share = settings.ratio / (1 + settings.ratio)
    logger.info("Synthetic pairs: %d, %.1f %% of the samples (ratio %g)", len(pairs), 100 * share, settings.ratio)
    synthetic = PairPatches(pairs, real, like, seed) if pairs else real
    # The host's dataset would ask for the number of its transforms before each use: see MixedPatches.
    transforms, real.transforms = real.transforms, None
    mixed = MixedPatches(real, synthetic, transforms, ratio=settings.ratio, seed=seed)
    return SimpleDataModule(_same_loader(loader, mixed), host.val_dataloader())


def _same_loader(loader: DataLoader[Any], dataset: MixedPatches) -> DataLoader[Any]:
    """A loader with the settings of the host's."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=SampleNumbers(len(dataset)),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        collate_fn=loader.collate_fn,
    )


def _require_plain_patches(real: Any, cfg: Any) -> dict[str, Any]:
    """One untransformed patch of the host's dataset, if synthetic patches can stand beside it.

    Raises
    ------
    ConfigError
        If the host reads patches in a way that pairs cannot follow; the message says what to set.
    """
    if not hasattr(real, "_crop_volumes"):
        raise ConfigError(
            f"{DATASET_TYPE} needs the host's patch dataset: set data.dataloader.use_preloaded_cache_train: true."
        )
    if look_up(cfg, "data.nnunet_preprocessing.enabled", False):
        raise ConfigError(f"{DATASET_TYPE} does not resample pairs: set data.nnunet_preprocessing.enabled: false.")
    if len(real.patch_size) != 3:
        raise ConfigError(f"{DATASET_TYPE} works in 3D: data.dataloader.patch_size must be [z, y, x].")
    patch: dict[str, Any] = real._crop_volumes(0, (0, 0, 0))
    if patch.get("label") is None:
        raise ConfigError(f"{DATASET_TYPE} trains on labelled volumes: set data.train.label.")
    if patch.get("label_aux") is not None:
        raise ConfigError(f"{DATASET_TYPE} has no auxiliary labels: set data.train.label_aux_type: none, no label_aux.")
    if len(patch["image"]) != 1:
        raise ConfigError(f"Synthetic images have one channel. The real ones have {len(patch['image'])}.")
    return patch
