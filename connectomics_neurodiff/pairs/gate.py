"""The quality gate: what does not follow its masks, or does not look like tissue, does not enter training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ValueRangeError
from .judge import Following, Judge, MaskScores
from .store import Mask
from .tissue import (
    LEAST_STD,
    DarkShares,
    RealTissue,
    TissueStatistics,
    grey_distance,
    grey_histogram,
    image_defect,
    measure_tissue,
)


@dataclass(frozen=True)
class GateReport:
    """What the gate found.

    Attributes
    ----------
    distance : float
        1-Wasserstein distance of the two grey value distributions, in [0, 1]; infinite if an image is not finite or
        leaves [0, 1].
    mean_real, mean_synthetic, std_real, std_synthetic : float
        Grey value moments, [0, 1] units.
    passed : bool
        Whether the pair may be trained on.
    reason : str
        Why not; empty if it passed.
    """

    distance: float
    mean_real: float
    mean_synthetic: float
    std_real: float
    std_synthetic: float
    passed: bool
    reason: str

    def require(self) -> None:
        """Raise :class:`ValueRangeError` with the reason unless the pair passed."""
        if not self.passed:
            raise ValueRangeError(self.reason)


def grey_value_gate(synthetic: ArrayLike, real: ArrayLike, *, limit: float = 0.1) -> GateReport:
    """Compare the grey values of a synthetic volume with those of a real one.

    Parameters
    ----------
    synthetic, real : array_like
        Images in [0, 1], any shapes.
    limit : float
        Largest 1-Wasserstein distance that passes, [0, 1] units: the mean shift in grey value that would turn one
        distribution into the other.

    Returns
    -------
    GateReport
        Never raises for a bad pair; call :meth:`GateReport.require` for that.

    Notes
    -----
    In one dimension the distance is the area between the cumulative distributions; here of histograms of 256 bins,
    so it is exact to one grey level of uint8.
    Two halves of one real volume lie .005 to .05 apart. The gate sees grey values only, not where they are: an image of
    noise with the right histogram passes.
    """
    image, reference = np.asarray(synthetic, dtype=np.float32), np.asarray(real, dtype=np.float32)
    reason = image_defect("synthetic", image) or image_defect("real", reference)
    if reason:
        return GateReport(np.inf, *(np.nan,) * 4, passed=False, reason=reason)
    distance = grey_distance(grey_histogram(image), grey_histogram(reference))
    std, std_reference = float(image.std(dtype=np.float64)), float(reference.std(dtype=np.float64))
    if std < LEAST_STD:
        reason = f"The synthetic image is constant (standard deviation {std:.2g}, needs {LEAST_STD:.2g})."
    elif distance > limit:
        reason = f"Grey values are {distance:.3f} from those of the real volume; at most {limit:g} is allowed."
    return GateReport(
        distance=distance,
        mean_real=float(reference.mean(dtype=np.float64)),
        mean_synthetic=float(image.mean(dtype=np.float64)),
        std_real=std_reference,
        std_synthetic=std,
        passed=not reason,
        reason=reason,
    )


@dataclass(frozen=True)
class GateLimits:
    """What a pair must keep to. 0 switches a check off.

    Attributes
    ----------
    following : float
        Least share of the way from masks of elsewhere to real tissue (:attr:`.Following.share`), in [0, 1].
    missing : float
        Largest share of the mask's membranes that may look like cytoplasm (:attr:`.MaskScores.missing`), in [0, .5]:
        half of what was left out, and what real tissue hides; twice that in any section and any ninth of the plane. If
        it is not 0, boundaries that the mask lacks may cut off at most `MOST_CUT` of its neurons
        (:attr:`.MaskScores.cut`).
    grey : float
        Largest 1-Wasserstein distance of the grey values, in [0, 1].
    spectrum : float
        Largest ratio of the power in a band of spatial frequency to the real one, or of the real one to it, > 1.
    grain : float
        Largest ratio, > 1, of how unevenly the finest detail is spread (:func:`.grain_spread`) to the real value.
    continuity : float
        Largest difference of Fisher's z (arctanh) of the correlation of neighbouring sections.
    order : float
        Least share of sections more like their neighbour than like one further away, in [0, 1]; .5 is no order.
    dark : float
        Largest ratio of the dark share deep inside neurons to the real one, or of the real one to it, > 1. A difference
        of `DARK_SLACK` always passes.
    spreads : float
        Limits of grey values, spectrum, grain, continuity and dark shares are widened to so many standard deviations
        among parts of the real volume, ratios not beyond `MOST_RATIO`.
    """

    following: float = 0.5
    missing: float = 0.17
    grey: float = 0.08
    spectrum: float = 2.0
    grain: float = 1.35
    continuity: float = 0.25
    order: float = 0.85
    dark: float = 1.2
    spreads: float = 3.5


#: Two dark shares no further apart than this are as good as equal: ratios of next to nothing say nothing.
DARK_SLACK = 0.02
#: Share of a mask's neurons that may be cut off by boundaries which it lacks.
MOST_CUT = 0.15
#: No ratio is widened beyond this, however much the parts of a small volume differ.
MOST_RATIO = 5.0


@dataclass(frozen=True)
class Check:
    """One number of a pair beside the real one.

    Attributes
    ----------
    name : str
        What was measured.
    got, real : float
        Of the pair, and of the real volume.
    low, high : float
        What is allowed, both included.
    passed : bool
        Whether `got` is.
    problem : str
        What is wrong, in a sentence; empty if it passed.
    """

    name: str
    got: float
    real: float
    low: float
    high: float
    passed: bool
    problem: str = ""


@dataclass(frozen=True)
class PairReport:
    """The gate's verdict on a pair.

    Attributes
    ----------
    passed : bool
        Whether it may be trained on.
    reason : str
        Why not, in one line; empty if it passed.
    checks : tuple of Check
        Every number that was looked at.
    following : Following or None
        The judge's numbers; None if that was switched off or could not be judged.
    """

    passed: bool
    reason: str
    checks: tuple[Check, ...] = field(default=())
    following: Following | None = None

    def require(self) -> None:
        """Raise :class:`ValueRangeError` with the reason unless the pair passed."""
        if not self.passed:
            raise ValueRangeError(self.reason)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON; what is not a number is None."""
        checks = {check.name: asdict(check) for check in self.checks}
        plain = {
            name: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in check.items()}
            for name, check in checks.items()
        }
        following = self.following.as_dict() if self.following else None
        return {"passed": self.passed, "reason": self.reason, "checks": plain, "following": following}


