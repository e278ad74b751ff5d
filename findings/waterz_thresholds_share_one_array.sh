#!/usr/bin/env bash
# waterz yields a segmentation per threshold, but each is the same array, merged further: gathered in a list, all
# thresholds hold the result of the last one, and so does the array of fragments that the caller passed in. Tuning a
# threshold on such a list finds no difference between thresholds, and a second call on the same fragments starts merged.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'waterz==0.10.1' 'numpy==2.4.6'
"$folder/env/bin/python" - > "$folder/printed" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import waterz

# Two fragments, 16 x 8 pixels each in four sections; the edges between them have affinity .6, all others 1.
affinities = np.ones((3, 4, 16, 16), np.float32)
affinities[2, :, :, 8] = 0.6
fragments = np.repeat(np.array([1, 2], np.uint64), 8)[None, None].repeat(16, 1).repeat(4, 0)

given = fragments.copy()
each = [len(np.unique(found)) for found in waterz.agglomerate(affinities, [0.1, 0.6], fragments=given)]
unchanged = np.array_equal(given, fragments)
given = fragments.copy()
gathered = list(waterz.agglomerate(affinities, [0.1, 0.6], fragments=given))
late = [len(np.unique(found)) for found in gathered]
print("SEEN waterz", version("waterz"))
print("SEEN neurons at thresholds .1 and .6, counted at once:", each)
print("SEEN the same, counted after both were gathered:", late)
print("SEEN one array:", gathered[0] is gathered[1], "- the caller's fragments unchanged:", unchanged)
assert each == [2, 1] and late == [1, 1] and gathered[0] is gathered[1] and not unchanged
PYTHON
sed -n 's/^SEEN //p' "$folder/printed"
