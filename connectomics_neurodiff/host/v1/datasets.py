"""PyTC v1's dataset with synthetic pairs among the real volumes, in an exact ratio."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from connectomics.data.dataset import VolumeDataset
from connectomics.data.dataset.build import _pad, _rescale
from fastremap import renumber
from yacs.config import CfgNode

from ...config.project import single_file
from ...errors import ConfigError, MissingInput, ValueRangeError
from ...geometry import voxel_size
from ...pairs import is_synthetic, last_synthetic, open_pairs
from ...seeding import rng_for
from ...volume import Volume, open_array, open_volume

#: Targets of PyTC's whose labels are classes: foreground, and semantic segmentation.
SEMANTIC = {"0", "9"}


@dataclass(frozen=True, eq=False)
class SyntheticVolumes:
    """Synthetic pairs, prepared as PyTC prepares its own volumes.

    Attributes
    ----------
    images, labels : list of numpy.ndarray
        (z, y, x); grey values 0..255, uint8; neuron ids.
    ratio : float
        Synthetic : real patches.
    until : int or None
        Number of the sample from which on all are real.
    seed : int
        Seed of what is drawn.
    """

    images: list[np.ndarray]
    labels: list[np.ndarray]
    ratio: float
    until: int | None
    seed: int


def load_synthetic(cfg: CfgNode, paths: Sequence[str], voxel_nm: Sequence[float]) -> SyntheticVolumes:
    """Read the pairs, and scale and pad them as DATASET.DATA_SCALE and PAD_SIZE ask for the real volumes.

    Parameters
    ----------
    cfg : CfgNode
        PyTC's configuration with our groups.
    paths : sequence of str
        Pair files.
    voxel_nm : sequence of 3 floats
        Voxel size of the real volumes; empty: not checked, as PyTC's files do not carry it.

    Raises
    ------
    MissingInput, LabelTypeError, ShapeMismatch, ValueRangeError
        If there are none, or one is not a pair of this voxel size.
    ConfigError
        If the configuration asks for what synthetic pairs cannot serve.
    """
    if not paths:
        raise MissingInput(
            "AUGMENTOR.SYNTHETIC is on without pairs. Name them in AUGMENTOR.SYNTHETIC.PAIRS, or let "
            "'python -m connectomics.main' make them."
        )
    if cfg.MODEL.TARGET_OPT_MULTISEG_SPLIT is not None or cfg.DATASET.LOAD_2D:
        raise ConfigError(
            "AUGMENTOR.SYNTHETIC works with one label per volume, without TARGET_OPT_MULTISEG_SPLIT or LOAD_2D."
        )
    semantic = [name for name in cfg.MODEL.TARGET_OPT if name.split("-")[0] in SEMANTIC]
    if semantic or cfg.DATASET.LABEL_BINARY or cfg.DATASET.LABEL_MAG:
        raise ConfigError(
            "Synthetic pairs carry the ids of neurons; AUGMENTOR.SYNTHETIC does not go with classes (MODEL.TARGET_OPT "
            f"{' and '.join(sorted(SEMANTIC))}), DATASET.LABEL_BINARY or LABEL_MAG. Got MODEL.TARGET_OPT "
            f"{list(cfg.MODEL.TARGET_OPT)}."
        )
    node = cfg.AUGMENTOR.SYNTHETIC
    if node.UNTIL < 1 and cfg.SYSTEM.get("DISTRIBUTED", False) and not cfg.DATASET.get("DISTRIBUTED", False):
        raise ConfigError(
            "AUGMENTOR.SYNTHETIC.UNTIL must be 1 in a distributed training, in which PyTC draws samples in a random "
            f"order: real ones would not come last. Got {node.UNTIL}."
        )
    pairs = _open(paths, voxel_nm)
    _require_grey_type(cfg, paths)
    images, labels = [], []
    for pair in pairs:
        grey = np.round(pair.array("image") * 255).astype(np.uint8)
        images.append(_pad(_rescale(grey, cfg.DATASET.IMAGE_SCALE, 3), cfg.DATASET.PAD_SIZE, cfg.DATASET.PAD_MODE))
        label = _rescale(renumber(pair.array("label"))[0], cfg.DATASET.LABEL_SCALE, 0)
        labels.append(_pad(label, cfg.DATASET.PAD_SIZE, cfg.DATASET.PAD_MODE))
    until = last_synthetic(float(node.UNTIL), cfg.SOLVER.ITERATION_TOTAL * cfg.SOLVER.SAMPLES_PER_BATCH)
    return SyntheticVolumes(images, labels, float(node.RATIO), until, int(cfg.NEURODIFF.SEED))


def _require_grey_type(cfg: CfgNode, paths: Sequence[str]) -> None:
    """Grey values must mean the same in both: 0..255 as they are stored.

    PyTC takes uint8 as it is, and stretches other types between their extremes, which are not those of the pairs.
    """
    types = {str(path): open_array(path, ("image",)).dtype for path in paths}
    real = single_file(cfg.DATASET.IMAGE_NAME)
    if real and not cfg.DATASET.DO_CHUNK_TITLE:
        path = Path(cfg.DATASET.INPUT_PATH) / real
        if path.suffix in (".h5", ".hdf5"):
            with h5py.File(path) as file:
                types[str(path)] = file[next(iter(file))].dtype  # PyTC takes the first one
        else:
            types[str(path)] = open_array(path, ("image",)).dtype
    for name, dtype in types.items():
        if dtype != np.uint8:
            raise ValueRangeError(f"Real and synthetic images that are mixed must both be uint8. {name} is {dtype}.")


def _open(paths: Sequence[str], voxel_nm: Sequence[float]) -> list[Volume]:
    """The pairs in memory; all of one voxel size, that of the real volume if it is known."""
    size = voxel_size(voxel_nm or open_volume(paths[0]).voxel_nm)
    empty = np.zeros((1, 1, 1), np.uint8)
    return [pair.load() for pair in open_pairs(list(paths), Volume(empty, empty, None, size))]


class MixedVolumeDataset(VolumeDataset):  # type: ignore[misc]  # PyTC has no types
    """PyTC's VolumeDataset that also draws from synthetic volumes, in an exact ratio.

    Sample i is synthetic or real by :func:`connectomics_neurodiff.pairs.is_synthetic`, whatever the workers and however
    often a sample is rejected; its place, pose and augmentation follow from (seed, i).

    Parameters
    ----------
    synthetic : SyntheticVolumes
        What is mixed in; the other arguments are PyTC's.
    """

    augmentor: Any
    #: Number of the first sample: a training that goes on, and the next chunk, go on in the numbers too.
    first_number = 0

    def __init__(
        self, volume: list[np.ndarray], label: list[np.ndarray], valid_mask: Any = None, *args: Any,
        synthetic: SyntheticVolumes, **options: Any,
    ) -> None:  # fmt: skip
        size = np.array(options["sample_label_size"])
        large = [[(size <= v.shape[-3:]).all() for v in group] for group in (volume, synthetic.images)]
        if not all(any(group) for group in large):
            kind = "real" if not any(large[0]) else "synthetic"
            raise ValueRangeError(
                f"No {kind} volume is as large as a sample, {tuple(size.tolist())} voxels with the margin that the "
                "augmentation needs. Make MODEL.INPUT_SIZE smaller, DATASET.PAD_SIZE larger, or the chunks fewer."
            )
        # PyTC drops volumes that are smaller than a sample; what is left keeps its order.
        self.real_count = sum(int(fits) for fits in large[0])
        self.synthetic_source = synthetic
        if valid_mask is not None:
            valid_mask = [*valid_mask, *(np.ones(v.shape, np.uint8) for v in synthetic.images)]
        super().__init__([*volume, *synthetic.images], [*label, *synthetic.labels], valid_mask, *args, **options)
        self.sample_index = 0
        self.attempt = 0
        if self.augmentor is not None:
            self.augmentor = _SeededAugmentor(self.augmentor, self)

    def __getitem__(self, index: int) -> Any:
        """Sample number `first_number` + `index` in PyTC's form."""
        self.sample_index, self.attempt = self.first_number + int(index), 0
        # PyTC's own draws (rejection) come from the global generator, which forked workers share.
        state = random.getstate()
        random.seed(int(self.rng("host").integers(2**62)))
        try:
            return super().__getitem__(index)
        finally:
            random.setstate(state)

    def rng(self, purpose: str) -> np.random.Generator:
        """Generator of this sample, attempt and purpose."""
        return rng_for(self.synthetic_source.seed, purpose, self.sample_index, self.attempt)

    def _get_pos_train(self, vol_size: Sequence[int]) -> list[int]:
        """Volume and corner: real or synthetic by number, the volume in proportion to its places, the place uniform."""
        self.attempt += 1
        rng = self.rng("host patch")
        synthetic = is_synthetic(self.sample_index, self.synthetic_source.ratio, self.synthetic_source.until)
        first, last = (self.real_count, len(self.volume)) if synthetic else (0, self.real_count)
        share = np.asarray(self.sample_num[first:last], dtype=float)
        chosen = first + int(rng.choice(last - first, p=share / share.sum()))
        room = np.asarray(self.volume_size[chosen]) - np.asarray(vol_size)
        return [chosen, *(int(rng.integers(n + 1)) for n in room)]


