#!/usr/bin/env bash
# Group normalisation of a float32 tensor by torch on a CPU: where the mean is a hundred times the spread, results, which
# are of order 1, are off by more than .05 if the tensor is channels-last in memory, and right to five digits if it is
# contiguous; at a thousand times they are in the thousands. Image networks are set to channels-last for speed, and
# unscaled micrographs or the inner layers of a network have such means: the layout alone decides whether the result is noise.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import group_norm

torch.manual_seed(0)
print("torch", torch.__version__.split("+")[0])
layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
worst = {}
for ratio in (1, 10, 100, 1000):
    image = torch.randn(1, 8, 256, 256) + ratio  # mean over standard deviation: ratio
    exact = group_norm(image.double(), 4)
    for name, layout in layouts.items():
        found = group_norm(image.contiguous(memory_format=layout), 4)
        worst[name, ratio] = (found.double() - exact).abs().max().item()
    print(f"mean / spread {ratio:4}: largest error, " + ", ".join(f"{name} {worst[name, ratio]:.1e}" for name in layouts))
assert worst["contiguous", 100] < 1e-4, "contiguous memory is no longer right"
assert worst["channels last", 100] > 0.05, "channels-last memory is no longer wrong"
PYTHON
