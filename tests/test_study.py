"""Studies: what a file asks for, what is refused, and what is concluded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from tiny import TINY, neurodiff

from connectomics_neurodiff.errors import ConfigError, MissingInput, ShapeMismatch, UserError
from connectomics_neurodiff.study.execute import jobs_of
from connectomics_neurodiff.study.plan import read_study
from connectomics_neurodiff.study.results import summarise, write_results
from connectomics_neurodiff.study.statistics import paired_interval, verdict_on
from connectomics_neurodiff.study.tables import csv_of, latex_of, markdown_of

ARMS: dict[str, Any] = {"real": {"AUGMENTOR.SYNTHETIC.ENABLED": False}, "mixed": {}}


def write_study(folder: Path, **changes: Any) -> Path:
    """A study of the tiny job; a change of None leaves a key out."""
    (folder / "recipe.yaml").write_text("AUGMENTOR: {SYNTHETIC: True}\n")
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"}
    content = {
        "RECIPE": "recipe.yaml",
        "OUTPUT": str(folder / "study"),
        "SEEDS": [0, 3],
        "REFERENCE": "real",
        "SETTINGS": settings,
        "ARMS": ARMS,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def test_what_arms_share_is_made_once(tmp_path: Path) -> None:
    arms = {
        **ARMS,
        "half": {"AUGMENTOR": {"SYNTHETIC": {"UNTIL": 0.5}}},
        "two copies": {"NEURODIFF.REMODEL.COPIES": 2},
        "longer": {"NEURODIFF.DIFFUSION.ITERATIONS": 9},
    }
    study = read_study(write_study(tmp_path, ARMS=arms))
    assert len(study.trials) == 5 * 2
    of_seed = {trial.arm: trial for trial in study.trials if trial.seed == 3}
    folders = {trial.folder for trial in study.trials}
    assert len(folders) == 5 * 2
    assert of_seed["mixed"].pairs == of_seed["half"].pairs
    assert len({of_seed[arm].pairs for arm in ("mixed", "two copies", "longer")}) == 3
    assert study.denoiser_of(of_seed["mixed"].pairs) == study.denoiser_of(of_seed["two copies"].pairs)
    assert len(study.denoisers) == 2 * 2
    assert {cfg.NEURODIFF.SEED for cfg in study.denoisers.values()} == {0, 3}


UNLABELED = {
    "DATASET.UNLABELED": "rest",
    "NEURODIFF.SPLIT.TRAIN.BOX": "[0, 0, 0, 8, 72, 44]",
}
SOURCES: dict[str, Any] = {
    "real": {"AUGMENTOR.SYNTHETIC.ENABLED": False},
    "painted": {},
    "pseudo": {"AUGMENTOR.SYNTHETIC.SOURCE": "pseudo"},
    "repainted": {"AUGMENTOR.SYNTHETIC.SOURCE": "repainted"},
    "both": {"AUGMENTOR.SYNTHETIC.SOURCE": ["repainted", "pseudo"]},
}


def test_unannotated_tissue_is_labelled_once_by_the_real_arms_network(tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"} | UNLABELED
    study = read_study(write_study(tmp_path, ARMS=SOURCES, SETTINGS=settings, SEEDS=[3]))
    jobs = jobs_of(study, lambda *_: 2.0)
    of_arm = {trial.arm: jobs[trial.folder.relative_to(study.output).as_posix()] for trial in study.trials}
    (labels,) = [job for job in jobs.values() if job.stages == ("pseudo_labels",)]
    assert labels.needs == (of_arm["real"].name,)
    assert labels.leaves == ("pseudo_labels/tissue_000.h5",)
    denoisers = [job for job in jobs.values() if job.stages == ("diffusion",)]
    assert [job.needs for job in denoisers] == [(), (labels.name,)], "of images without masks, and of labelled ones"
    painted = {arm: [jobs[name] for name in of_arm[arm].needs if name.startswith("pairs/")] for arm in of_arm}
    assert [len(found) for found in painted.values()] == [0, 1, 0, 1, 1]
    assert painted["repainted"] == painted["both"]
    assert set(painted["both"][0].needs) == {denoisers[1].name, labels.name}
    assert painted["repainted"][0].leaves == (
        "pairs/unlabeled_000_copy_000.h5",
        "pairs/unlabeled_000_copy_000.gate.json",
    )
    assert [labels.name in of_arm[arm].needs for arm in of_arm] == [False, False, True, True, True]


def test_the_boxes_of_the_rest_tell_denoisers_apart(tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"} | UNLABELED
    arms = {"real": SOURCES["real"], "a": {}, "b": {"MODEL.INPUT_SIZE": [9, 32, 40]}}
    study = read_study(write_study(tmp_path, ARMS=arms, SETTINGS=settings, SEEDS=[3]))
    of_arm = {trial.arm: trial for trial in study.trials}
    assert study.denoiser_of(of_arm["a"].pairs) != study.denoiser_of(of_arm["b"].pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"AUGMENTOR.SYNTHETIC.SOURCE": ["repainted", "pseudo"]},
            {"AUGMENTOR.SYNTHETIC.SOURCE": ["pseudo", "repainted"]},
        ),
        (SOURCES["pseudo"], {**SOURCES["pseudo"], "NEURODIFF.DIFFUSION.ITERATIONS": 5}),
    ],
)
def test_what_no_training_on_unannotated_tissue_depends_on(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"} | UNLABELED
    names = []
    for arm in (one, other):
        study = read_study(
            write_study(tmp_path, ARMS={"real": SOURCES["real"], "a": arm}, SETTINGS=settings, SEEDS=[3])
        )
        names.append([trial.folder.name for trial in study.trials])
    assert names[0] == names[1]


def test_without_a_real_arm_of_the_same_settings_the_labels_have_a_training_of_their_own(tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"} | UNLABELED
    arms = {"real": SOURCES["real"] | {"SOLVER.ITERATION_TOTAL": 7}, "pseudo": SOURCES["pseudo"]}
    jobs = jobs_of(read_study(write_study(tmp_path, ARMS=arms, SETTINGS=settings, SEEDS=[3])), lambda *_: 2.0)
    (labels,) = [job for job in jobs.values() if job.stages == ("pseudo_labels",)]
    assert (labels.needs, labels.seconds) == ((), 2.0)


def test_the_real_arm_knows_nothing_of_unannotated_tissue(tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if key != "AUGMENTOR.SYNTHETIC"}
    settings["NEURODIFF.SPLIT.TRAIN.BOX"] = UNLABELED["NEURODIFF.SPLIT.TRAIN.BOX"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = read_study(write_study(tmp_path / "a", SETTINGS=settings))
    with_tissue = read_study(write_study(tmp_path / "b", SETTINGS=settings | UNLABELED))
    names = [[trial.folder.name for trial in study.trials] for study in (plain, with_tissue)]
    assert names[0][:2] == names[1][:2], "of the arm 'real'"
    assert not set(names[0][2:]) & set(names[1][2:]), "the denoiser of the other sees it"


def test_settings_of_arms_go_before_shared_ones_and_the_command_line_before_all(tmp_path: Path) -> None:
    arms = {"real": {"AUGMENTOR.SYNTHETIC.ENABLED": False}, "wide": {"NEURODIFF": {"MEMBRANE_NM": 40}}}
    settings = {"NEURODIFF.MEMBRANE_NM": 30, "SOLVER.ITERATION_TOTAL": 7}
    path = write_study(tmp_path, ARMS=arms, SETTINGS=settings)
    wide = read_study(path).row("wide", "")[0].cfg
    assert (wide.NEURODIFF.MEMBRANE_NM, wide.SOLVER.ITERATION_TOTAL) == (40, 7)
    over = read_study(path, ["NEURODIFF.MEMBRANE_NM", "35", "SEEDS", "[4]", "OUTPUT", "elsewhere"])
    assert over.row("wide", "")[0].cfg.NEURODIFF.MEMBRANE_NM == 35
    assert over.seeds == [4]
    assert over.output == Path("elsewhere")


def test_conditions_multiply_arms(tmp_path: Path) -> None:
    longer = {"4 %": {"NEURODIFF.DIFFUSION.ITERATIONS": 4}, "20 %": {"NEURODIFF.DIFFUSION.ITERATIONS": 9}}
    study = read_study(write_study(tmp_path, CONDITIONS=longer))
    assert len({trial.folder for trial in study.trials}) == (1 + 2) * 2, "the synthesis does not matter to real data"
    conditions = {"4 %": {"NEURODIFF.MEMBRANE_NM": 30}, "20 %": {"NEURODIFF.MEMBRANE_NM": 40}}
    study = read_study(write_study(tmp_path, CONDITIONS=conditions))
    assert [trial.name for trial in study.row("mixed", "20 %")] == ["mixed, 20 %"] * 2
    assert len({trial.folder for trial in study.trials}) == 2 * 2 * 2
    assert {trial.cfg.NEURODIFF.MEMBRANE_NM for trial in study.row("real", "4 %")} == {30}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SEEDS": [0, 1, 0]}, r"SEEDS.*must differ.*Got \[0, 1, 0\]"),
        ({"SEEDS": [0, -1]}, "SEEDS.*whole numbers >= 0"),
        ({"SEEDS": None}, "lacks SEEDS"),
        ({"SEEDS": []}, "SEEDS.*one or more"),
        ({"REFERENCE": None}, "lacks REFERENCE"),
        ({"SETTINGS": [1]}, "SETTINGS.*keys and values"),
        ({"SETTINGS": {"NEURODIFF": {"SEED": 4}}}, "NEURODIFF.SEED differs.*use SEEDS"),
        ({"ARMS": {"real": {}, "same": {}}}, "'real' and 'same' ask for the same training"),
        (
            {"ARMS": {**ARMS, "once more": {"NEURODIFF.SEGMENT.METHODS": ["mean"]}}},
            "'mixed' and 'once more' differ in how they are scored alone",
        ),
        ({"REFERENCE": "reel"}, "REFERENCE.*Did you mean 'real'"),
        ({"ARM": ARMS}, "Unknown key ARM.*Did you mean 'ARMS'"),
        ({"ARMS": {"real": {}, "mixed": 3}}, "ARMS.*settings by name"),
        ({"ARMS": {"real": {}, "../x": {}}}, r"ARMS.*Got '\.\./x'"),
        ({"ARMS": {"real": {}, "m": {"AUGMENTOR.SYNTETIC.RATIO": 1}}}, "Arm 'm': Unknown key.*SYNTHETIC"),
        ({"ARMS": {"real": {}, "m": {"NEURODIFF.MEMBRANE_NM": "wide"}}}, "Arm 'm': NEURODIFF.MEMBRANE_NM"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_study(write_study(tmp_path, **changes))


def test_names_given_twice_are_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("  mixed: {}", "  mixed: {}\n  mixed: {}"))
    with pytest.raises(ConfigError, match="'mixed' is given twice"):
        read_study(path)
    with pytest.raises(ConfigError, match=r"'SEEDS' has no value"):
        read_study(write_study(tmp_path), ["SEEDS"])


def test_what_no_training_depends_on_is_not_in_its_folder_s_name(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    before = read_study(path)
    changed = ["NEURODIFF.SEGMENT.METHODS", "['mean']", "SYSTEM.NUM_CPUS", "3", "SOLVER.ITERATION_SAVE", "7"]
    after = read_study(path, changed)
    assert [trial.folder for trial in after.trials] == [trial.folder for trial in before.trials]
    guided = read_study(path, ["NEURODIFF.DIFFUSION.GUIDANCE", "1.5"])
    assert list(guided.denoisers) == list(before.denoisers)
    assert not set(guided.synthesis) & set(before.synthesis)
    judged = read_study(path, ["NEURODIFF.PAIRS.LEAST_FOLLOWING", "0.4"])
    assert not set(judged.denoisers) & set(before.denoisers), "another judge goes with it"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"study\.yaml"):
        read_study(tmp_path / "study.yaml")
    with pytest.raises(UserError, match=r"The recipe of .* does not exist: .*other\.yaml"):
        read_study(write_study(tmp_path, RECIPE="other.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CONDITIONS": {"a": {"NEURODIFF.SPLIT.TEST.BOX": [7, 0, 0, 20, 72, 88]}}}, "'real, a'.*share"),
        (
            {"ARMS": {**ARMS, "easy": {"NEURODIFF.SPLIT.TEST.BOX": [14, 0, 0, 20, 72, 88]}}},
            "compared on the same.*'easy' has others than 'real'",
        ),
        ({"SETTINGS": {**TINY, "NEURODIFF.SPLIT.SCORED": False}}, "scores its trainings"),
    ],
)
def test_data_that_would_make_it_unfair_are_told_before_any_work(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from connectomics_neurodiff.study import run_study

    with pytest.raises(ConfigError, match=message):
        run_study(write_study(tmp_path, **changes))
    assert not (tmp_path / "study").exists()


def test_interval_of_one_column_is_that_of_the_seeds() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(2, 0.1, (6, 1))
    after = before + np.array([[-0.3], [-0.2], [-0.25], [-0.35], [-0.3], [-0.1]])
    found = paired_interval(before, after, np.random.default_rng(1))
    differences = (after - before).ravel()
    assert found.mean == pytest.approx(differences.mean())
    error = differences.std(ddof=1) / math.sqrt(6)
    student = 2.5706  # of 5 degrees of freedom, from a table
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * student * error, rel=0.12)
    assert found.is_clear
    assert not paired_interval(before, after, np.random.default_rng(1), comparisons=200).is_clear


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int) -> None:
    # Seeds and columns, each with an effect of its own: 19 of 20 intervals hold the true difference.
    rng = np.random.default_rng(5)
    covered, widths = 0, []
    trials = 200
    for _ in range(trials):
        before = rng.normal(1, 0.2, (seeds, 9))
        effects = rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.02, (1, 9)) + rng.normal(0, 0.05, (seeds, 9))
        after = before + 0.1 + effects
        found = paired_interval(before, after, rng)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.1 <= found.high
        widths.append(found.high - found.low)
    assert covered / trials >= 0.9
    # Student's t times the standard error of the mean: what a table gives for the same spread.
    student = {2: 12.71, 3: 4.30, 6: 2.57}[seeds]
    error = math.sqrt((0.1**2 + 0.05**2 / 9) / seeds + 0.02**2 / 9)
    assert np.median(widths) < 1.3 * 2 * student * error


def test_chance_alone_gives_a_verdict_in_one_of_twenty_studies() -> None:
    rng = np.random.default_rng(2)
    verdicts = []
    for _ in range(150):
        scores = {}
        shared = rng.normal(0, 0.1, (4, 1))  # scores of one training go together
        for method in ("waterz", "mean", "multicut"):
            for score in ("voi_columns", "arand_columns"):
                effects = 0.7 * shared + rng.normal(0, 0.07, (4, 1)) + rng.normal(0, 0.05, (4, 9))
                found = paired_interval(np.zeros((4, 9)), effects, rng, comparisons=6)
                scores.setdefault(method, {})[score] = found
        verdicts.append(verdict_on(scores))
    assert np.mean([verdict != "cannot tell" for verdict in verdicts]) <= 0.08


def test_seeds_needed_by_hand() -> None:
    # Seeds -.3 and -.1: mean -.2, standard deviation .1414. Student's t over the root of n: 4.303 x .0816 = .351 for
    # three, 3.182 x .0707 = .225 for four, 2.776 x .0632 = .176 for five.
    found = paired_interval(np.zeros((2, 1)), np.array([[-0.3], [-0.1]]), np.random.default_rng(0))
    assert found.needed == 5
    # A difference that two columns contradict by more than it is: no number of seeds tells it.
    columns = np.array([[-1.0, 0.8], [-1.01, 0.81], [-0.99, 0.79]])
    assert paired_interval(np.zeros((3, 2)), columns, np.random.default_rng(0)).needed is None


def test_columns_without_a_score_are_left_out_and_one_seed_has_no_interval() -> None:
    before = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]])
    gain = np.array([[0.5, 9.0, 0.5], [0.7, 9.0, 0.7]])
    found = paired_interval(before, before + gain, np.random.default_rng(0))
    assert found.mean == pytest.approx(0.6)
    alone = paired_interval(before[:1], before[:1] + 1, np.random.default_rng(0))
    assert (alone.mean, alone.low, alone.high, alone.needed) == (1.0, None, None, None)
    assert not alone.is_clear
    with pytest.raises(ShapeMismatch, match="both alike"):
        paired_interval(before, before[:, :2], np.random.default_rng(0))


def test_verdicts_by_hand() -> None:
    from connectomics_neurodiff.study.statistics import Difference

    good, bad, open_ = Difference(-1, -2, -0.5, 3, True), Difference(1, 0.5, 2, 3, True), Difference(-1, -2, -0.5, 3)
    assert verdict_on({"waterz": {"voi_columns": good, "arand_columns": open_}}) == "helps"
    assert verdict_on({"waterz": {"voi_columns": bad}, "multicut": {"voi_columns": open_}}) == "harms"
    assert verdict_on({"waterz": {"voi_columns": bad}, "multicut": {"voi_columns": good}}) == "cannot tell"
    assert verdict_on({"waterz": {"voi_columns": open_}}) == "cannot tell"
    assert verdict_on({"boundaries": {"average_precision": bad}}) == "helps", "more of it is better"


def leave_scores(folder: Path, arm: str, voi: float) -> None:
    """What a training leaves, with a VOI of one's own."""
    rng = np.random.default_rng(round(100 * voi))
    scores = {"voi_split": voi / 4, "voi_merge": 3 * voi / 4, "voi": voi, "arand": voi / 10}
    columns = [{name: value + rng.normal(0, 0.01) for name, value in scores.items()} for _ in range(8)]
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({arm: {"waterz": scores}}))
    (folder / "columns.json").write_text(json.dumps({arm: {"waterz": [*columns, None]}}))
    boundaries = {"average_precision": 0.5, "columns": [0.5] * 8 + [None]}
    (folder / "boundaries.json").write_text(json.dumps({arm: boundaries}))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    arms = {**ARMS, "half": {"AUGMENTOR.SYNTHETIC.UNTIL": 0.5}}
    path = write_study(tmp_path, ARMS=arms, SEEDS=[0, 1, 2])
    values = {"real": (1.2, 1.3, 1.22), "mixed": (1.0, 1.1, 1.03), "half": (1.25, 1.2, 1.3)}
    for trial in read_study(path).trials:
        leave_scores(trial.folder, "mixed" if trial.is_mixed else "real", values[trial.arm][trial.seed])
    return path


