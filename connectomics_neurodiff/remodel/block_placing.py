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
from .placement import Budget, Templates, Wanted, fill, is_wanted, plan_of
from .room import CandidateGroups, Room, Window, unknown_sections, volume_groups

#: Depths told apart when it is counted where a mitochondrion could be.
_DEPTHS = 32
#: Multiples of the golden ratio's fraction fill the unit interval evenly, however many are taken (Weyl's sequence).
_GOLDEN = (np.sqrt(5) - 1) / 2


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

    def place(self, library: SignatureLibrary, mito_fraction: float, seed: int) -> None:
        """:func:`.place_mitochondria`, block by block.

        The plan is that of the whole volume. Each mitochondrion of it is given to a block, by how many voxels deep
        enough for it every block holds, and has its widest section there; it may reach as far as :meth:`_halo` into
        the blocks beside it. Blocks are worked on in their order, each around what those before it have placed; what
        one could not hold is added to what the next one shall.

        One block gives the bytes of :func:`.place_in` with ``numpy.random.default_rng(seed)``.
        """
        if not is_wanted(library, mito_fraction, self.candidate_fraction, self.margin_nm):
            return
        templates = Templates.of(library, len(self.label), self.voxel_nm)
        group = volume_groups(self.neurons.volumes, self.candidate_fraction)
        wanted = mito_fraction * self.label.size
        plan = plan_of(library, wanted, self.voxel_nm)
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
            fill(room, groups, templates, plans[i], budget, rng)
            reserve_space(self.mito.file, room.mito.nbytes)
            self.mito[part] = room.mito

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
        """Plan of each block: every size is spread over the volume as evenly as the room for it is."""
        if len(self.blocks) == 1:
            return [list(plan)]
        step = templates.most_depth_nm / _DEPTHS
        counts = np.stack([self._depths(block, templates, group, step) for block in self.blocks])
        capacity = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        # Where nothing is deep at all, sections count.
        capacity[:, 0] += (capacity[:, 0].sum() == 0) * np.array([len(block) for block in self.blocks])
        somewhere = int(np.flatnonzero(capacity.sum(axis=0)).max())
        plans: list[list[Wanted]] = [[] for _ in self.blocks]
        start = rng_for(seed, "plan").random()
        for i, each in enumerate(plan):
            need = min(int(templates.matching(each).least_depth_nm / step), somewhere)
            ends = capacity[:, need].cumsum()
            plans[int(np.searchsorted(ends, (start + i * _GOLDEN) % 1 * ends[-1], side="right"))].append(each)
        return plans

    def _depths(self, block: range, templates: Templates, group: np.ndarray, step_nm: float) -> np.ndarray:
        """Number of voxels of a block, in neurons of the first group, by depth, (depths,)."""
        room, names = self._room(Window(len(self.label), block, block), templates)
        first = self._group_of(names, group) == 0
        deep = (room.depth > 0) & first[room.label]
        depths = np.minimum(room.depth[deep] / step_nm, _DEPTHS - 1).astype(np.int64)
        return np.bincount(depths, minlength=_DEPTHS)
