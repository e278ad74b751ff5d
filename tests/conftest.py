"""Shared by all tests: where real volumes lie, and one thread so that timings and memory stay civil."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real labelled volumes, named by NEURODIFF_DATA; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("NEURODIFF_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "fib_medulla_train.h5").exists():
        pytest.skip(f"real volumes are not at {folder}; set NEURODIFF_DATA to the folder that has them")
    return folder
