"""Blocks joined to one segmentation: exact where blocks agree, cautious where not, in any order, in bounded memory."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import cc3d
import fastremap
import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics_neurodiff.agglomerate import affinities_from_interior, segment, segment_blockwise, stitch_blocks
from connectomics_neurodiff.errors import (
    LabelTypeError,
    MissingInput,
    NotEnoughSpace,
    ShapeMismatch,
    UserError,
    ValueRangeError,
)
from connectomics_neurodiff.geometry import Box, tiles
from connectomics_neurodiff.metrics import evaluate

Layout = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
Blocks = list[tuple[Box, np.ndarray]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Shape, block and overlap; blocks may be longer than the volume, and overlap more than their neighbour."""
    shape = tuple(draw(st.integers(1, most)) for most in (6, 10, 13))
    block = tuple(draw(st.integers(2, most)) for most in (4, 6, 8))
    overlap = tuple(draw(st.integers(1, b - 1)) for b in block)
    return shape, block, overlap  # type: ignore[return-value]


def by_first_voxel(labels: np.ndarray) -> np.ndarray:
    """The same partition with ids 1, 2, ... in order of their first voxels, 0 kept."""
    return fastremap.renumber(np.ascontiguousarray(labels).astype(np.uint64))[0].astype(np.int64)


