"""Painting whole volumes: any shape, no seams, same bytes after a kill."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny import TINY_DENOISER, awake_denoiser
from torch import Tensor, nn

from connectomics_neurodiff.checkpoints import load_checkpoint, save_checkpoint
from connectomics_neurodiff.errors import (
    CheckpointMismatch,
    NotEnoughSpace,
    NotWritable,
    ShapeMismatch,
    UnknownName,
    UserError,
    ValueRangeError,
)
from connectomics_neurodiff.geometry import Box, blend_window, tiles
from connectomics_neurodiff.seeding import rng_for
from connectomics_neurodiff.synthesis import (
    SAMPLERS,
    DiffusionProcess,
    GuidedDenoiser,
    cosine_betas,
    denoiser_from_checkpoint,
    discard_scratch,
    sampler_steps,
    synthesise,
)
from connectomics_neurodiff.volume import LazyArray

PROCESS = DiffusionProcess(cosine_betas(50))
VOXEL = (29.0, 6.0, 6.0)


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
    layout = {"tile": (4, 12, 12), "overlap": (1, 4, 4), "margin": (0, 0, 0)}
    given = {"seed": 3, "sampler": "ddim", "steps": 5} | layout | options
    return synthesise(network or Painter(), PROCESS, membrane, mito, VOXEL, **given)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 40), (6, 20, 28), (4, 12, 12)])
@pytest.mark.parametrize("name", SAMPLERS.names())
def test_a_perfect_denoiser_paints_its_world(name: str, shape: tuple[int, int, int]) -> None:
    membrane, mito = masks(shape)
    image = paint(shape=shape, sampler=name)
    expected = (1 + np.clip(0.8 - 1.4 * membrane - 0.5 * mito, -1, 1)) / 2
    assert (image.shape, image.dtype) == (shape, np.float32)
    np.testing.assert_allclose(image, expected, atol=2e-3)


class JoiningPainter(Painter):
    """Says that it joins squares of pixels, and records how large a tile it sees at which step."""

    pixels = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[tuple[int, ...]]] = {}

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor, hints: list[Tensor] | None = None
    ) -> Tensor:
        self.seen.setdefault(int(t), set()).add(tuple(x_t.shape[2:]))
        return super().forward(x_t, t, condition, voxel_nm, hints)


@pytest.mark.parametrize("guide", [False, True])
def test_a_network_that_joins_pixels_sees_them_a_pixel_further_on_every_second_step(guide: bool) -> None:
    """Its blocks do not add up from step to step; where things are stays the same."""
    painter = JoiningPainter()
    membrane, mito = masks()
    image = paint(GuidedDenoiser(painter, 1.0) if guide else painter, steps=4)
    np.testing.assert_allclose(image, (1 + np.clip(0.8 - 1.4 * membrane - 0.5 * mito, -1, 1)) / 2, atol=2e-3)
    sizes = [painter.seen[t] for t in sorted(painter.seen, reverse=True)]
    assert sizes == [{(4, 12, 12)}, {(4, 13, 13)}, {(4, 12, 12)}, {(4, 13, 13)}]


def test_without_mitochondria() -> None:
    membrane, _ = masks()
    image = synthesise(Painter(), PROCESS, membrane, None, VOXEL, seed=0, steps=3, tile=(4, 12, 12), overlap=(1, 4, 4))
    np.testing.assert_allclose(image, (1.8 - 1.4 * membrane) / 2, atol=2e-3)


def test_a_real_network_stays_in_range_and_depends_on_the_seed_alone() -> None:
    network = awake_denoiser()
    first, again, other = (paint(network, seed=seed, sampler="ddpm") for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_tiles_leave_no_seams() -> None:
    """Steps across tile borders are no larger than elsewhere, where tiles painted one by one would show them."""
    network, shape = awake_denoiser(), (4, 32, 60)
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
@pytest.mark.parametrize("stop_after", [0, 1, 6, 20, 40, 59])
def test_an_interrupted_volume_goes_on_with_its_row(name: str, stop_after: int, tmp_path: Path) -> None:
    whole = paint(sampler=name)
    network = Painter()
    network.stop_after = stop_after  # of 5 steps of 2 rows of 6 tiles
    with pytest.raises(KeyboardInterrupt):
        paint(network, sampler=name, scratch=tmp_path)
    rest = Painter()
    np.testing.assert_array_equal(paint(rest, sampler=name, scratch=tmp_path), whole)
    assert rest.forwards == 60 - stop_after // 6 * 6
    again = Painter()
    np.testing.assert_array_equal(paint(again, sampler=name, scratch=tmp_path), whole)
    assert again.forwards == 0


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"steps": 6},
        {"sampler": "dpmpp"},
        {"tile": (4, 14, 12)},
        {"overlap": (1, 5, 4)},
        {"scratch_key": "other"},
        {"shape": (5, 20, 28)},
    ],
)
def test_the_scratch_of_another_sample_is_not_continued(change: dict[str, Any], tmp_path: Path) -> None:
    network = Painter()
    network.stop_after = 40
    with pytest.raises(KeyboardInterrupt):
        paint(network, scratch=tmp_path)
    np.testing.assert_array_equal(paint(**({"scratch": tmp_path} | change)), paint(**change))


def test_the_scratch_of_other_masks_or_weights_is_not_continued(tmp_path: Path) -> None:
    membrane, mito = masks()
    options: dict[str, Any] = {"seed": 3, "steps": 5, "tile": (4, 12, 12), "overlap": (1, 4, 4)}
    other = Painter()
    nn.init.constant_(other.shift, -0.1)
    for painter, mask in ((Painter(), membrane), (Painter(), 1 - membrane), (other, membrane)):
        image = synthesise(painter, PROCESS, mask, mito, VOXEL, scratch=tmp_path, **options)
        np.testing.assert_array_equal(image, synthesise(painter, PROCESS, mask, mito, VOXEL, **options))


def test_a_folder_that_another_process_paints_into_is_left_alone(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    whole = paint(scratch=tmp_path)
    with open(tmp_path / "lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        network = Painter()
        with pytest.raises(UserError, match="Another process"):
            paint(network, scratch=tmp_path, seed=9)
        assert network.forwards == 0
    np.testing.assert_array_equal(paint(scratch=tmp_path), whole)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("thesis")
    with pytest.raises(NotWritable, match="in the way"):
        paint(scratch=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "thesis"


def test_nothing_of_ours_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    paint(scratch=folder)
    (folder / ".progress.123.part.json").write_text("half of")
    discard_scratch(folder)
    assert not folder.exists()
    paint(scratch=folder)
    (folder / "notes.txt").write_text("mine")
    discard_scratch(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["text", "list", "gone", "short"])
def test_damaged_scratch_is_named_not_overwritten(damage: str, tmp_path: Path) -> None:
    paint(scratch=tmp_path)
    file = tmp_path / ("progress.json" if damage in ("text", "list") else "x1.float32")
    if damage == "gone":
        file.unlink()
    else:
        file.write_text({"text": '{"key": ', "list": "[]", "short": "abc"}[damage])
    with pytest.raises(CheckpointMismatch, match=file.name):
        paint(scratch=tmp_path)
    assert damage == "gone" or file.stat().st_size < 10


def test_a_disk_too_small_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    network = Painter()
    with pytest.raises(NotEnoughSpace, match="GiB while the volume is painted: No space left"):
        paint(network, scratch=tmp_path)
    assert network.forwards == 0
    assert not list(tmp_path.glob("*.float32"))


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_on_disk_and_in_memory_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    network = awake_denoiser()
    painted = paint(network, sampler=name, scratch=tmp_path)
    assert isinstance(painted, LazyArray)
    np.testing.assert_array_equal(painted, paint(network, sampler=name))
    np.testing.assert_array_equal(painted[2:4, :, 5], np.asarray(painted)[2:4, :, 5])


def test_masks_are_read_tile_by_tile(tmp_path: Path) -> None:
    membrane, mito = masks()

    class OnDisk(LazyArray):
        largest = 0

        def _read(self, box: tuple[slice, ...]) -> np.ndarray:
            read = membrane[box]
            OnDisk.largest = max(OnDisk.largest, read.shape[0])
            return read

    options: dict[str, Any] = {"seed": 3, "steps": 2, "tile": (2, 12, 12), "overlap": (1, 4, 4)}
    deep = np.concatenate([membrane] * 3)
    membrane, mito = deep, np.concatenate([mito] * 3)
    lazily = synthesise(Painter(), PROCESS, OnDisk(deep.shape, np.uint8), mito, VOXEL, **options)
    np.testing.assert_array_equal(lazily, synthesise(Painter(), PROCESS, deep, mito, VOXEL, **options))
    assert OnDisk.largest <= 8 < deep.shape[0]


@pytest.mark.parametrize("margin", [(0, 0, 0), (1, 2, 3)])
def test_joint_denoising_is_the_blended_average_of_all_tiles(margin: tuple[int, int, int]) -> None:
    """A twin that holds everything at once: sums over all tiles, divided by the sum of their windows.

    It mirrors the whole volume, of which tiles at its faces see a part.
    """
    network, shape = awake_denoiser(), (7, 20, 28)
    membrane, mito = masks(shape)
    around = [(0, 0), *((m + extra, m) for m, extra in zip(margin, (0, 1, 1), strict=True))]
    condition = np.pad(np.stack([membrane, mito]).astype(np.float32), around, mode="reflect")
    boxes = tiles(shape, (3, 12, 12), (1, 4, 4))
    rule = SAMPLERS.get("ddim")
    x = np.stack([rng_for(3, "start", z, 0).standard_normal(shape[1:], dtype=np.float32) for z in range(shape[0])])
    for step in sampler_steps(PROCESS.timesteps(4)):
        total, weight = np.zeros((2, *shape))
        mirrored = np.pad(x[None], around, mode="reflect")
        for box in boxes:
            window = blend_window(box.shape) ** 2
            seen, inside = _seen(box, shape, margin, step.number % 2)
            parts = [torch.from_numpy(a[(slice(None), *seen)][None]) for a in (mirrored, condition)]
            with torch.no_grad():
                found = network(parts[0], torch.tensor([step.t]), parts[1], torch.tensor([VOXEL]))[0, 0].numpy()
            total[box.slices] += window * found[inside]
            weight[box.slices] += window
        x, _ = rule(PROCESS, step, x, (total / weight)[None].astype(np.float32))
    painted = paint(network, shape, steps=4, tile=(3, 12, 12), margin=margin)
    # The noisiest step divides by hardly any signal, and so blows the rounding up.
    np.testing.assert_allclose(painted, np.clip((x + 1) / 2, 0, 1), atol=1e-4)


def _seen(
    box: Box, shape: Sequence[int], margin: Sequence[int], shift: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a tile sees of the mirrored volume, a row and a column more if shifted, and where its voxels are therein."""
    seen, inside = [], []
    for axis, (start, stop, n, m) in enumerate(zip(box.start, box.stop, shape, margin, strict=True)):
        extra = 0 if axis == 0 else 1  # the volume is mirrored so much further before its first row and column
        more, origin = extra * shift, m + extra
        first = extra - more if start == 0 else start + origin - more
        last = n + origin + m if stop == n else stop + origin
        seen.append(slice(first, last))
        inside.append(slice(start + origin - first, stop + origin - first))
    return tuple(seen), tuple(inside)


