"""Tissue that nobody has annotated: its boxes and files, and the masks that are made of it and of the train part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from yacs.config import CfgNode

from ..conditions import with_dark_bodies
from ..config.validate import REST
from ..errors import ConfigError, StaleArtifactError, ValueRangeError, VoxelSizeMissing
from ..geometry import Box, same_voxel_size
from ..provenance import hash_of, read_provenance
from ..volume import Volume, check_training_volume, open_volume
from .parts import (
    Part,
    box_of,
    dark_bodies_nm,
    file_of,
    hash_of_source,
    makes_pseudo_labels,
    require_disjoint,
    shape_of_training_volume,
    uses_unlabeled,
)

if TYPE_CHECKING:
    from .run import Run

#: The stage, its folder, and what its artefacts are known by.
PSEUDO_LABELS = "pseudo_labels"
#: Pixels of a row by which tissue is recognised, and how many grey values a row has that is not met by chance.
ROW, LEAST_VALUES = 48, 8
#: Most voxels of a "rest" that nobody has looked at: it is held in memory, with its affinities.
MOST_REST = 1 << 29


@dataclass(frozen=True)
class MaskCopy:
    """A mask that a run makes, and the pair that is painted onto it.

    Attributes
    ----------
    number : int
        Of the copies of one piece of tissue.
    tissue : int
        Place in DATASET.UNLABELED; -1: the train part.
    """

    number: int
    tissue: int = -1

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        where = "" if self.tissue < 0 else f"unlabeled_{self.tissue:03d}_"
        return f"{where}copy_{self.number:03d}"

    @property
    def stream(self) -> tuple[str | int, ...]:
        """What its random numbers are drawn for."""
        return (self.number,) if self.tissue < 0 else ("unlabeled", self.tissue, self.number)

    @property
    def settings(self) -> dict[str, int]:
        """As its provenance records it."""
        return {"COPY": self.number} | ({"UNLABELED": self.tissue} if self.tissue >= 0 else {})


def mask_copies(cfg: CfgNode) -> list[MaskCopy]:
    """All masks that a configuration makes."""
    sources = cfg.AUGMENTOR.SYNTHETIC.SOURCE
    tissues = [-1] if "remodelled" in sources else []
    tissues += range(len(unlabeled_entries(cfg))) if "repainted" in sources else []
    return [MaskCopy(number, tissue) for tissue in tissues for number in range(cfg.NEURODIFF.REMODEL.COPIES)]


def pseudo_labelled(cfg: CfgNode) -> list[Path]:
    """Files of the unannotated tissue with the labels of the real arm's network; none if the run makes none."""
    if not makes_pseudo_labels(cfg):
        return []
    folder = Path(cfg.DATASET.OUTPUT_PATH) / PSEUDO_LABELS
    return [folder / f"tissue_{number:03d}.h5" for number in range(len(unlabeled_entries(cfg)))]


def unlabeled_entries(cfg: CfgNode) -> list[Mapping[str, Any]]:
    """DATASET.UNLABELED as mappings with IMAGE_NAME and BOX, "rest" as the boxes that it stands for.

    Raises
    ------
    ConfigError
        If nothing is left of the file in which a training patch has room, or too much to hold in memory.
    """
    if list(cfg.DATASET.UNLABELED) != [REST]:
        return list(cfg.DATASET.UNLABELED)
    shape = shape_of_training_volume(cfg)
    boxes = [Box((0, 0, 0), shape)]
    for name in ("TRAIN", "TUNE", "TEST"):  # what is set apart for later is not taken either
        node = cfg.NEURODIFF.SPLIT[name]
        if name != "TRAIN" and not (node.BOX or cfg.NEURODIFF.SPLIT.SCORED):
            continue
        if _is_training_file(cfg, node.get("IMAGE_NAME", "")):
            taken = Box.of(node.BOX) if node.BOX else Box((0, 0, 0), shape)
            boxes = [left for box in boxes for left in box.without(taken)]
    patch = cfg.MODEL.INPUT_SIZE
    boxes = [box for box in boxes if all(n >= p for n, p in zip(box.shape, patch, strict=True))]
    voxels = sum(z * y * x for z, y, x in (box.shape for box in boxes))
    if not 0 < voxels <= MOST_REST:
        raise ConfigError(
            f"DATASET.UNLABELED '{REST}' must be from one training patch, {list(patch)}, to {MOST_REST:,} voxels "
            f"outside of train, tune and test. Got {voxels:,} of the volume's {tuple(shape)}; name boxes instead."
        )
    return [{"BOX": [*box.start, *box.stop]} for box in boxes]


