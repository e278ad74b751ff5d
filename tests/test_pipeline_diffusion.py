"""The diffusion stage: several volumes of different voxel size, what is refused, what makes a checkpoint stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import settings

from connectomics_neurodiff.checkpoints import load_checkpoint
from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.errors import ConfigError, MissingInput, StaleArtifactError, UserError, ValueRangeError
from connectomics_neurodiff.pipeline import run_pipeline
from connectomics_neurodiff.pipeline.plan import describe_plan
from connectomics_neurodiff.synthesis import denoiser_from_checkpoint
from connectomics_neurodiff.volume import grow_phantom, write_volume

EXTRA = "NEURODIFF__DIFFUSION__EXTRA_VOLUMES"
SHORT = {"NEURODIFF__DIFFUSION__ITERATIONS": "4", "NEURODIFF__DIFFUSION__PATCH": "[2, 16, 24]"}


def run(folder: Path, **changes: str) -> None:
    run_pipeline(load_config(overrides=settings(folder, **SHORT, **changes)), stages=["diffusion"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes beside the embedded one: isotropic, and one that is smaller than a patch is deep."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, shape, voxel_nm in (("fib.h5", (12, 40, 44), (8, 8, 8)), ("thin.h5", (1, 24, 30), (50, 4.6, 4.6))):
        volume = grow_phantom(shape, voxel_nm, 1)
        write_volume(folder / name, volume.arrays, volume.voxel_nm, {})
    return folder


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run on three voxel sizes with every option of the training on."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    changes = {
        "DATASET__INPUT_PATH": str(inputs),
        EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "BOX": [0, 0, 0, 1, 24, 28]}]),
        "NEURODIFF__DIFFUSION__VOLUME_SHARE": "equal",
        "NEURODIFF__DIFFUSION__RESOLUTION_EMBEDDING": "True",
        "NEURODIFF__DIFFUSION__LEARN_VARIANCE": "True",
        "NEURODIFF__DIFFUSION__CONDITION_DROPOUT": "0.1",
        "NEURODIFF__DIFFUSION__VOXEL_SIZE_DROPOUT": "0.1",
        "NEURODIFF__DIFFUSION__SNR_GAMMA": "5",
        "NEURODIFF__DIFFUSION__PREDICTION": "velocity",
    }
    run(folder, **changes)
    return folder, changes


def test_a_checkpoint_says_what_it_was_trained_on(trained: tuple[Path, dict[str, str]]) -> None:
    checkpoint = load_checkpoint(trained[0] / "diffusion" / "checkpoint.pt", kind="denoiser")
    assert checkpoint.extra["voxel_nm"] == [[29.0, 6.0, 6.0], [8.0, 8.0, 8.0], [50.0, 4.6, 4.6]]
    assert (checkpoint.extra["condition_dropout"], checkpoint.extra["voxel_size_dropout"]) == (0.1, 0.1)
    network, process = denoiser_from_checkpoint(checkpoint)
    assert process.prediction == "velocity"
    image = torch.zeros(1, 1, 2, 8, 8)
    with torch.no_grad():
        out = network(image, torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 2, 8, 8), torch.zeros(1, 3))
    assert out.shape == (1, 2, 2, 8, 8)
    # It starts at zero behind two other zero layers, each of which takes a step to wake.
    assert network.state_dict()["resolution.known.2.weight"].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"NEURODIFF__DIFFUSION__SNR_GAMMA": "0"}, "SNR_GAMMA: 5.0 -> absent"),
        ({"NEURODIFF__DIFFUSION__FLIPS": "False"}, "FLIPS: absent -> False"),
        ({"NEURODIFF__DIFFUSION__INTENSITY_JITTER": "0.1"}, "INTENSITY_JITTER: absent -> 0.1"),
        ({"NEURODIFF__DIFFUSION__CONDITION_DROPOUT": "0.2"}, "CONDITION_DROPOUT: 0.1 -> 0.2"),
        ({EXTRA: "['fib.h5']"}, "extra: "),
        ({EXTRA: "[]"}, "extra: .* -> absent"),
        ({EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "BOX": [0, 0, 0, 1, 24, 27]}])}, "extra: "),
        ({EXTRA: str(["fib.h5", {"IMAGE_NAME": "thin.h5", "VOXEL_NM": [40, 5, 5]}])}, "extra: "),
    ],
)
def test_what_makes_a_denoiser_stale(trained: tuple[Path, dict[str, str]], change: dict[str, str], named: str) -> None:
    with pytest.raises(StaleArtifactError, match=named):
        run(trained[0], **{**trained[1], **change})


def test_keys_at_their_defaults_leave_no_trace(tmp_path: Path) -> None:
    """A training made before these keys existed stays valid: its sidecar holds exactly these settings."""
    run(tmp_path / "run")
    sidecar = json.loads((tmp_path / "run" / "diffusion" / "checkpoint.pt.provenance.json").read_text())
    assert set(sidecar["settings"]) == {
        "ARCHITECTURE", "PRESET", "STEPS", "COSINE_OFFSET", "PREDICTION", "CONDITIONING", "RGM", "RPGE",
        "SCAN_DIRECTIONS", "PATCH", "ITERATIONS", "BATCH", "ACCUMULATE", "LEARNING_RATE", "WARMUP", "SCHEDULE",
        "CLIP_NORM", "EMA_DECAY", "MEMBRANE_NM", "PRECISION",
    }  # fmt: skip
    assert set(sidecar["parents"]) == {"train"}


def test_a_missing_extra_volume_is_listed_and_refused(tmp_path: Path, inputs: Path) -> None:
    changes = {"DATASET__INPUT_PATH": str(inputs), EXTRA: "['fib.h5', {'IMAGE_NAME': 'a.h5', 'LABEL_NAME': 'b.h5'}]"}
    cfg = load_config(overrides=settings(tmp_path / "out", **changes))
    plan = describe_plan(cfg, ["diffusion"])
    assert [f"missing: {inputs / name}" in plan for name in ("fib.h5", "a.h5", "b.h5")] == [False, True, True]
    with pytest.raises(MissingInput, match=r"a\.h5, .*b\.h5"):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_extra_volumes(tmp_path: Path, inputs: Path) -> None:
    changes = {"DATASET__INPUT_PATH": str(inputs), EXTRA: "fib.h5", "NEURODIFF__DIFFUSION__LEARN_VARIANCE": "True"}
    plan = describe_plan(load_config(overrides=settings(tmp_path / "out", **changes)), ["diffusion"])
    assert f"EXTRA_VOLUMES[0]: {inputs / 'fib.h5'} (0, 0, 0)-(12, 40, 44), (8.0, 8.0, 8.0) nm" in plan


def test_extra_volumes_are_not_asked_for_where_no_denoiser_is_trained(tmp_path: Path) -> None:
    changes = {"AUGMENTOR__SYNTHETIC": "False", EXTRA: "nowhere.h5"}
    assert "missing" not in describe_plan(load_config(overrides=settings(tmp_path / "out", **changes)), ["segmenter"])


@pytest.mark.parametrize("copied", [False, True])
def test_voxels_of_the_test_part_are_refused_also_from_a_copy(tmp_path: Path, inputs: Path, copied: bool) -> None:
    for name in ("fib.h5", "thin.h5"):
        shutil.copy(inputs / name, tmp_path / name)
    name = "copy.h5" if copied else "fib.h5"
    shutil.copy(inputs / "fib.h5", tmp_path / "copy.h5")
    changes = {
        "DATASET__INPUT_PATH": str(tmp_path),
        "DATASET__IMAGE_NAME": "fib.h5",
        "NEURODIFF__SPLIT__TRAIN__BOX": "[0, 0, 0, 4, 40, 44]",
        "NEURODIFF__SPLIT__TUNE__BOX": "[4, 0, 0, 6, 40, 44]",
        "NEURODIFF__SPLIT__TEST__BOX": "[8, 0, 0, 12, 40, 44]",
    }

    def extra(z0: int, z1: int) -> str:
        return str(["thin.h5", {"IMAGE_NAME": name, "BOX": [z0, 0, 0, z1, 40, 44]}])

    key = r"NEURODIFF\.DIFFUSION\.EXTRA_VOLUMES\[1\]\.BOX"
    for z0, z1, part in ((5, 7, "tune"), (7, 9, "test")):
        with pytest.raises(ConfigError, match=rf"EXTRA_VOLUMES\[1\] and {part} must not share voxels.*{key}") as caught:
            run(tmp_path / "out", **changes, **{EXTRA: extra(z0, z1)})
        assert "\n" not in str(caught.value)
    cfg = load_config(overrides=settings(tmp_path / "out", **changes, **{EXTRA: extra(6, 8)}))
    assert "EXTRA_VOLUMES[1]" in describe_plan(cfg, ["diffusion"])  # between the two there is nothing to refuse


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"IMAGE_NAME": "fib.h5", "BOX": [0, 0, 0, 13, 40, 44]}, ValueRangeError, r"EXTRA_VOLUMES\[0\]\.BOX must lie"),
        ({"IMAGE_NAME": "fib.h5", "MITO_NAME": "thin.h5"}, UserError, "shape|mito"),
    ],
)
def test_extra_volumes_that_cannot_be_used(
    tmp_path: Path, inputs: Path, entry: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(tmp_path / "out", DATASET__INPUT_PATH=str(inputs), **{EXTRA: str([entry])})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
