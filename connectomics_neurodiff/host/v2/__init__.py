"""Plugin for pytorch_connectomics v2 (Lightning, OmegaConf).

Two lines in front of the host's own program::

    from connectomics_neurodiff.host import v2
    v2.register()

or one command instead of it, with its own arguments: ``python -m connectomics_neurodiff.host.v2 --config my.yaml``.

The host then knows our segmenters (``model.arch.type: neurodiff_superhuman``, options in ``model.arch.params``), our
agglomerators as decoders (``decoding.steps: [{name: neurodiff_waterz, kwargs: {voxel_nm: [30, 6, 6]}}]``) and mixes
synthetic pairs into its training data (``data.train.dataset_type: neurodiff_pairs``). See :mod:`.architectures`,
:mod:`.decoders` and :mod:`.pairs`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, MissingDependency, UserError
from ...torchvision_repair import INSTALL_TORCHVISION, has_torchvision, repair_torchvision
from ..detect import require_host

if TYPE_CHECKING:
    from .pairs import PairSettings

__all__ = ["register", "unregister"]

_TESTED = "2.0.0 (commit 4335a8be)"
#: How to undo the present registration; None while there is none.
_registration: ExitStack | None = None


def register(pairs: Sequence[str | Path] = (), ratio: float = 1.0) -> None:
    """Make our segmenters, decoders and synthetic pairs known to the host. A second call replaces the first.

    Parameters
    ----------
    pairs : sequence of paths
        Synthetic pairs for ``data.train.dataset_type: neurodiff_pairs``, in place of the file that ``data.train.json``
        names; ``*`` and ``?`` are allowed.
    ratio : float
        Synthetic : real, >= 0, exact; counts only if pairs are given here.

    Raises
    ------
    MissingDependency
        If pytorch_connectomics v2 is not there (another package, or none, answers to its name), lacks what this plugin
        needs, or cannot be imported; the message says what to run. Nothing is registered then.
    MissingInput, ValueRangeError
        If a pair does not exist, or the ratio is not one.
    ConfigError
        If somebody else has registered one of our names.
    """
    global _registration
    require_host("v2")
    if not has_torchvision():
        raise MissingDependency(
            f"pytorch_connectomics v2 needs torchvision, which is not installed. Run: {INSTALL_TORCHVISION}"
        )
    repair_torchvision()
    from .pairs import PairSettings, expand

    given = PairSettings(expand(pairs, Path()), float(ratio)) if pairs else None
    unregister()
    with ExitStack() as undo:
        _add_architectures(undo)
        _add_decoders(undo)
        _replace_create_datamodule(undo, given)
        _registration = undo.pop_all()


def unregister() -> None:
    """Take everything out of the host again; does nothing if nothing is registered."""
    global _registration
    if _registration is not None:
        _registration.close()
        _registration = None


def host_part(module: str, *names: str) -> tuple[Any, ...]:
    """Objects of the host's modules, by name.

    Raises
    ------
    MissingDependency
        If the host cannot be imported, or this version of it has no such thing.
    """
    try:
        home = importlib.import_module(f"connectomics.{module}")
        return tuple(getattr(home, name) for name in names)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("connectomics"):
            raise MissingDependency(
                f"pytorch_connectomics v2 needs '{error.name}', which is not installed. Run: pip install {error.name}"
            ) from error
        raise MissingDependency(_too_different(str(error))) from error
    except (ImportError, AttributeError) as error:
        raise MissingDependency(_too_different(str(error))) from error


def _too_different(finding: str) -> str:
    return f"This version of pytorch_connectomics v2 is none that the plugin knows: {finding}. Tested with {_TESTED}."


def _add_architectures(undo: ExitStack) -> None:
    from .architectures import builders

    names = "register_architecture", "unregister_architecture", "list_architectures"
    add, remove, known = host_part("models.architectures", *names)
    ours = builders()
    _refuse_taken("architecture", ours, known())
    for name, builder in ours.items():
        add(name)(builder)
        undo.callback(remove, name)


def _add_decoders(undo: ExitStack) -> None:
    from .decoders import decoders

    add, registry, known = host_part(
        "decoding.registry", "register_decoder", "DEFAULT_DECODER_REGISTRY", "list_decoders"
    )
    ours = decoders()
    _refuse_taken("decoder", ours, known())
    for name, decoder in ours.items():
        add(name, decoder)
        undo.callback(registry._decoders.pop, name, None)  # the host has no way to remove one


def _refuse_taken(kind: str, ours: dict[str, Any], known: Sequence[str]) -> None:
    for name in ours:
        if name in known:
            raise ConfigError(f"Among the host's {kind}s there is a '{name}' already, which is not ours: rename it.")


def _replace_create_datamodule(undo: ExitStack, given: PairSettings | None) -> None:
    """Let the host's program make its training data through us; all other data it makes as before."""
    (create,) = host_part("runtime.dispatch", "create_datamodule")
    dispatch: Any = importlib.import_module("connectomics.runtime.dispatch")

    def create_datamodule(cfg: Any, mode: str = "train", **options: Any) -> Any:
        from .pairs import mixed_datamodule, settings_for

        if mode != "train":
            return create(cfg, mode=mode, **options)
        try:
            settings = settings_for(cfg, given)
            if settings is None:
                return create(cfg, mode=mode, **options)
            return mixed_datamodule(create, cfg, settings, mode=mode, **options)
        except UserError as error:
            # The host's program would bury the one line under a traceback, and say that the fault is its own.
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def restore() -> None:
        if dispatch.create_datamodule is create_datamodule:  # else somebody wrapped it since, and still needs it
            dispatch.create_datamodule = create

    dispatch.create_datamodule = create_datamodule
    undo.callback(restore)