def test_study_json_by_hand(finished: Path) -> None:
    content = summarise(read_study(finished))
    voi = content["arms"]["real"]["waterz"]["voi"]
    assert voi["values"] == [1.2, 1.3, 1.22]
    assert voi["mean"] == pytest.approx(1.24)
    assert voi["se"] == pytest.approx(np.std([1.2, 1.3, 1.22], ddof=1) / math.sqrt(3))
    difference = content["differences"]["mixed"]["waterz"]["voi"]
    assert difference["mean"] == pytest.approx((-0.2 - 0.2 - 0.19) / 3)
    assert difference["seeds"] == 3
    assert content["verdict"] == {"mixed": "helps", "half": "cannot tell"}
    assert content["reference"] == "real"
    assert "real" not in content["differences"]
    assert "more seed" in content["sentences"]["half"]
    assert content["missing"] == {}


def test_tables_hold_what_study_json_holds_and_are_the_same_again(finished: Path, tmp_path: Path) -> None:
    study = read_study(finished)
    content = write_results(study)
    made = {path.name: path.read_bytes() for path in study.output.iterdir() if path.is_file()}
    assert {"study.json", "study.html", "table.md", "table.csv", "table.tex"} <= set(made)
    write_results(study)
    assert {path.name: path.read_bytes() for path in study.output.iterdir() if path.is_file()} == made
    rows = [line.split(",") for line in csv_of(content).splitlines()]
    assert all(len(row) == len(rows[0]) for row in rows)
    (mixed,) = (row for row in rows if row[:3] == ["mixed", "waterz", "voi"])
    assert float(mixed[3]) == content["arms"]["mixed"]["waterz"]["voi"]["mean"]
    lines = markdown_of(content).splitlines()
    start = lines.index("**waterz**") + 2
    table = lines[start : start + 5]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| real", "| mixed", "| half"]
    assert len({line.count("|") for line in table}) == 1
    assert "1.240 ± 0.031" in table[2]
    assert table[2].endswith("| reference |")
    latex = latex_of(content)
    assert latex.count("\\\\") == 2 * 4, "a table each for affinities and waterz"
    assert {line.count("&") for line in latex.splitlines() if "&" in line} == {3, 6}
    html = made["study.html"].decode()
    assert "://" not in html.split("base64")[0]
    assert all(word in html for word in ("helps", "cannot tell", "1.240"))


