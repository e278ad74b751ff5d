"""Small registries: one name, one builder. Duplicates are refused, misspelt names get a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import UnknownName, did_you_mean

Entry = TypeVar("Entry", bound=Callable[..., object])


class Registry(Generic[Entry]):
    """Named builders of one kind.

    Parameters
    ----------
    kind : str
        What the entries are, in the singular, for messages: ``"segmenter"``.
    call : str
        The call every entry must accept, for the reader: ``"f(in_channels, out_channels, **options) -> nn.Module"``.
    """

    def __init__(self, kind: str, call: str) -> None:
        self.kind = kind
        self.call = call
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that adds an entry under `name`; a second entry of the same name is an error."""

        def add(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"A {self.kind} named '{name}' is registered already: {self._entries[name]!r}.")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> Entry:
        """The entry called `name`; raises :class:`UnknownName` with the nearest name otherwise."""
        if name not in self._entries:
            raise UnknownName(
                f"No {self.kind} '{name}'.{did_you_mean(name, self._entries)} Known: {', '.join(self.names())}."
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
