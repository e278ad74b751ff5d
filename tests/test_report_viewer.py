"""Neuroglancer: the server answers; layers have the right names, axes and voxel sizes, and serve the right voxels."""

from __future__ import annotations

import io
import socket
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.errors import MissingInput, ValueRangeError, VolumeFormatError, VoxelSizeMissing
from connectomics_neurodiff.geometry import ZYX
from connectomics_neurodiff.report import Layer, View, layers_of, layers_of_volume, show, view
from connectomics_neurodiff.volume import Volume, write_volume

pytest.importorskip("neuroglancer")
VOXEL = ZYX(29.0, 6.0, 5.0)
SHAPE = (6, 20, 28)


@pytest.fixture(scope="module")
def volume() -> Volume:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2**40, SHAPE).astype(np.uint64)
    return Volume(rng.random(SHAPE, dtype=np.float32), label, (label % 2).astype(np.uint8), VOXEL)


@pytest.fixture
def running(volume: Volume) -> Iterator[View]:
    affinity = affinities_from_labels(np.asarray(volume.label)).astype(np.float16)
    layers = [*layers_of_volume(volume, "ac4"), Layer("ac4 affinity", "affinities", affinity, VOXEL)]
    with show(layers) as started:
        yield started


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200
        return answer.read()


def served_block(running: View, layer: str, stop: tuple[int, ...]) -> np.ndarray:
    """First voxels of a layer, as the browser gets them."""
    source = running.viewer.state.layers[layer].layer.source[0].url
    start = ",".join("0" for _ in stop)
    scale = ",".join("1" for _ in stop)
    base = running.address.split("/v/")[0]
    url = (
        f"{base}/neuroglancer/npz/{source.removeprefix('python://volume/')}/{scale}/{start}/{','.join(map(str, stop))}"
    )
    # Neuroglancer's "npz" is an npy file, deflated.
    return np.load(io.BytesIO(zlib.decompress(fetch(url))))


def test_page_is_served_to_this_machine_only(running: View) -> None:
    assert running.address.startswith("http://127.0.0.1:")
    assert b"<html" in fetch(running.address).lower()


def test_layers_have_names_kinds_and_physical_axes(running: View) -> None:
    state = running.viewer.state
    assert {layer.name: layer.type for layer in state.layers} == {
        "ac4 image": "image",
        "ac4 label": "segmentation",
        "ac4 mito": "segmentation",
        "ac4 affinity": "image",
    }
    assert state.dimensions.names == ("z", "y", "x")
    # Neuroglancer keeps metres.
    np.testing.assert_allclose(state.dimensions.scales, np.array(VOXEL) * 1e-9)
    assert state.dimensions.units == ("m", "m", "m")
    assert list(state.display_dimensions) == ["x", "y", "z"]


def test_the_browser_gets_the_voxels_of_the_volume(running: View, volume: Volume) -> None:
    label, image = np.asarray(volume.label), np.asarray(volume.image)
    np.testing.assert_array_equal(served_block(running, "ac4 label", (2, 3, 4)), label[:2, :3, :4])
    np.testing.assert_array_equal(served_block(running, "ac4 image", (6, 20, 28)), image)
    affinity = served_block(running, "ac4 affinity", (3, 6, 20, 28))
    assert affinity.dtype == np.float32
    np.testing.assert_array_equal(affinity, affinities_from_labels(label))


def test_files_are_opened_with_all_they_hold(tmp_path: Path, volume: Volume) -> None:
    label = np.asarray(volume.label)
    write_volume(tmp_path / "pair.h5", {**volume.arrays, "membrane": np.zeros(SHAPE, np.uint8)}, VOXEL)
    write_volume(tmp_path / "affinity.h5", {"affinity": affinities_from_labels(label)}, VOXEL)
    with view([tmp_path / "pair.h5", tmp_path / "affinity.h5", tmp_path / "pair.h5"]) as running:
        names = {layer.name for layer in running.viewer.state.layers}
        fetch(running.address)
    roles = ("image", "label", "mito", "membrane")
    expected = {f"pair {role}" for role in roles} | {f"pair {role} 2" for role in roles} | {"affinity affinity"}
    assert names == expected
    layers = layers_of(f"{tmp_path / 'pair.h5'}::label", voxel_nm=(40, 4, 4))
    assert [(layer.name, layer.kind, tuple(layer.voxel_nm)) for layer in layers] == [
        ("pair label", "labels", (40, 4, 4))
    ]


def test_a_closed_view_answers_no_more(volume: Volume) -> None:
    with show(layers_of_volume(volume, "a")) as first:
        address = first.address
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        fetch(address)


def test_wrong_input_is_refused_in_one_line(tmp_path: Path, volume: Volume) -> None:
    import h5py

    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["main"] = np.zeros(SHAPE, np.uint32)
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["table"] = np.zeros((4, 4), np.uint32)
    with pytest.raises(VoxelSizeMissing, match="--voxel-nm"):
        layers_of(tmp_path / "bare.h5")
    assert len(layers_of(tmp_path / "bare.h5", voxel_nm=VOXEL)) == 1
    with pytest.raises(VolumeFormatError, match=r"Got table \(4, 4\)"):
        layers_of(tmp_path / "flat.h5", voxel_nm=VOXEL)
    with pytest.raises(MissingInput, match="does not exist"):
        view([tmp_path / "absent.h5"])
    with pytest.raises(ValueRangeError, match="at least one volume"):
        show([])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueRangeError, match=r"Cannot listen on 127\.0\.0\.1"):
            show(layers_of_volume(volume, "a"), port=taken.getsockname()[1])
