"""Painting whole volumes: any shape, no seams, same bytes after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from connectomics_neurodiff.checkpoints import load_checkpoint, save_checkpoint
from connectomics_neurodiff.errors import CheckpointMismatch, ShapeMismatch, UnknownName, ValueRangeError
from connectomics_neurodiff.synthesis import (
    SAMPLERS,
    DiffusionProcess,
    build_denoiser,
    cosine_betas,
    denoiser_from_checkpoint,
    synthesise,
)

PROCESS = DiffusionProcess(cosine_betas(50))
VOXEL = (29.0, 6.0, 6.0)
TINY: dict[str, Any] = {
    "base_channels": 32,
    "multipliers": [1, 1],
    "condition_channels": [32, 32],
    "rgm_reductions": [2],
    "time_channels": 32,
}


class Painter(nn.Module):
    """Perfect denoiser of a world in which membranes are dark, mitochondria grey, and nothing is uncertain."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.encoded = 0
        self.forwards = 0
        self.stop_after = 10**9

    def encode_condition_path(self, condition: Tensor) -> list[Tensor]:
        self.encoded += 1
        return [0.8 - 1.4 * condition[:, :1] - 0.5 * condition[:, 1:] + self.shift]

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor, hints: list[Tensor] | None = None
    ) -> Tensor:
        self.forwards += 1
        if self.forwards > self.stop_after:
            raise KeyboardInterrupt
        clean = (hints or self.encode_condition_path(condition))[0]
        signal = float(PROCESS.signal[int(t)])
        return (x_t - signal**0.5 * clean) / (1 - signal) ** 0.5


def masks(shape: tuple[int, int, int] = (6, 20, 28)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    membrane = (rng.random(shape) < 0.3).astype(np.uint8)
    return membrane, ((rng.random(shape) < 0.2) & (membrane == 0)).astype(np.uint8)


def paint(network: nn.Module | None = None, shape: tuple[int, int, int] = (6, 20, 28), **options: Any) -> np.ndarray:
    membrane, mito = masks(shape)
    given = {"seed": 3, "sampler": "ddim", "steps": 5, "tile": (4, 12, 12), "overlap": (1, 4, 4)} | options
    return synthesise(network or Painter(), PROCESS, membrane, mito, VOXEL, **given)


def noisy_network() -> nn.Module:
    """A network whose prediction depends on all of a tile."""
    torch.manual_seed(0)
    network = build_denoiser("neurodiff", preset="small", **TINY)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 40), (6, 20, 28), (4, 12, 12)])
@pytest.mark.parametrize("name", SAMPLERS.names())
def test_a_perfect_denoiser_paints_its_world(name: str, shape: tuple[int, int, int]) -> None:
    membrane, mito = masks(shape)
    image = paint(shape=shape, sampler=name)
    expected = (1 + np.clip(0.8 - 1.4 * membrane - 0.5 * mito, -1, 1)) / 2
    assert (image.shape, image.dtype) == (shape, np.float32)
    np.testing.assert_allclose(image, expected, atol=2e-3)


def test_without_mitochondria() -> None:
    membrane, _ = masks()
    image = synthesise(Painter(), PROCESS, membrane, None, VOXEL, seed=0, steps=3, tile=(4, 12, 12), overlap=(1, 4, 4))
    np.testing.assert_allclose(image, (1.8 - 1.4 * membrane) / 2, atol=2e-3)


def test_a_real_network_stays_in_range_and_depends_on_the_seed_alone() -> None:
    network = noisy_network()
    first, again, other = (paint(network, seed=seed, sampler="ddpm") for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_tiles_leave_no_seams() -> None:
    """Steps across tile borders are no larger than elsewhere, where tiles painted one by one would show them."""
    network, shape = noisy_network(), (4, 32, 60)
    rough = np.abs(np.diff(paint(network, shape, tile=(4, 32, 24), overlap=(0, 0, 12)), axis=2)).mean((0, 1))
    borders = [11, 23, 35, 47]
    elsewhere = np.delete(rough, borders)
    assert rough[borders].mean() < elsewhere.mean() + 2 * elsewhere.std()


def test_one_tile_and_many_agree_for_a_local_denoiser() -> None:
    np.testing.assert_allclose(paint(tile=(6, 20, 28), overlap=(0, 0, 0)), paint(), atol=1e-4)


@pytest.mark.parametrize(("cache", "per_tile"), [(1 << 30, 1), (0, 5)])
def test_hints_are_computed_once_where_memory_allows(cache: int, per_tile: int) -> None:
    network = Painter()
    image = paint(network, hint_cache_bytes=cache)
    tiles = network.forwards // 5
    assert tiles == 2 * 2 * 3
    assert network.encoded == per_tile * tiles
    np.testing.assert_array_equal(image, paint())


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("stop_after", [1, 20, 40])
def test_an_interrupted_volume_goes_on_to_the_same_bytes(name: str, stop_after: int, tmp_path: Path) -> None:
    keep = {"sampler": name, "snapshot": tmp_path / "part.npz", "snapshot_seconds": 0.0}
    whole = paint(sampler=name)
    network = Painter()
    network.stop_after = stop_after  # of 5 steps of 12 tiles
    with pytest.raises(KeyboardInterrupt):
        paint(network, **keep)
    rest = Painter()
    np.testing.assert_array_equal(paint(rest, **keep), whole)
    assert rest.forwards == 60 - stop_after // 12 * 12


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"steps": 6},
        {"sampler": "dpmpp"},
        {"tile": (4, 14, 12)},
        {"overlap": (1, 5, 4)},
        {"snapshot_key": "other"},
        {"shape": (5, 20, 28)},
    ],
)
def test_a_snapshot_of_another_sample_is_not_continued(change: dict[str, Any], tmp_path: Path) -> None:
    keep = {"snapshot": tmp_path / "part.npz", "snapshot_seconds": 0.0}
    network = Painter()
    network.stop_after = 40
    with pytest.raises(KeyboardInterrupt):
        paint(network, **keep)
    np.testing.assert_array_equal(paint(**(keep | change)), paint(**change))


