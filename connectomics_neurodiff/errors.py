"""Every failure a user can cause has a name here.

A :class:`UserError` means that the input, the configuration or the installation is wrong: the command line prints it
in one line and exits with 2. Anything else that escapes is our fault: exit 1, traceback in ``run.log``.

Messages say what is wrong, what is allowed, what was got and, for names, the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NeuroDiffError(Exception):
    """Root of all errors raised on purpose by this package."""


class UserError(NeuroDiffError):
    """The user's input, configuration or installation is wrong; exit code 2."""


class ConfigError(UserError):
    """A configuration key or value is not valid."""


class UnknownName(UserError):
    """A name is not among the known ones; the message suggests the nearest."""


class MissingInput(UserError):
    """A file or dataset that is needed does not exist."""


class VolumeFormatError(UserError):
    """A file cannot be read as a volume: truncated, unknown format, wrong number of axes."""


class VoxelSizeMissing(UserError):
    """A volume carries no voxel size and none was given."""


class ShapeMismatch(UserError):
    """Two arrays that describe the same space have different shapes."""


class ValueRangeError(UserError):
    """Values outside the allowed range, or not finite."""


class LabelTypeError(UserError):
    """A label volume is not made of non-negative integers."""


class CheckpointMismatch(UserError):
    """A checkpoint belongs to another architecture, preset or kind of network."""


class StaleArtifactError(UserError):
    """An existing artefact was made with other settings than those asked for now."""


class OutputExists(UserError):
    """A command would overwrite a file that it did not make."""


class NotWritable(UserError):
    """An output cannot be written where it was asked for."""


class MissingDependency(UserError):
    """An optional package is not installed; the message names the extra to install."""


class NotEnoughSpace(UserError):
    """The disk is full."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentence that suggests the nearest known name, or an empty string.

    >>> did_you_mean("superhumn", ["agq", "superhuman"])
    " Did you mean 'superhuman'?"
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f" Did you mean '{by_lower[matches[0]]}'?" if matches else ""
