"""The three disjoint parts of the data - train, tune, test - opened and checked before any long work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from ..errors import ConfigError, MissingInput, ValueRangeError
from ..geometry import Box
from ..pairs import open_pairs
from ..provenance import hash_of, hash_of_file
from ..volume import Volume, check_training_volume, grow_phantom, open_volume

PHANTOM = "phantom"


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes
    ----------
    name : str
        ``"train"``, ``"tune"`` or ``"test"``.
    source : str
        The file it comes from, or ``"phantom"``.
    volume : Volume
        The whole volume, lazily read.
    box : Box
        The part of it.
    identity : str
        Hash of the source's content, the box, and the voxel size if it was given in the configuration.
    image : str
        Hash of the image's source alone: equal in two parts that show the same tissue, whatever the files are called.
    """

    name: str
    source: str
    volume: Volume
    box: Box
    identity: str
    image: str

    def load(self) -> Volume:
        """The part in memory."""
        return self.volume.crop(self.box)


def part_names(cfg: CfgNode) -> tuple[str, ...]:
    """The parts that this configuration has; train is the first."""
    return ("train", "tune", "test") if cfg.NEURODIFF.SPLIT.SCORED else ("train",)


def source_paths(cfg: CfgNode) -> dict[str, list[str]]:
    """Every input file by the part that needs it; none for the embedded phantom."""
    folder = Path(cfg.DATASET.INPUT_PATH)
    if cfg.DATASET.IMAGE_NAME == PHANTOM:
        return {part: [] for part in part_names(cfg)}
    train = [cfg.DATASET.IMAGE_NAME, cfg.DATASET.LABEL_NAME, cfg.NEURODIFF.MITO_NAME]
    found = {"train": [str(folder / name) for name in train if name]}
    for part in part_names(cfg)[1:]:
        node = cfg.NEURODIFF.SPLIT[part.upper()]
        names = [node.IMAGE_NAME, node.LABEL_NAME] if node.IMAGE_NAME else train[:2]
        found[part] = [str(folder / name) for name in names if name]
    return found


def missing_inputs(cfg: CfgNode) -> list[str]:
    """Input files that are not there, including those of synthetic pairs made before."""
    paths = [path for group in source_paths(cfg).values() for path in group] + list(cfg.AUGMENTOR.SYNTHETIC.PAIRS)
    return sorted({path for path in paths if not Path(path.split("::")[0]).exists()})


def open_parts(cfg: CfgNode) -> dict[str, Part]:
    """Open and check train, tune and test (train alone if nothing is scored).

    Raises
    ------
    MissingInput, ShapeMismatch, LabelTypeError, ValueRangeError, VoxelSizeMissing
        If an input is not there or cannot be used, or a part has no labelled voxel.
    ConfigError
        If two of the parts share voxels.
    """
    missing = missing_inputs(cfg)
    if missing:
        raise MissingInput(f"Missing input: {', '.join(missing)}. DATASET.INPUT_PATH is '{cfg.DATASET.INPUT_PATH}'.")
    opened: dict[str, tuple[Volume, str, str]] = {}
    parts = {}
    for name in part_names(cfg):
        source, volume, identity, image = _open_source(cfg, name, opened)
        box = _box_of(cfg.NEURODIFF.SPLIT[name.upper()].BOX, volume, name)
        parts[name] = Part(name, source, volume, box, hash_of([identity, box.start, box.stop]), image)
    for part in parts.values():
        _require_labels(part)
    for second, first in combinations(reversed(parts), 2):
        _require_disjoint(parts[first], parts[second])
    voxel = {tuple(part.volume.voxel_nm) for part in parts.values()}
    if len(voxel) > 1:
        raise ConfigError(f"Train, tune and test must share one voxel size. Got {sorted(voxel)} nm.")
    return parts


def check_pairs(cfg: CfgNode, real: Volume) -> None:
    """Read the synthetic pairs made before, if any, as the real volumes are read: now, not after the first training."""
    if cfg.AUGMENTOR.SYNTHETIC.ENABLED:
        for pair in open_pairs(list(cfg.AUGMENTOR.SYNTHETIC.PAIRS), real):
            check_training_volume(pair)


