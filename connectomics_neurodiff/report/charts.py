"""Charts of a run: grey values, training losses, thresholds, scores."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ValueRangeError
from .style import INK, MUTED, PALETTE, arm_colour, arm_name, figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]

_GREY_BINS = 128
_WIDTH = 10.0  # inches
_ROW_HEIGHT = 3.4
#: A loss that falls by more than this factor is drawn on a logarithmic axis.
_LOG_FROM = 8.0


def _points(curve: Curve, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(list(curve), dtype=float).reshape(-1, 2) if len(curve) else np.empty((0, 2))
    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        raise ValueRangeError(f"Curve '{name}' needs at least one finite point. Got {len(points)} points, none finite.")
    finite = finite[np.argsort(finite[:, 0], kind="stable")]
    return finite[:, 0], finite[:, 1]


def _row_of_axes(figure: Any, count: int) -> list[Axes]:
    """`count` axes, at most three in a row; unused places stay empty."""
    columns = min(count, 3)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for spare in grid[count:]:
        spare.remove()
    return list(grid[:count])


def _size(count: int) -> tuple[float, float]:
    return _WIDTH, _ROW_HEIGHT * -(-count // 3)


def grey_value_figure(
    path: str | os.PathLike[str], real: np.ndarray, synthetics: Mapping[str, np.ndarray] | Sequence[np.ndarray]
) -> None:
    """Histograms of the grey values of the real image and of every synthetic one, on one axis.

    The legend gives the distance between real and pooled synthetic values: the first Wasserstein distance, that is the
    mean shift in grey value that would make one distribution the other.

    Parameters
    ----------
    path : path
        PNG file to write.
    real : numpy.ndarray
        Grey values in [0, 1], any shape.
    synthetics : mapping or sequence of numpy.ndarray
        The same of each synthetic image.

    Raises
    ------
    ValueRangeError
        If there is no synthetic image.
    """
    from scipy.stats import wasserstein_distance

    images = list(synthetics.values()) if isinstance(synthetics, Mapping) else list(synthetics)
    if not images:
        raise ValueRangeError("A grey value figure needs at least one synthetic image. Got none.")
    edges = np.linspace(0, 1, _GREY_BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    counts = [np.histogram(np.clip(values, 0, 1), edges)[0] for values in (real, *images)]
    pooled = np.sum(counts[1:], axis=0)
    distance = wasserstein_distance(centres, centres, counts[0], pooled)
    density = [100 * count / count.sum() for count in (counts[0], pooled, *counts[1:])]
    with figure_file(path, (_WIDTH, 3.6)) as figure:
        axes = figure.subplots()
        axes.fill_between(centres, density[0], step="mid", color="#c3cad1", lw=0, label="Real")
        axes.step(centres, density[0], where="mid", color="#8a949e", lw=1.2)
        if len(images) > 1:
            for i, one in enumerate(density[2:]):
                label = f"Synthetic, each of {len(images)}" if i == 0 else None
                axes.step(centres, one, where="mid", color=PALETTE[0], lw=0.7, alpha=0.35, label=label)
        name = "Synthetic, all together" if len(images) > 1 else "Synthetic"
        axes.step(centres, density[1], where="mid", color=PALETTE[0], label=f"{name} (distance to real {distance:.3f})")
        axes.set(xlabel="Grey value (0 = black, 1 = white)", ylabel="Voxels (%)", xlim=(0, 1), ylim=(0, None))
        axes.legend()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average over about 2 % of the curve: no lag, and the ends are kept."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(values, max(len(values) / 50, 0.5), mode="nearest")


def loss_figure(path: str | os.PathLike[str], curves: Mapping[str, Curve]) -> None:
    """Training losses: a smoothed line over the faint raw one, on a logarithmic axis where the loss falls far.

    Parameters
    ----------
    path : path
        PNG file to write.
    curves : mapping
        Name -> sequence of (step, loss). Names with a common first part share a panel: ``"segmenter/real"`` and
        ``"segmenter/mixed"`` are two lines of the panel "segmenter"; ``"diffusion"`` has a panel of its own.
        Points that are not finite are left out, and counted in the panel's title.

    Raises
    ------
    ValueRangeError
        If there is no curve, or one without a finite point.
    """
    if not curves:
        raise ValueRangeError("A loss figure needs at least one curve. Got none.")
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        panel, _, line = name.partition("/")
        panels.setdefault(panel, {})[line] = curve
    with figure_file(path, _size(len(panels))) as figure:
        for axes, (panel, lines) in zip(_row_of_axes(figure, len(panels)), panels.items(), strict=True):
            _draw_losses(axes, panel, lines)


def _draw_losses(axes: Axes, panel: str, lines: Mapping[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    left_out, smoothed = 0, []
    for index, (name, curve) in enumerate(lines.items()):
        step, loss = _points(curve, f"{panel}/{name}" if name else panel)
        left_out += len(curve) - len(step)
        colour = arm_colour(name, index) if name else PALETTE[0]
        axes.plot(step, loss, color=colour, lw=0.7, alpha=0.3)
        smoothed.append(_smooth(loss))
        axes.plot(step, smoothed[-1], color=colour, label=arm_name(name))
    lowest, highest = min(s.min() for s in smoothed), max(s.max() for s in smoothed)
    if lowest > 0 and highest / lowest > _LOG_FROM:
        axes.set_yscale("log")
    title = panel.capitalize() + (f" ({left_out} points not finite)" if left_out else "")
    axes.set(title=title, xlabel="Step", ylabel="Loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if any(lines):
        axes.legend()


#: Numbers of a mask's quality report, and how they are called.
_QUALITIES: Mapping[str, str] = {
    "membrane_fraction": "Membrane fraction",
    "neuron_median_nm3": "Neuron volume, median (nm³)",
    "profile_median_nm2": "Neuron profile, median (nm²)",
    "label_section_iou": "Neurons, overlap of adjacent sections",
    "mito_fraction": "Mitochondria fraction",
    "mito_count": "Mitochondria",
    "mito_mean_z_nm": "Mitochondria, mean height (nm)",
    "mito_profile_median_nm2": "Mitochondria profile, median (nm²)",
    "mito_section_iou": "Mitochondria, overlap of adjacent sections",
}


def following_figure(path: str | os.PathLike[str], curve: Curve, least: float) -> None:
    """How closely small images followed their mask while the denoiser was trained.

    Parameters
    ----------
    path : path
        PNG file to write.
    curve : sequence of (step, share)
        0: as tissue of elsewhere; 1: as real tissue with its own mask.
    least : float
        What pairs need; drawn as a line.

    Raises
    ------
    ValueRangeError
        If there is no finite point.
    """
    step, share = _points(curve, "following")
    with figure_file(path, (_WIDTH, _ROW_HEIGHT)) as figure:
        axes = figure.subplots()
        axes.plot(step, share, color=PALETTE[0], marker="o", ms=4)
        for level, text in ((1.0, "real tissue"), (least, "pairs need"), (0.0, "tissue of elsewhere")):
            axes.axhline(level, color=MUTED, lw=0.8, ls="--")
            axes.annotate(text, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", color=MUTED, fontsize=8)
        axes.set(title="Following of the mask", xlabel="Step of the denoiser's training", ylabel="Share")
        axes.set_ylim(min(-0.1, float(share.min()) - 0.1), max(1.2, float(share.max()) + 0.1))


def mask_quality_figure(path: str | os.PathLike[str], reports: Mapping[str, Mapping[str, float]]) -> None:
    """Numbers of remodelled masks, as multiples of their source's, which is written beside each row.

    Parameters
    ----------
    path : path
        PNG file to write.
    reports : mapping
        Name of mask -> its quality report. Sources may differ; where one is 0 there is no point.

    Raises
    ------
    ValueRangeError
        If there is no report.
    """
    if not reports:
        raise ValueRangeError("A figure of mask quality needs at least one report. Got none.")
    rows = [name for name in _QUALITIES if any(report[f"source_{name}"] for report in reports.values())]
    with figure_file(path, (_WIDTH, 0.9 + 0.34 * len(rows))) as figure:
        axes = figure.subplots()
        axes.axvline(1, color=MUTED, lw=1)
        for i, (mask, report) in enumerate(reports.items()):
            sources = [report[f"source_{name}"] for name in rows]
            ratios = [report[name] / of if of else math.nan for name, of in zip(rows, sources, strict=True)]
            axes.plot(ratios, range(len(rows)), "o", ms=6, alpha=0.7, color=PALETTE[i % len(PALETTE)], label=mask)
        axes.set_yticks(range(len(rows)), [f"{_QUALITIES[name]}: {_range_of(reports, name)}" for name in rows])
        axes.set(xlabel="Remodelled mask / source", ylim=(len(rows) - 0.5, -0.5))
        # A few masks have names; of many only the scatter matters.
        if len(reports) <= len(PALETTE):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _range_of(reports: Mapping[str, Mapping[str, float]], name: str) -> str:
    """What the sources have of it: a number, or the least and the most."""
    ends = [f(report[f"source_{name}"] for report in reports.values()) for f in (min, max)]
    return " to ".join(dict.fromkeys(f"{end:.4g}" for end in ends))


def threshold_figure(
    path: str | os.PathLike[str],
    tuning: Mapping[tuple[str, str], Curve],
    chosen: Mapping[tuple[str, str], float],
    *,
    score: str = "ARAND",
) -> None:
    """Score on the tune split against the agglomeration threshold; the chosen threshold is marked.

    Parameters
    ----------
    path : path
        PNG file to write.
    tuning : mapping
        (arm, method) -> sequence of (threshold, score). One panel per method, one line per arm.
    chosen : mapping
        (arm, method) -> the threshold taken to the test split; one of the tried ones.
    score : str
        Name of the score, for the axis; lower is better.

    Raises
    ------
    ValueRangeError
        If nothing was tuned, or a chosen threshold was not tried.
    """
    if not tuning:
        raise ValueRangeError("A threshold figure needs at least one tuned method. Got none.")
    arms = list(dict.fromkeys(arm for arm, _ in tuning))
    methods = list(dict.fromkeys(method for _, method in tuning))
    with figure_file(path, _size(len(methods))) as figure:
        for axes, method in zip(_row_of_axes(figure, len(methods)), methods, strict=True):
            for index, arm in enumerate(arms):
                if (arm, method) in tuning:
                    _draw_tuning(axes, tuning[arm, method], chosen[arm, method], arm, index)
            axes.set(title=method, xlabel="Threshold", ylabel=f"{score} (tune split), lower is better")
        _arm_legend(figure, arms)


def _draw_tuning(axes: Axes, curve: Curve, chosen: float, arm: str, index: int) -> None:
    threshold, score = _points(curve, arm)
    at = int(np.argmin(np.abs(threshold - chosen)))
    if not np.isclose(threshold[at], chosen):
        raise ValueRangeError(f"The chosen threshold is one of those tried, {threshold.tolist()}. Got {chosen:g}.")
    colour = arm_colour(arm, index)
    axes.plot(threshold, score, color=colour, marker="o", ms=3.5)
    axes.axvline(chosen, color=colour, lw=1, ls=(0, (2, 3)))
    axes.plot(chosen, score[at], marker="o", ms=11, mfc="none", mec=colour, mew=2)
    # The arms' marks stand one below the other: they often choose the same threshold.
    axes.annotate(
        f"{chosen:g}",
        (chosen, 0.97 - 0.08 * index),
        (5, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        va="top",
        color=colour,
        weight="bold",
    )


def learning_figure(
    path: str | os.PathLike[str], curves: Mapping[str, Sequence[Curve]], *, score: str = "Average precision"
) -> None:
    """What trainings find on the tune part against their iterations: a line per arm, the mean over its seeds.

    Parameters
    ----------
    path : path
        PNG file to write.
    curves : mapping
        Arm -> for each seed a sequence of (iterations, score), all at the same iterations; each seed is drawn faintly.
    score : str
        Name of the score, for the axis; higher is better.

    Raises
    ------
    ValueRangeError
        If there is no curve, or the seeds of an arm were tried at different iterations.
    """
    if not curves or not all(curves.values()):
        raise ValueRangeError("A learning figure needs at least one curve of every arm. Got none.")
    with figure_file(path, (_WIDTH, 4.2)) as figure:
        axes = figure.subplots()
        for index, (arm, seeds) in enumerate(curves.items()):
            points = [_points(curve, arm) for curve in seeds]
            steps = points[0][0]
            if any(not np.array_equal(other, steps) for other, _ in points):
                raise ValueRangeError(f"The seeds of '{arm}' must be tried at the same iterations.")
            colour = arm_colour(arm, index)
            for _, values in points if len(points) > 1 else []:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
            mean = np.mean([values for _, values in points], axis=0)
            axes.plot(steps, mean, color=colour, marker="o", ms=4, label=arm_name(arm))
        axes.set(xlabel="Iterations", ylabel=f"{score} (tune part), higher is better", xlim=(0, None))
        figure.legend(loc="outside lower center", ncols=min(len(curves), 4))


def scores_figure(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Bars of VOI (split below, merge above) and adapted Rand error per method, the arms side by side.

    Parameters
    ----------
    path : path
        PNG file to write.
    metrics : mapping
        ``{arm: {method: {"voi_split", "voi_merge", "voi", "arand"}}}`` for the arms "real" and "mixed", at least one;
        other keys of metrics.json are ignored.

    Raises
    ------
    ValueRangeError
        If there are no scores.
    """
    arms = [arm for arm in ("real", "mixed") if metrics.get(arm)]
    if not arms:
        raise ValueRangeError("A score figure needs the scores of the arm 'real' or 'mixed'. Got neither.")
    methods = list(dict.fromkeys(method for arm in arms for method in metrics[arm]))
    with figure_file(path, (_WIDTH, 3.6)) as figure:
        voi, arand = figure.subplots(1, 2)
        _draw_bars(voi, metrics, arms, methods, ("voi_split", "voi_merge"))
        voi.set(title="Variation of information", ylabel="VOI (bits), lower is better")
        _draw_bars(arand, metrics, arms, methods, ("arand",))
        arand.set(title="Adapted Rand error", ylabel="ARAND, lower is better")
        _arm_legend(figure, arms, {"VOI split": MUTED, "VOI merge": _paler(MUTED)})


