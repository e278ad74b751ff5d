"""What runs as ``python -m connectomics.main ARGS``: the command ``neurodiff run ARGS``.

``connectomics_neurodiff_finder`` finds this file under that name. Imports are absolute, for the package it runs in is
another's.
"""

from __future__ import annotations

import importlib.util
import sys

from connectomics_neurodiff.cli import main
from connectomics_neurodiff_finder import MODULE, forget_stub

__all__ = ["main"]

COMMAND = "connectomics_neurodiff.__main__"


def become_the_command() -> None:
    """Turn this process into one that ``python -m connectomics_neurodiff run ARGS`` started, for all who ask.

    Processes started from this one look at the name of the main module: multiprocessing imports it anew unless it ends
    in ``.__main__``, Lightning starts the other ranks with ``python -m NAME`` and the arguments. The name
    ``connectomics.main`` would fail them where no ``connectomics`` is installed.
    """
    forget_stub()
    module = sys.modules["__main__"]
    spec = importlib.util.find_spec(COMMAND)
    if module.__spec__ is not None and module.__spec__.name == MODULE and spec is not None:  # not a profiler's
        module.__spec__ = spec
        module.__package__ = spec.parent
        sys.argv[0] = spec.origin or sys.argv[0]
    sys.argv.insert(1, "run")


if __name__ == "__main__":
    become_the_command()
    sys.exit(main(sys.argv[1:]))
