"""Progress bars with the time left, for every loop that may take long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(*, label: str, total: int, initial: int = 0) -> tqdm:
    """A bar on stderr that is advanced by hand; redirected to a file, it writes a line every ten seconds."""
    return tqdm(
        desc=label,
        total=total,
        initial=initial,
        file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        leave=True,
    )


def progress(iterable: Iterable[Item], *, label: str, total: int | None = None) -> Iterable[Item]:
    """Iterate with a progress bar.

    Parameters
    ----------
    iterable : iterable
        What to walk through.
    label : str
        What is going on, in a word or two.
    total : int, optional
        Number of items, where `iterable` has no length.
    """
    if total is None:
        iterable = list(iterable)
        total = len(iterable)
    with progress_bar(label=label, total=total) as bar:
        for item in iterable:
            yield item
            bar.update()