def _draw_bars(
    axes: Axes, metrics: Mapping[str, Any], arms: list[str], methods: list[str], parts: tuple[str, ...]
) -> None:
    """Groups of bars, one group per method, one bar per arm, parts stacked from the bottom, total on top."""
    width = 0.76 / len(arms)
    for i, arm in enumerate(arms):
        colours = (arm_colour(arm), _paler(arm_colour(arm)))
        for x, method in enumerate(methods):
            scores = metrics[arm].get(method)
            if scores is None:
                continue
            left, bottom = x + (i - (len(arms) - 1) / 2) * width, 0.0
            for colour, part in zip(colours, parts, strict=False):
                axes.bar(left, scores[part], width * 0.92, bottom, color=colour, lw=0)
                bottom += scores[part]
            axes.annotate(f"{bottom:.3f}", (left, bottom), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_xlim(-0.6, len(methods) - 0.4)
    axes.tick_params(axis="x", length=0, labelsize=10, labelcolor=INK)
    axes.grid(False, axis="x")
    axes.margins(y=0.12)


def _paler(colour: str) -> tuple[float, float, float]:
    """The colour mixed with as much white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


def _arm_legend(figure: Any, arms: Sequence[str], more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Legend under the whole figure: the arms, and other patches by name."""
    from matplotlib.patches import Patch

    entries = [Patch(color=arm_colour(arm, i), label=arm_name(arm)) for i, arm in enumerate(arms)]
    entries += [Patch(color=colour, label=name) for name, colour in more.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries))
