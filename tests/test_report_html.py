"""The HTML report: one file, nothing from outside, honest about numbers and gaps."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from connectomics_neurodiff.errors import MissingInput, UnknownName, VolumeFormatError
from connectomics_neurodiff.pipeline.synthesis_metrics import _CHECKS
from connectomics_neurodiff.report import FIGURES, verdict_of, write_report
from connectomics_neurodiff.report.report import _SYNTHESIS_NAMES, duration_text
from connectomics_neurodiff.report.verdict import compare

VOID = {"meta", "img", "br", "link", "input", "hr"}
# The smallest PNG: one transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def scores(arand: float, voi: float) -> dict[str, float]:
    return {"voi_split": voi * 0.6, "voi_merge": voi * 0.4, "voi": voi, "arand": arand}


METRICS: dict[str, Any] = {
    "real": {"waterz": scores(0.1, 1.0), "multicut": scores(0.2, 2.0)},
    "mixed": {"waterz": scores(0.088, 0.9), "multicut": scores(0.206, 1.9)},
    "synthesis": {"fid3d": 41.75},
    "seconds": {"remodel": 30.0, "diffusion": 15200.0},
    "provenance": {"seed": 7, "parents": {"AC4.h5": "77aa12de"}},
}


def test_every_number_of_the_gate_has_a_name_for_people() -> None:
    assert set(_CHECKS) <= set(_SYNTHESIS_NAMES)


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in FIGURES}
    for path in paths.values():
        path.write_bytes(PNG)
    return paths


def page_of(folder: Path, metrics: dict[str, Any], **options: Any) -> Page:
    path = write_report(folder, **{"title": "A run", "metrics": metrics, "figures": {}, **options})
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_everything_is_inside_the_file(tmp_path: Path, figures: dict[str, Path]) -> None:
    page = page_of(tmp_path, METRICS, figures=figures, config_text="A: 1", notes=["n"])
    assert not page.of("script")
    assert not page.of("link")
    assert all((a["href"] or "").startswith("#") for a in page.of("a"))
    images = page.of("img")
    assert len(images) == len(FIGURES)
    for image in images:
        assert (image["src"] or "").removeprefix("data:image/png;base64,") == base64.b64encode(PNG).decode()
        assert (image["width"], image["height"]) == ("1", "1")
        assert len(image["alt"] or "") > 20
    style = (tmp_path / "report.html").read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert "http://" not in style
    assert "https://" not in style


def test_links_lead_to_sections_and_ids_are_unique(tmp_path: Path, figures: dict[str, Path]) -> None:
    page = page_of(tmp_path, METRICS, figures=figures, notes=["n"])
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in page.of("a")} <= set(ids)


def test_score_table_holds_the_numbers_and_marks_the_better_one(tmp_path: Path) -> None:
    cells = [" ".join(cell.split()) for cell in page_of(tmp_path, METRICS).cells]
    at = cells.index("waterz")
    assert cells[at + 1 : at + 5] == ["ARAND", "0.1000", "0.0880 (better)", "\N{MINUS SIGN}12.0 %better"]
    at = cells.index("multicut")
    assert cells[at + 1 : at + 5] == ["ARAND", "0.2000 (better)", "0.2060", "+3.0 %worse"]
    assert cells[at + 5 : at + 9] == ["VOI (bits)", "2.000", "1.900 (better)", "\N{MINUS SIGN}5.0 %better"]


def test_table_markup_is_accessible(tmp_path: Path) -> None:
    page = page_of(tmp_path, METRICS)
    assert all(attributes.get("scope") for attributes in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) == 2
    assert page.of("html") == [{"lang": "en"}]
    assert [len(page.of(tag)) for tag in ("h1", "main", "nav")] == [1, 1, 1]


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&"
    metrics = {"real": {evil: scores(0.1, 1.0)}, "seconds": {evil: 1.0}, "provenance": {evil: evil}}
    page = page_of(tmp_path, metrics, title=evil, config_text=evil, notes=[evil])
    assert not page.of("script")
    assert page.text.count(evil) >= 7


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    text = page_of(tmp_path, {}).text
    for sentence in (
        "no segmenter has been scored",
        "No segmenter has been scored in this run",
        "no synthetic pairs",
        "No training losses",
        "No segmentation was made",
        "No times were recorded",
        "No provenance was recorded",
        "No configuration was given",
    ):
        assert sentence in text


def test_a_run_without_synthetic_arm_shows_the_real_one(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"real": METRICS["real"]})
    assert "Not scored in this run: Real + synthetic." in page.text
    assert "the segmenter trained on real and synthetic data has not been scored" in page.text
    cells = [" ".join(cell.split()) for cell in page.cells]
    assert cells[cells.index("waterz") + 1 :][:4] == ["ARAND", "0.1000", "—", "—"]


def test_time_provenance_and_configuration_are_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, METRICS, config_text="SOLVER:\n  BASE_LR: 1e-4\n", notes=["Two pairs were refused."])
    for text in (
        "4 h 13 min",
        "4 h 14 min",
        "99.8 %",
        "parents.AC4.h5",
        "77aa12de",
        "BASE_LR: 1e-4",
        "Two pairs",
        "41.75",
    ):
        assert text in page.text
    assert page.of("details")


def test_the_floor_stands_below_the_distance_of_synthetic_volumes(tmp_path: Path) -> None:
    synthesis = {
        "fid3d": 6.63125,
        "fid3d_interval": [4.6374, 9.4912],
        "fid3d_floor": 0.19554,
        "fid3d_patches": 256,
        "fid3d_features": 64,
        "fid3d_test": 3.802,
        "pairs": 2,
    }
    text = page_of(tmp_path, METRICS | {"synthesis": synthesis}).text
    assert (
        "3D-FID of the synthetic volumes, lower is better "
        "6.631 (95 % interval 4.637 to 9.491), from 256 patches of 64 features "
        "Its floor: real patches against others of the same part 0.1955 "
        "For comparison, 3D-FID of the test part, real tissue 3.802 Synthetic volumes that entered training 2"
    ) in text
    without = dict.fromkeys(synthesis) | {"pairs": 2}
    text = page_of(tmp_path, METRICS | {"synthesis": without}).text
    assert "3D-FID of the synthetic volumes, lower is better not computed Synthetic volumes" in text


def test_figures_of_other_names_need_a_caption(tmp_path: Path, figures: dict[str, Path]) -> None:
    page = page_of(tmp_path, {}, figures={"zoo": figures["scores"]}, captions={"zoo": "Animals."})
    assert "Further figures" in page.text
    assert "Animals." in page.text
    with pytest.raises(UnknownName, match="Did you mean 'scores'"):
        write_report(tmp_path, title="t", metrics={}, figures={"score": figures["scores"]})


def test_a_wrong_figure_leaves_the_old_report(tmp_path: Path) -> None:
    page_of(tmp_path, {})
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(MissingInput, match="'scores' is not there"):
        write_report(tmp_path, title="t", metrics={}, figures={"scores": tmp_path / "absent.png"})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(VolumeFormatError, match=r"PNG files. Got .*text\.png"):
        write_report(tmp_path, title="t", metrics={}, figures={"scores": tmp_path / "text.png"})
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, figures: dict[str, Path]) -> None:
    options: dict[str, Any] = {"title": "t", "metrics": json.loads(json.dumps(METRICS)), "figures": figures}
    first = write_report(tmp_path, **options).read_bytes()
    assert write_report(tmp_path, **options).read_bytes() == first


def one_method(real: tuple[float, float], mixed: tuple[float, float]) -> dict[str, Any]:
    return {"real": {"waterz": scores(*real)}, "mixed": {"waterz": scores(*mixed)}}


@pytest.mark.parametrize(
    ("metrics", "sentence", "tone"),
    [
        (
            METRICS,
            "Synthetic pairs lowered ARAND by 12.0 % and VOI by 10.0 % with waterz, and raised ARAND by 3.0 % but "
            "lowered VOI by 5.0 % with multicut.",
            "divided",
        ),
        (
            one_method((0.1, 1.0), (0.05, 0.8)),
            "Synthetic pairs lowered ARAND by 50.0 % and VOI by 20.0 % with waterz.",
            "better",
        ),
        (
            one_method((0.1, 1.0), (0.2, 1.1)),
            "Synthetic pairs raised ARAND by 100.0 % and VOI by 10.0 % with waterz.",
            "worse",
        ),
        (
            one_method((0.1, 1.0), (0.1, 1.0)),
            "Synthetic pairs left ARAND and VOI unchanged with waterz.",
            "unchanged",
        ),
        (
            one_method((0.1, 1.0), (0.1, 1.1)),
            "Synthetic pairs left ARAND unchanged but raised VOI by 10.0 % with waterz.",
            "worse",
        ),
        (
            one_method((0.1, 1.0), (float("nan"), 0.5)),
            "Synthetic pairs lowered VOI by 50.0 % with waterz.",
            "better",
        ),
        ({}, "Nothing to compare yet: no segmenter has been scored.", "open"),
        (
            {"mixed": METRICS["mixed"]},
            "Nothing to compare yet: the segmenter trained on real data only has not been scored.",
            "open",
        ),
        (
            {"real": {"waterz": scores(0.1, 1)}, "mixed": {"multicut": scores(0.1, 1)}},
            "Nothing to compare: no method has finite scores in both arms.",
            "open",
        ),
    ],
)
def test_verdict_says_what_the_numbers_say(metrics: dict[str, Any], sentence: str, tone: str) -> None:
    verdict = verdict_of(metrics)
    assert (verdict.sentence, verdict.tone) == (sentence, tone)


def test_scores_without_a_relative_change_are_shown_as_such() -> None:
    arand, voi, *_ = compare(one_method((0.0, float("inf")), (0.1, 1.0)), "waterz")
    assert (arand.real, arand.mixed, arand.change_text, arand.best) == ("0.0000", "0.1000", "—", "real")
    assert (voi.real, voi.change_text, voi.best, voi.judgement) == ("not finite", "—", "", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (7265, "2 h 01 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def in_columns(real: list[float], mixed: list[float]) -> dict[str, Any]:
    """Metrics of waterz alone; ARAND as given in the columns, VOI ten times that."""
    arms = {"real": real, "mixed": mixed}
    rows = {arm: {"waterz": [scores(value, 10 * value) for value in values]} for arm, values in arms.items()}
    whole = {arm: {"waterz": scores(sum(v) / len(v), 10 * sum(v) / len(v))} for arm, v in arms.items()}
    return {**whole, "columns": rows}


def test_a_change_within_its_error_is_no_change() -> None:
    metrics = in_columns([0.1, 0.2, 0.3], [0.3, 0.1, 0.23])
    arand = compare(metrics, "waterz")[0]
    assert arand.change_text == "+5.0 %"
    # Differences .2, -.1, -.07: mean .01, standard deviation .165, over the root of 3.
    assert arand.columns_text == "+0.010 ± 0.095"
    verdict = verdict_of(metrics)
    assert verdict.tone == "unchanged"
    assert verdict.sentence == "One run cannot tell whether synthetic pairs help."
    assert verdict.certainty.startswith(
        "No change of VOI or ARAND is more than twice its standard error over 3 columns"
    )


def test_a_clear_change_is_named() -> None:
    metrics = in_columns([0.1, 0.2, 0.3], [0.05, 0.14, 0.25])
    verdict = verdict_of(metrics)
    assert verdict.tone == "better"
    assert "ARAND with waterz (\N{MINUS SIGN}0.053 ± 0.003)" in verdict.certainty
    assert "VOI with waterz" in verdict.certainty


def test_a_change_that_the_columns_contradict_is_no_gain() -> None:
    """One large neuron may lower the score of the whole while it rises nearly everywhere."""
    metrics = in_columns([0.1, 0.2, 0.3], [0.15, 0.26, 0.35])
    metrics["mixed"]["waterz"] = scores(0.1, 2.3)  # ARAND fell from .2, VOI rose from 2
    verdict = verdict_of(metrics)
    assert verdict.sentence == "Synthetic pairs raised VOI by 15.0 % with waterz."
    assert verdict.tone == "divided"
    supported, contrary = verdict.certainty.split(". ")
    assert "VOI with waterz (+0.533 ± 0.033)" in supported
    assert "ARAND" not in supported
    assert contrary == "In the columns clearly otherwise than in the whole: ARAND with waterz (+0.053 ± 0.003)."
    metrics["mixed"]["waterz"] = scores(0.1, 1.0)
    assert verdict_of(metrics).tone == "unchanged"
    assert verdict_of(metrics).sentence == "One run cannot tell whether synthetic pairs help."
    assert "Each change" not in verdict_of(metrics).certainty


def test_a_change_that_rounding_can_undo_is_not_told() -> None:
    """The same affinities, moved by a step of bfloat16, let one merger go: ARAND .1 as well as .3."""
    metrics = in_columns([0.1, 0.2, 0.3], [0.05, 0.14, 0.25])
    wide = {"real": {"waterz": [scores(0.2, 2.0), scores(0.26, 2.001)]}, "mixed": {"waterz": [scores(0.14, 1.5)]}}
    arand, voi, *_ = compare(metrics | {"rounding": wide}, "waterz")
    assert arand.by_rounding == pytest.approx(0.06)
    assert arand.difference == pytest.approx(-0.16 / 3)
    assert not arand.is_told
    assert voi.by_rounding == pytest.approx(1.5 - 4.4 / 3)
    assert voi.is_told
    verdict = verdict_of(metrics | {"rounding": wide})
    assert verdict.sentence == "Synthetic pairs lowered VOI by 26.7 % with waterz."
    assert "rounding of the affinities alone moves the whole by as much: ARAND with waterz" in verdict.certainty
    assert verdict_of(metrics).sentence.startswith("Synthetic pairs lowered ARAND by 26.7 % and VOI")


def test_columns_without_truth_and_single_ones_give_no_error() -> None:
    metrics = in_columns([0.1, 0.2], [0.2, 0.1])
    metrics["columns"]["real"]["waterz"][0] = None
    arand = compare(metrics, "waterz")[0]
    assert arand.in_columns is None
    assert arand.columns_text == "—"
    assert verdict_of(metrics).certainty == ""


def test_differences_in_columns_are_in_the_page(tmp_path: Path) -> None:
    metrics = in_columns([0.1, 0.2, 0.3], [0.05, 0.14, 0.25])
    text = write_report(tmp_path, title="t", metrics=metrics, figures={}, config_text="").read_text()
    page = Page(text)
    assert any("0.053 ± 0.003" in cell for cell in page.cells)
    assert verdict_of(metrics).certainty in text
