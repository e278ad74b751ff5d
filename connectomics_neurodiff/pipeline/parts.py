"""The parts of the data - train, tune, test, extra volumes - opened and checked before any long work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from ..conditions import with_dark_bodies
from ..config.validate import REST
from ..errors import ConfigError, MissingInput, ValueRangeError
from ..geometry import Box, is_anisotropic
from ..pairs import open_pairs
from ..provenance import hash_of, hash_of_file
from ..volume import ArrayLike, Volume, check_training_volume, grow_phantom, open_volume

PHANTOM = "phantom"


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes
    ----------
    name : str
        ``"train"``, ``"tune"`` or ``"test"``; of an extra volume or a piece of unannotated tissue, its place in the
        list: ``"EXTRA_VOLUMES[0]"``.
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
    dark_bodies_nm : float
        Above 0, what is dark inside neurons is found in the image (:func:`.with_dark_bodies`); the thickness of
        membranes, nm.
    """

    name: str
    source: str
    volume: Volume
    box: Box
    identity: str
    image: str
    dark_bodies_nm: float = 0.0

    def load(self) -> Volume:
        """The part in memory."""
        part = self.volume.crop(self.box)
        if not self.dark_bodies_nm:
            return part
        mito, dark = self._dark_bodies
        return replace(part, mito=mito, dark=dark)

    @property
    def finds_dark_bodies(self) -> bool:
        """Whether bodies that are found in the image stand for mitochondria, which nobody has annotated."""
        return self.dark_bodies_nm > 0 and self.volume.mito is None

    @cached_property
    def _dark_bodies(self) -> tuple[ArrayLike | None, ArrayLike | None]:
        part = with_dark_bodies(self.volume.crop(self.box), self.dark_bodies_nm)
        return part.mito, part.dark


def dark_bodies_nm(cfg: CfgNode) -> float:
    """:attr:`Part.dark_bodies_nm` of what the denoiser is trained on."""
    return float(cfg.NEURODIFF.MEMBRANE_NM) if makes_pairs(cfg) and cfg.NEURODIFF.DARK_BODIES else 0.0


def part_names(cfg: CfgNode) -> tuple[str, ...]:
    """The parts that this configuration has; train is the first."""
    return ("train", "tune", "test") if cfg.NEURODIFF.SPLIT.SCORED else ("train",)


def makes_pairs(cfg: CfgNode) -> bool:
    """Whether this configuration trains a denoiser and paints pairs of its own."""
    return bool(_own_sources(cfg) & {"remodelled", "repainted"})


def makes_pseudo_labels(cfg: CfgNode) -> bool:
    """Whether the real arm's network segments the unannotated tissue."""
    return bool(_own_sources(cfg) & {"repainted", "pseudo"})


def _own_sources(cfg: CfgNode) -> set[str]:
    """Kinds of pairs that the run makes itself."""
    synthetic = cfg.AUGMENTOR.SYNTHETIC
    return set(synthetic.SOURCE) if synthetic.ENABLED and not synthetic.PAIRS else set()


def uses_unlabeled(cfg: CfgNode) -> bool:
    """Whether the run learns from tissue that nobody has annotated."""
    return bool(cfg.DATASET.UNLABELED) and (makes_pairs(cfg) or makes_pseudo_labels(cfg))


def unlabeled_paths(cfg: CfgNode) -> list[str]:
    """Files of unannotated tissue that the run uses, but for the training volume's."""
    entries = [entry for entry in cfg.DATASET.UNLABELED if entry != REST] if uses_unlabeled(cfg) else []
    return [str(Path(cfg.DATASET.INPUT_PATH) / entry["IMAGE_NAME"]) for entry in entries if entry.get("IMAGE_NAME")]


def extra_paths(cfg: CfgNode) -> list[list[str]]:
    """Files of each volume that the denoiser is trained on beside the train part: image, label, mitochondria."""
    folder = Path(cfg.DATASET.INPUT_PATH)
    entries = cfg.NEURODIFF.DIFFUSION.EXTRA_VOLUMES if makes_pairs(cfg) else []
    names = [[entry.get(key, "") for key in ("IMAGE_NAME", "LABEL_NAME", "MITO_NAME")] for entry in entries]
    return [[str(folder / name) for name in group if name] for group in names]


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


def library_paths(cfg: CfgNode) -> list[str]:
    """File with shapes of mitochondria that the masks are remodelled with, if there is one."""
    name = cfg.NEURODIFF.REMODEL.LIBRARY if makes_pairs(cfg) and cfg.NEURODIFF.REMODEL.MITOCHONDRIA else ""
    return [str(Path(cfg.DATASET.INPUT_PATH) / name)] if name else []


def input_paths(cfg: CfgNode) -> list[str]:
    """All input files, including those of synthetic pairs made before."""
    made = list(cfg.AUGMENTOR.SYNTHETIC.PAIRS)
    groups = [*source_paths(cfg).values(), *extra_paths(cfg), unlabeled_paths(cfg), library_paths(cfg), made]
    return [path for group in groups for path in group]


def missing_inputs(cfg: CfgNode) -> list[str]:
    """Input files that are not there."""
    paths = input_paths(cfg)
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
        box = box_of(cfg.NEURODIFF.SPLIT[name.upper()].BOX, volume, name)
        found = dark_bodies_nm(cfg) if name == "train" else 0.0
        parts[name] = Part(name, source, volume, box, hash_of([identity, box.start, box.stop]), image, found)
    for part in parts.values():
        _require_labels(part)
    _require_neurons_left(parts["train"], cfg.NEURODIFF.SEGMENTER.LABEL_EROSION)
    for second, first in combinations(reversed(parts), 2):
        require_disjoint(parts[first], parts[second])
    voxel = {tuple(part.volume.voxel_nm) for part in parts.values()}
    if len(voxel) > 1:
        raise ConfigError(f"Train, tune and test must share one voxel size. Got {sorted(voxel)} nm.")
    return parts


