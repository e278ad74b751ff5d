"""Mitochondria of a volume on disk, placed a few sections at a time; they cross the faces between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from ..geometry import ZYX
from ..progress import progress
from ..seeding import rng_for
from ..volume.writing import reserve_space
from .checks import compact_labels
from .library import SignatureLibrary
from .placement import fill, is_wanted
from .plan import Budget, Wanted, plan_of
from .room import CandidateGroups, Room, Window, unknown_sections, volume_groups
from .templates import Templates

#: Depths told apart when it is counted where a mitochondrion could be.
_DEPTHS = 32
#: So much of a mitochondrion's height lies inside the volume if it is centred in a section.
_INSIDE = 0.85


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons of a whole volume.

    Attributes
    ----------
    names : numpy.ndarray
        (n,) labels, rising, without 0.
    volumes : numpy.ndarray
        (n,) voxels.
    """

    names: np.ndarray
    volumes: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockwisePlacing:
    """Masks on disk, open for writing, and what decides where mitochondria may be.

    Attributes
    ----------
    label, membrane, mito : h5py.Dataset
        (z, y, x); `mito` is written.
    blocks : sequence of range
        Sections of each block, rising.
    voxel_nm : ZYX
    neurons : Neurons
        Those of `label`.
    candidate_fraction, margin_nm : float
        See :func:`.place_mitochondria`.
    """

    label: h5py.Dataset
    membrane: h5py.Dataset
    mito: h5py.Dataset
    blocks: Sequence[range]
    voxel_nm: ZYX
    neurons: Neurons
    candidate_fraction: float
    margin_nm: float

    def place(self, library: SignatureLibrary, mito_fraction: float, mito_count: int | None, seed: int) -> None:
        """:func:`.place_mitochondria`, block by block.

        The plan is that of the whole volume. Each mitochondrion of it is given to a block, by how many voxels deep
        enough for it every block holds, not so near to the volume's first or last section that it would be cut, and by
        what was given before; it has its widest section there and may reach into the blocks beside it, at most through
        them. Blocks are worked on in their order, each around what those before it have placed; what
        one could not hold is added to what the next one shall.

        One block gives the bytes of :func:`.place_in` with ``numpy.random.default_rng(seed)``.
        """
        if not is_wanted(library, mito_fraction, mito_count, self.candidate_fraction, self.margin_nm):
            return
        templates = Templates.of(library, len(self.label), self.voxel_nm)
        group = volume_groups(self.neurons.volumes, self.candidate_fraction)
        wanted = mito_fraction * self.label.size
        plan = plan_of(library, wanted, self.voxel_nm, mito_count)
        plans = self._shared_out(plan, templates, group, seed)
        ends = np.cumsum([sum(each.volume for each in part) for part in plans])
        budget = Budget(0.0)
        halo = self._halo(templates)
        for i, block in enumerate(progress(self.blocks, label="mitochondria")):
            window = self._window(block, halo)
            room, neurons = self._room(window, templates)
            groups = CandidateGroups(
                room, self.candidate_fraction, templates.least_need_nm, self._group_of(neurons, group)
            )
            part = slice(window.seen.start, window.seen.stop)
            room.occupy(self.mito[part])
            budget.wanted = wanted * float(ends[i] / ends[-1])
            # Less than one mitochondrion is not made up by specks here, but by larger ones there.
            budget.slack = wanted / len(plan) if i < len(plans) - 1 else 0.0
            rng = rng_for(seed, "block", i) if i else np.random.default_rng(seed)
            fill(room, groups, templates, plans[i], budget, rng, sizes=plan)
            reserve_space(self.mito.file, room.mito.nbytes)
            self.mito[part] = room.mito
        budget.warn_if_missed(self.label.size, mito_count)

    def _halo(self, templates: Templates) -> int:
        """Sections that a mitochondrion may reach beyond its block: all that it needs, but no more than a block."""
        return min(int(np.ceil(templates.most_rise_nm / self.voxel_nm.z)), len(self.blocks[0]))

    def _window(self, block: range, halo: int) -> Window:
        depth, beyond = len(self.label), halo + unknown_sections(self.voxel_nm, self.margin_nm)
        return Window(depth, range(max(block.start - beyond, 0), min(block.stop + beyond, depth)), block)

    def _room(self, window: Window, templates: Templates) -> tuple[Room, np.ndarray]:
        """Room in some sections, and the neuron's name for each of its labels."""
        part = slice(window.seen.start, window.seen.stop)
        compact, names = compact_labels(self.label[part])
        room = Room.of(
            compact, self.membrane[part], self.voxel_nm, self.margin_nm, templates.most_depth_nm, window=window
        )
        return room, names

    def _group_of(self, names: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Group of each label of a room, (n + 1,); -1 for the background."""
        found = np.full(len(names), -1, dtype=np.int64)
        neurons = names > 0
        found[neurons] = group[np.searchsorted(self.neurons.names, names[neurons])]
        return found

    def _shared_out(
        self, plan: Sequence[Wanted], templates: Templates, group: np.ndarray, seed: int
    ) -> list[list[Wanted]]:
        """Plan of each block: drawn by the volume that is still due to it, as there is room in it for such a one."""
        if len(self.blocks) == 1:
            return [list(plan)]
        step, depth = templates.most_depth_nm / _DEPTHS, len(self.label)
        counts = np.concatenate([self._depths(block, templates, group, step) for block in self.blocks])
        room = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        middle, starts = np.arange(depth) + 0.5, [block.start for block in self.blocks]
        plans: list[list[Wanted]] = [[] for _ in self.blocks]
        given, rng = np.zeros(len(self.blocks)), rng_for(seed, "plan")
        for each in plan:
            deep = room[:, min(int(templates.matching(each).least_depth_nm / step), _DEPTHS - 1)]
            half = each.height_nm / self.voxel_nm.z / 2
            inside = np.minimum(middle + half, depth) - np.maximum(middle - half, 0)
            choices = deep * (inside >= _INSIDE * 2 * half), deep, room[:, 0], np.ones(depth)
            here = np.add.reduceat(next(choice for choice in choices if choice.any()), starts)
            due = np.maximum(here / here.sum() * (given.sum() + each.volume) - given, 0)
            chosen = int(rng.choice(len(due), p=due / due.sum()))
            plans[chosen].append(each)
            given[chosen] += each.volume
        return plans

    def _depths(self, block: range, templates: Templates, group: np.ndarray, step_nm: float) -> np.ndarray:
        """Number of voxels in neurons of the first group by depth, (sections, depths)."""
        room, names = self._room(Window(len(self.label), block, block), templates)
        first = self._group_of(names, group) == 0
        found = np.zeros((len(block), _DEPTHS), dtype=np.int64)
        for section, label, depth in zip(found, room.label, room.depth, strict=True):
            deep = depth[(depth > 0) & first[label]]
            section += np.bincount(np.minimum(deep / step_nm, _DEPTHS - 1).astype(np.int64), minlength=_DEPTHS)
        return found
