"""Mitochondria from the signature library into the large neurons of a deformed volume (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ValueRangeError
from ..geometry import voxel_size
from .chain import Pose, grow_chain
from .checks import binary_mask, compact_labels, positive
from .ellipse import Ellipse, equivalent_ellipse, piece_at
from .library import LEAST_VOLUME_NM3, Signature, SignatureLibrary
from .room import Candidate, CandidateGroups, Room

#: Log-scale tolerance of the axis-length ratio. Published: .35 +- .05; here each template brings its own ratio.
_RATIO_SPREAD = 0.35
#: Of a neuron's cross-section, what lies within this distance gives its width and direction.
_NEAR_NM = 1500.0
#: Jitter of the orientation, published: +-5 degrees.
_TURN_JITTER = np.deg2rad(5.0)
_SCALE_JITTER = (0.92, 1.08)
#: A template may be drawn down to this size, and at last, where nothing else helps, to the second one, but then not
#: below the volume of the smallest template.
_MIN_SCALE, _LAST_SCALE = 0.6, 0.35
#: Placement stops within this share of the volume wanted, and never goes beyond it by more.
_TOLERANCE = 0.04
#: Places tried for a template in a neuron before another neuron and template are drawn.
_PLACES = 6
#: Failures in a row, per candidate and at least, before the demands are lowered.
_PATIENCE_PER_CANDIDATE, _PATIENCE = 1, 15
#: Share of a template's sections that must find room: at first, and when the largest neurons take no more.
_COMPLETE, _LESS_COMPLETE = 0.75, 0.4


@dataclass(frozen=True)
class _Goal:
    """What is asked for at present.

    Attributes
    ----------
    voxels : float
        Volume wanted in all.
    groups : int
        Groups of candidates, largest first, that may be used.
    complete : float
        Share of a template's sections that must find room.
    shares : bool
        Whether every template is to make up its own share of the volume.
    scale : float
        Smallest size at which a template may be drawn.
    """

    voxels: float
    groups: int
    complete: float
    shares: bool
    scale: float

    def room_left(self, templates: _Templates) -> float:
        """Voxels that may still be placed."""
        return (1 + _TOLERANCE) * self.voxels - float(templates.placed.sum())

    def is_met(self, templates: _Templates) -> bool:
        """Whether the volume wanted is there."""
        return float(templates.placed.sum()) >= (1 - _TOLERANCE) * self.voxels


@dataclass(frozen=True, eq=False)
class _Templates:
    """Templates of a library, and per template: volume in voxels, axes in nm and ratio to the host of its widest
    section, smallest sensible size, voxels placed so far."""

    signatures: tuple[Signature, ...]
    volume: np.ndarray
    major: np.ndarray
    minor: np.ndarray
    ratio: np.ndarray
    least_scale: np.ndarray
    placed: np.ndarray

    @classmethod
    def of(cls, library: SignatureLibrary, depth: int, voxel_nm: Sequence[float]) -> _Templates:
        signatures = library.templates_for(depth * voxel_nm[0])
        widest = [s.widest for s in signatures]
        axes = np.array([s.axes[i] for s, i in zip(signatures, widest, strict=True)])
        return cls(
            signatures,
            np.array([s.volume_nm3 for s in signatures]) / float(np.prod(voxel_nm)),
            axes[:, 0],
            axes[:, 1],
            np.array([s.host_ratios[i] for s, i in zip(signatures, widest, strict=True)]),
            np.clip(np.cbrt([LEAST_VOLUME_NM3 / s.volume_nm3 for s in signatures]), _LAST_SCALE, _MIN_SCALE),
            np.zeros(len(signatures)),
        )

    @property
    def least_depth_nm(self) -> float:
        """Depth that the centre of the smallest template needs."""
        return 0.8 * float((self.least_scale * self.minor).min()) / 2

    @property
    def most_depth_nm(self) -> float:
        """Depth that the centre of no section of any template exceeds in its need."""
        return _SCALE_JITTER[1] * max(float(s.axes[:, 1].max()) for s in self.signatures) / 2

    def choose(
        self, host_major_nm: float, depth_nm: float, goal: _Goal, rng: np.random.Generator
    ) -> tuple[int, float] | None:
        """Template and its scale for a neuron's cross-section, by the ratio of their axes; None if none fits."""
        scale = np.minimum(np.cbrt(goal.room_left(self) / self.volume), 1.0) * rng.uniform(*_SCALE_JITTER)
        if not goal.shares:
            # Rather a large one drawn smaller than a crowd of the smallest.
            scale *= rng.uniform(goal.scale, 1.0)
        fits = (scale >= np.maximum(self.least_scale, goal.scale)) & (0.8 * scale * self.minor / 2 <= depth_nm)
        if goal.shares:
            # Small templates fit everywhere: those that have made up their share must not take the place of large ones.
            fits &= self.placed < goal.voxels * self.volume / self.volume.sum()
        if not fits.any():
            return None
        off = np.log(self.major * scale / host_major_nm / self.ratio) / _RATIO_SPREAD
        # The best of those that fit keeps weight 1 however far all of them are from their ratio.
        weight = np.where(fits, np.exp(-0.5 * (off**2 - (off[fits] ** 2).min())), 0)
        if not goal.shares:
            weight *= self.volume * scale**3
        chosen = int(rng.choice(len(weight), p=weight / weight.sum()))
        return chosen, float(scale[chosen])


