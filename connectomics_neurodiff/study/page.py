"""The page of a study: verdicts, table, learning curves; one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..provenance import atomic_write
from ..report import embedded, learning_figure, render_page
from .tables import groups_of, missing_lines


def write_page(folder: Path, title: str, content: Mapping[str, Any]) -> Path:
    """Write study.html, and the figure that it holds, into a study's folder.

    Parameters
    ----------
    folder : pathlib.Path
        The study's.
    title : str
        Heading of the page.
    content : mapping
        Of study.json.

    Returns
    -------
    pathlib.Path
        The file written.
    """
    curves = content["curves"]
    figure = ""
    if curves:
        learning_figure(folder / "learning.png", curves)
        figure = embedded(folder / "learning.png")
    tones = {"helps": "better", "harms": "worse", "cannot tell": "open", "reference": "", "": ""}
    verdicts = [
        {"tone": tones[content["verdict"][name]], "tag": content["verdict"][name], "sentence": sentence}
        for name, sentence in content["sentences"].items()
    ]
    html = render_page(
        files(__package__).joinpath("template.html").read_text(encoding="utf-8"),
        title=title,
        verdicts=verdicts,
        tones=tones,
        reference=content["reference"],
        seeds=content["seeds"],
        groups=list(groups_of(content)),
        missing=missing_lines(content),
        figure=figure,
    )
    target = folder / "study.html"
    with atomic_write(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target
