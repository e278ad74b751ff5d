"""The training loop: interrupted and resumed equals undisturbed, bit for bit; checkpoints are safe and checked."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from connectomics_neurodiff.checkpoints import load_checkpoint, load_weights, save_checkpoint
from connectomics_neurodiff.engine import FitSettings, fit, learning_rate_factor, read_loss_curve, resolve_precision
from connectomics_neurodiff.errors import (
    CheckpointMismatch,
    MissingInput,
    StaleArtifactError,
    UnknownName,
    ValueRangeError,
)


class Samples:
    """y = 2 x + 1, a pure function of the sample number."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng([1, index]).normal(size=(1, 2, 6, 8)).astype(np.float32)
        return {"x": x, "y": 2 * x + 1}


class Killed(Exception):
    """Stands for kill -9 in the middle of a step."""


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ELU(), nn.Conv3d(8, 1, 1))


def settings(**changes: object) -> FitSettings:
    base = {
        "steps": 23,
        "batch_size": 2,
        "accumulate": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "warmup_steps": 4,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "checkpoint_every": 5,
        "log_every": 5,
    }
    return FitSettings(**{**base, **changes})  # type: ignore[arg-type]


def train(folder: Path, kill_at: int = 0, key: str = "", **changes: object) -> dict[str, torch.Tensor]:
    calls = 0

    def loss(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        return (net(batch["x"]) - batch["y"]).abs().mean(), {}

    return fit(network(), loss, Samples(), settings(**changes), folder, label="test", key=key).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train(folder)


@pytest.mark.parametrize("kill_at", [3, 25])  # before the first checkpoint, and after the second
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, kill_at: int, undisturbed: tuple) -> None:
    with pytest.raises(Killed):
        train(tmp_path, kill_at)
    assert equal(train(tmp_path), undisturbed[1])
    assert read_loss_curve(tmp_path / "loss.csv") == read_loss_curve(undisturbed[0] / "loss.csv")


def test_a_resumed_loss_curve_is_that_of_an_undisturbed_one_between_rows_too(tmp_path: Path) -> None:
    odd = {"checkpoint_every": 3, "log_every": 5, "steps": 15}
    train(tmp_path / "whole", **odd)
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at=19, **odd)
    train(tmp_path / "killed", **odd)
    assert (tmp_path / "killed" / "loss.csv").read_bytes() == (tmp_path / "whole" / "loss.csv").read_bytes()


def test_a_finished_training_is_returned_as_it_was(undisturbed: tuple) -> None:
    assert equal(train(undisturbed[0]), undisturbed[1])


def test_worker_processes_do_not_change_the_result(tmp_path: Path, undisturbed: tuple) -> None:
    assert equal(train(tmp_path, workers=2), undisturbed[1])


def test_training_lowers_the_loss(undisturbed: tuple) -> None:
    curve = read_loss_curve(undisturbed[0] / "loss.csv")
    assert [row[0] for row in curve] == [5, 10, 15, 20, 23]
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_a_resume_point_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path, key="a", steps=5)
    with pytest.raises(StaleArtifactError, match="other settings"):
        train(tmp_path, key="b", steps=5)


def test_divergence_is_said(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return net(batch["x"]).mean() * float("nan"), {}

    with pytest.raises(ValueRangeError, match="diverged"):
        fit(network(), loss, Samples(), settings(), tmp_path, label="test")


def test_the_learning_rate_warms_up_and_falls() -> None:
    chosen = settings(steps=104, warmup_steps=4)
    factors = [learning_rate_factor(step, chosen) for step in range(104)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[4:]))
    assert factors[-1] == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": "adam"}, UnknownName, "Did you mean 'Adam'"),
        ({"precision": "bf61"}, UnknownName, "Did you mean 'bf16'"),
        ({"steps": 0}, ValueRangeError, "steps >= 1"),
    ],
)
def test_bad_settings_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings(**changes)


def saved(path: Path) -> Path:
    save_checkpoint(
        path,
        kind="segmenter",
        architecture="toy",
        options={"a": 1},
        state_dict=network().state_dict(),
        extra={"patch": [1, 2, 3]},
    )
    return path


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    found = load_checkpoint(saved(tmp_path / "c.pt"), kind="segmenter")
    assert (found.architecture, found.options, found.extra) == ("toy", {"a": 1}, {"patch": [1, 2, 3]})
    assert equal(load_weights(network(), found).state_dict(), network().state_dict())


def test_wrong_checkpoints_are_told_apart(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt")
    with pytest.raises(CheckpointMismatch, match="holds a segmenter"):
        load_checkpoint(path, kind="denoiser")
    with pytest.raises(CheckpointMismatch, match=r"0\.bias"):
        load_weights(nn.Sequential(nn.Conv3d(1, 9, 3)), load_checkpoint(path, kind="segmenter"))
    with pytest.raises(MissingInput):
        load_checkpoint(tmp_path / "none.pt", kind="segmenter")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        load_checkpoint(path, kind="segmenter")


@pytest.mark.parametrize(
    ("part", "content", "told"),
    [
        ("architecture", ["toy"], "architecture must be a word"),
        ("options", [1], "options must be a mapping of names"),
        ("options", {1: 2}, "options must be a mapping of names"),
        ("state_dict", [torch.zeros(1)], "state_dict must be a mapping of names to tensors"),
        ("state_dict", {"0.weight": 1}, "names to tensors. Got {'0.weight': 1}"),
        ("extra", None, "extra must be a mapping"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path: Path, part: str, content: Any, told: str) -> None:
    path = saved(tmp_path / "c.pt")
    torch.save(torch.load(path, weights_only=True) | {part: content}, path)
    with pytest.raises(CheckpointMismatch, match=told) as caught:
        load_checkpoint(path, kind="segmenter")
    assert "\n" not in str(caught.value)


class Malicious:
    """Its unpickling would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_pickled_code_is_never_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    with pytest.raises(CheckpointMismatch):
        load_checkpoint(tmp_path / "evil.pt", kind="segmenter")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx", [False, True])
def test_auto_takes_bfloat16_where_the_processor_has_it(amx: bool, avx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert resolve_precision("auto", "cpu") == (torch.bfloat16 if amx or avx else torch.float32)
    assert resolve_precision("fp32", "cpu") == torch.float32
    assert resolve_precision("bf16", "cpu") == torch.bfloat16
    with pytest.raises(UnknownName, match="Did you mean 'bf16'"):
        resolve_precision("bf61", "cpu")