def with_other_ids(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same partition with random ids, far apart, in no order."""
    ids = rng.permutation(5 * int(labels.max()) + 5)[: int(labels.max()) + 1] + 1000
    ids[0] = 0
    return ids[labels]


def cut(truth: np.ndarray, layout: Layout, rng: np.random.Generator, connectivity: int) -> Blocks:
    """Blocks in random order as a segmenter of blocks would give them: connected parts with ids of their own."""
    parts = []
    for box in tiles(*layout):
        part = cc3d.connected_components(truth[box.slices].copy(), connectivity=connectivity)
        parts.append((box, with_other_ids(part, rng)))
    return [parts[i] for i in rng.permutation(len(parts))]


def stitched(blocks: Blocks, layout: Layout, **options: Any) -> np.ndarray:
    shape, block, overlap = layout
    return np.asarray(stitch_blocks(blocks, shape, block=block, overlap=overlap, **options))


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), connectivity=st.sampled_from([6, 26]), ids=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_blocks_of_one_segmentation_are_restored_exactly(layout: Layout, connectivity: int, ids: int, seed: int):
    rng = np.random.default_rng(seed)
    truth = cc3d.connected_components(rng.integers(0, ids + 1, layout[0]).astype(np.uint8), connectivity=connectivity)
    result = stitched(cut(truth, layout, rng, connectivity), layout, min_contact=1)
    np.testing.assert_array_equal(by_first_voxel(result), by_first_voxel(truth))


def twin(blocks: Blocks, min_fraction: float, min_contact: int, shape: tuple[int, ...]) -> np.ndarray:
    """The documented rule, voxel by voxel and pair by pair."""
    labels = dict(blocks)
    group = {(box, i): {(box, i)} for box, part in blocks for i in set(part[part > 0].tolist())}
    for a, b in combinations(labels, 2):
        if not face_neighbours(a, b, list(labels)):
            continue
        start, stop = np.maximum(a.start, b.start), np.minimum(a.stop, b.stop)
        part_a, part_b = (
            labels[box][tuple(slice(s - o, e - o) for s, e, o in zip(start, stop, box.start, strict=True))]
            for box in (a, b)
        )
        for i, j in product(set(part_a[part_a > 0].tolist()), set(part_b[part_b > 0].tolist())):
            in_a, in_b = part_a == i, part_b == j
            shared = np.sum(in_a & in_b)
            extents = [touching(in_a, in_b), touching(in_b, in_a)]
            if shared >= min_contact and all(shared >= min_fraction * extent for extent in extents):
                joined = group[a, i] | group[b, j]
                for member in joined:
                    group[member] = joined
    names = {id(members): n for n, members in enumerate(group.values(), 1)}
    result = np.zeros(shape, np.int64)
    for voxel in np.ndindex(*shape):
        box = owner(voxel, list(labels))
        label = int(labels[box][tuple(v - s for v, s in zip(voxel, box.start, strict=True))])
        result[voxel] = names[id(group[box, label])] if label else 0
    return result


def touching(mask: np.ndarray, other: np.ndarray) -> int:
    """Voxels of the face-connected parts of the mask that share a voxel with the other."""
    parts, count = ndimage.label(mask)
    return sum(int(np.sum(parts == p)) for p in range(1, count + 1) if np.any(other[parts == p]))


def face_neighbours(a: Box, b: Box, boxes: list[Box]) -> bool:
    """Whether the boxes differ along one axis, with no third in between."""
    axes = [k for k in range(3) if a.start[k] != b.start[k]]
    if len(axes) != 1:
        return False
    low, high = sorted((a.start[axes[0]], b.start[axes[0]]))
    return not any(low < box.start[axes[0]] < high for box in boxes)


def owner(voxel: tuple[int, ...], boxes: list[Box]) -> Box:
    """The box with the nearest centre along each axis, the later one if two are as near."""
    return min(
        boxes,
        key=lambda box: [
            (abs(2 * v + 1 - s - e), -s) for v, s, e in zip(voxel, box.start, box.stop, strict=True)
        ],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(),
    smoothness=st.sampled_from([0.0, 0.8]),
    min_fraction=st.sampled_from([0.2, 0.5, 0.7, 1.0]),
    min_contact=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_that_disagree_are_joined_by_the_documented_rule(
    layout: Layout, smoothness: float, min_fraction: float, min_contact: int, seed: int
):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random(layout[0]), smoothness)
    blocks = []
    for box in tiles(*layout):  # the same field seen with another noise by each block
        seen = field[box.slices] + 0.1 * rng.random(box.shape)
        blocks.append((box, np.digitize(seen, np.quantile(field, [0.2, 0.5, 0.8])).astype(np.int32)))
    expected = by_first_voxel(twin(blocks, min_fraction, min_contact, layout[0]))
    options = {"min_fraction": min_fraction, "min_contact": min_contact}
    result = stitched(blocks, layout, **options)
    np.testing.assert_array_equal(by_first_voxel(result), expected)
    ids = np.unique(result[result > 0])
    np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
    first_block: dict[int, int] = {}
    for voxel in map(tuple, np.argwhere(result)):
        block = [box for box, _ in blocks].index(owner(voxel, [box for box, _ in blocks]))
        first_block[int(result[voxel])] = min(block, first_block.get(int(result[voxel]), block))
    assert [first_block[i] for i in sorted(first_block)] == sorted(first_block.values())
    renamed = [(blocks[i][0], with_other_ids(blocks[i][1], rng)) for i in rng.permutation(len(blocks))]
    np.testing.assert_array_equal(stitched(renamed, layout, **options), result)


#: Two blocks of 10 voxels along x that share the voxels 6 to 9; the core of the first ends before voxel 8.
PAIR: Layout = ((4, 5, 16), (4, 5, 10), (1, 1, 4))


def join_of_two(first: np.ndarray, second: np.ndarray, **options: Any) -> np.ndarray:
    """Result for two blocks (y, x), the same in each of 4 sections; its first section."""
    parts = [np.repeat(part[None], 4, axis=0) for part in (first, second)]
    return stitched(list(zip(tiles(*PAIR), parts, strict=True)), PAIR, **options)[0]


def test_a_chance_contact_along_a_border_joins_nothing():
    first, second = np.zeros((2, 5, 10), int)
    first[:2], first[2:] = 1, 2
    second[:3], second[3:] = 1, 2  # the second block sees the membrane one voxel lower
    result = join_of_two(first, second)
    assert result[0, 0] == result[0, 15]
    assert result[4, 0] == result[4, 15]
    assert result[0, 0] != result[4, 0]


def test_of_two_parts_that_the_other_block_joins_the_larger_goes_on():
    first, second = np.zeros((2, 5, 10), int)
    first[:3], first[3:] = 1, 2
    second[:] = 1
    result = join_of_two(first, second)
    assert result[0, 0] == result[0, 15]
    assert result[4, 0] not in (0, result[0, 0])


def test_a_sliver_along_the_end_of_a_block_joins_nothing():
    first, second = np.zeros((2, 5, 10), int)
    first[:2], first[2:], first[:, 9] = 1, 2, 3
    second[:2], second[2:] = 1, 2
    result = join_of_two(first, second)
    assert result[0, 0] == result[0, 15]
    assert result[4, 0] == result[4, 15]
    assert result[0, 0] != result[4, 0]


def test_branches_that_meet_beyond_the_overlap_all_go_on():
    first, second = np.zeros((2, 5, 10), int)
    first[::2], first[:, :2] = 1, 1  # a fork with three prongs; none has half of the fork's voxels
    second[0], second[2], second[4] = 1, 2, 3
    result = join_of_two(first, second)
    assert set(np.unique(result)) == {0, 1}
    assert result[0, 15] == result[2, 15] == result[4, 15] == 1


@pytest.mark.parametrize(("min_contact", "joined"), [(16, True), (17, False)])
def test_the_least_contact_counts_shared_voxels(min_contact: int, joined: bool):
    first, second = np.zeros((2, 5, 10), int)
    first[2] = second[2] = 1  # 4 voxels in each of 4 sections
    result = join_of_two(first, second, min_contact=min_contact)
    assert (result[2, 0] == result[2, 15]) == joined


@pytest.mark.parametrize(("min_fraction", "joined"), [(0.75, True), (0.76, False)])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_fraction_is_that_of_the_larger_side(min_fraction: float, joined: bool, swapped: bool):
    whole, part = np.zeros((2, 5, 10), int)
    whole[:4] = 1
    part[:3] = 1
    first, second = (part, whole) if swapped else (whole, part)
    result = join_of_two(first, second, min_fraction=min_fraction)
    assert (result[0, 0] == result[0, 15]) == joined


def test_real_neurons_cut_into_eight_blocks_are_put_together_again(real_data: Path):
    with h5py.File(real_data / "fib_medulla_train.h5") as file:
        truth = file["label"][:]
    layout: Layout = (truth.shape, (90, 140, 136), (16, 24, 20))
    results = [stitched(cut(truth, layout, np.random.default_rng(seed), 26), layout) for seed in range(3)]
    assert len(tiles(*layout)) == 8
    assert np.unique(results[0]).size == np.unique(truth).size
    assert evaluate(results[0], truth).arand < 1e-9
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_waterz_block_by_block_is_as_good_as_on_the_whole(real_data: Path):
    with h5py.File(real_data / "gala_fib_mini_train.h5") as file:
        truth, interior = file["label"][:], 255 - file["boundary_prob"][:]
    affinities = affinities_from_interior(interior)

    def waterz(part: np.ndarray) -> np.ndarray:
        return segment(part, "waterz", 0.15, (10, 10, 10))

    blockwise = segment_blockwise(waterz, affinities, block=(32, 60, 80), overlap=(10, 20, 20))
    whole = waterz(affinities)
    assert evaluate(np.asarray(blockwise), truth).voi < evaluate(whole, truth).voi + 0.01
    assert evaluate(np.asarray(blockwise), whole).voi < 0.05


def components(part: np.ndarray) -> np.ndarray:
    return cc3d.connected_components(part > 0.6, connectivity=6)


class Recorder:
    """An image that remembers how much was read at once."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.shape = image.shape
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.image[index]
        self.read.append(part.size)
        return part


def smooth_image(shape: tuple[int, int, int]) -> np.ndarray:
    image = ndimage.gaussian_filter(np.random.default_rng(3).random(shape), 1.5)
    return (image - image.min()) / np.ptp(image)


@pytest.mark.parametrize("shape", [(20, 33, 47), (5, 33, 12), (3, 4, 5)])
def test_a_volume_is_segmented_one_block_at_a_time(shape: tuple[int, int, int]):
    image = Recorder(smooth_image(shape))
    result = segment_blockwise(components, image, block=(8, 12, 20), overlap=(2, 4, 3), min_contact=1)
    np.testing.assert_array_equal(by_first_voxel(np.asarray(result)), by_first_voxel(components(image.image)))
    assert max(image.read) <= 8 * 12 * 20
    assert len(image.read) == len(tiles(shape, (8, 12, 20), (2, 4, 3)))


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("kind", ["zarr", "hdf5", "memmap"])
def test_the_result_goes_to_any_array_on_disk(kind: str, dtype: str, tmp_path: Path):
    image = smooth_image((12, 20, 31))
    layout = {"block": (8, 12, 20), "overlap": (2, 4, 3)}
    expected = np.asarray(segment_blockwise(components, image, **layout))
    assert expected.max() > 5
    with h5py.File(tmp_path / "out.h5", "w") as file:
        makers: dict[str, Callable[[], Any]] = {
            "zarr": lambda: zarr.create_array(tmp_path / "o.zarr", shape=image.shape, chunks=(5, 7, 9), dtype=dtype),
            "hdf5": lambda: file.create_dataset("label", image.shape, dtype),
            "memmap": lambda: np.memmap(tmp_path / "out.raw", dtype=dtype, mode="w+", shape=image.shape),
        }
        out = makers[kind]()
        assert segment_blockwise(components, image, out=out, **layout) is out
        assert out.dtype == dtype
        np.testing.assert_array_equal(out[:], expected)


def bricks(layout: Layout, size: int) -> Iterator[tuple[Box, np.ndarray]]:
    """Blocks of a wall of bricks, made when asked for."""
    for box in tiles(*layout):
        z, y, x = np.ix_(*(np.arange(a, b) // size for a, b in zip(box.start, box.stop, strict=True)))
        yield box, (z * 10_000 + y * 100 + x + 1).astype(np.uint32)


def peak_of_stitching(shape: tuple[int, int, int], folder: Path) -> int:
    """Most bytes allocated at once by numpy and Python; the result is a file."""
    out = np.memmap(folder / f"{shape[0]}.raw", dtype=np.uint32, mode="w+", shape=shape)
    layout: Layout = (shape, (32, 40, 48), (8, 8, 8))
    tracemalloc.start()
    try:
        stitch_blocks(bricks(layout, 16), shape, block=layout[1], overlap=layout[2], out=out, scratch=folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(np.unique(out)) == np.prod([-(-n // 16) for n in shape])
    return peak


def test_memory_does_not_grow_with_the_volume(tmp_path: Path):
    small, large = (64, 96, 112), (128, 192, 224)
    peaks = [peak_of_stitching(shape, tmp_path) for shape in (small, large)]
    print(f"peak {peaks[0] / 2**20:.2f} MiB and, with 8 times the voxels, {peaks[1] / 2**20:.2f} MiB")
    assert peaks[1] < 1.25 * peaks[0]
    assert peaks[1] < np.prod(large) * 4 / 5


def test_scratch_files_are_gone_afterwards_also_after_a_mistake(tmp_path: Path):
    scratch = tmp_path / "new" / "scratch"
    row: Layout = ((4, 5, 22), (4, 5, 10), (1, 1, 4))
    waiting: list[int] = []

    def watched() -> Iterator[tuple[Box, np.ndarray]]:
        for box, part in bricks(row, 4):
            waiting.append(len(list(scratch.rglob("*.npy"))))
            yield box, part

    shape, block, overlap = row
    stitch_blocks(watched(), shape, block=block, overlap=overlap, scratch=scratch)
    assert waiting == [0, 1, 1]
    assert list(scratch.iterdir()) == []
    with pytest.raises(MissingInput):
        stitch_blocks([next(watched())], shape, block=block, overlap=overlap, scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_a_full_disk_is_told_in_one_line(tmp_path: Path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shape, block, overlap = PAIR
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(NotEnoughSpace, match=re.escape(f"No space left in {tmp_path}")):
            stitch_blocks(bricks(PAIR, 4), shape, block=block, overlap=overlap, scratch=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_volume_without_instances_stays_empty():
    blocks = [(box, np.zeros(box.shape, np.uint8)) for box in tiles(*PAIR)]
    assert not stitched(blocks, PAIR).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"overlap": (1, 1, 10)}, ValueRangeError, "0 <= overlap < block"),
        ({"overlap": (1, 4)}, ValueRangeError, "need three values"),
        ({"overlap": (1, 1, 0)}, ValueRangeError, "at least 1 on every axis that is cut"),
        ({"shape": (4, 16)}, ShapeMismatch, "three axes"),
        ({"shape": (4, 0, 16)}, ShapeMismatch, "none empty"),
        ({"min_fraction": 0.0}, ValueRangeError, "min_fraction must lie in"),
        ({"min_fraction": float("nan")}, ValueRangeError, "min_fraction must lie in"),
        ({"min_contact": 0}, ValueRangeError, "at least 1 voxel"),
        ({"out": np.zeros((4, 5, 16), np.int32)}, LabelTypeError, "uint32 or uint64. Got an output of dtype int32"),
        ({"out": np.zeros((4, 5, 15), np.uint32)}, ShapeMismatch, r"shape \(4, 5, 16\). Got \(4, 5, 15\)"),
    ],
)
def test_an_impossible_request_is_refused_before_the_first_block(change: dict, error: type[UserError], message: str):
    def never() -> Iterator[tuple[Box, np.ndarray]]:
        raise AssertionError("a block was made")
        yield

    shape, block, overlap = PAIR
    request = {"shape": shape, "block": block, "overlap": overlap, **change}
    with pytest.raises(error, match=message) as caught:
        stitch_blocks(never(), request.pop("shape"), **request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (np.zeros((4, 5, 10), np.float32), LabelTypeError, r"Got dtype float32 in the block from \(0, 0, 6\)"),
        (np.zeros((4, 5, 10), bool), LabelTypeError, "Got dtype bool"),
        (np.full((4, 5, 10), -3), LabelTypeError, "Got -3 in the block"),
        (np.zeros((4, 5, 9), int), ShapeMismatch, r"shape \(4, 5, 10\) of their block. Got \(4, 5, 9\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(second: np.ndarray, error: type[UserError], message: str):
    (first_box, second_box) = tiles(*PAIR)
    with pytest.raises(error, match=message):
        stitched([(first_box, np.ones((4, 5, 10), int)), (second_box, second)], PAIR)


def test_every_block_must_come_once_and_from_its_place():
    first, second = ((box, np.ones(box.shape, int)) for box in tiles(*PAIR))
    with pytest.raises(ValueRangeError, match=r"come once. Got \(0, 0, 0\) to \(4, 5, 10\) twice"):
        stitched([first, first], PAIR)
    with pytest.raises(MissingInput, match=r"All 2 blocks are needed. 1 did not come, the first from \(0, 0, 6\)"):
        stitched([first], PAIR)
    with pytest.raises(ValueRangeError, match=r"Got \(0, 0, 5\) to \(4, 5, 15\)"):
        stitched([first, (Box((0, 0, 5), (4, 5, 15)), second[1])], PAIR)


def test_an_axis_that_is_not_cut_needs_no_overlap():
    blocks = [(box, np.ones(box.shape, int)) for box in tiles((4, 5, 16), (9, 5, 10), (0, 0, 4))]
    result = stitch_blocks(blocks, (4, 5, 16), block=(9, 5, 10), overlap=(0, 0, 4))
    assert np.all(np.asarray(result) == 1)


def test_an_image_needs_three_axes():
    with pytest.raises(ShapeMismatch, match=r"\(\.\.\., z, y, x\). Got shape \(5, 6\)"):
        segment_blockwise(components, np.zeros((5, 6)), block=(2, 2, 2), overlap=(1, 1, 1))