def judge_pair(
    image: ArrayLike, mask: Mask, *, real: RealTissue, judge: Judge | None, limits: GateLimits | None = None
) -> PairReport:
    """Judge whether an image painted onto masks may be trained on.

    Parameters
    ----------
    image : array_like
        (z, y, x), values in [0, 1].
    mask : Mask
        Label, membrane and, if there are any, mitochondria of the same shape and of the real volume's voxel size. Where
        both the pair and the real volume have mitochondria, what is dark is compared inside and outside of them.
    real : RealTissue
        Of the real train part (:func:`.measure_real`), measured with membranes of the same thickness.
    judge : Judge or None
        Trained on the same part (:func:`.train_judge`); None only if `limits` switches following off.
    limits : GateLimits, optional
        What is allowed.

    Returns
    -------
    PairReport
        Never raises for a bad pair; call :meth:`PairReport.require` for that. A check that cannot be made fails and
        says so.

    Raises
    ------
    ShapeMismatch
        If image and masks differ in shape.
    """
    allowed = limits or GateLimits()
    values = np.asarray(image, dtype=np.float32)
    reason = image_defect("synthetic", values)
    if not reason and (std := float(values.std(dtype=np.float64))) < LEAST_STD:
        reason = f"The synthetic image is constant (standard deviation {std:.2g}, needs {LEAST_STD:.2g})."
    if reason:
        return PairReport(passed=False, reason=reason)
    label, membrane = np.asarray(mask.label), np.asarray(mask.membrane)
    mito = None if mask.mito is None else np.asarray(mask.mito)
    painted = measure_tissue(values, label, membrane, mito, real.voxel_nm, real.bands)
    following, checks = _check_following(values, label, membrane, judge, allowed)
    checks += _check_tissue(painted, real, allowed)
    reason = " ".join(check.problem for check in checks if check.problem)
    return PairReport(not reason, reason, tuple(checks), following)


def gate_defect(real: RealTissue, judge: Judge | None, limits: GateLimits) -> str:
    """Why the gate cannot judge, or would refuse even the real tissue; an empty string if neither.

    Parameters
    ----------
    real, judge, limits
        As :func:`judge_pair` has them.

    Returns
    -------
    str
        One line: the judge or the real volume lacks what it takes, or real tissue does not keep to the limits itself.
    """
    problems = [check.problem for check in _check_tissue(real.whole, real, limits) if check.problem]
    if limits.following or limits.missing:
        if judge is None or judge.defect:
            problems.append(_no_judge(judge))
        else:
            checks = _check_membranes(judge.real, judge.real, limits)
            held_out = [check.problem for check in checks if check.problem]
            advice = "train the judge longer (NEURODIFF.PAIRS.JUDGE_ITERATIONS) or loosen MOST_MISSING."
            problems += [*held_out, f"If the labels are right, {advice}"] if held_out else []
    return " ".join(["The real train part does not pass the gate itself:", *problems]) if problems else ""


