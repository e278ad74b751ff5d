"""Randomness: one generator per purpose, derived from a seed and a path of names; nothing is seeded globally."""

from __future__ import annotations

import hashlib

import numpy as np


def _stable_hash(part: str | int) -> int:
    """64-bit hash that is the same in every process (Python's own is salted per process)."""
    kind = "i" if isinstance(part, (int, np.integer)) else "s"
    return int.from_bytes(hashlib.blake2b(f"{kind}:{part}".encode(), digest_size=8).digest(), "little")


def rng_for(seed: int, *path: str | int) -> np.random.Generator:
    """Independent generator for one purpose.

    Parameters
    ----------
    seed : int
        The run's seed, >= 0.
    *path : str or int
        What the numbers are for, e.g. ``rng_for(seed, "remodel", copy)``. The same path gives the same numbers
        whatever else was drawn before and in whichever process.

    Examples
    --------
    >>> int(rng_for(0, "crop", 3).integers(100)) == int(rng_for(0, "crop", 3).integers(100))
    True
    """
    return np.random.default_rng([int(seed), *map(_stable_hash, path)])
