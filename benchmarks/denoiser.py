"""CPU time and memory of the denoiser's reverse step and training step, as ratios to a baseline in the same run.

    python benchmarks/denoiser.py --patch 8 256 256 --reference ../NeuroDiff --json out.json

The baseline is the published network in float32 if --reference names a checkout of github.com/HeadLiuYun/NeuroDiff
(this package's Mamba stands in for its mamba_ssm, which flatters it); else this package's network in float32,
contiguous in memory and without cached hints. Ratios are to the first row. A reverse step is the network's forward
pass, a training step forward, backward and Adam; the second of each is timed. ckpt is gradient checkpointing.
noise_error is the relative error of the bf16 noise prediction against fp32, with random weights. Peaks are of the whole
process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cases import Measured, count, medians, parse, parser_for, peak_mib, timed, write

BASELINE = "baseline"
WAYS = {
    "reverse": {"fp32": ["fp32"], "bf16": ["bf16"]},
    "training": {"fp32": ["fp32", "fp32+ckpt"], "bf16": ["bf16", "bf16+ckpt"]},
}


def published(checkout: str) -> Any:
    """The published network."""
    from connectomics_neurodiff.synthesis.nets import Mamba

    if not (Path(checkout) / "diffusion_model" / "neurodiff.py").exists():
        sys.exit(f"{checkout} is not a checkout of NeuroDiff: it has no diffusion_model/neurodiff.py.")
    stand_in: Any = types.ModuleType("mamba_ssm")
    stand_in.Mamba = Mamba
    sys.modules["mamba_ssm"] = stand_in
    sys.path.insert(0, checkout)
    from diffusion_model.neurodiff import create_neurodiff

    return create_neurodiff(512, 64, 1, in_channels=3, out_channels=1, ani_ratio=1000, res_z=29, res_xy=6)


def with_every_branch(network: Any) -> Any:
    """Small random numbers for what starts at zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def measure(way: str, options: argparse.Namespace) -> Measured:
    """One case in this process."""
    import torch

    from connectomics_neurodiff.convolution import use_sound_convolutions
    from connectomics_neurodiff.memory import kept_memory
    from connectomics_neurodiff.synthesis import build_denoiser

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    is_baseline, low = way == BASELINE, way.startswith("bf16")
    theirs = is_baseline and options.reference is not None
    if theirs:
        network = published(options.reference)
    else:
        network = build_denoiser("neurodiff", preset=options.preset, checkpointing=way.endswith("ckpt"))
    with_every_branch(network)
    if not is_baseline:
        network.to(memory_format=torch.channels_last_3d)
        use_sound_convolutions(network)
    noisy, condition = torch.randn(1, 1, *options.patch), (torch.rand(1, 2, *options.patch) > 0.7).float()
    t, voxel_nm = torch.tensor([100]), torch.tensor([[29.0, 6.0, 6.0]])

    def predict(hints: Any = None, *, low: bool = low) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if theirs:
                return network(torch.cat([noisy, condition], dim=1), t)
            return network(noisy, t, condition, voxel_nm, hints=hints)

    with kept_memory(math.prod(options.patch)) if options.kept_memory and not is_baseline else nullcontext():
        if options.what == "training":
            return second_time(training_step(network, predict, noisy))
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                hints = None if is_baseline else network.encode_condition_path(condition)
            result = second_time(lambda: predict(hints))
            if low:
                exact = predict(low=False)
                result["noise_error"] = float((predict(hints).float() - exact).norm() / exact.norm())
    return result


def training_step(network: Any, predict: Callable[[], Any], target: Any) -> Callable[[], None]:
    """Forward, backward and Adam on one crop."""
    import torch

    optimiser = torch.optim.Adam(network.parameters(), lr=1e-5)

    def step() -> None:
        optimiser.zero_grad()
        (predict().float() - target).abs().mean().backward()
        optimiser.step()

    return step


def second_time(step: Callable[[], object]) -> Measured:
    """The first pass makes oneDNN's kernels and Adam's averages."""
    step()
    return timed(step) | {"peak_mib": peak_mib()}


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__, repeat=3)
    parser.add_argument("--what", choices=sorted(WAYS), default="reverse")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--preset", choices=["paper", "small"], default="paper")
    parser.add_argument("--patch", nargs=3, type=count, default=[8, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--reference", metavar="FOLDER", help="checkout of the published code, the baseline")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    parser.add_argument(
        "--kept-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as trainings and sampling run: faster",
    )
    options = parse(parser)
    if options.case:
        print(json.dumps(measure(options.case, options)))
        return
    if options.reference and options.preset != "paper":
        parser.error("the published code has one size, --preset paper")
    ways = [way for precision in options.precision for way in WAYS[options.what][precision]]
    ways = [BASELINE, *ways] if options.baseline else ways
    rows = medians(ways, options.repeat)
    print(f"{options.what} step, {options.preset}, patch {options.patch}, {options.threads} threads")
    for way, row in rows.items():
        for key in ("cpu_seconds", "wall_seconds", "peak_mib"):
            row[f"{key}_ratio"] = row[key] / rows[ways[0]][key]
        print(
            f"{way:>9}  CPU {row['cpu_seconds']:7.2f} s x{row['cpu_seconds_ratio']:.3f}"
            f"  wall {row['wall_seconds']:7.2f} s x{row['wall_seconds_ratio']:.3f}"
            f"  peak {row['peak_mib']:6.0f} MiB x{row['peak_mib_ratio']:.3f}"
            + (f"  noise error {row['noise_error']:.4f}" if "noise_error" in row else "")
        )
    chosen = {
        name: getattr(options, name) for name in ("what", "preset", "patch", "threads", "reference", "kept_memory")
    }
    write(options.json, chosen | {"rows": rows})


if __name__ == "__main__":
    main()
