"""The report of a run: one HTML file that opens offline and holds everything, pictures included."""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import MissingInput, UnknownName, VolumeFormatError, did_you_mean
from ..provenance import atomic_write
from .style import ARM_NAMES
from .verdict import compare, methods_of, verdict_of


@dataclass(frozen=True)
class _Slot:
    """Where a figure stands in the report, and what is said about it."""

    section: str
    kind: str  # "picture" (of a volume) or "chart"; charts are inverted on dark pages, pictures never
    alt: str
    caption: str


#: The figures that the report has a place for, by name, in order.
FIGURES: Mapping[str, _Slot] = {
    "scores": _Slot(
        "scores",
        "chart",
        "Bar charts of the variation of information and of the adapted Rand error for each agglomeration method, "
        "real only beside real and synthetic. The table above holds the numbers.",
        "Scores on the test split. VOI is stacked: split below, merge above. Lower is better.",
    ),
    "synthesis": _Slot(
        "synthesis",
        "picture",
        "Rows of sections: real image, its labels, the remodelled mask, and the synthetic image.",
        "Real sections and their labels beside a remodelled mask and the image synthesised onto it. Real and synthetic "
        "images share one grey scale. A neuron keeps its colour throughout.",
    ),
    "mask_quality": _Slot(
        "synthesis",
        "chart",
        "Dots: numbers of each remodelled mask relative to its source, whose value is written beside each row.",
        "Remodelled masks against the real one they were made from; 1 is equal. All numbers are in "
        "masks/*.quality.json.",
    ),
    "following": _Slot(
        "synthesis",
        "chart",
        "How closely small images followed their mask, against the step of the denoiser's training.",
        "Small images painted while the denoiser was trained: how well a boundary network that knows real tissue finds "
        "the mask's membranes in them. 1: as well as in real tissue; 0: no better than under masks of elsewhere.",
    ),
    "grey_values": _Slot(
        "synthesis",
        "chart",
        "Histograms of grey values of the real and the synthetic images.",
        "Grey values, real against synthetic. The distance is the mean shift in grey value that would make one "
        "distribution the other (first Wasserstein distance).",
    ),
    "losses": _Slot(
        "training",
        "chart",
        "Training loss against step.",
        "Training losses: raw values faint, smoothed line over them.",
    ),
    "thresholds": _Slot(
        "segmentation",
        "chart",
        "Score on the tune split against the agglomeration threshold, the chosen one marked.",
        "Thresholds were chosen on the tune split, which shares no voxel with the test split.",
    ),
    "segmentations": _Slot(
        "segmentation",
        "picture",
        "One section: image, ground truth, and the segmentation of each arm by each method.",
        "White lines are true outlines; a segment has the colour of the neuron that it covers best. Two colours inside "
        "one outline are a split, one colour across an outline is a merge.",
    ),
}

_SECTIONS: Mapping[str, tuple[str, str]] = {
    "scores": ("Scores", "No segmenter has been scored in this run."),
    "synthesis": ("Synthetic data", "This run has no synthetic pairs to show."),
    "training": ("Training", "No training losses were recorded in this run."),
    "segmentation": ("Segmentation", "No segmentation was made in this run."),
}

_SYNTHESIS_NAMES: Mapping[str, str] = {
    "grey_value_distance": "Distance of grey values, synthetic to real",
    "following": "Following of the masks: 0 as tissue of elsewhere, 1 as real tissue",
    "missing_at_worst": "Share of the masks' membranes that cannot be seen, in the worst section or ninth of the plane",
    "cut_off": "Share of the neurons that boundaries cut off which the masks lack",
    "dark_share": "Share of dark voxels deep inside neurons",
    "dark_share_in_mitochondria": "Share of dark voxels in mitochondria",
    "dark_share_outside_mitochondria": "Share of dark voxels deep inside neurons, outside mitochondria",
    "dark_piece_nm": "Mean diameter of dark pieces inside neurons, nm",
    "dark_pieces_per_um2": "Dark pieces per square micrometre deep inside neurons",
    "grain": "Spread of the finest detail's power, standard deviation of its logarithm",
    "pairs": "Synthetic volumes that entered training",
    **{f"seams.{axis}.ratio": f"Seams of tiles along {axis}, 1: none" for axis in "zyx"},
    **{f"seams.{axis}.standard_error": f"Seams along {axis}, standard error" for axis in "zyx"},
}


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    metrics: Mapping[str, Any],
    figures: Mapping[str, str | os.PathLike[str]],
    config_text: str = "",
    notes: Sequence[str] = (),
    captions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html`` into a run's folder, atomically.

    Whatever is missing (an arm, a figure, the synthesis) is named in its section; a run of a few stages has a report
    too. The file holds no script and refers to nothing outside itself.

    Parameters
    ----------
    folder : path
        The run's folder.
    title : str
        Heading of the report.
    metrics : mapping
        Contents of metrics.json: ``"real"`` and ``"mixed"`` (method -> ``voi_split``, ``voi_merge``, ``voi`` in bits,
        ``arand``), ``"synthesis"``, ``"seconds"`` (stage -> s), ``"provenance"``. Any may be absent.
    figures : mapping
        Name -> PNG file; the names are the keys of :data:`FIGURES`. Another name needs a caption and goes to a
        section of its own.
    config_text : str
        The resolved configuration, as YAML.
    notes : sequence of str
        What the reader must know: one sentence each.
    captions : mapping, optional
        Name of figure -> caption instead of the standard one.

    Returns
    -------
    pathlib.Path
        The file written.

    Raises
    ------
    MissingInput
        If a figure's file does not exist.
    UnknownName
        If a figure has neither a place in the report nor a caption.
    VolumeFormatError
        If a figure is not a PNG file.
    """
    captions = captions or {}
    pictures = [_figure(name, Path(path), captions) for name, path in figures.items()]
    target = Path(folder) / "report.html"
    methods = [(method, compare(metrics, method)) for method in methods_of(metrics)]
    source = files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    html = render_page(
        source,
        title=title,
        verdict=verdict_of(metrics),
        methods=methods,
        in_columns=any(row.in_columns for _, rows in methods for row in rows),
        arm_names=ARM_NAMES,
        missing_arms=[name for arm, name in ARM_NAMES.items() if not metrics.get(arm)],
        sections=_sections(pictures, metrics),
        synthesis=_synthesis_rows(metrics.get("synthesis") or {}),
        timing=_timing(metrics.get("seconds") or {}),
        provenance=_flatten(metrics.get("provenance") or {}),
        config_text=config_text,
        notes=list(notes),
    )
    with atomic_write(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def render_page(source: str, **content: Any) -> str:
    """A page in the house style from a Jinja template, which uses `style` and `version` beside its own content.

    Every value is escaped; a name that the template uses and nobody gave is an error.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))
    return template.from_string(source).render(style=style, version=__version__, **content)


