"""Mitochondria from the signature library into the large neurons of a deformed volume (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ValueRangeError
from ..geometry import voxel_size
from .chain import Pose, grow_chain
from .checks import MOST_NM, binary_mask, compact_labels, positive, require_generator
from .ellipse import Ellipse, equivalent_ellipse, piece_at
from .library import Signature, SignatureLibrary, require_library
from .plan import Budget, Wanted, plan_of
from .room import Candidate, CandidateGroups, Room
from .templates import LAST_SCALE, MIN_SCALE, Choice, Templates

#: Of a neuron's cross-section, what lies within this distance gives its width and direction.
_NEAR_NM = 1500.0
#: It is looked at in every second row and column where these are at most so far apart: half the time. Of elongated
#: cross-sections 95 % keep their direction within 1 degree; the others have necks of a pixel, which are skipped.
_COARSE_NM = 12.0
#: Jitter of the orientation, published: +-5 degrees.
_TURN_JITTER = np.deg2rad(5.0)
#: Places tried for a template in a neuron before another neuron and template are drawn.
_PLACES = 6
#: Neurons tried for one mitochondrion of the plan; the one drawn that is nearest in volume and height is kept, the
#: first that comes to this share of both ends the search, and what is smaller than the last share of the volume is not
#: placed. With .8, or an end after eight tries in vain, the phantom's largest one was placed less often.
_TRIES, _ENOUGH, _TOO_SMALL = 24, 0.85, 0.35
#: After so many tries this share is enough: those that had come to .8 seldom came to more in the tries left.
_PATIENT_TRIES, _AT_LAST_ENOUGH = 8, 0.78
#: Share of a section by which a height may be off without counting.
_ROUNDED = 0.25
#: What could not be placed is added to what is still planned, up to this factor.
_STRETCH = (0.7, 1.5)
#: So many in a row without room, and no more are tried before those of the plan that are smaller by such a factor.
_REFUSALS, _SMALLER = 10, 0.9
#: Voxels drawn to find some that are deep enough, and so many of these to choose the deepest from.
_DRAWN, _DEEPEST_OF = 32, 4
#: Failures in a row, per candidate and at least, before the demands are lowered.
_PATIENCE_PER_CANDIDATE, _PATIENCE = 1, 15
#: Share of a template's sections that must find room.
_COMPLETE = 0.4


def _anchor(
    room: Room, candidate: Candidate, least_nm: float, section: int | None, rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """A random voxel of the neuron, in one section if given, that is still deep enough for a template's centre.

    Of a few such voxels the deepest one: near the neuron's medial axis chains get further.
    """
    deep = candidate.deep
    if section is not None:
        area = room.label.shape[1] * room.label.shape[2]
        deep = deep[slice(*np.searchsorted(deep, [section * area, (section + 1) * area]))]
    if not deep.size:
        return None
    drawn = deep[rng.integers(len(deep), size=_DRAWN)]
    depth = room.depth.ravel()[drawn]
    fit = np.flatnonzero(depth >= least_nm)[:_DEEPEST_OF]
    if not fit.size:
        return None
    deepest = drawn[fit[depth[fit].argmax()]]
    z, y, x = (int(v) for v in np.unravel_index(deepest, room.label.shape))
    return z, y, x


def _section_of(template: Signature, scale: float, up: bool, room: Room, rng: np.random.Generator) -> int | None:
    """Section for the widest part of a template that a face of its volume cut; None, any, for one that is whole.

    Such a template is the visible part of something about twice as high. Of objects of height h that reach into a
    stack of depth D, 2 h / (D + h) are cut by a face. So many have their cut end on a face of this volume; the others,
    closed, lie wholly inside. Anywhere they would be cut a second time, and more and smaller ones would make up the
    volume.
    """
    if not (template.cut_below or template.cut_above):
        return None
    window, step = room.window, scale * template.pitch_z_nm / room.voxel_nm[0]
    below, above = step * template.widest, step * (len(template) - 1 - template.widest)
    cut_low, cut_high = template.cut_below, template.cut_above
    if not up:
        below, above, cut_low, cut_high = above, below, cut_high, cut_low
    whole = 2 * (below + above + step)
    on_face, which, at = rng.random(3)
    low = cut_low and (not cut_high or which < 0.5)
    # Only centres near a face see it: of the volume's share for that face, all falls to them.
    share = window.depth / len(window.core) if (0 if low else window.depth - 1) in window.core else 0.0
    first, last = max(below, window.core.start), min(window.depth - 1 - above, window.core.stop - 1)
    if share and (template.is_low or on_face < share * 2 * whole / (window.depth + whole)):
        wanted = below if low else window.depth - 1 - above
    elif first <= last:
        wanted = first + at * (last - first)
    else:
        return None
    return int(np.clip(round(wanted), window.core.start, window.core.stop - 1)) - window.seen.start


def _cross_section(room: Room, at: tuple[int, int, int]) -> Ellipse:
    """Ellipse of the piece of the neuron's cross-section that holds the voxel `at`, as far as it is near."""
    z, *centre = at
    steps = [2 if 2 * pitch <= _COARSE_NM else 1 for pitch in room.voxel_nm[1:]]
    pitch = steps[0] * room.voxel_nm[1], steps[1] * room.voxel_nm[2]
    # Every so many pixels, the one `at` among them.
    before = [min(int(_NEAR_NM / nm), c // step) for c, nm, step in zip(centre, pitch, steps, strict=True)]
    window = tuple(
        slice(c - n * step, c + int(_NEAR_NM / nm) * step + 1, step)
        for c, n, nm, step in zip(centre, before, pitch, steps, strict=True)
    )
    section = piece_at(np.ascontiguousarray(room.label[z][window]), *before)
    return equivalent_ellipse(section, pitch)


def _depth_near(room: Room, candidate: Candidate, at: tuple[int, int, int], reach_nm: float) -> float:
    """Largest depth of the neuron within `reach_nm` of a voxel, in its section."""
    z, y, x = at
    ry, rx = (int(np.ceil(reach_nm / pitch)) for pitch in room.voxel_nm[1:])
    near = (slice(max(0, y - ry), y + ry + 1), slice(max(0, x - rx), x + rx + 1))
    return float((room.depth[z][near] * (room.label[z][near] == candidate.label)).max())


def _draw(
    room: Room, candidate: Candidate, choice: Choice, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[slice, ...]] | None:
    """One mitochondrion drawn in a neuron, at several places if need be, not yet put there; None if none fits."""
    chosen, section, up = None, None, bool(rng.integers(2))
    for _ in range(_PLACES):
        at = _anchor(room, candidate, choice.least_depth_nm, section, rng)
        if at is None:
            return None
        host = _cross_section(room, at)
        # One template for all places: a large one would lose to small ones if it were redrawn at each failure.
        if chosen is None:
            depth = _depth_near(room, candidate, at, host.minor_nm / 2)
            chosen = choice.choose(host.major_nm, depth, rng)
            if chosen is None:
                continue
            section = _section_of(*chosen, up, room, rng)
            if section is not None:
                continue
        template, scale = chosen
        mirror, around = (bool(b) for b in rng.integers(2, size=2))
        own = float(template.angles[template.widest])
        jitter = rng.uniform(-_TURN_JITTER, _TURN_JITTER)
        turn = host.angle + (own if mirror else -own) + np.pi * around + jitter
        made = grow_chain(room, template, Pose(candidate.label, at, turn, mirror, up, scale), _COMPLETE)
        if made is not None:
            return made
    return None


def _drawn_from(candidates: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
    """A neuron, with odds between uniform (paper) and proportional to volume, which crowds the largest one."""
    weight = np.sqrt([c.deep.size for c in candidates])
    return candidates[int(rng.choice(len(candidates), p=weight / weight.sum()))]


def _place(
    room: Room, groups: CandidateGroups, templates: Templates, wanted: Wanted, most: float, rng: np.random.Generator
) -> int:
    """Place one mitochondrion like the one wanted, of at most so many voxels; returns its voxels, 0 if none fits."""
    candidates, choice = groups.largest(1), templates.matching(wanted)
    best: tuple[np.ndarray, tuple[slice, ...]] | None = None
    nearest = 0.0
    for tries in range(_TRIES if candidates else 0):
        if nearest >= (_ENOUGH if tries < _PATIENT_TRIES else _AT_LAST_ENOUGH):
            break
        made = _draw(room, _drawn_from(candidates, rng), choice, rng)
        if made is None:
            continue
        volume = np.count_nonzero(made[0]) / wanted.volume
        if not _TOO_SMALL <= volume <= most / wanted.volume:
            continue
        # What ends early where its neuron is narrow may be large enough and too low. Heights are whole sections, so a
        # fourth of one is let pass. With half of one, or by volume alone, the heights of 300 were not like the
        # source's (p .00 to .14); with none the search takes a third longer.
        sections, high = np.count_nonzero(made[0].any(axis=(1, 2))), wanted.height_nm / room.voxel_nm[0]
        near = min(volume, 1 / volume, (sections + _ROUNDED) / high, high / (sections - _ROUNDED))
        if near > nearest:
            best, nearest = made, near
    if best is None:
        return 0
    # Those that follow are rarely larger.
    room.put(*best, choice.most_depth_nm)
    return int(np.count_nonzero(best[0]))


def fill(
    room: Room,
    groups: CandidateGroups,
    templates: Templates,
    plan: Sequence[Wanted],
    budget: Budget,
    rng: np.random.Generator,
    *,
    sizes: Sequence[Wanted],
) -> None:
    """Place the mitochondria of a plan, and others until the volume wanted is reached or no candidate takes another.

    The others are as few as possible: each as large as what is missing, with the height of the one of `sizes` that
    comes nearest, or as there is room for; only then of any size.
    """
    _place_plan(room, groups, templates, plan, budget, rng)
    _make_up(room, groups, templates, sizes, budget, rng)
    _crowd(room, groups, templates, budget, rng)


def _place_plan(
    room: Room,
    groups: CandidateGroups,
    templates: Templates,
    plan: Sequence[Wanted],
    budget: Budget,
    rng: np.random.Generator,
) -> None:
    """Place the mitochondria of a plan; what one lacks is added to those after it.

    Where many in a row find no room, those of their size are left out: there may be thousands.
    """
    planned = sum(each.volume for each in plan)
    failures, refused = 0, np.inf
    for each in plan:
        volume = float(np.clip((budget.wanted - budget.placed) / planned, *_STRETCH)) * each.volume
        planned -= each.volume
        if failures >= _REFUSALS and each.volume > _SMALLER * refused:
            continue
        placed = _place(room, groups, templates, Wanted(volume, each.height_nm), budget.left, rng)
        budget.spend(placed)
        failures, refused = (0, np.inf) if placed else (failures + 1, each.volume)


def _make_up(
    room: Room,
    groups: CandidateGroups,
    templates: Templates,
    sizes: Sequence[Wanted],
    budget: Budget,
    rng: np.random.Generator,
) -> None:
    """Place what is missing in one mitochondrion, or in half as large ones where none of that size finds room, ..."""
    volumes = np.log([each.volume for each in sizes])
    volume = budget.wanted - budget.placed
    while not budget.is_met and np.log(volume) >= volumes.min():
        alike = sizes[int(np.abs(volumes - np.log(volume)).argmin())]
        placed = _place(room, groups, templates, Wanted(volume, alike.height_nm), budget.left, rng)
        budget.spend(placed)
        volume = min(volume if placed else volume / 2, budget.wanted - budget.placed)


def _crowd(room: Room, groups: CandidateGroups, templates: Templates, budget: Budget, rng: np.random.Generator) -> None:
    """Place mitochondria of any size, at last in any neuron, until the volume wanted is reached or none is taken."""
    demands = [(1, MIN_SCALE), *((count, LAST_SCALE) for count in range(1, len(groups) + 1))]
    for largest, least_scale in demands:
        candidates = groups.largest(largest)
        failures = 0
        while candidates and failures < max(_PATIENCE, _PATIENCE_PER_CANDIDATE * len(candidates)):
            if budget.is_met:
                return
            left = budget.left
            made = _draw(room, _drawn_from(candidates, rng), templates.filling(left, least_scale, rng), rng)
            voxels = 0 if made is None else int(np.count_nonzero(made[0]))
            if made is None or voxels > left:
                failures += 1
                continue
            room.put(*made)
            budget.spend(voxels)
            failures = 0


def place_mitochondria(
    label: np.ndarray,
    membrane: np.ndarray,
    voxel_nm: Sequence[float],
    library: SignatureLibrary,
    rng: np.random.Generator,
    *,
    mito_fraction: float,
    mito_count: int | None = None,
    candidate_fraction: float = 0.10,
    margin_nm: float = 10.0,
) -> np.ndarray:
    """Place mitochondria of a library in a labelled volume.

    As many mitochondria are planned as make up the volume wanted in the library's tissue, of the sizes that it has,
    largest first. For each one neurons are drawn from the candidates, the top `candidate_fraction` by volume (at least
    one) that are wide enough: an ellipse is fitted to the neuron's cross-section at a random place that is deep enough,
    a template is drawn by its likeness to what is wanted, once scaled, and by its axis-length ratio to that ellipse,
    aligned with it, led through the sections, refined, and kept if it is valid (:func:`.grow_chain`). Of the tries
    the one that comes nearest to the volume and height is placed. What it lacks is added to those still planned. A
    template that a face of its own volume cut has that end on a face here, too, as often as real ones do.

    Where the plan did not make up the volume within 4 %, more are placed: as large as what is missing, then in halves.
    Where these find no room either, any that fit are placed, down to .6 of a template's size, then to .35;
    when one attempt per candidate (15 at least) fails in a row, the next `candidate_fraction` of neurons joins, and so
    on: real tissue's share of mitochondria comes before the top 10 %. When all neurons have joined and still refuse,
    placement ends below the volume wanted.

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
    mito_count : int or None
        Mitochondria that are to make up that share; None: as many as in the library's tissue. Those that are not large
        enough for it, as templates are drawn up to 1.25 of their size, leave a rest for others.
    candidate_fraction : float
        Share of the neurons, in (0, 1].
    margin_nm : float
        Distance kept from membranes and from other mitochondria within a section, 0 to 1e5; one voxel at least.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8. Every 26-connected component is one mitochondrion, lies in one neuron and off the membrane.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid, the library is empty although mitochondria are wanted, or more mitochondria than
        the share makes room for.
    """
    require_generator(rng)
    require_library(library)
    compact, _ = compact_labels(label)
    mask = binary_mask(membrane, compact.shape, "membrane")
    return place_in(
        compact,
        mask,
        voxel_nm,
        library,
        rng,
        mito_fraction=mito_fraction,
        mito_count=mito_count,
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
    mito_count: int | None,
    candidate_fraction: float,
    margin_nm: float,
) -> np.ndarray:
    """:func:`place_mitochondria` in labels 0..n (uint32) with a uint8 membrane mask."""
    size = voxel_size(voxel_nm)
    if not is_wanted(library, mito_fraction, mito_count, candidate_fraction, margin_nm):
        return np.zeros(compact.shape, dtype=np.uint8)
    templates = Templates.of(library, len(compact), size)
    budget = Budget(mito_fraction * compact.size)
    plan = plan_of(library, budget.wanted, size, mito_count)
    room = Room.of(compact, membrane, size, margin_nm, templates.most_depth_nm)
    groups = CandidateGroups(room, candidate_fraction, templates.least_need_nm)
    fill(room, groups, templates, plan, budget, rng, sizes=plan)
    budget.warn_if_missed(compact.size, mito_count)
    return room.mito


def check_asked(place: bool, mito_fraction: float | None, mito_count: int | None) -> None:
    """Raise ValueRangeError if mitochondria are asked for where none are placed."""
    if not place and (mito_fraction is not None or mito_count is not None):
        raise ValueRangeError(
            "A share or a number of mitochondria is of those to place, but none are. "
            f"Got mito_fraction {mito_fraction} and mito_count {mito_count}."
        )


def is_wanted(
    library: SignatureLibrary,
    mito_fraction: float,
    mito_count: int | None,
    candidate_fraction: float,
    margin_nm: float,
) -> bool:
    """Validate the arguments of :func:`place_mitochondria`; whether any mitochondria are to be placed."""
    positive("The share of mitochondria", mito_fraction, below=1.0, zero=True)
    positive("The share of candidate neurons", candidate_fraction, below=1.0)
    positive("The margin in nm", margin_nm, below=MOST_NM, zero=True)
    is_whole = isinstance(mito_count, int | np.integer) and not isinstance(mito_count, bool)
    if mito_count is not None and not (is_whole and mito_count >= 1):
        raise ValueRangeError(f"The number of mitochondria must be a whole number of at least 1. Got {mito_count}.")
    if (mito_fraction or mito_count) and not len(library):
        raise ValueRangeError("Mitochondria are wanted, but the signature library has none. Got an empty library.")
    if mito_count and not mito_fraction:
        raise ValueRangeError(f"The share of mitochondria must be > 0 for {mito_count} of them. Got {mito_fraction}.")
    return mito_fraction > 0