def _is_training_file(cfg: CfgNode, name: str) -> bool:
    """Whether a name, or none, means the training volume's file."""
    return not name or file_of([_path_of(cfg, name)]) == file_of([_path_of(cfg, cfg.DATASET.IMAGE_NAME)])


def unlabeled_shapes(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """Voxels (z, y, x) of each piece of unannotated tissue, whose files must be there; nothing of them is read."""
    shapes = []
    for entry in unlabeled_entries(cfg):
        if box := entry.get("BOX"):
            shapes.append(Box.of(box).shape)
        else:
            z, y, x = _open(cfg, entry["IMAGE_NAME"]).shape
            shapes.append((z, y, x))
    return shapes


def shapes_of_masks(cfg: CfgNode, train: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Voxels (z, y, x) of each mask that a configuration makes; `train` of the train part."""
    copies = mask_copies(cfg)
    tissues = unlabeled_shapes(cfg) if any(copy.tissue >= 0 for copy in copies) else []
    return [tissues[copy.tissue] if copy.tissue >= 0 else train for copy in copies]


def open_unlabeled(cfg: CfgNode, parts: Mapping[str, Part]) -> list[Part]:
    """Open and check the unannotated tissue, none if the run makes neither a denoiser nor pseudo-labels.

    Labels that a file has are not looked at.

    Raises
    ------
    MissingInput, ShapeMismatch, ValueRangeError, VoxelSizeMissing
        If a volume cannot be used.
    ConfigError
        If one has other voxels than the train part, or shares some with another part.
    """
    if not uses_unlabeled(cfg):
        return []
    train = parts["train"]
    opened: list[Part] = []
    for number, entry in enumerate(unlabeled_entries(cfg)):
        name = f"UNLABELED[{number}]"
        if file := entry.get("IMAGE_NAME"):
            path = _path_of(cfg, file)
            source, image = file_of([path]), hash_of_source(path.split("::")[0])
            content = hash_of([image, *path.split("::")[1:]])
            volume = _open(cfg, file)
            check_training_volume(volume, needs=["image"])
        else:
            source, image, content = train.source, train.image, train.image
            volume = replace(train.volume, label=None, mito=None, dark=None)
        if not same_voxel_size(volume.voxel_nm, train.volume.voxel_nm):
            raise ConfigError(
                f"DATASET.{name} must have the train part's voxels, {tuple(train.volume.voxel_nm)} nm. "
                f"Got {tuple(volume.voxel_nm)} nm."
            )
        box = box_of(entry.get("BOX", []), volume, name)
        part = Part(name, source, volume, box, hash_of([content, box.start, box.stop]), image)
        for other in [*parts.values(), *opened]:
            require_disjoint(part, other)
        _require_contrast(part)
        for other in list(parts.values())[1:]:  # what the train part shows is known anyway
            _require_other_tissue(part, other)
        opened.append(part)
    return opened


def _require_contrast(part: Part) -> None:
    """Padding teaches nothing; better told before the real arm is trained."""
    image, (z, y, x) = part.volume.image, part.box.slices
    assert image is not None  # of all that is opened here
    first = image[part.box.start]
    if all((np.asarray(image[section, y, x]) == first).all() for section in range(z.start, z.stop)):
        raise ValueRangeError(
            f"DATASET.{part.name} must show tissue. Got one grey value, {float(first):.3g}, in all of "
            f"{part.box.start}-{part.box.stop} of {part.source}."
        )


def _require_other_tissue(part: Part, other: Part) -> None:
    """Refuse tissue that shows a part of the data, saved anew under another name, pixel for pixel.

    A row of pixels from the middle of the part is looked for in every section.
    """
    if part.source == other.source or part.image == other.image:
        return  # compared by their boxes
    rows = _telling_rows(other)
    image, (z, y, x) = part.volume.image, part.box.slices
    assert image is not None  # of all that is opened here
    for section in range(z.start, z.stop) if rows else ():
        seen = _bytes_of(image[section, y, x])
        if any(row in seen for row in rows):
            raise ConfigError(
                f"DATASET.{part.name} must not show the {other.name} part, whatever the files are called. Section "
                f"{section} of {part.source} shows what lies in {other.box.start}-{other.box.stop} of {other.source}; "
                "choose another BOX."
            )


def _telling_rows(part: Part) -> list[bytes]:
    """Pieces of rows in the middle of three sections, as far as they are unlikely to be met elsewhere."""
    image, (z0, y0, x0), (depth, height, width) = part.volume.image, part.box.start, part.box.shape
    assert image is not None  # of all that is opened here
    length = min(ROW, width)
    found = []
    for quarter in (1, 2, 3):
        start = x0 + (width - length) // 2
        row = image[z0 + depth * quarter // 4, y0 + height // 2, start : start + length]
        if len(np.unique(row)) >= LEAST_VALUES:
            found.append(_bytes_of(row))
    return found


def _bytes_of(image: np.ndarray) -> bytes:
    """Grey values as uint8, in which volumes are compared."""
    return np.rint(np.asarray(image, np.float32) * 255).astype(np.uint8).tobytes()


def hash_of_pseudo_labels(run: Run, tissue: int) -> str:
    """Content hash of a piece of tissue with the labels that the run has made for it.

    Raises
    ------
    StaleArtifactError
        If they are of other tissue than the configuration names.
    """
    name = f"{PSEUDO_LABELS}/tissue_{tissue:03d}.h5"
    found = run.hash_of(name)
    provenance = read_provenance(run.folder / name)
    if provenance and provenance["parents"]["tissue"] != run.unlabeled[tissue].identity:
        raise StaleArtifactError(
            f"{run.folder / name} is of other tissue than DATASET.{run.unlabeled[tissue].name}: run the stage "
            f"'{PSEUDO_LABELS}' again, with --force, or in another folder."
        )
    return found


def load_pseudo_labelled(run: Run, tissue: int) -> Volume:
    """A piece of tissue with its pseudo-labels, and what is dark inside these neurons, in memory."""
    volume = open_volume(run.folder / PSEUDO_LABELS / f"tissue_{tissue:03d}.h5").load()
    if thickness_nm := dark_bodies_nm(run.cfg):
        return with_dark_bodies(volume, thickness_nm)
    if run.parts["train"].volume.mito is None:
        return volume
    # The denoiser is told of mitochondria: where nobody has marked any, those found in the image stand for them.
    return replace(volume, mito=with_dark_bodies(volume, run.cfg.NEURODIFF.MEMBRANE_NM).mito)


def _path_of(cfg: CfgNode, name: str) -> str:
    return str(Path(cfg.DATASET.INPUT_PATH) / name)


def _open(cfg: CfgNode, name: str) -> Volume:
    """An image alone; NEURODIFF.VOXEL_NM stands for a voxel size that the file does not state."""
    path = _path_of(cfg, name)
    try:
        return open_volume(path, role="image")
    except VoxelSizeMissing:
        return open_volume(path, voxel_nm=tuple(cfg.NEURODIFF.VOXEL_NM) or None, role="image")