def embedded(path: Path) -> str:
    """A PNG file as the source of an image: the page refers to nothing outside itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _figure(name: str, path: Path, captions: Mapping[str, str]) -> dict[str, Any]:
    """A figure as the template wants it, its bytes embedded."""
    slot = FIGURES.get(name)
    if slot is None and name not in captions:
        raise UnknownName(
            f"The report has no place for a figure '{name}' without a caption.{did_you_mean(name, FIGURES)} "
            f"Known: {', '.join(FIGURES)}."
        )
    if not path.is_file():
        raise MissingInput(f"The figure '{name}' is not there: {path}.")
    content = path.read_bytes()
    width, height = _png_size(content, path)
    caption = captions.get(name) or (slot.caption if slot else "")
    return {
        "name": name,
        "section": slot.section if slot else "more",
        "kind": slot.kind if slot else "picture",
        "alt": slot.alt if slot else caption,
        "caption": caption,
        "source": embedded(path),
        "width": width,
        "height": height,
    }


def _png_size(content: bytes, path: Path) -> tuple[int, int]:
    """Width and height from the header (PNG specification, 11.2.2 IHDR): the page keeps its layout while loading."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise VolumeFormatError(f"Figures are PNG files. Got {path}, which is not.")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def _sections(pictures: Sequence[dict[str, Any]], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sections in order, each with its figures in the order of :data:`FIGURES` and what to say where it is empty."""
    order = list(FIGURES)
    ranked = sorted(pictures, key=lambda p: order.index(p["name"]) if p["name"] in order else len(order))
    synthesis = metrics.get("synthesis") or {}
    has_content = {
        "scores": bool(methods_of(metrics)),
        "synthesis": any(value is not None for value in synthesis.values()),
    }
    sections = []
    for name, (heading, missing) in {**_SECTIONS, "more": ("Further figures", "")}.items():
        own = [picture for picture in ranked if picture["section"] == name]
        empty = not own and not has_content.get(name, False)
        if name != "more" or own:
            sections.append({"id": name, "heading": heading, "figures": own, "missing": missing if empty else ""})
    return sections


def _synthesis_rows(synthesis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each number; the 3D-FID in one row with what it was taken from, and its floor beneath."""
    rest = {name: value for name, value in synthesis.items() if not name.startswith("fid3d")}
    rows = [(_SYNTHESIS_NAMES.get(name, name), text) for name, text in _flatten(rest)]
    if "fid3d" not in synthesis:
        return rows
    text = _text_of(synthesis["fid3d"])
    if synthesis.get("fid3d_interval"):
        low, high = map(_text_of, synthesis["fid3d_interval"])
        text += f" (95 % interval {low} to {high})"
    if synthesis.get("fid3d_patches"):
        text += f", from {synthesis['fid3d_patches']} patches of {synthesis['fid3d_features']} features"
    found = [("3D-FID of the synthetic volumes, lower is better", text)]
    if synthesis.get("fid3d_floor") is not None:
        found.append(("Its floor: real patches against others of the same part", _text_of(synthesis["fid3d_floor"])))
    if synthesis.get("fid3d_test") is not None:
        found.append(("For comparison, 3D-FID of the test part, real tissue", _text_of(synthesis["fid3d_test"])))
    return found + rows


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mapping as (dotted name, text) pairs, in order."""
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _text_of(value)))
    return rows


def _text_of(value: Any) -> str:
    if value is None:
        return "not computed"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration_text(seconds: float) -> str:
    """Duration for people.

    >>> [duration_text(s) for s in (3.14, 75, 15200)]
    ['3.1 s', '1 min 15 s', '4 h 13 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _timing(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Rows (stage, duration, share of the total in percent) and the total."""
    total = sum(seconds.values())
    rows = [(stage, duration_text(s), 100 * s / total if total else 0.0) for stage, s in seconds.items()]
    return {"rows": rows, "total": duration_text(total)}
