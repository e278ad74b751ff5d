"""The affinity convention against a loop over voxels."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from connectomics_neurodiff.affinities import OFFSETS, affinities_from_labels

LABELS = hnp.arrays(
    np.uint32, st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)), elements=st.integers(0, 3)
)


@given(label=LABELS)
def test_affinities_agree_with_a_loop_over_voxels(label: np.ndarray) -> None:
    found = affinities_from_labels(label)
    for c, (dz, dy, dx) in enumerate(OFFSETS):
        for z, y, x in np.ndindex(label.shape):
            before = (z + dz, y + dy, x + dx)
            expected = label[z, y, x] > 0
            if min(before) >= 0:
                expected = expected and label[z, y, x] == label[before]
            assert found[c, z, y, x] == expected


def test_the_edge_is_stored_at_its_second_voxel() -> None:
    label = np.ones((2, 3, 4), np.uint32)
    label[:, :, 2:] = 2
    assert affinities_from_labels(label)[2, 0, 0].tolist() == [1, 1, 0, 1]
    assert affinities_from_labels(label)[:2].all()
