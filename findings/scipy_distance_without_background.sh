#!/usr/bin/env bash
# scipy's Euclidean distance transform of a volume without any background raises nothing and measures the distance to a
# point outside, index (-1, 0, 0): a ramp away from one corner. A block that lies wholly inside a soma, or a neuron that
# fills its crop, thus gets seeds, depths and skeletons from a ramp that depends on where the block was cut.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'scipy==1.17.1' 'numpy==2.4.6'
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import scipy
from scipy.ndimage import distance_transform_edt

shape, voxel_nm = (2, 3, 4), (29.0, 6.0, 6.0)
inside = np.ones(shape, bool)
distance, nearest = distance_transform_edt(inside, sampling=voxel_nm, return_indices=True)
z, y, x = np.indices(shape)
ramp = np.sqrt(((z + 1) * voxel_nm[0]) ** 2 + (y * voxel_nm[1]) ** 2 + (x * voxel_nm[2]) ** 2)
print("scipy", scipy.__version__)
print("distances in the first section, nm:", *np.round(distance[0], 1).tolist(), sep="\n  ")
print("nearest background of every voxel, by its own account:", np.unique(nearest.reshape(3, -1), axis=1).T.tolist())
assert np.allclose(distance, ramp) and (nearest.reshape(3, -1).T == (-1, 0, 0)).all()
PYTHON
