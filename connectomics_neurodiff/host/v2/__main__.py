"""``python -m connectomics_neurodiff.host.v2 <the host's own arguments>``: register, then run the host's program.

The host does not package its program (``scripts/main.py``), but all that the program calls.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from ...errors import UserError
from ..detect import require_host
from . import host_part, register


def main() -> int:
    """Run the host with the arguments of this process.

    Returns
    -------
    int
        0 if all went well, 2 with one line if the input, the configuration or the installation is wrong. Other failures
        end as the host ends them.
    """
    try:
        register()
        _run_host()
    except UserError as error:
        return _told(error)
    except SystemExit as stop:
        # Inside the host's run its program has turned our error into a traceback and exit 1.
        cause = _user_error_behind(stop)
        if cause is None or stop.code == 2:
            raise
        return _told(cause)
    return 0


def _run_host() -> None:
    from .architectures import check_architecture
    from .decoders import check_steps
    from .pairs import check_training

    parse_args, setup_config = host_part("runtime.cli", "parse_args", "setup_config")
    names = "dispatch_runtime", "prepare_cli_args", "suppress_nonzero_rank_stdout"
    dispatch_runtime, prepare_cli_args, suppress_nonzero_rank_stdout = host_part("runtime.dispatch", *names)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    suppress_nonzero_rank_stdout()
    args = parse_args()
    # Where its clone keeps the tutorials that --demo reads; an installed package has none, and says so.
    prepare_cli_args(args, require_host("v2").folders[0].parent)
    cfg: Any = setup_config(args)
    check_architecture(cfg)
    check_steps(cfg)
    if args.mode == "train":
        check_training(cfg, None)
    dispatch_runtime(args, cfg)


def _user_error_behind(stop: SystemExit) -> UserError | None:
    """The user's error that made the host stop, if it was one."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _told(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