def test_the_margin_mirrors_the_outermost_voxels() -> None:
    """A denoiser that blurs has nothing beyond the image to blur with; with a margin it is SciPy's mirrored blur."""

    class Blur(Painter):
        def forward(self, x_t: Tensor, *_: Any, **__: Any) -> Tensor:
            return nn.functional.avg_pool3d(x_t, 3, stride=1, padding=1)

    noise = np.stack([rng_for(3, "start", z, 0).standard_normal((20, 28), dtype=np.float32) for z in range(6)])
    step = sampler_steps(PROCESS.timesteps(1))[0]
    expected, _ = SAMPLERS.get("ddim")(PROCESS, step, noise, ndimage.uniform_filter(noise, 3, mode="mirror")[None])
    options: dict[str, Any] = {"steps": 1, "tile": (6, 20, 28), "overlap": (0, 0, 0)}
    expected = np.clip((expected + 1) / 2, 0, 1)
    np.testing.assert_allclose(paint(Blur(), margin=(1, 1, 1), **options), expected, atol=1e-4)
    assert np.abs(paint(Blur(), margin=(0, 0, 0), **options) - expected).max() > 0.1


def test_a_denoiser_that_has_diverged_is_noticed_at_once() -> None:
    network = Painter()
    network.shift.data.fill_(torch.nan)
    with pytest.raises(ValueRangeError, match="not finite at diffusion step 49"):
        paint(network)
    assert network.forwards == 1


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    """A volume on disk 16 times deeper takes hardly more memory: its arrays alone would take 150 MiB more."""
    code = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        sys.path.insert(0, sys.argv[1])
        from test_synthesis_synthesise import PROCESS, VOXEL, Painter
        from connectomics_neurodiff.synthesis import synthesise
        from connectomics_neurodiff.volume import LazyArray

        class Stripes(LazyArray):
            def _read(self, box):
                return np.indices([s.stop - s.start for s in box]).sum(0) % 9 == 0

        shape = (int(sys.argv[3]), 256, 512)
        synthesise(Painter(), PROCESS, Stripes(shape, bool), None, VOXEL, seed=0, steps=2, tile=(8, 256, 256),
                   overlap=(2, 0, 64), scratch=Path(sys.argv[2]), hint_cache_bytes=0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        """
    )
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def peak_mib(depth: int) -> int:
        command = [sys.executable, "-c", code, str(here), str(tmp_path / str(depth)), str(depth)]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)

    assert peak_mib(160) < peak_mib(10) + 30


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

        np.save(sys.argv[3], paint(Killed(), sampler="dpmpp", scratch=Path(sys.argv[2])))
        """
    )
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def start(kill_at: int) -> int:
        arguments = [str(here), str(tmp_path / "part"), str(tmp_path / "image.npy"), str(kill_at)]
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
        ({"tile": (0, 12, 12)}, ValueRangeError, "overlap < tile"),
        ({"overlap": (-1, 4, 4)}, ValueRangeError, "0 <= overlap"),
        ({"margin": (0, -1, 0)}, ValueRangeError, "margin"),
        ({"margin": (4, 4)}, ValueRangeError, "margin"),
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
    network = awake_denoiser()
    recorded = {"process": {"steps": 50, "cosine_offset": 0.008}}
    for name, extra in (("good.pt", recorded), ("bare.pt", {})):
        save_checkpoint(
            tmp_path / name,
            kind="denoiser",
            architecture="neurodiff",
            options=TINY_DENOISER,
            state_dict=network.state_dict(),
            extra=extra,
        )
    again, process = denoiser_from_checkpoint(load_checkpoint(tmp_path / "good.pt", kind="denoiser"))
    np.testing.assert_array_equal(process.betas, PROCESS.betas)
    np.testing.assert_array_equal(paint(again, steps=2), paint(network, steps=2))
    with pytest.raises(CheckpointMismatch, match="process"):
        denoiser_from_checkpoint(load_checkpoint(tmp_path / "bare.pt", kind="denoiser"))
