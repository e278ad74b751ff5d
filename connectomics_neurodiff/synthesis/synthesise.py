"""Paint an EM image of any size onto masks: all tiles are denoised together, so there are no seams.

At every step the whole volume holds one x_t. Each tile predicts the noise in its part, the overlapping predictions are
averaged, and the sampler takes one step on the whole volume.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from ..checkpoints import Checkpoint, load_weights
from ..conditions import encode_condition
from ..convolution import use_sound_convolutions
from ..engine import resolve_precision
from ..errors import CheckpointMismatch, ShapeMismatch, ValueRangeError
from ..geometry import Box, blend_window, tiles, voxel_size
from ..memory import kept_memory
from ..progress import progress_bar
from ..provenance import atomic_write, hash_of
from ..seeding import rng_for
from .nets import build_denoiser
from .process import DiffusionProcess, cosine_betas
from .samplers import SAMPLERS, SamplerState


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


@kept_memory()
def synthesise(
    network: nn.Module,
    process: DiffusionProcess,
    membrane: np.ndarray,
    mito: np.ndarray | None,
    voxel_nm: Sequence[float],
    *,
    seed: int,
    sampler: str = "ddim",
    steps: int = 50,
    tile: Sequence[int] = (8, 128, 128),
    overlap: Sequence[int] = (2, 32, 32),
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    snapshot: Path | None = None,
    snapshot_key: str = "",
    snapshot_seconds: float = 20.0,
    hint_cache_bytes: int = 1 << 30,
    label: str = "synthesis",
) -> np.ndarray:
    """Synthesise the image of a mask.

    Parameters
    ----------
    network, process
        Denoiser and the process it was trained for.
    membrane, mito : numpy.ndarray
        (z, y, x) masks, 0 or 1; `mito` may be None. Any size.
    voxel_nm : sequence of 3 floats
        Voxel size in nm.
    seed : int
        The same seed gives the same image.
    sampler, steps
        Name in ``SAMPLERS``, and its number of steps, at most ``process.steps``.
    tile, overlap : sequence of 3 ints
        Tile and least overlap of neighbours, voxels.
    precision, device
        ``"fp32"``, ``"bf16"`` or ``"auto"``, and where the network runs.
    snapshot : pathlib.Path, optional
        File that the unfinished volume is saved to every `snapshot_seconds`; a later call goes on from it. Removed
        by the caller.
    snapshot_key : str
        Further identifies the sample. A snapshot of another sample (other key, masks, weights, process or argument that
        the image depends on) is made anew.
    hint_cache_bytes : int
        Memory for hints, which are the same at every step; tiles whose hints do not fit compute them at every step.
    label : str
        Name on the progress bar.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32 in [0, 1].

    Raises
    ------
    ShapeMismatch
        If the masks differ in shape.
    ValueRangeError
        If there are more steps than the process has, or a tile does not fit its overlap.
    UnknownName
        If there is no such sampler.
    """
    _check(membrane, mito, tile, overlap)
    sample = SAMPLERS.get(sampler)
    timesteps = process.timesteps(steps)
    shape = membrane.shape
    boxes = tiles(shape, tile, overlap)
    arguments = [snapshot_key, seed, sampler, steps, list(tile), list(overlap), list(voxel_nm), precision, str(device)]
    key = "" if snapshot is None else hash_of([arguments, _content_of(network, process, membrane, mito)])
    state = _read_snapshot(snapshot, key)

    def noise_for(position: int) -> np.ndarray:
        return rng_for(seed, "noise", position).standard_normal(shape, dtype=np.float32)

    done = 0 if state is None else state.done
    with progress_bar(label=label, total=steps * len(boxes), initial=done * len(boxes)) as bar:
        denoise = _tiled_denoiser(
            network,
            process,
            encode_condition(membrane, mito),
            voxel_size(voxel_nm),
            boxes,
            precision,
            device,
            hint_cache_bytes,
            bar.update,
        )
        x = sample(
            denoise,
            process,
            rng_for(seed, "start").standard_normal(shape, dtype=np.float32),
            timesteps,
            noise_for,
            state=state,
            on_step=_snapshot_writer(snapshot, key, snapshot_seconds),
        )
    return np.clip((x + 1) / 2, 0, 1)


def _check(membrane: np.ndarray, mito: np.ndarray | None, tile: Sequence[int], overlap: Sequence[int]) -> None:
    if mito is not None and mito.shape != membrane.shape:
        raise ShapeMismatch(f"membrane and mito must have one shape. Got {membrane.shape} and {mito.shape}.")
    if len(tile) != 3 or len(overlap) != 3 or any(o >= t for o, t in zip(overlap, tile, strict=True)):
        raise ValueRangeError(
            f"Tile and overlap are three sizes each, the tile larger. Got {tuple(tile)} and {tuple(overlap)}."
        )


def _tiled_denoiser(
    network: nn.Module,
    process: DiffusionProcess,
    condition: np.ndarray,
    voxel_nm: Sequence[float],
    boxes: Sequence[Box],
    precision: str,
    device: str | torch.device,
    hint_cache_bytes: int,
    on_tile: Callable[[], object],
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Function (x, t) -> noise over the whole volume, blended from tiles."""
    device = torch.device(device)
    network = network.to(device).eval()
    use_sound_convolutions(network)
    encode = cast("Callable[[torch.Tensor], list[torch.Tensor]]", network.encode_condition_path)
    autocast = resolve_precision(precision, device)
    size = torch.tensor([list(voxel_nm)], dtype=torch.float32, device=device)
    window = blend_window(boxes[0].shape)
    weight = np.zeros(condition.shape[1:], np.float32)
    for box in boxes:
        weight[box.slices] += window
    cached: dict[Box, list[torch.Tensor]] = {}
    free = hint_cache_bytes

    @torch.inference_mode()
    def predict(x: np.ndarray, t: int, box: Box) -> np.ndarray:
        nonlocal free
        part = torch.from_numpy(condition[(slice(None), *box.slices)][None].astype(np.float32)).to(device)
        noisy = torch.from_numpy(x[box.slices][None, None]).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast != torch.float32):
            # The condition path depends neither on x_t nor on t: once per sample is enough.
            hints = cached.get(box)
            if hints is None:
                hints = encode(part)
                needed = sum(hint.nbytes for hint in hints)
                if needed <= free:
                    cached[box], free = hints, free - needed
            prediction = network(noisy, torch.tensor([t], device=device), part, size, hints=hints)
        return prediction[0, 0].float().cpu().numpy()

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        total = np.zeros(x.shape, np.float32)
        for box in boxes:
            total[box.slices] += window * predict(x, t, box)
            on_tile()
        return process.noise_from(total / weight, x, t)

    return denoise


