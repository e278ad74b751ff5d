"""Memory of networks: how much a pass takes, how much there is, and who keeps what was freed.

glibc hands every large freed block back to the kernel and asks for it again at the next layer; each page is then zeroed
and mapped anew. A training step of the small denoiser takes 500,000 such page faults, a quarter of its time.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# What glibc starts with, and what its thresholds rise to by themselves in a program with large blocks.
DEFAULT_MMAP_MAX, LARGEST_MMAP_THRESHOLD = 65536, 32 << 20


#: Passes over more voxels give freed memory back: blocks of tens of MiB fragment what is kept, up to twice the peak at
#: 8 x 512 x 512 (docs/performance.md).
MOST_VOXELS = 1 << 20
#: Whether a block of :func:`kept_memory` is open.
_keeping = False


@contextmanager
def kept_memory(voxels: int = 0) -> Iterator[None]:
    """Within the block, freed memory is kept for the next layer; at its end it goes back to the kernel.

    Without ``mallopt`` in the C library (macOS, Windows, musl), or for more than `MOST_VOXELS`, nothing changes. Blocks
    within blocks change nothing either: a training that paints a small image in between keeps its memory.

    Parameters
    ----------
    voxels : int
        Of a pass, as far as it is known.
    """
    global _keeping
    library = ctypes.CDLL(None) if sys.platform == "linux" and voxels <= MOST_VOXELS and not _keeping else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    _keeping = True
    try:
        yield
    finally:
        _keeping = False
        library.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that a network may still take on a device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_main_bytes()


def available_main_bytes() -> int:
    """Main memory that this process may still take, within the limit of its control group, if any."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(available, 0)


def peak_bytes(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Most memory that a forward pass without gradients holds at once, without computing anything.

    Parameters
    ----------
    network : torch.nn.Module
        On the device ``meta``.
    *inputs : torch.Tensor
        Arguments of the pass, on the device ``meta``.

    Returns
    -------
    int
        Bytes of all tensors that live at the same time, weights not included, nor what convolutions need inside.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveStorages(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.live = self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor.untyped_storage())
            return result

        def add(self, storage: torch.UntypedStorage) -> None:
            address, size = storage._cdata, storage.nbytes()
            if address not in self.known:
                self.known.add(address)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.remove, address, size)

        def remove(self, address: int, size: int) -> None:
            self.known.discard(address)
            self.live -= size

    with torch.no_grad(), LiveStorages() as storages:
        network(*inputs)
    return storages.peak
