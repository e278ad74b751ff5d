"""Makes ``python -m connectomics.main`` run connectomics_neurodiff, whatever package ``connectomics`` is, if any.

``connectomics_neurodiff.pth`` calls :func:`install` whenever this Python starts, hence no import at the top but sys.
"""

import sys

TYPE_CHECKING = False  # type checkers take it as typing's, whose import would cost every start a millisecond
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = "connectomics"
MODULE = f"{PACKAGE}.main"
ENTRY = "connectomics_neurodiff.host.entry"


class MainFinder:
    """Last on ``sys.meta_path``: finds ``connectomics.main`` where nobody else has one, and nothing more.

    While the interpreter starts ``-m connectomics.main``, it also finds an empty package ``connectomics`` where there
    is none, for ``-m`` imports the parent first; :func:`forget_stub` ends that.
    """

    starting = True
    stub: "ModuleSpec | None" = None

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec of ``connectomics.main``, or of the stub of its parent; None for all other names."""
        is_parent = name == PACKAGE and cls.starting and runs_main(sys.orig_argv)
        if not (is_parent or name == MODULE) or cls._known_to_later_finders(name, path, target):
            return None
        if is_parent:
            from importlib.machinery import ModuleSpec

            cls.stub = ModuleSpec(PACKAGE, None, is_package=True)
            return cls.stub
        from importlib.util import find_spec, spec_from_file_location

        entry = find_spec(ENTRY)
        return spec_from_file_location(MODULE, entry.origin) if entry and entry.origin else None

    @classmethod
    def _known_to_later_finders(cls, name: str, path: "Sequence[str] | None", target: "ModuleType | None") -> bool:
        """Whether a finder that was added after this one, as that of an editable host may be, has the module."""
        finders = iter(sys.meta_path)
        if cls not in finders:  # goes on to the finder after this one
            return False
        return any(finder.find_spec(name, path, target) for finder in finders if hasattr(finder, "find_spec"))


def runs_main(command: "Sequence[str]") -> bool:
    """Whether a command line has ``-m connectomics.main``, for Python itself or for a profiler or debugger.

    >>> runs_main(["python", "-um", "connectomics.main"])
    True
    """
    options = zip(command, [*command[1:], ""], strict=True)
    return any(
        option.startswith("-") and (option.endswith(f"m{MODULE}") or (option.endswith("m") and value == MODULE))
        for option, value in options
    )


def install() -> None:
    """Put the finder behind all others; a second call changes nothing."""
    if MainFinder not in sys.meta_path:
        sys.meta_path.append(MainFinder)  # type: ignore[arg-type]


def forget_stub() -> None:
    """Make an absent ``connectomics`` absent again, once ``connectomics.main`` has started."""
    MainFinder.starting = False
    module = sys.modules.get(PACKAGE)
    if MainFinder.stub is not None and getattr(module, "__spec__", None) is MainFinder.stub:
        del sys.modules[PACKAGE]
