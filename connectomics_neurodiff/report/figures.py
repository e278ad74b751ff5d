"""Pictures of volumes: what was synthesised, and what was segmented, always with a scale bar."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import voxel_size
from .colours import colourise, grey_to_rgb, label_colours, match_segments, outlines, overlay
from .style import INK, MUTED, arm_name, bare, figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 12.0  # inches
_MEMBRANE = (0.10, 0.11, 0.13)
_BACKGROUND = (0.30, 0.32, 0.34)
_MITOCHONDRION = (1.0, 1.0, 1.0)
#: Brightness that is left of a neuron's colour where it is dark inside.
_SHADE = 0.5


@dataclass(frozen=True)
class _Panel:
    """One picture: RGB (y, x, 3), what stands over it, what stands in its corner."""

    picture: np.ndarray
    title: str = ""
    corner: str = ""


def sections_to_show(depth: int, count: int = 3) -> list[int]:
    """Indices of `count` sections spread evenly over a stack, away from its ends; fewer if the stack is thin.

    >>> sections_to_show(30)
    [5, 15, 25]
    >>> sections_to_show(2)
    [0, 1]
    """
    count = min(count, depth)
    return [int((2 * i + 1) * depth / (2 * count)) for i in range(count)]


def scale_bar_length(width_nm: float) -> float:
    """Round length in nm (1, 2 or 5 times a power of ten) between a tenth and a quarter of a picture's width.

    >>> scale_bar_length(3000)
    500.0
    """
    longest = width_nm / 4
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))


def length_text(nm: float) -> str:
    """Length in its natural unit: ``"500 nm"``, ``"2 µm"``."""
    return f"{nm / 1000:g} µm" if nm >= 1000 else f"{nm:g} nm"


def grey_limits(image: np.ndarray) -> tuple[float, float]:
    """Grey values to show black and white: the 0.1 and 99.9 percentiles, so that a few outliers dim nothing."""
    low, high = (float(v) for v in np.percentile(np.asarray(image, dtype=np.float32), (0.1, 99.9)))
    return (low, high) if high > low else (low, low + 1.0)


def paint_mask(
    label: np.ndarray, membrane: np.ndarray, mito: np.ndarray | None, dark: np.ndarray | None = None
) -> np.ndarray:
    """Picture of a mask section: neurons coloured, membranes dark, mitochondria white with a dark rim.

    Parameters
    ----------
    label : numpy.ndarray
        (y, x) ids, 0 = background.
    membrane : numpy.ndarray
        (y, x), non-zero on membranes.
    mito : numpy.ndarray or None
        (y, x), non-zero inside mitochondria; None where the pipeline ran without them.
    dark : numpy.ndarray, optional
        (y, x), non-zero where else neurons are dark inside: there the colour is half as bright.

    Returns
    -------
    numpy.ndarray
        float32 (y, x, 3) RGB in [0, 1].
    """
    picture = colourise(label)
    picture[label == 0] = _BACKGROUND
    if dark is not None:
        picture[dark > 0] *= _SHADE
    picture[membrane > 0] = _MEMBRANE
    if mito is not None:
        inside = mito > 0
        picture[inside] = _MITOCHONDRION
        picture[outlines(inside)] = _MEMBRANE
    return picture


def _write_on(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.5, foreground="black", alpha=0.75)]
    axes.text(
        x, y, text, color="white", fontsize=10, weight="bold", transform=axes.transAxes, path_effects=rim, **options
    )


def _draw_scale_bar(axes: Axes, shape: tuple[int, ...], voxel_nm: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    nm = scale_bar_length(shape[1] * voxel_nm[2])
    fraction = nm / (shape[1] * voxel_nm[2])
    # 1.6 % of the width whatever the picture's proportions.
    height = 0.016 * shape[1] * voxel_nm[2] / (shape[0] * voxel_nm[1])
    axes.add_patch(
        Rectangle(
            (0.04, 0.05), fraction, height, transform=axes.transAxes, facecolor="white", edgecolor="black", lw=0.6
        )
    )
    _write_on(axes, 0.04, 0.05 + height + 0.02, length_text(nm), ha="left", va="bottom")


def _draw_panel(axes: Axes, panel: _Panel, voxel_nm: Sequence[float], *, scale_bar: bool) -> None:
    bare(axes)
    axes.imshow(panel.picture, aspect=voxel_nm[1] / voxel_nm[2])
    axes.set_title(panel.title, color=MUTED, loc="left", fontsize=12, pad=6)
    if panel.corner:
        _write_on(axes, 0.04, 0.965, panel.corner, ha="left", va="top")
    if scale_bar:
        _draw_scale_bar(axes, panel.picture.shape, voxel_nm)


def _draw_grid(figure: Figure, rows: Sequence[Sequence[_Panel | None]], voxel_nm: Sequence[float]) -> None:
    """Panels in rows; the lowest panel of each column carries the scale bar."""
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    # Pads in inches, spaces as shares of a panel: pictures nearly touch.
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    lowest = [max(i for i, row in enumerate(rows) if row[column] is not None) for column in range(len(rows[0]))]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel is None:
                bare(grid[i, j])
            else:
                _draw_panel(grid[i, j], panel, voxel_nm, scale_bar=i == lowest[j])


def _grid_size(rows: Sequence[Sequence[_Panel | None]], voxel_nm: Sequence[float], extra: float) -> tuple[float, float]:
    """Figure size in inches for which the panels touch without white gaps."""
    tallest = max(
        panel.picture.shape[0] * voxel_nm[1] / (panel.picture.shape[1] * voxel_nm[2])
        for row in rows
        for panel in row
        if panel is not None
    )
    return _WIDTH, _WIDTH / len(rows[0]) * tallest * len(rows) + extra


def _check_sections(sections: Sequence[int], volumes: Mapping[str, np.ndarray]) -> None:
    for name, volume in volumes.items():
        outside = [z for z in sections if not 0 <= z < volume.shape[0]]
        if outside or not sections:
            raise ValueRangeError(f"Sections of {name} are 0 to {volume.shape[0] - 1}. Got {list(sections)}.")


def _check_shapes(volumes: Mapping[str, np.ndarray]) -> None:
    if len({volume.shape for volume in volumes.values()}) > 1:
        got = ", ".join(f"{name} {volume.shape}" for name, volume in volumes.items())
        raise ShapeMismatch(f"These must have one shape: {got}.")


def synthesis_figure(
    path: str | os.PathLike[str],
    real_image: np.ndarray,
    real_label: np.ndarray,
    mask_label: np.ndarray,
    mask_membrane: np.ndarray,
    mask_mito: np.ndarray | None,
    synthetic_image: np.ndarray,
    sections: Sequence[int],
    voxel_nm: Sequence[float],
    mask_dark: np.ndarray | None = None,
) -> None:
    """Rows of sections: real image, its labels, the remodelled mask, the synthetic image painted onto that mask.

    Real and synthetic sections share one grey scale, taken from the real image: what looks paler is paler.

    Parameters
    ----------
    path : path
        PNG file to write, transparent background.
    real_image, real_label : numpy.ndarray
        (z, y, x): grey values and ids.
    mask_label, mask_membrane, mask_mito, synthetic_image : numpy.ndarray
        (z, y, x) of one shape, which may differ from the real one; mitochondria may be None.
    sections : sequence of int
        z indices, valid in both; see :func:`sections_to_show`.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm, for the scale bar and the proportions.
    mask_dark : numpy.ndarray, optional
        What else is dark inside neurons, in the shape of the masks.

    Raises
    ------
    ShapeMismatch
        If image and label, or mask and synthetic image, differ in shape.
    ValueRangeError
        If a section does not exist.
    """
    voxel_nm = voxel_size(voxel_nm)
    optional = {"mask_mito": mask_mito, "mask_dark": mask_dark}
    inside = {name: array for name, array in optional.items() if array is not None}
    _check_shapes({"real_image": real_image, "real_label": real_label})
    masks = {"mask_label": mask_label, "mask_membrane": mask_membrane, "synthetic_image": synthetic_image, **inside}
    _check_shapes(masks)
    _check_sections(sections, {"the real volume": real_image, "the synthetic volume": synthetic_image})
    limits = grey_limits(np.stack([real_image[z] for z in sections]))
    rows = []
    for z in sections:
        mito, dark = (None if array is None else array[z] for array in optional.values())
        mask = paint_mask(mask_label[z], mask_membrane[z], mito, dark)
        pictures = [
            grey_to_rgb(real_image[z], limits),
            overlay(real_image[z], real_label[z], opacity=0.6, limits=limits),
            mask,
            grey_to_rgb(synthetic_image[z], limits),
        ]
        titles = ["Real image", "Its labels", "Remodelled mask", "Synthetic image"] if z == sections[0] else [""] * 4
        corners = [f"section {z}", "", "", ""]
        rows.append([_Panel(*panel) for panel in zip(pictures, titles, corners, strict=True)])
    empty = ((mask_label == 0) & (mask_membrane == 0))[list(sections)].any()
    with figure_file(path, _grid_size(rows, voxel_nm, extra=0.62), transparent=True) as figure:
        _draw_grid(figure, rows, voxel_nm)
        _draw_mask_legend(figure, mask_mito is not None, mask_dark is not None, bool(empty))


def _draw_mask_legend(figure: Figure, with_mito: bool, with_dark: bool, with_background: bool) -> None:
    from matplotlib.patches import Patch

    entries = [Patch(facecolor=_MEMBRANE, edgecolor=MUTED, label="membrane")]
    if with_mito:
        entries.append(Patch(facecolor=_MITOCHONDRION, edgecolor=INK, label="mitochondrion"))
    if with_dark:
        red, green, blue = _SHADE * label_colours(np.array(1))
        entries.append(
            Patch(facecolor=(red, green, blue), edgecolor=MUTED, label="dark inside a neuron (shade of its colour)")
        )
    if with_background:
        entries.append(Patch(facecolor=_BACKGROUND, edgecolor=MUTED, label="background"))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), labelcolor=MUTED, fontsize=11)


def segmentation_figure(
    path: str | os.PathLike[str],
    image: np.ndarray,
    truth: np.ndarray,
    segmentations: Mapping[tuple[str, str], np.ndarray],
    section: int,
    voxel_nm: Sequence[float],
) -> None:
    """One section: image, ground truth, and each arm's segmentation by each method.

    Segments take the colour of the neuron they cover best in 3D (:func:`~.colours.match_segments`); true outlines are
    drawn in white. A neuron in two colours was split; a colour that crosses a white line was merged.

    Parameters
    ----------
    path : path
        PNG file to write, transparent background.
    image, truth : numpy.ndarray
        (z, y, x): grey values and ids.
    segmentations : mapping
        (arm, method) -> (z, y, x) ids, for example ``("mixed", "waterz")``.
    section : int
        z index.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm.

    Raises
    ------
    ShapeMismatch
        If the volumes differ in shape.
    ValueRangeError
        If the section does not exist, or there is no segmentation.
    """
    voxel_nm = voxel_size(voxel_nm)
    if not segmentations:
        raise ValueRangeError("A segmentation figure needs at least one segmentation. Got none.")
    named = {f"{arm}/{method}": volume for (arm, method), volume in segmentations.items()}
    _check_shapes({"image": image, "truth": truth, **named})
    _check_sections([section], {"the volume": image})
    limits = grey_limits(image[section])
    edge = outlines(truth[section])

    def painted(label: np.ndarray) -> np.ndarray:
        picture = overlay(image[section], label, opacity=0.65, limits=limits)
        picture[edge] = 1.0
        return picture

    reference = [
        _Panel(grey_to_rgb(image[section], limits), "Image", f"section {section}"),
        _Panel(painted(truth[section]), "Ground truth"),
    ]
    panels = {
        (arm, method): _Panel(painted(match_segments(volume, truth)[section]), f"{arm_name(arm)}, {method}")
        for (arm, method), volume in segmentations.items()
    }
    rows = _arrange(reference, panels)
    with figure_file(path, _grid_size(rows, voxel_nm, extra=0.4 * len(rows)), transparent=True) as figure:
        _draw_grid(figure, rows, voxel_nm)


def _arrange(reference: list[_Panel], panels: Mapping[tuple[str, str], _Panel]) -> list[list[_Panel | None]]:
    """One row per arm, one column per method; image and truth on the left, one over the other where there is room."""
    arms = list(dict.fromkeys(arm for arm, _ in panels))
    methods = list(dict.fromkeys(method for _, method in panels))
    rows: list[list[_Panel | None]] = [[panels.get((arm, method)) for method in methods] for arm in arms]
    if len(arms) == 1:
        return [[*reference, *rows[0]]]
    left: list[_Panel | None] = [*reference, *[None] * (len(arms) - 2)]
    return [[panel, *row] for panel, row in zip(left, rows, strict=True)]