def test_what_is_missing_is_told(finished: Path) -> None:
    study = read_study(finished)
    (study.row("half", "")[0].folder / "metrics.json").unlink()
    for trial in study.row("mixed", ""):
        (trial.folder / "columns.json").unlink()
    failed = {study.row("mixed", "")[1].folder.relative_to(study.output).as_posix(): "no pair passed"}
    content = write_results(study, failed)
    assert set(content["arms"]) == {"real", "half"}
    assert content["differences"]["half"]["waterz"]["voi"]["seeds"] == 2
    assert content["missing"]["half"] == {"0": "not trained yet"}
    assert content["missing"]["mixed"] == {"0": "not trained yet", "1": "no pair passed", "2": "not trained yet"}
    table = (study.output / "table.md").read_text()
    assert "| half | 2 of 3 |" in table
    assert "mixed, seed 1: no scores (no pair passed)" in table
    assert "mixed, seed 1: no scores (no pair passed)" in (study.output / "study.html").read_text()


def test_seeds_of_several_machines_come_into_one_table(finished: Path, tmp_path: Path) -> None:
    study = read_study(finished)
    content = write_results(study)
    (study.output / "jobs").mkdir()
    (study.output / "jobs" / "study.txt").write_text("study.yaml of the recipe recipe.yaml")
    others = [trial.folder for trial in study.trials if trial.seed == 2]
    for folder in others:
        shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    found = neurodiff("study", str(finished), "--tables")
    assert found.returncode == 0, found.stderr
    assert "| mixed | 2 of 3 |" in found.stdout
    for folder in others:
        shutil.move(tmp_path / "elsewhere" / folder.name, folder)
    assert neurodiff("study", str(finished), "--tables").returncode == 0
    assert json.loads((study.output / "study.json").read_text()) == content