def _anchor(
    room: Room, candidate: Candidate, least_nm: float, section: int | None, rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """A random voxel of the neuron, in one section if given, that is still deep enough for a template's centre."""
    deep = candidate.deep
    if section is not None:
        area = room.label.shape[1] * room.label.shape[2]
        deep = deep[slice(*np.searchsorted(deep, [section * area, (section + 1) * area]))]
    if not deep.size:
        return None
    for flat in deep[rng.integers(len(deep), size=8)]:
        z, y, x = (int(v) for v in np.unravel_index(flat, room.label.shape))
        if room.depth[z, y, x] >= least_nm:
            return z, y, x
    return None


def _section_of(template: Signature, scale: float, up: bool, room: Room, rng: np.random.Generator) -> int | None:
    """Section for the widest part of a template that a face of its volume cut; None, any, for one that is whole.

    Such a template is the visible part of something about twice as high. Of objects of height h that reach into a
    stack of depth D, 2 h / (D + h) are cut by a face. So many have their cut end on a face of this volume; the others,
    closed, lie wholly inside. Anywhere they would be cut a second time, and more and smaller ones would make up the
    volume.
    """
    if not (template.cut_below or template.cut_above):
        return None
    depth, step = room.label.shape[0], scale * template.pitch_z_nm / room.voxel_nm[0]
    below, above = step * template.widest, step * (len(template) - 1 - template.widest)
    cut_low, cut_high = template.cut_below, template.cut_above
    if not up:
        below, above, cut_low, cut_high = above, below, cut_high, cut_low
    whole = 2 * (below + above + step)
    on_face, which, at = rng.random(3)
    if template.is_low or on_face < 2 * whole / (depth + whole):
        low = cut_low and (not cut_high or which < 0.5)
        wanted = below if low else depth - 1 - above
    elif below + above <= depth - 1:
        wanted = below + at * (depth - 1 - above - below)
    else:
        return None
    return int(np.clip(round(wanted), 0, depth - 1))


def _cross_section(room: Room, candidate: Candidate, at: tuple[int, int, int]) -> Ellipse:
    """Ellipse of the piece of the neuron's cross-section that holds the voxel `at`, as far as it is near."""
    z, y, x = at
    window = tuple(
        slice(max(part.start, centre - int(_NEAR_NM / pitch)), min(part.stop, centre + int(_NEAR_NM / pitch) + 1))
        for part, centre, pitch in zip(candidate.box[1:], (y, x), room.voxel_nm[1:], strict=True)
    )
    section = piece_at(room.label[z][window] == candidate.label, y - window[0].start, x - window[1].start)
    return equivalent_ellipse(section, room.voxel_nm[1:])


def _depth_near(room: Room, candidate: Candidate, at: tuple[int, int, int], reach_nm: float) -> float:
    """Largest depth of the neuron within `reach_nm` of a voxel, in its section."""
    z, y, x = at
    ry, rx = (int(np.ceil(reach_nm / pitch)) for pitch in room.voxel_nm[1:])
    near = (slice(max(0, y - ry), y + ry + 1), slice(max(0, x - rx), x + rx + 1))
    return float((room.depth[z][near] * (room.label[z][near] == candidate.label)).max())


def _try(
    room: Room,
    candidate: Candidate,
    templates: _Templates,
    goal: _Goal,
    rng: np.random.Generator,
) -> bool:
    """Place one mitochondrion in a neuron, at several places if need be; whether one was placed."""
    choice, section, up = None, None, bool(rng.integers(2))
    for _ in range(_PLACES):
        at = _anchor(room, candidate, templates.least_depth_nm, section, rng)
        if at is None:
            return False
        host = _cross_section(room, candidate, at)
        # One template for all places: a large one would lose to small ones if it were redrawn at each failure.
        if choice is None:
            depth = _depth_near(room, candidate, at, host.minor_nm / 2)
            choice = templates.choose(host.major_nm, depth, goal, rng)
            if choice is None:
                continue
            section = _section_of(templates.signatures[choice[0]], choice[1], up, room, rng)
            if section is not None:
                continue
        template = templates.signatures[choice[0]]
        mirror, around = (bool(b) for b in rng.integers(2, size=2))
        own = float(template.angles[template.widest])
        jitter = rng.uniform(-_TURN_JITTER, _TURN_JITTER)
        turn = host.angle + (own if mirror else -own) + np.pi * around + jitter
        made = grow_chain(room, template, Pose(candidate.label, at, turn, mirror, up, choice[1]), goal.complete)
        if made is not None and made[0].sum() <= goal.room_left(templates):
            room.put(*made)
            templates.placed[choice[0]] += made[0].sum()
            return True
    return False


def _fill(room: Room, groups: CandidateGroups, templates: _Templates, wanted: float, rng: np.random.Generator) -> None:
    """Place mitochondria until the volume wanted is reached or no candidate takes another."""
    goals = [_Goal(wanted, 1, complete, True, _MIN_SCALE) for complete in (_COMPLETE, _LESS_COMPLETE)]
    goals += [_Goal(wanted, 1, _LESS_COMPLETE, False, _MIN_SCALE)]
    goals += [_Goal(wanted, count, _LESS_COMPLETE, False, _LAST_SCALE) for count in range(1, len(groups) + 1)]
    for goal in goals:
        candidates = groups.largest(goal.groups)
        # Between uniform (paper) and proportional to volume, which crowds the largest neuron.
        weight = np.sqrt([c.deep.size for c in candidates])
        failures = 0
        while candidates and failures < max(_PATIENCE, _PATIENCE_PER_CANDIDATE * len(candidates)):
            if goal.is_met(templates):
                return
            candidate = candidates[int(rng.choice(len(candidates), p=weight / weight.sum()))]
            failures = 0 if _try(room, candidate, templates, goal, rng) else failures + 1


def place_mitochondria(
    label: np.ndarray,
    membrane: np.ndarray,
    voxel_nm: Sequence[float],
    library: SignatureLibrary,
    rng: np.random.Generator,
    *,
    mito_fraction: float,
    candidate_fraction: float = 0.10,
    margin_nm: float = 10.0,
) -> np.ndarray:
    """Place mitochondria of a library in a labelled volume.

    The candidates are the top `candidate_fraction` of neurons by volume (at least one) that are wide enough. A neuron
    is drawn, an ellipse is fitted to its cross-section at a random place, a template is drawn by its axis-length ratio
    to that ellipse, aligned with it, led through the sections, refined, and kept if it is valid
    (:func:`.grow_chain`). A template that a face of its own volume cut has that end on a face here, too, as often as
    real ones do. Each template makes up its own share of the volume, so that small ones, which fit
    everywhere, do not displace large ones. This goes on until the volume wanted is met within 4 %
    (a small volume may end further off: the smallest template is what it is).

    When one attempt per candidate (15 at least) fails in a row, less complete templates are taken, then shares are
    dropped and templates drawn smaller, down to .6, then to .35; then the next `candidate_fraction` of neurons joins,
    and so on: real tissue's share of mitochondria comes before the top 10 %. When all neurons have joined and still
    refuse, placement ends below the volume wanted.

    Published differently: one template per neuron, drawn anew on each section, up to 20 % of it outside the neuron.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.
    membrane : numpy.ndarray
        (z, y, x), non-zero on membranes.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x).
    library : SignatureLibrary
    rng : numpy.random.Generator
    mito_fraction : float
        Share of all voxels that are to be mitochondria, in [0, 1].
    candidate_fraction : float
        Share of the neurons, in (0, 1].
    margin_nm : float
        Distance kept from membranes and from other mitochondria within a section, >= 0; one voxel at least.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8. Every 26-connected component is one mitochondrion, lies in one neuron and off the membrane.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid, or the library is empty although mitochondria are wanted.
    """
    compact, _ = compact_labels(label)
    mask = binary_mask(membrane, compact.shape, "membrane")
    return place_in(
        compact,
        mask,
        voxel_nm,
        library,
        rng,
        mito_fraction=mito_fraction,
        candidate_fraction=candidate_fraction,
        margin_nm=margin_nm,
    )


def place_in(
    compact: np.ndarray,
    membrane: np.ndarray,
    voxel_nm: Sequence[float],
    library: SignatureLibrary,
    rng: np.random.Generator,
    *,
    mito_fraction: float,
    candidate_fraction: float,
    margin_nm: float,
) -> np.ndarray:
    """:func:`place_mitochondria` in labels 0..n (uint32) with a membrane mask of uint8."""
    size = voxel_size(voxel_nm)
    positive("The share of mitochondria", mito_fraction, below=1.0, zero=True)
    positive("The share of candidate neurons", candidate_fraction, below=1.0)
    positive("The margin in nm", margin_nm, zero=True)
    if mito_fraction == 0:
        return np.zeros(compact.shape, dtype=np.uint8)
    if not len(library):
        raise ValueRangeError("Mitochondria are wanted, but the signature library has none. Got an empty library.")
    templates = _Templates.of(library, len(compact), size)
    room = Room.of(compact, membrane, (size.z, size.y, size.x), margin_nm, templates.most_depth_nm)
    groups = CandidateGroups(room, candidate_fraction, templates.least_depth_nm)
    _fill(room, groups, templates, mito_fraction * compact.size, rng)
    return room.mito