def shape_of_training_volume(cfg: CfgNode) -> tuple[int, int, int]:
    """Voxels (z, y, x) of the file that the train part is cut from."""
    if cfg.DATASET.IMAGE_NAME == PHANTOM:
        z, y, x = cfg.NEURODIFF.PHANTOM.SHAPE
    else:
        path = source_paths(cfg)["train"][0]
        if not Path(path.split("::")[0]).exists():
            raise MissingInput(f"Missing input: {path}. DATASET.INPUT_PATH is '{cfg.DATASET.INPUT_PATH}'.")
        z, y, x = _shape_of(path, tuple(cfg.NEURODIFF.VOXEL_NM), Path(path.split("::")[0]).stat().st_mtime_ns)
    return z, y, x


@cache
def _shape_of(path: str, voxel_nm: tuple[float, ...], _written: int) -> tuple[int, ...]:
    """Of a volume; to open one that is not uint8 is to read it."""
    return open_volume(path, voxel_nm=voxel_nm or None).shape


def open_extra_volumes(cfg: CfgNode, parts: Mapping[str, Part]) -> list[Part]:
    """Open and check the volumes that the denoiser is trained on beside the train part; none if it is not trained.

    Raises
    ------
    MissingInput, ShapeMismatch, LabelTypeError, ValueRangeError, VoxelSizeMissing
        If a volume cannot be used, or its box has no labelled voxel.
    ConfigError
        If one shares voxels with the tune or the test part.
    """
    extra = []
    for number, paths in enumerate(extra_paths(cfg)):
        entry = cfg.NEURODIFF.DIFFUSION.EXTRA_VOLUMES[number]
        name = f"EXTRA_VOLUMES[{number}]"
        volume, identity, image = _read_source(paths, entry.get("VOXEL_NM", []), with_mito=bool(entry.get("MITO_NAME")))
        box = box_of(entry.get("BOX", []), volume, name)
        identity = hash_of([identity, box.start, box.stop])
        extra.append(Part(name, file_of(paths), volume, box, identity, image, dark_bodies_nm(cfg)))
        _require_labels(extra[-1])
        for part in parts.values():
            if part.name != "train":
                require_disjoint(extra[-1], part)
    return extra


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
            f"{part.source}; set {_box_key(part.name)}."
        )


def _require_neurons_left(part: Part, erosion: int) -> None:
    """The segmenter cannot learn neurons that were eroded away; better told before the denoiser is trained."""
    if erosion:
        from ..training.patches import erode_contacts

        label = part.load().array("label")
        if not erode_contacts(label, erosion, in_plane=is_anisotropic(part.volume.voxel_nm)).any():
            raise ValueRangeError(
                f"NEURODIFF.SEGMENTER.LABEL_EROSION must leave something of the neurons of the {part.name} part. "
                f"Got {erosion} voxels, nothing is left."
            )


def require_disjoint(first: Part, second: Part) -> None:
    """Refuse two parts that share voxels, whatever their files are called."""
    same = first.source == second.source or first.image == second.image
    if same and first.box.overlaps(second.box):
        where = first.source if first.source == second.source else f"{first.source} and its copy {second.source}"
        raise ConfigError(
            f"{first.name} and {second.name} must not share voxels. Got {first.box.start}-{first.box.stop} and "
            f"{second.box.start}-{second.box.stop} of {where}; set {_box_key(first.name)} or {_box_key(second.name)}."
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
    key = "|".join(paths)
    if key not in opened:
        with_mito = bool(cfg.NEURODIFF.MITO_NAME) and name == "train"
        opened[key] = _read_source(paths, cfg.NEURODIFF.VOXEL_NM, with_mito=with_mito)
    return file_of(paths), *opened[key]


def file_of(paths: list[str]) -> str:
    """The image's file, by which two volumes are found to be one."""
    return str(Path(paths[0].split("::")[0]).resolve())


def _read_source(paths: list[str], voxel_nm: Sequence[float], *, with_mito: bool) -> tuple[Volume, str, str]:
    """Volume, hash of all its files and of the voxel size given for it, hash of the image's file."""
    volume = _open_volume(paths, tuple(voxel_nm), with_mito=with_mito)
    check_training_volume(volume)
    given = [list(voxel_nm)] if voxel_nm else []
    identity = hash_of([hash_of_source(path) for path in paths] + given)
    return volume, identity, hash_of_source(paths[0].split("::")[0])


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


def _box_key(name: str) -> str:
    """Configuration key of a part's box."""
    group = {"EXTRA_VOLUMES": "NEURODIFF.DIFFUSION.", "UNLABELED": "DATASET."}.get(name.split("[")[0])
    return f"{group}{name}.BOX" if group else f"NEURODIFF.SPLIT.{name.upper()}.BOX"


def box_of(values: list[int], volume: Volume, name: str) -> Box:
    """A part's box, checked; without values all of the volume."""
    shape = volume.shape
    box = Box.of(values) if values else Box((0, 0, 0), shape)
    if not box.within(shape):
        raise ValueRangeError(f"{_box_key(name)} must lie within the volume's {tuple(shape)} voxels. Got {values}.")
    return box


def hash_of_source(path: str) -> str:
    """Content hash of a file, or of all files of a folder (sections, Zarr), in name order."""
    file, *dataset = path.split("::")
    root = Path(file)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return hash_of(
        [[(p.relative_to(root.parent).as_posix() if root.is_dir() else "", hash_of_file(p)) for p in files], dataset]
    )
