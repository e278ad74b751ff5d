"""Room 11: what a run shows. Figures, one self-contained HTML report, and volumes in Neuroglancer.

Figures are functions from arrays to a PNG file; ``write_report`` binds them with the scores into ``report.html``, which
opens offline; ``view`` serves volumes to the browser of this machine.
"""

from .charts import (
    following_figure,
    grey_value_figure,
    learning_figure,
    loss_figure,
    mask_quality_figure,
    scores_figure,
    threshold_figure,
)
from .colours import colourise, label_colours, match_segments, outlines, overlay
from .figures import sections_to_show, segmentation_figure, synthesis_figure
from .report import FIGURES, embedded, render_page, write_report
from .verdict import Verdict, verdict_of
from .viewer import Layer, View, layers_of, layers_of_volume, show, view

__all__ = [
    "FIGURES",
    "Layer",
    "Verdict",
    "View",
    "colourise",
    "embedded",
    "following_figure",
    "grey_value_figure",
    "label_colours",
    "layers_of",
    "layers_of_volume",
    "learning_figure",
    "loss_figure",
    "mask_quality_figure",
    "match_segments",
    "outlines",
    "overlay",
    "render_page",
    "scores_figure",
    "sections_to_show",
    "segmentation_figure",
    "show",
    "synthesis_figure",
    "threshold_figure",
    "verdict_of",
    "view",
    "write_report",
]