def _no_judge(judge: Judge | None) -> str:
    return "Cannot judge whether images follow their masks without a judge." if judge is None else judge.defect


def _check_tissue(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> list[Check]:
    """All checks that need no judge."""
    checks = [*_check_grey(painted, real, limits), *_check_spectrum(painted, real, limits)]
    checks += [*_check_grain(painted, real, limits)]
    checks += [*_check_continuity(painted, real, limits), *_check_order(painted, real, limits)]
    return [*checks, *_check_dark(painted, real, limits)]


def _cannot(name: str, what: str, limit: str) -> Check:
    """A check that cannot be made."""
    problem = f"Cannot judge {what}. Give larger volumes, or switch the check off (NEURODIFF.PAIRS.{limit} 0)."
    return Check(name, math.nan, math.nan, math.nan, math.nan, passed=False, problem=problem)


def _checked(name: str, got: float, real: float, allowed: tuple[float, float], problem: str) -> Check:
    low, high = (float(limit) for limit in allowed)
    passed = bool(low <= got <= high)
    return Check(name, float(got), float(real), low, high, passed, "" if passed else problem)


def _widened(ratio: float, octaves: float) -> float:
    """A largest ratio, widened to so many octaves but not beyond `MOST_RATIO`."""
    return max(ratio, min(2**octaves, MOST_RATIO))


def _check_following(
    image: np.ndarray, label: np.ndarray, membrane: np.ndarray, judge: Judge | None, limits: GateLimits
) -> tuple[Following | None, list[Check]]:
    if not limits.following and not limits.missing:
        return None, []
    if judge is None or judge.defect:
        problem = _no_judge(judge)
        return None, [Check("following", math.nan, math.nan, math.nan, math.nan, passed=False, problem=problem)]
    found = judge.following(image, membrane, label)
    if not math.isfinite(found.share):
        what = "whether the image follows its mask, which lacks membranes or neurons"
        return None, [_cannot("following", what, "LEAST_FOLLOWING and MOST_MISSING")]
    got, own, checks = found.image, found.real, []
    if limits.following:
        problem = (
            f"The image does not follow its mask: a judge finds its membranes with an average precision of "
            f"{got.average_precision:.2f} (masks of elsewhere {got.null:.2f}, real tissue "
            f"{own.average_precision:.2f}), {100 * found.share:.0f} % of the way to real tissue; at least "
            f"{100 * limits.following:.0f} % is needed."
        )
        checks.append(_checked("following", found.share, 1.0, (limits.following, math.inf), problem))
    checks += _check_membranes(got, own, limits)
    return found, checks


def _check_membranes(got: MaskScores, real: MaskScores, limits: GateLimits) -> list[Check]:
    """Whether image and mask have the same membranes."""
    if not limits.missing:
        return []
    problem = (
        f"The image has boundaries that its mask lacks: they cut off {100 * got.cut:.1f} % of its neurons "
        f"({100 * real.cut:.1f} % in real tissue); at most {100 * MOST_CUT:.0f} % is allowed."
    )
    worst = "in one section or one ninth of the plane "
    return [
        _check_missing("missing", got.missing, real.missing, limits.missing, ""),
        _check_missing("missing at worst", got.missing_at_worst, real.missing_at_worst, 2 * limits.missing, worst),
        _checked("cut off", got.cut, real.cut, (0.0, MOST_CUT), problem),
    ]


def _check_missing(name: str, got: float, real: float, most: float, where: str) -> Check:
    problem = (
        f"Membranes are missing: {100 * got:.0f} % of the mask's look like cytoplasm {where}"
        f"({100 * real:.0f} % in real tissue); at most {100 * most:.0f} % is allowed."
    )
    return _checked(name, got, real, (0.0, most), problem)


def _check_grey(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> list[Check]:
    if not limits.grey:
        return []
    got = grey_distance(painted.histogram, real.whole.histogram)
    most = max(limits.grey, limits.spreads * real.grey_spread)
    problem = f"Grey values are {got:.3f} from those of the real volume; at most {most:.3f} is allowed."
    return [_checked("grey", got, 0.0, (0.0, most), problem)]


def _check_spectrum(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> Iterator[Check]:
    """One check per band: power relative to the real one."""
    if not limits.spectrum:
        return
    if not real.bands:
        yield _cannot("spectrum", "the texture: sections of the real volume show too few cycles", "SPECTRUM_LIMIT")
        return
    ratios = np.exp2(painted.comparable - real.whole.comparable)
    for band, ratio, spread in zip(real.bands, ratios, real.spread, strict=False):
        most = _widened(limits.spectrum, limits.spreads * spread)
        problem = (
            f"The texture is not that of the tissue: details of {band} have {ratio:.2f} times the power of real ones; "
            f"{1 / most:.2f} to {most:.2f} is allowed."
        )
        yield _checked(f"power {band}", ratio, 1.0, (1 / most, most), problem)


def _check_grain(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> Iterator[Check]:
    """Grain more evenly spread than in the real volume passes."""
    if not limits.grain:
        return
    got, own = painted.grain, real.whole.grain
    if not (math.isfinite(got + own) and own > 0):
        yield _cannot("grain", "the finest detail: no voxel lies inside a neuron", "GRAIN_LIMIT")
        return
    most = own * _widened(limits.grain, limits.spreads * real.spread[-1])
    problem = (
        f"The finest detail is not that of a recording: it is spread {got / own:.2f} times as unevenly as in the real "
        f"volume, as after enlarging or sharpening; at most {most / own:.2f} times is allowed."
    )
    yield _checked("grain", got, own, (0.0, most), problem)


def _check_continuity(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> Iterator[Check]:
    if not limits.continuity:
        return
    got, own = (min(tissue.continuity, 0.999) for tissue in (painted, real.whole))
    if not math.isfinite(got + own):
        yield _cannot("continuity", "how alike neighbouring sections are: there are no two", "CONTINUITY_LIMIT")
        return
    width = max(limits.continuity, limits.spreads * real.spread[len(real.bands)])
    low, high = (math.tanh(math.atanh(max(own, -0.999)) + sign * width) for sign in (-1, 1))
    problem = (
        f"Sections do not go on as in tissue: neighbours correlate by {got:.2f}, real ones by {own:.2f}; "
        f"{low:.2f} to {high:.2f} is allowed."
    )
    yield _checked("continuity", got, own, (low, high), problem)


def _check_order(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> Iterator[Check]:
    """Nothing to check for fewer than three sections."""
    if not limits.order or not math.isfinite(painted.order):
        return
    problem = (
        f"Sections are out of order: {100 * painted.order:.0f} % are more like their neighbour than like one further "
        f"away ({100 * real.whole.order:.0f} % in the real volume); at least {100 * limits.order:.0f} % are needed."
    )
    yield _checked("order", painted.order, real.whole.order, (limits.order, 1.0), problem)


def _check_dark(painted: TissueStatistics, real: RealTissue, limits: GateLimits) -> Iterator[Check]:
    """Dark shares deep inside neurons: of all, or inside and outside mitochondria where both volumes know them.

    The size and number of dark pieces are told beside them. They have no limits: in boxes of one real volume they
    differ by factors.
    """
    if not limits.dark:
        return
    own, got = real.whole.dark, painted.dark
    if not math.isfinite(own.all + got.all):
        yield _cannot("dark", "what is dark inside neurons: no voxel lies deep enough", "DARK_LIMIT")
        return
    split = math.isfinite(own.mito + own.rest + got.mito + got.rest)
    for name, where in (("mito", " in mitochondria"), ("rest", " outside mitochondria")) if split else (("all", ""),):
        spread = real.spread[len(real.bands) + 1 + list(DarkShares.__dataclass_fields__).index(name)]
        most = _widened(limits.dark, limits.spreads * spread)
        share, real_share = getattr(got, name), getattr(own, name)
        low = max(0.0, min(real_share / most, real_share - DARK_SLACK))
        high = min(1.0, max(real_share * most, real_share + DARK_SLACK))
        problem = (
            f"Neurons are not as dark inside as real ones: {100 * share:.1f} % deep inside them{where} is as dark as "
            f"membranes, {100 * real_share:.1f} % in the real volume; {100 * low:.1f} to {100 * high:.1f} % is allowed."
        )
        yield _checked(f"dark{where}", share, real_share, (low, high), problem)
    yield Check("size of dark pieces, nm", got.size_nm, own.size_nm, 0.0, math.inf, passed=True)
    yield Check("dark pieces per um2", got.per_um2, own.per_um2, 0.0, math.inf, passed=True)