def test_tables_of_nothing_are_refused(tmp_path: Path) -> None:
    found = neurodiff("study", str(write_study(tmp_path)), "--tables")
    assert found.returncode == 2
    assert "No training of" in found.stderr
    assert not (tmp_path / "study").exists()


def test_what_is_yet_to_be_done_anew_has_no_score(finished: Path) -> None:
    study = read_study(finished)
    half = [trial.folder.relative_to(study.output).as_posix() for trial in study.row("half", "")]
    content = write_results(study, {}, half[1:])
    assert content["missing"] == {"half": {"1": "not trained yet", "2": "not trained yet"}}
    assert content["arms"]["half"]["waterz"]["voi"]["values"] == [1.25]


def test_arms_scored_by_other_methods_are_compared_by_those_they_share(finished: Path) -> None:
    study = read_study(finished)
    for trial in study.row("mixed", ""):
        for name in ("metrics", "columns"):
            path = trial.folder / f"{name}.json"
            content = json.loads(path.read_text())
            content["mixed"]["other"] = content["mixed"]["waterz"]
            path.write_text(json.dumps(content))
    content = write_results(study)
    assert set(content["differences"]["mixed"]) == {"waterz", "boundaries"}
    assert set(content["arms"]["mixed"]) == {"waterz", "boundaries", "other"}


def test_a_study_of_another_recipe_and_a_foreign_folder_are_left_alone(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.txt").write_text("mine")
    found = neurodiff("study", str(path))
    assert found.returncode == 2
    assert "not empty and not a study's folder" in found.stderr
    (tmp_path / "study" / "jobs").mkdir()
    (tmp_path / "study" / "jobs" / "study.txt").write_text("study.yaml of the recipe other.yaml")
    found = neurodiff("study", str(path))
    assert found.returncode == 2
    assert "holds the study study.yaml of the recipe other.yaml; this one is study.yaml of" in found.stderr


def test_dry_run_counts_and_makes_nothing(tmp_path: Path) -> None:
    found = neurodiff("study", str(write_study(tmp_path)), "--dry-run", "--jobs", "1")
    assert found.returncode == 0, found.stderr
    assert "arms: 2, conditions: 1, seeds: 2" in found.stdout
    assert "2 denoisers, 2 sets of pairs, 4 segmenters" in found.stdout
    assert not (tmp_path / "study").exists()


def test_the_demo_is_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    study = read_study(REPOSITORY / "studies" / "demo.yaml")
    assert study.arms == ["real", "mixed"]
    assert len(study.seeds) == 2
