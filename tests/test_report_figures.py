"""Figures: what is drawn is what the arrays say; measured on the pixels of the files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics_neurodiff.errors import ShapeMismatch, ValueRangeError
from connectomics_neurodiff.remodel import PAIRED
from connectomics_neurodiff.report import (
    following_figure,
    grey_value_figure,
    label_colours,
    loss_figure,
    mask_quality_figure,
    scores_figure,
    sections_to_show,
    segmentation_figure,
    synthesis_figure,
    threshold_figure,
)
from connectomics_neurodiff.report.charts import _draw_losses
from connectomics_neurodiff.report.figures import length_text, paint_mask, scale_bar_length

VOXEL = (29.0, 6.0, 6.0)
SHAPE = (6, 60, 84)
QUALITY = {name: 0.0 for key in PAIRED for name in (key, f"source_{key}")}
QUALITY |= {"membrane_fraction": 0.2, "source_membrane_fraction": 0.25}
SCORES = {"voi_split": 0.8, "voi_merge": 0.4, "voi": 1.2, "arand": 0.14}


def pixels(path: Path) -> np.ndarray:
    """RGBA of a PNG file in [0, 1]."""
    from matplotlib.image import imread

    return imread(path)


def mask() -> dict[str, np.ndarray]:
    label = np.zeros(SHAPE, dtype=np.uint64)
    label[:, :, :40], label[:, :, 44:] = 3, 4
    mito = np.zeros(SHAPE, dtype=np.uint8)
    mito[:, 20:30, 10:20] = 1
    return {"label": label, "membrane": (label == 0).astype(np.uint8), "mito": mito}


def synthesis(path: Path, **changes: Any) -> None:
    m = mask()
    image = np.full(SHAPE, 0.8, dtype=np.float32)
    image[:, 0, ::2] = 0.0
    image[:, 1, ::2] = 1.0
    inputs: dict[str, Any] = {
        "real_image": image,
        "real_label": m["label"],
        "mask_label": m["label"],
        "mask_membrane": m["membrane"],
        "mask_mito": m["mito"],
        "synthetic_image": np.full(SHAPE, 0.4, dtype=np.float32),
        "sections": [2],
        "voxel_nm": VOXEL,
    }
    synthesis_figure(path, **{**inputs, **changes})


def test_real_and_synthetic_share_one_grey_scale(tmp_path: Path) -> None:
    synthesis(tmp_path / "s.png")
    picture = pixels(tmp_path / "s.png")
    y = picture.shape[0] // 2
    real, synthetic = (picture[y, int((i + 0.5) / 4 * picture.shape[1]), :3] for i in (0, 3))
    np.testing.assert_allclose(real, 0.8, atol=0.01)
    np.testing.assert_allclose(synthetic, 0.4, atol=0.01)


def test_scale_bar_has_the_length_it_states(tmp_path: Path) -> None:
    black = np.zeros(SHAPE, dtype=np.float32)
    synthesis(tmp_path / "s.png", real_image=black, synthetic_image=black)
    synthetic = pixels(tmp_path / "s.png")[:, -460:, :]
    panel = (synthetic[synthetic.shape[0] // 2, :, 3] == 1).sum()
    white = (synthetic[..., :3] > 0.9).all(-1) & (synthetic[..., 3] == 1)
    longest = white.sum(axis=1).max()
    assert scale_bar_length(84 * 6) == 100
    assert longest / panel == pytest.approx(100 / (84 * 6), abs=0.012)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sections": [6]}, ValueRangeError),
        ({"sections": []}, ValueRangeError),
        ({"voxel_nm": (29, 6)}, ValueRangeError),
        ({"synthetic_image": np.zeros((6, 60, 80), dtype=np.float32)}, ShapeMismatch),
        ({"real_label": np.zeros((6, 61, 84), dtype=np.uint64)}, ShapeMismatch),
        ({"mask_dark": np.zeros((6, 61, 84), dtype=np.uint8)}, ShapeMismatch),
    ],
)
def test_bad_input_leaves_no_file(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Got|one shape"):
        synthesis(tmp_path / "s.png", **changes)
    assert list(tmp_path.iterdir()) == []


def test_masks_without_mitochondria_and_of_another_shape_are_drawn(tmp_path: Path) -> None:
    m = {name: array[:4, :50] for name, array in mask().items()}
    changes = {"mask_label": m["label"], "mask_membrane": m["membrane"], "synthetic_image": m["mito"] / 2.0}
    synthesis(tmp_path / "s.png", mask_mito=None, **changes)
    assert pixels(tmp_path / "s.png").std() > 0


def test_mask_picture_by_hand() -> None:
    m = {name: array[0] for name, array in mask().items()}
    m["label"][50:, :10] = 0
    m["membrane"][50:, :10] = 0
    dark = np.zeros_like(m["mito"])
    dark[35:38, 20:26] = 1
    picture = paint_mask(m["label"], m["membrane"], m["mito"], dark)
    np.testing.assert_array_equal(picture[5, 5], label_colours(np.array(3)))
    np.testing.assert_allclose(picture[36, 22], label_colours(np.array(3)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(picture[36, 27], label_colours(np.array(3)))
    np.testing.assert_array_equal(picture[25, 15], 1.0)
    assert picture[5, 42].max() < 0.2, "membranes are dark"
    assert picture[5, 42].max() < picture[55, 5].max() < 0.5, (
        "background is lighter than membranes, darker than neurons"
    )


def test_segmentation_figure_shows_a_split_and_a_merge(tmp_path: Path) -> None:
    truth = mask()["label"]
    image = np.full(SHAPE, 0.5, dtype=np.float32)
    image[:, 0, ::2], image[:, 0, 1::2] = 0.0, 1.0
    split = truth.copy()
    split[:, :20][truth[:, :20] == 3] = 7  # the upper third of neuron 3
    merged = np.where(truth > 0, 4, 0)
    segmentations = {("real", "waterz"): split, ("mixed", "waterz"): merged}
    segmentation_figure(tmp_path / "s.png", image, truth, segmentations, 1, VOXEL)
    picture = pixels(tmp_path / "s.png")
    height, width = picture.shape[:2]

    def colour(row: float, column: float) -> np.ndarray:
        return picture[int(row * height), int(column * width), :3]

    # Left half: image over truth. Right half: split over merge. A panel's left part is neuron 3, its right part 4.
    three, four = colour(0.75, 0.1), colour(0.75, 0.4)
    np.testing.assert_allclose(colour(0.35, 0.6), three, atol=0.02)
    assert np.abs(colour(0.12, 0.6) - three).max() > 0.1, "the split-off third has a colour of its own"
    np.testing.assert_allclose(colour(0.35, 0.9), four, atol=0.02)
    np.testing.assert_allclose(colour(0.75, 0.6), colour(0.75, 0.9), atol=0.02)


def test_segmentation_figure_of_one_arm_and_of_three(tmp_path: Path) -> None:
    truth = mask()["label"]
    image = mask()["mito"].astype(np.float32)
    for arms in (["real"], ["real", "mixed", "other"]):
        segmentations = {(arm, method): truth for arm in arms for method in ("waterz", "multicut")}
        segmentations.pop((arms[-1], "multicut"))
        segmentation_figure(tmp_path / f"{len(arms)}.png", image, truth, segmentations, 0, VOXEL)
        assert pixels(tmp_path / f"{len(arms)}.png").std() > 0
    with pytest.raises(ValueRangeError, match="at least one"):
        segmentation_figure(tmp_path / "0.png", image, truth, {}, 0, VOXEL)


@given(st.floats(20, 1e6))
def test_scale_bar_is_round_and_of_fitting_length(width_nm: float) -> None:
    length = scale_bar_length(width_nm)
    assert 0.1 * width_nm * (1 - 1e-9) <= length <= 0.25 * width_nm * (1 + 1e-9)
    assert float(f"{length:.0e}") == pytest.approx(length)
    assert f"{length:.0e}"[0] in "125"


@pytest.mark.parametrize(("nm", "text"), [(200, "200 nm"), (1000, "1 µm"), (0.5, "0.5 nm"), (20000, "20 µm")])
def test_lengths_are_written_in_their_natural_unit(nm: float, text: str) -> None:
    assert length_text(nm) == text


@given(st.integers(1, 200), st.integers(1, 6))
def test_sections_to_show_are_distinct_and_inside(depth: int, count: int) -> None:
    sections = sections_to_show(depth, count)
    assert len(set(sections)) == len(sections) == min(count, depth)
    assert 0 <= min(sections) <= max(sections) < depth


def drawn_losses(lines: dict[str, list[tuple[float, float]]]) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _draw_losses(axes, "segmenter", lines)
    return axes


def test_losses_are_logarithmic_only_where_they_fall_far() -> None:
    steps = range(400)
    assert drawn_losses({"": [(s, np.exp(-s / 60)) for s in steps]}).get_yscale() == "log"
    assert drawn_losses({"": [(s, 1 + 0.5 * np.exp(-s / 60)) for s in steps]}).get_yscale() == "linear"
    assert drawn_losses({"": [(s, -s) for s in steps]}).get_yscale() == "linear"


def test_smoothed_loss_keeps_the_level_and_loses_the_noise() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 1000)
    raw, smooth = drawn_losses({"real": [(i, 0.5 + n) for i, n in enumerate(noise)]}).lines
    assert smooth.get_ydata().mean() == pytest.approx(raw.get_ydata().mean(), abs=0.01)
    assert smooth.get_ydata().std() < 0.25 * raw.get_ydata().std()


def test_losses_that_are_not_finite_are_counted_not_hidden() -> None:
    axes = drawn_losses({"real": [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 0.9)]})
    assert axes.get_title(loc="left") + axes.get_title() == "Segmenter (2 points not finite)"


CURVE = [(0.1, 0.5), (0.2, 0.3), (0.3, 0.4)]
CHARTS: dict[str, Callable[[Path], None]] = {
    "following": lambda p: following_figure(p, [(10, -0.2), (20, 0.7), (30, float("nan"))], 0.75),
    "losses": lambda p: loss_figure(p, {"diffusion": [(0, 1.0)], "segmenter/real": [(0, 1), (9, 0.1)]}),
    "many losses": lambda p: loss_figure(p, {f"loss{i}": [(0, 1.0), (1, 0.5)] for i in range(5)}),
    "thresholds": lambda p: threshold_figure(
        p,
        {("real", "waterz"): CURVE, ("mixed", "waterz"): CURVE, ("mixed", "multicut"): CURVE},
        {("real", "waterz"): 0.2, ("mixed", "waterz"): 0.2, ("mixed", "multicut"): 0.3},
    ),
    "scores": lambda p: scores_figure(p, {"real": {"waterz": SCORES}, "mixed": {"waterz": SCORES, "multicut": SCORES}}),
    "scores of one arm": lambda p: scores_figure(p, {"real": {"waterz": SCORES}, "mixed": {}}),
    "mask quality": lambda p: mask_quality_figure(p, {"copy_000": QUALITY, "copy_001": QUALITY}),
    "mask quality of two sources": lambda p: mask_quality_figure(
        p, {"copy_000": QUALITY, "unlabeled_000_copy_000": QUALITY | {"source_membrane_fraction": 0.0}}
    ),
    "grey values": lambda p: grey_value_figure(p, np.linspace(0, 1, 99), {"a": np.full(9, 0.5), "b": np.zeros(9)}),
    "grey values of one": lambda p: grey_value_figure(p, np.linspace(0, 1, 99), [np.full((3, 4, 5), 0.5)]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_drawn_the_same_twice(tmp_path: Path, name: str) -> None:
    for file in ("a.png", "b.png"):
        CHARTS[name](tmp_path / file)
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] == 1600
    assert picture[..., :3].std() > 0.01
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: loss_figure(p, {}), "at least one curve"),
        (lambda p: following_figure(p, [], 0.8), "'following' needs at least one finite point"),
        (lambda p: loss_figure(p, {"a": []}), "'a' needs at least one finite point"),
        (lambda p: loss_figure(p, {"a/b": [(0, float("nan"))]}), "'a/b' needs at least one finite point"),
        (lambda p: threshold_figure(p, {}, {}), "at least one tuned method"),
        (lambda p: threshold_figure(p, {("r", "w"): CURVE}, {("r", "w"): 0.25}), "one of those tried.* Got 0.25"),
        (lambda p: scores_figure(p, {"real": {}}), "'real' or 'mixed'"),
        (lambda p: grey_value_figure(p, np.zeros(3), []), "at least one synthetic"),
        (lambda p: mask_quality_figure(p, {}), "at least one report"),
    ],
)
def test_charts_refuse_nothing_to_draw(tmp_path: Path, draw: Callable[[Path], None], message: str) -> None:
    with pytest.raises(ValueRangeError, match=message):
        draw(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_needs_no_pyplot_and_importing_the_room_no_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from connectomics_neurodiff.report import loss_figure\n"
        "heavy = {'matplotlib', 'jinja2', 'neuroglancer', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # Reading rcParams["backend"] would import pyplot.
        "from matplotlib import rcParams\n"
        "settings = lambda: {name: rcParams[name] for name in rcParams if name != 'backend'}\n"
        "before = settings()\n"
        f"loss_figure(pathlib.Path({str(tmp_path / 'a.png')!r}), {{'a': [(0, 1.0)]}})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