def _require_labels(part: Part) -> None:
    """A part without a neuron can neither teach, nor tune, nor be scored; better told before the training."""
    label = part.volume.label
    if label is None or not np.asarray(label[part.box.slices]).any():
        raise ValueRangeError(
            f"The {part.name} part has no labelled voxel, background only. Got {part.box.start}-{part.box.stop} of "
            f"{part.source}; set NEURODIFF.SPLIT.{part.name.upper()}.BOX."
        )


def _require_disjoint(first: Part, second: Part) -> None:
    same = first.source == second.source or first.image == second.image
    if same and first.box.overlaps(second.box):
        where = first.source if first.source == second.source else f"{first.source} and its copy {second.source}"
        raise ConfigError(
            f"{first.name} and {second.name} must not share voxels. Got {first.box.start}-{first.box.stop} and "
            f"{second.box.start}-{second.box.stop} of {where}; set NEURODIFF.SPLIT.*.BOX."
        )


def _open_source(cfg: CfgNode, name: str, opened: dict[str, tuple[Volume, str, str]]) -> tuple[str, Volume, str, str]:
    """Path, volume, hash of all its files, hash of the image's."""
    if cfg.DATASET.IMAGE_NAME == PHANTOM:
        node = cfg.NEURODIFF.PHANTOM
        if PHANTOM not in opened:
            grown = grow_phantom(tuple(node.SHAPE), tuple(node.VOXEL_NM), node.SEED)
            identity = hash_of([node.SHAPE, node.VOXEL_NM, node.SEED])
            opened[PHANTOM] = (grown, identity, identity)
        return PHANTOM, *opened[PHANTOM]
    paths = source_paths(cfg)[name]
    source = str(Path(paths[0].split("::")[0]).resolve())
    key = "|".join(paths)
    if key not in opened:
        volume = _open_volume(
            paths, tuple(cfg.NEURODIFF.VOXEL_NM), with_mito=bool(cfg.NEURODIFF.MITO_NAME) and name == "train"
        )
        check_training_volume(volume)
        given = [cfg.NEURODIFF.VOXEL_NM] if cfg.NEURODIFF.VOXEL_NM else []
        identity = hash_of([hash_of_source(path) for path in paths] + given)
        opened[key] = (volume, identity, hash_of_source(paths[0].split("::")[0]))
    return source, *opened[key]


def _open_volume(paths: list[str], voxel_nm: tuple[float, ...], *, with_mito: bool) -> Volume:
    rest = paths[1:]
    separate = {"mito": rest.pop()} if with_mito else {}
    separate |= {"label": rest[0]} if rest else {}
    volume = open_volume(paths[0], voxel_nm=voxel_nm or None, role="image" if "label" in separate else "auto")
    for role, path in separate.items():
        volume = replace(volume, **{role: getattr(open_volume(path, voxel_nm=volume.voxel_nm, role=role), role)})
    if volume.image is None or volume.label is None:
        lacking = "image" if volume.image is None else "label"
        raise MissingInput(f"{paths[0]} has no dataset '{lacking}'. Name the file that has it with DATASET.LABEL_NAME.")
    return volume


def _box_of(values: list[int], volume: Volume, name: str) -> Box:
    shape = volume.shape
    box = Box((values[0], values[1], values[2]), (values[3], values[4], values[5])) if values else Box((0, 0, 0), shape)
    if not box.within(shape):
        raise ValueRangeError(
            f"NEURODIFF.SPLIT.{name.upper()}.BOX must lie within the volume's {tuple(shape)} voxels. Got {values}."
        )
    return box


def hash_of_source(path: str) -> str:
    """Content hash of a file, or of all files of a folder (sections, Zarr), in name order."""
    file, *dataset = path.split("::")
    root = Path(file)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return hash_of(
        [[(p.relative_to(root.parent).as_posix() if root.is_dir() else "", hash_of_file(p)) for p in files], dataset]
    )
