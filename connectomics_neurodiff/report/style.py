"""One look for all figures: fonts, colours safe for colour-blind readers, PNG files written atomically.

Figures are drawn on an Agg canvas of their own; pyplot and its global state are never touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..provenance import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Text and axes.
INK = "#1f2933"
#: Secondary text, readable on white and on black alike (contrast 4.6 on both).
MUTED = "#76797c"
#: Grid lines.
FAINT = "#e3e7eb"
#: Colours after Okabe & Ito (2008): they stay apart for the common kinds of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: The arms of the experiment: the baseline in grey, what is put to the test in blue.
ARM_COLOURS: Mapping[str, str] = {"real": "#8a949e", "mixed": "#0072B2"}
#: How the arms are called in figures and in the report.
ARM_NAMES: Mapping[str, str] = {"real": "Real only", "mixed": "Real + synthetic"}
DOTS_PER_INCH = 160

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def figure_file(
    path: str | os.PathLike[str], size: tuple[float, float], *, transparent: bool = False
) -> Iterator[Figure]:
    """Yield an empty figure in the house style; save it as PNG when the block succeeds.

    Parameters
    ----------
    path : path
        PNG file, written atomically.
    size : (float, float)
        Width and height in inches.
    transparent : bool
        Without a background: for pictures that are laid on light and dark pages.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as AggFigure

    with rc_context(_STYLE):
        figure = AggFigure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path) as temporary:
            # A fixed metadata set keeps equal figures equal byte by byte.
            figure.savefig(
                temporary, dpi=DOTS_PER_INCH, format="png", transparent=transparent, metadata={"Software": None}
            )


def bare(axes: Axes) -> None:
    """Take ticks, grid and frame away: for axes that hold a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def arm_name(arm: str) -> str:
    """What an arm is called in figures and in the report."""
    return ARM_NAMES.get(arm, arm)


def arm_colour(arm: str, index: int = 0) -> str:
    """Colour of an arm; arms beyond the two standard ones take the palette in turn."""
    return ARM_COLOURS.get(arm, PALETTE[(index + 1) % len(PALETTE)])
