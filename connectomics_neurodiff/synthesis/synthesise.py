"""Paint an EM image of any size onto masks: all tiles are denoised together, so there are no seams.

At every step the whole volume holds one x_t. Each tile predicts the noise in its part, the overlapping predictions are
averaged, and the sampler takes one step on the whole volume.

Glossary: a row is all tiles that begin in the same section. Rows are worked through from the first section to the last;
the sections that no later row reaches are finished at the end of a row. So no more than one tile needs to be in memory,
and a killed run goes on with the row it was in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from ..checkpoints import Checkpoint, load_weights
from ..conditions import encode_condition
from ..convolution import use_sound_convolutions
from ..engine import resolve_precision
from ..errors import CheckpointMismatch, ShapeMismatch, ValueRangeError
from ..geometry import Box, blend_weights, blend_window, tile_starts, tiles, voxel_size
from ..memory import kept_memory
from ..progress import progress_bar
from ..provenance import hash_of
from ..seeding import rng_for
from ..volume import ArrayLike, slabs
from .grey import GreyScale
from .nets import build_denoiser
from .nets.resolution import UNKNOWN_NM
from .process import DiffusionProcess, cosine_betas
from .samplers import SAMPLERS, Sampler, Step, sampler_steps
from .working_arrays import PaintedImage, WorkingArrays

#: Voxels that a tile reaches beyond the faces of its volume, unless told otherwise: how it was measured is in
#: docs/results.md, "Samplers and steps".
DEFAULT_MARGIN = (0, 4, 4)
#: Grey values of a denoiser that learnt on the published scale, [-1, 1].
PUBLISHED_GREY = GreyScale()
#: Image rows of a block that is drawn from one generator: the noise depends neither on tiles nor on memory.
_NOISE_ROWS = 256


def denoiser_from_checkpoint(checkpoint: Checkpoint) -> tuple[nn.Module, DiffusionProcess]:
    """Build the denoiser and the process that a checkpoint holds, the network in evaluation mode.

    Raises
    ------
    CheckpointMismatch
        If the weights do not fit the architecture, or the checkpoint does not say which process it was trained for.
    """
    recorded = checkpoint.extra.get("process")
    if not recorded:
        raise CheckpointMismatch(f"The checkpoint of '{checkpoint.architecture}' records no diffusion process.")
    network = load_weights(build_denoiser(checkpoint.architecture, **checkpoint.options), checkpoint).eval()
    betas = cosine_betas(recorded["steps"], recorded["cosine_offset"])
    return network, DiffusionProcess(betas, recorded.get("prediction", "noise"))


def synthesise(
    network: nn.Module,
    process: DiffusionProcess,
    membrane: ArrayLike,
    mito: ArrayLike | None,
    voxel_nm: Sequence[float] | None,
    *,
    seed: int,
    grey: GreyScale = PUBLISHED_GREY,
    sampler: str = "ddim",
    steps: int = 50,
    tile: Sequence[int] = (8, 128, 128),
    overlap: Sequence[int] = (2, 32, 32),
    margin: Sequence[int] = DEFAULT_MARGIN,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    scratch: Path | None = None,
    scratch_key: str = "",
    hint_cache_bytes: int = 1 << 30,
    label: str = "synthesis",
) -> ArrayLike:
    """Synthesise the image of a mask.

    Parameters
    ----------
    network, process
        Denoiser and the process it was trained for.
    membrane, mito : array
        (z, y, x) masks, 0 or 1, in memory or on disk; `mito` may be None. Any size.
    voxel_nm : sequence of 3 floats or None
        Voxel size in nm; None where it is unknown, which suits a denoiser that was trained with voxel size dropout.
    seed : int
        The same seed gives the same image.
    grey : GreyScale
        Scale of the images that the denoiser was trained on, see :func:`.grey_scale_for`.
    sampler, steps
        Name in ``SAMPLERS``, and its number of steps, at most ``process.steps``.
    tile, overlap : sequence of 3 ints
        Tile and least overlap of neighbours, voxels.
    margin : sequence of 3 ints
        Voxels, >= 0, by which tiles at the faces of the volume reach beyond them, into its mirror image. Without, the
        network sees less around the outermost voxels, and they come out noisier than the rest.
    precision, device
        ``"fp32"``, ``"bf16"`` or ``"auto"``, and where the network runs.
    scratch : pathlib.Path, optional
        Folder for the unfinished volume: 8 bytes per voxel, 16 with ``dpmpp``, and some tiles. Memory is then bounded
        whatever the size of the volume, and a later call goes on where a killed one stopped. Removed by the caller,
        once the image is no longer needed. Without it all is in memory.
    scratch_key : str
        Further identifies the sample. What a folder holds of another sample (other key, masks, weights, process or
        argument that the image depends on) is made anew.
    hint_cache_bytes : int
        Memory for hints, which are the same at every step; tiles whose hints do not fit compute them at every step.
    label : str
        Name on the progress bar.

    Returns
    -------
    array
        (z, y, x) float32 in [0, 1]; with `scratch` it stays there and is read as it is indexed.

    Raises
    ------
    ShapeMismatch
        If the masks differ in shape.
    ValueRangeError
        If there are more steps than the process has, a tile does not fit its overlap, a margin is negative, a mask
        leaves [0, 1], or what the network predicts is not finite.
    UnknownName
        If there is no such sampler.
    NotEnoughSpace
        If the disk cannot hold the unfinished volume.
    CheckpointMismatch
        If what the folder holds of this very sample is damaged.
    """
    _check(membrane, mito, tile, overlap, margin)
    rule = SAMPLERS.get(sampler)
    walk = sampler_steps(process.timesteps(steps))
    size = (UNKNOWN_NM,) * 3 if voxel_nm is None else voxel_size(voxel_nm)
    arguments = [
        scratch_key,
        seed,
        [grey.mean, grey.std],
        sampler,
        steps,
        list(tile),
        list(overlap),
        list(margin),
        list(size),
        precision,
        str(device),
        "shifted",  # how blocks of pixels are treated: what an older version has begun is made anew
    ]
    key = hash_of([arguments, _content_of(network, process, membrane, mito)])
    predict = _Predictor(network, membrane, mito, size, margin, precision, device, hint_cache_bytes)
    canvas = _Canvas(membrane.shape, tile, overlap, process, rule, seed, grey, predict.channels, scratch, key)
    done = canvas.tiles_done
    with (
        closing(canvas),
        kept_memory(math.prod(canvas.extent)),
        progress_bar(label=label, total=len(walk) * canvas.tiles_per_step, initial=done) as bar,
    ):
        for step in walk[canvas.step :]:
            canvas.take(step, predict, bar.update)
    return canvas.image(len(walk))


def _check(
    membrane: ArrayLike, mito: ArrayLike | None, tile: Sequence[int], overlap: Sequence[int], margin: Sequence[int]
) -> None:
    if mito is not None and mito.shape != membrane.shape:
        raise ShapeMismatch(f"membrane and mito must have one shape. Got {membrane.shape} and {mito.shape}.")
    if len(tile) != 3 or len(overlap) != 3 or any(not 0 <= o < t for o, t in zip(overlap, tile, strict=True)):
        raise ValueRangeError(
            f"Tile and overlap are three sizes each, 0 <= overlap < tile. Got {tuple(tile)} and {tuple(overlap)}."
        )
    if len(margin) != 3 or min(margin) < 0:
        raise ValueRangeError(f"A margin is three numbers of voxels >= 0. Got {tuple(margin)}.")


class _Canvas:
    """The volume between two steps, and the step that is being taken."""

    def __init__(
        self,
        shape: Sequence[int],
        tile: Sequence[int],
        overlap: Sequence[int],
        process: DiffusionProcess,
        rule: Sampler,
        seed: int,
        grey: GreyScale,
        channels: int,
        scratch: Path | None,
        key: str,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.process, self.rule, self.seed, self.grey = process, rule, seed, grey
        boxes = tiles(self.shape, tile, overlap)
        self.extent = boxes[0].shape
        self.rows = tile_starts(self.shape[0], tile[0], overlap[0])
        self.tiles_per_step = len(boxes)
        per_row = len(boxes) // len(self.rows)
        self._boxes = [boxes[i : i + per_row] for i in range(0, len(boxes), per_row)]
        # Squared: the outermost voxels of a tile, which the network paints badly, hardly count where tiles join.
        self._window = blend_window(self.extent) ** 2
        self._weights = [
            _summed_weights(n, e, tile_starts(n, t, o))
            for n, e, t, o in zip(self.shape, self.extent, tile, overlap, strict=True)
        ]
        plane = self.shape[1:]
        shared = max((a + self.extent[0] - b for a, b in zip(self.rows, self.rows[1:], strict=False)), default=1)
        shapes: dict[str, tuple[int, ...]] = {"x0": self.shape, "x1": self.shape}
        if rule.looks_back:
            shapes |= {"clean0": self.shape, "clean1": self.shape}
        shapes["total"] = (channels, self.extent[0], *plane)
        # What a row leaves to the next one, by turns: while one is written, a resumed run begins with the other.
        shapes |= {f"left{i}": (channels, max(shared, 1), *plane) for i in (0, 1)}
        self._arrays = WorkingArrays(scratch, key, shapes)
        if self._arrays.progress is None:
            self._fill_with_noise()
            self._arrays.commit({"step": 0, "row": 0})

    def close(self) -> None:
        """Let other processes work in the scratch folder."""
        self._arrays.close()

    @property
    def step(self) -> int:
        """Number of the step that comes next, or is half done."""
        return self._progress["step"]

    @property
    def tiles_done(self) -> int:
        """Tiles that need not be denoised again."""
        done = self._progress
        return done["step"] * self.tiles_per_step + done["row"] * (self.tiles_per_step // len(self.rows))

    @property
    def _progress(self) -> dict[str, int]:
        return self._arrays.progress or {"step": 0, "row": 0}

    def take(self, step: Step, predict: _Predictor, on_tile: Callable[[], object]) -> None:
        """Take one step, or what is left of it."""
        x = self._arrays[f"x{step.number % 2}"]
        total = self._arrays["total"]
        for row in range(self._progress["row"], len(self.rows)):
            first = self.rows[row]
            self._begin(row, total)
            for box in self._boxes[row]:
                part = (slice(None), slice(0, self.extent[0]), *box.slices[1:])
                total[part] += self._window * predict(x, step, box)
                on_tile()
            last = row == len(self.rows) - 1
            end = self.shape[0] if last else self.rows[row + 1]
            for z in range(first, end):
                self._finish_section(step, z, total[:, z - first])
            if last:
                self._arrays.commit({"step": step.number + 1, "row": 0})
            else:
                left = self._arrays[f"left{row % 2}"]
                remaining = total[:, end - first :]
                left[:, : remaining.shape[1]] = remaining
                self._arrays.commit({"step": step.number, "row": row + 1})

    def image(self, steps: int) -> ArrayLike:
        """What is there after `steps` steps."""
        name = f"x{steps % 2}"
        path = self._arrays.path_of(name)
        if path is None:
            return self.grey.to_grey(self._arrays[name])
        return PaintedImage(path, self.shape, self.grey)

    def _begin(self, row: int, total: np.ndarray) -> None:
        """What the row before left in the sections that both cover; nothing in the others."""
        shared = self.rows[row - 1] + self.extent[0] - self.rows[row] if row else 0
        total[:, :shared] = self._arrays[f"left{(row - 1) % 2}"][:, :shared] if row else 0
        total[:, shared:] = 0

    def _finish_section(self, step: Step, z: int, total: np.ndarray) -> None:
        """One step of section `z`; `total` (c, y, x) is the weighted sum of all predictions for it."""
        now, after = step.number % 2, (step.number + 1) % 2
        noisy = self.rule.adds_noise and step.t_next >= 0
        for index, rows in enumerate(_row_blocks(self.shape[1])):
            weight = self._weights[0][z] * self._weights[1][rows, None] * self._weights[2][None]
            self._arrays[f"x{after}"][z, rows], clean = self.rule(
                self.process,
                step,
                self._arrays[f"x{now}"][z, rows],
                total[:, rows] / weight,
                self._arrays[f"clean{now}"][z, rows] if self.rule.looks_back else None,
                self._noise(z, index, rows, "noise", step.number) if noisy else None,
                self.grey.limits,
            )
            if self.rule.looks_back:
                self._arrays[f"clean{after}"][z, rows] = clean

    def _fill_with_noise(self) -> None:
        for z in range(self.shape[0]):
            for index, rows in enumerate(_row_blocks(self.shape[1])):
                self._arrays["x0"][z, rows] = self._noise(z, index, rows, "start")

    def _noise(self, z: int, index: int, rows: slice, *purpose: str | int) -> np.ndarray:
        shape = (rows.stop - rows.start, self.shape[2])
        return rng_for(self.seed, *purpose, z, index).standard_normal(shape, dtype=np.float32)


def _row_blocks(size: int) -> list[slice]:
    """The image rows of a section, in blocks."""
    return [slice(start, min(start + _NOISE_ROWS, size)) for start in range(0, size, _NOISE_ROWS)]


def _summed_weights(size: int, extent: int, starts: Sequence[int]) -> np.ndarray:
    """Sum of the tiles' weights along one axis; that of the volume is the product over axes."""
    total = np.zeros(size, np.float32)
    for start in starts:
        total[start : start + extent] += blend_weights(extent) ** 2
    return total