def test_a_snapshot_of_other_masks_or_weights_is_not_continued(tmp_path: Path) -> None:
    membrane, mito = masks()
    options: dict[str, Any] = {"seed": 3, "steps": 5, "tile": (4, 12, 12), "overlap": (1, 4, 4)}
    keep = options | {"snapshot": tmp_path / "part.npz", "snapshot_seconds": 0.0}
    other = Painter()
    nn.init.constant_(other.shift, -0.1)
    for painter, mask in ((Painter(), membrane), (Painter(), 1 - membrane), (other, membrane)):
        image = synthesise(painter, PROCESS, mask, mito, VOXEL, **keep)
        np.testing.assert_array_equal(image, synthesise(painter, PROCESS, mask, mito, VOXEL, **options))


def test_a_damaged_snapshot_is_named_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(CheckpointMismatch, match=r"part\.npz"):
        paint(snapshot=path)
    assert path.read_bytes().startswith(b"PK")


def test_kill_minus_nine_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """A process that is really killed between two steps; the next one ends as if nothing had happened."""
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        sys.path.insert(0, sys.argv[1])
        from test_synthesis_synthesise import Painter, paint

        class Killed(Painter):
            def forward(self, *args, **kwargs):
                if self.forwards == int(sys.argv[4]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(*args, **kwargs)

        np.save(sys.argv[3], paint(Killed(), sampler="dpmpp", snapshot=Path(sys.argv[2]), snapshot_seconds=0.0))
        """
    )
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def start(kill_at: int) -> int:
        arguments = [str(here), str(tmp_path / "part.npz"), str(tmp_path / "image.npy"), str(kill_at)]
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode

    assert start(kill_at=30) == -9
    assert not (tmp_path / "image.npy").exists()
    assert start(kill_at=-1) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "image.npy"), paint(sampler="dpmpp"))


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ({"sampler": "ddmi"}, UnknownName, "ddim"),
        ({"steps": 51}, ValueRangeError, "1 to 50"),
        ({"steps": 0}, ValueRangeError, "1 to 50"),
        ({"overlap": (4, 4, 4)}, ValueRangeError, "overlap"),
        ({"tile": (12, 12)}, ValueRangeError, "three sizes"),
        ({"precision": "fp61"}, UnknownName, "fp"),
    ],
)
def test_wrong_arguments_stop_before_any_work(options: dict[str, Any], error: type[Exception], hint: str) -> None:
    network = Painter()
    with pytest.raises(error, match=hint):
        paint(network, **options)
    assert network.forwards == 0


@pytest.mark.parametrize(("value", "bad"), [(1, False), (0, False), (2, True), (float("nan"), True), (-1, True)])
def test_masks_must_lie_in_the_unit_range(value: float, bad: bool) -> None:
    membrane = np.zeros((2, 8, 8), np.float32)
    membrane[1, 2, 3] = value
    options: dict[str, Any] = {"seed": 0, "steps": 2, "tile": (2, 8, 8), "overlap": (0, 0, 0)}
    if bad:
        with pytest.raises(ValueRangeError):
            synthesise(Painter(), PROCESS, membrane, None, VOXEL, **options)
    else:
        assert np.isfinite(synthesise(Painter(), PROCESS, membrane, None, VOXEL, **options)).all()


def test_masks_of_different_shape() -> None:
    membrane, mito = masks()
    with pytest.raises(ShapeMismatch):
        synthesise(Painter(), PROCESS, membrane, mito[1:], VOXEL, seed=0)


def test_a_checkpoint_becomes_the_same_denoiser(tmp_path: Path) -> None:
    network = noisy_network()
    recorded = {"process": {"steps": 50, "cosine_offset": 0.008}}
    for name, extra in (("good.pt", recorded), ("bare.pt", {})):
        save_checkpoint(
            tmp_path / name,
            kind="denoiser",
            architecture="neurodiff",
            options={"preset": "small", **TINY},
            state_dict=network.state_dict(),
            extra=extra,
        )
    again, process = denoiser_from_checkpoint(load_checkpoint(tmp_path / "good.pt", kind="denoiser"))
    np.testing.assert_array_equal(process.betas, PROCESS.betas)
    np.testing.assert_array_equal(paint(again, steps=2), paint(network, steps=2))
    with pytest.raises(CheckpointMismatch, match="process"):
        denoiser_from_checkpoint(load_checkpoint(tmp_path / "bare.pt", kind="denoiser"))
