"""Our agglomerators as decoders of the host: ``neurodiff_waterz`` and ``neurodiff_multicut``.

The host calls ``decoder(predictions (c, z, y, x), **kwargs) -> labels (z, y, x)`` with the keywords of
``decoding.steps``. Its affinities come in several conventions, ours in one (:mod:`connectomics_neurodiff.affinities`):

* channel order: that of ``label_transform.targets[].kwargs.offsets``. ``["1-0-0", "0-1-0", "0-0-1"]``, its default, is
  ``channel_order: zyx``; ``["0-0-1", "0-1-0", "1-0-0"]`` is ``xyz``.
* where an edge is stored: ``affinity_mode: deepem`` at the destination, ``edge_offset: 1``; ``banis`` at the source,
  ``edge_offset: 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError, ShapeMismatch, UnknownName, VoxelSizeMissing, did_you_mean
from .config import look_up, plain

PREFIX = "neurodiff_"
Decoder = Callable[..., np.ndarray]

#: Our channel for each of the host's first three.
CHANNEL_ORDERS: dict[str, tuple[int, int, int]] = {"zyx": (0, 1, 2), "xyz": (2, 1, 0)}
#: Keywords that shape the fragments, and their names in ``fragments_from_affinities``: there, `threshold` and
#: `min_size` can mean nothing but the fragments'.
FRAGMENT_OPTIONS = {
    "boundary_threshold": "threshold",
    "min_fragment_size": "min_size",
    "sigma_seeds": "sigma_seeds",
    "sigma_weights": "sigma_weights",
    "alpha": "alpha",
    "edge_weight": "edge_weight",
    "min_component": "min_component",
}
_OWN_OPTIONS = ("threshold", "voxel_nm", "channel_order", "edge_offset", "min_segment_size")
#: Keywords that the host takes out itself before it calls a decoder.
_HOST_OPTIONS = ("spatial_transpose", "use_original_input", "original_input_kwarg")


def decoders() -> dict[str, Decoder]:
    """A decoder for each of our agglomerators, by the name it gets in the host."""
    from ...agglomerate import DEFAULT_THRESHOLDS

    return {f"{PREFIX}{name}": _make_decoder(name) for name in DEFAULT_THRESHOLDS}


def _make_decoder(method: str) -> Decoder:
    def decoder(predictions: np.ndarray, **kwargs: Any) -> np.ndarray:
        return decode(predictions, method, **kwargs)

    decoder.__name__ = decoder.__qualname__ = f"{PREFIX}{method}"
    decoder.__doc__ = f"Agglomeration '{method}' of connectomics_neurodiff; keywords as in `decode`."
    return decoder


def decode(
    predictions: np.ndarray,
    method: str,
    *,
    threshold: float | None = None,
    voxel_nm: Sequence[float] | None = None,
    channel_order: str = "zyx",
    edge_offset: int = 1,
    min_segment_size: int = 0,
    **fragment_options: Any,
) -> np.ndarray:
    """Neurons from the host's affinity predictions.

    Parameters
    ----------
    predictions : numpy.ndarray
        (c, z, y, x), c >= 3; the first three channels are nearest-neighbour affinities, the others are not used.
        Floats in [0, 1] (after a sigmoid: ``inference.model.channel_activations``) or uint8 in 0..255.
    method : str
        ``"waterz"`` or ``"multicut"``.
    threshold : float, optional
        In [0, 1]; waterz merges more with a higher one, multicut less. Default: the published one.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm: fragments are made section by section if sections are at least twice as thick as a
        pixel, else in 3D.
    channel_order : {"zyx", "xyz"}
        Order of the three channels; see the module's docstring.
    edge_offset : {1, 0}
        1 if the edge (v-1, v) is stored at v, 0 if it is stored at v-1.
    min_segment_size : int
        Segments with fewer voxels become background.
    **fragment_options
        ``boundary_threshold``, ``min_fragment_size``, ``sigma_seeds``, ``sigma_weights``, ``alpha``, ``edge_weight``,
        ``min_component``: see :func:`connectomics_neurodiff.agglomerate.fragments_from_affinities`.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint32, or uint64 if ids need it; 0 = background.

    Raises
    ------
    VoxelSizeMissing
        If `voxel_nm` is not given.
    ConfigError
        For another channel order or edge offset.
    UnknownName
        For an unknown keyword; the message suggests the nearest.
    ShapeMismatch, ValueRangeError
        If the predictions are not as described.
    """
    from ...agglomerate import DEFAULT_THRESHOLDS, as_affinities, fragments_from_affinities, segment

    given = {"voxel_nm": voxel_nm, "channel_order": channel_order, "edge_offset": edge_offset, **fragment_options}
    check_options(f"{PREFIX}{method}", given)
    affinities = as_affinities(as_ours(predictions, channel_order, edge_offset))
    size = plain(voxel_nm)
    of_fragments = {FRAGMENT_OPTIONS[key]: value for key, value in fragment_options.items()}
    labels = segment(
        affinities,
        method,
        DEFAULT_THRESHOLDS[method] if threshold is None else float(threshold),
        size,
        fragments=fragments_from_affinities(affinities, size, **of_fragments),
        min_segment_size=int(min_segment_size),
    )
    # The host's metrics turn labels into tensors, and torch cannot compute with uint64.
    return labels.astype(np.uint32) if labels.max(initial=0) <= np.iinfo(np.uint32).max else labels


def check_options(decoder: str, options: Mapping[str, Any]) -> None:
    """Raise what :func:`decode` would raise for these keywords, without any data.

    Parameters
    ----------
    decoder : str
        Name in the host, for messages.
    options : mapping
        Keywords of the step.

    Raises
    ------
    UnknownName, ConfigError, VoxelSizeMissing, ValueRangeError
        As :func:`decode`.
    """
    from ...geometry import voxel_size

    known = [*_OWN_OPTIONS, *FRAGMENT_OPTIONS]
    for key in options:
        if key not in known:
            raise UnknownName(
                f"Decoder '{decoder}' has no option '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )
    if options.get("voxel_nm") is None:
        raise VoxelSizeMissing(f"Decoder '{decoder}' needs the voxel size in nm: voxel_nm: [z, y, x], e.g. [30, 6, 6].")
    voxel_size(plain(options["voxel_nm"]))
    order, offset = options.get("channel_order", "zyx"), options.get("edge_offset", 1)
    if order not in CHANNEL_ORDERS:
        raise ConfigError(f"channel_order of '{decoder}' must be {' or '.join(CHANNEL_ORDERS)}. Got {order!r}.")
    if offset not in (0, 1):
        raise ConfigError(f"edge_offset of '{decoder}' must be 1 (affinity_mode deepem) or 0 (banis). Got {offset!r}.")


def check_steps(cfg: Any) -> None:
    """Check the keywords of every step or node of the host's ``decoding`` section that names one of our decoders.

    Raises
    ------
    UserError
        As :func:`check_options`; also for a name with our prefix that does not exist.
    """
    known = decoders()
    for name, kwargs in _steps(cfg):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise UnknownName(f"No decoder '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        check_options(name, {key: value for key, value in kwargs.items() if key not in _HOST_OPTIONS})


def _steps(cfg: Any) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Name and keywords of the enabled steps and graph nodes of the host's decoding."""
    for part, name in (("decoding.steps", "name"), ("decoding.graph.nodes", "op")):
        for step in look_up(cfg, part, []):
            if look_up(step, "enabled", True):
                yield str(look_up(step, name, "")), look_up(step, "kwargs", {})