def _content_of(network: nn.Module, process: DiffusionProcess, membrane: np.ndarray, mito: np.ndarray | None) -> str:
    """Hash of weights, schedule and masks."""
    digest = hashlib.sha256(process.betas.tobytes() + process.prediction.encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for mask in (membrane, mito):
        digest.update(
            b"none" if mask is None else f"{mask.shape} {mask.dtype}".encode() + np.ascontiguousarray(mask).tobytes()
        )
    return digest.hexdigest()


def _snapshot_writer(path: Path | None, key: str, seconds: float) -> Callable[[SamplerState], None] | None:
    if path is None:
        return None
    last = time.monotonic()

    def on_step(state: SamplerState) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            with atomic_write(path) as temporary, open(temporary, "wb") as handle:
                np.savez(handle, key=json.dumps(key), done=state.done, x=state.x, clean=state.clean)
            last = time.monotonic()

    return on_step


def _read_snapshot(path: Path | None, key: str) -> SamplerState | None:
    """The state saved for exactly this sample, None if there is none; another sample's is left to be replaced."""
    if path is None or not path.exists():
        return None
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as saved:
            if json.loads(str(saved["key"])) == key:
                return SamplerState(int(saved["done"]), saved["x"], saved["clean"])
    except (BadZipFile, ValueError, KeyError, OSError) as error:
        raise CheckpointMismatch(
            f"{path} is damaged ({type(error).__name__}); remove it to start the volume anew."
        ) from error
    return None
