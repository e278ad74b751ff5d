"""A run of a study in a process of its own, which ends when the study's does, even if that is killed."""

from __future__ import annotations

import os
import sys
import threading

from ..cli import main
from ..provenance import remove_unfinished


def end_with_parent() -> None:
    """Wait for the end of standard input, which the study holds open, and end at once."""
    # Not by sys.stdin, whose lock a thread may not hold when the interpreter ends.
    while os.read(0, 1 << 12):
        pass
    remove_unfinished()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(["run", *sys.argv[1:]]))