class _SeededAugmentor:
    """PyTC's augmentor, whose random state was made at import, drawing from the sample's own instead."""

    def __init__(self, augmentor: Any, dataset: MixedVolumeDataset) -> None:
        self.augmentor, self.dataset = augmentor, dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["augmentor"], name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, sample: Mapping[str, Any]) -> Any:
        state = np.random.RandomState(int(self.dataset.rng("host augmentation").integers(2**32)))
        return self.augmentor(sample, state)


def mixing_loader(plain: Callable[..., Any], synthetic: SyntheticVolumes, first_iteration: int) -> Callable[..., Any]:
    """PyTC's ``build_dataloader``, which in training mixes synthetic volumes in, from this iteration on."""
    next_iteration = first_iteration

    def build(cfg: CfgNode, augmentor: Any = None, mode: str = "train", **options: Any) -> Any:
        nonlocal next_iteration
        if mode != "train":
            return plain(cfg, augmentor, mode, **options)
        options |= {"dataset_class": MixedVolumeDataset, "dataset_options": {"synthetic": synthetic}}
        loader = plain(cfg, augmentor, mode, **options)
        loader.dataset.first_number = next_iteration * cfg.SOLVER.SAMPLES_PER_BATCH
        # Without chunks there is one loader; the next one would be another training's.
        next_iteration += cfg.DATASET.DATA_CHUNK_ITER if cfg.DATASET.DO_CHUNK_TITLE else 0
        return loader

    return build


def mixing_chunk(synthetic: SyntheticVolumes) -> Callable[..., VolumeDataset]:
    """What takes VolumeDataset's place where PyTC makes a dataset of a chunk of tiles: mixed if it is for training."""

    def make(*args: Any, mode: str, **options: Any) -> VolumeDataset:
        if mode != "train":
            return VolumeDataset(*args, mode=mode, **options)
        return MixedVolumeDataset(*args, mode=mode, synthetic=synthetic, **options)

    return make