def as_ours(predictions: np.ndarray, channel_order: str = "zyx", edge_offset: int = 1) -> np.ndarray:
    """The host's nearest-neighbour affinities in our convention: channels z, y, x, edge (v-1, v) stored at v.

    Parameters
    ----------
    predictions : numpy.ndarray
        (c, z, y, x), c >= 3, any type.
    channel_order : {"zyx", "xyz"}
        Order of the first three channels.
    edge_offset : {1, 0}
        1: edges are stored at their destination already. 0: they are stored at their source, and move up by one; the
        first plane of each axis, in front of which there is no edge, repeats the second.

    Returns
    -------
    numpy.ndarray
        (3, z, y, x), same type.

    Raises
    ------
    ShapeMismatch
        If the array has not four axes, or fewer than three channels.
    """
    values = np.asarray(predictions)
    if values.ndim != 4 or values.shape[0] < 3:
        raise ShapeMismatch(
            f"Affinity predictions must have the shape (c, z, y, x) with at least three channels. Got {values.shape}."
        )
    ordered = values[list(CHANNEL_ORDERS[channel_order])]
    if edge_offset == 1:
        return ordered
    moved = ordered.copy()  # so the first plane keeps the edge behind it: a 0 would be a boundary around the volume
    for axis in range(3):
        here, before = [slice(None)] * 3, [slice(None)] * 3
        here[axis], before[axis] = slice(1, None), slice(None, -1)
        moved[axis][tuple(here)] = ordered[axis][tuple(before)]
    return moved