class _Predictor:
    """What the network predicts for a tile; its hints are kept from step to step as far as they fit."""

    def __init__(
        self,
        network: nn.Module,
        membrane: ArrayLike,
        mito: ArrayLike | None,
        voxel_nm: Sequence[float],
        margin: Sequence[int],
        precision: str,
        device: str | torch.device,
        hint_cache_bytes: int,
    ) -> None:
        self._device = torch.device(device)
        self._autocast = resolve_precision(precision, self._device)
        self._network = network.to(self._device).eval()
        use_sound_convolutions(self._network)
        self._encode = cast("Callable[[torch.Tensor], list[torch.Tensor]]", self._network.encode_condition_path)
        self._membrane, self._mito = membrane, mito
        self._voxel_nm = torch.tensor([list(voxel_nm)], dtype=torch.float32, device=self._device)
        self._margin = margin
        self._cached: dict[tuple[Box, bool], list[torch.Tensor]] = {}
        self._free = hint_cache_bytes
        # A network that joins pixels shows its blocks. Every second step it sees them a pixel further on.
        self._pixels = int(getattr(network, "pixels", 1))
        #: 1: noise or velocity; 2: and the coefficient of the variance.
        self.channels = 2 if getattr(network, "learns_variance", False) else 1

    @torch.inference_mode()
    def __call__(self, x: np.ndarray, step: Step, box: Box) -> np.ndarray:
        """Predict (c, z, y, x) float32 for the part of x_t, the volume `x`, that lies in `box`."""
        shifted = self._pixels > 1 and step.number % 2 == 1
        # A row and a column more, of the volume or mirrored: the network's blocks begin a pixel earlier.
        more = (0, int(shifted), int(shifted))
        seen = tuple(slice(max(a - m, 0), b) for a, b, m in zip(box.start, box.stop, more, strict=True))
        beyond = self._beyond(box, more)
        mirrored = np.pad(np.stack([x[seen], *self._condition(seen)]), [(0, 0), *beyond], mode="reflect")
        noisy, condition = torch.from_numpy(mirrored[None]).to(self._device).split([1, len(mirrored) - 1], dim=1)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast != torch.float32):
            hints = self._hints(condition, box, shifted)
            t = torch.tensor([step.t], device=self._device)
            prediction = self._network(noisy, t, condition, self._voxel_nm, hints=hints)
        if not torch.isfinite(prediction).all():
            raise ValueRangeError(
                f"The denoiser's output is not finite at diffusion step {step.t}: its training has diverged."
            )
        first = [a - part.start + before for a, part, (before, _) in zip(box.start, seen, beyond, strict=True)]
        inside = (slice(a, a + n) for a, n in zip(first, box.shape, strict=True))
        return cast("np.ndarray", prediction[0].float().cpu().numpy()[(slice(None), *inside)])

    def _beyond(self, box: Box, more: Sequence[int]) -> list[tuple[int, int]]:
        """Voxels by which a tile reaches beyond the volume, before and after, on each axis; `more` before."""
        whole = self._membrane.shape
        return [
            ((m + extra) * (start == 0), m * (stop == n))
            for m, extra, start, stop, n in zip(self._margin, more, box.start, box.stop, whole, strict=True)
        ]

    def _condition(self, seen: tuple[slice, ...]) -> np.ndarray:
        mito = None if self._mito is None else np.asarray(self._mito[seen])
        return encode_condition(np.asarray(self._membrane[seen]), mito)

    def _hints(self, condition: torch.Tensor, box: Box, shifted: bool) -> list[torch.Tensor]:
        """The condition path depends neither on x_t nor on t: once per sample, and shift, is enough."""
        hints = self._cached.get((box, shifted))
        if hints is None:
            hints = self._encode(condition)
            needed = sum(hint.nbytes for hint in hints)
            if needed <= self._free:
                self._cached[box, shifted], self._free = hints, self._free - needed
        return hints


def _content_of(network: nn.Module, process: DiffusionProcess, membrane: ArrayLike, mito: ArrayLike | None) -> str:
    """Hash of weights, schedule and masks; the masks are checked on the way."""
    digest = hashlib.sha256(process.betas.tobytes() + process.prediction.encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f"{tuple(membrane.shape)} {mito is None}".encode())
    for index in slabs(tuple(membrane.shape)):
        condition = encode_condition(np.asarray(membrane[index]), None if mito is None else np.asarray(mito[index]))
        digest.update(condition.tobytes())
    return digest.hexdigest()
