"""What a dry run expects a stage to take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from connectomics_neurodiff.config import load_config
from connectomics_neurodiff.pipeline import plan
from connectomics_neurodiff.pipeline.plan import TIMED_PIECE, seconds_of_pass


class Slow(torch.autograd.Function):
    """Takes 5 us a voxel forward and twice that backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        time.sleep(5e-6 * x.numel())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        time.sleep(1e-5 * gradient.numel())
        return gradient


class SlowNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, image: Tensor) -> Tensor:
        self.seen.add(tuple(image.shape[2:]))
        result: Tensor = Slow.apply(self.weight * image)
        return result


@pytest.fixture
def _nothing_measured() -> Iterator[None]:
    """Costs that were measured before, or under a test's patches, are forgotten."""
    plan._measured_cost.cache_clear()
    yield
    plan._measured_cost.cache_clear()


def inputs(size: Sequence[int], device: str) -> tuple[Tensor]:
    return (torch.zeros(1, 1, *size, device=device),)


@pytest.mark.parametrize(("training", "per_voxel"), [(False, 5e-6), (True, 1.5e-5)])
@pytest.mark.parametrize("size", [(3, 40, 50), (32, 32, 256)])
def test_a_large_pass_is_measured_on_a_piece(size: tuple[int, int, int], training: bool, per_voxel: float) -> None:
    network = SlowNetwork()
    found = seconds_of_pass(network, inputs, size, torch.device("cpu"), "fp32", training=training)
    voxels = size[0] * size[1] * size[2]
    assert per_voxel * voxels <= found < 3 * per_voxel * voxels, "a busy machine wakes late"
    assert network.seen == {tuple(min(pair) for pair in zip(size, TIMED_PIECE, strict=True))}
    assert network.training == training


@pytest.mark.parametrize(("seconds", "passes"), [(plan.LONG_PASS / 2, 2), (plan.LONG_PASS * 2, 1)])
def test_a_long_first_pass_is_enough(seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(seconds * tick for tick in range(100))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    size = (2, 3, 4)
    assert seconds_of_pass(nn.Identity(), inputs, size, torch.device("cpu"), "fp32", training=False) == seconds
    assert next(clock) == seconds * 2 * passes


@pytest.mark.usefixtures("_nothing_measured")
def test_an_estimate_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    cfg = load_config(
        overrides=["MODEL.FILTERS", "[4, 6]", "MODEL.ISOTROPY", "[False]", "MODEL.INPUT_SIZE", "[2, 8, 8]"]
    )
    assert plan.estimates(cfg, ["segmenter"], None)[0].seconds > 0
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.usefixtures("_nothing_measured")
def test_time_is_that_of_all_samples_steps_and_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def one_pass(network: nn.Module, *_: object, **__: object) -> float:
        built.append(network)
        return 0.5

    monkeypatch.setattr(plan, "seconds_of_pass", one_pass)
    settings = ["SOLVER.SAMPLES_PER_BATCH", 3, "SOLVER.ITERATION_TOTAL", 7, "AUGMENTOR.SYNTHETIC.ENABLED", True]
    one, both = (plan.estimates(load_config(overrides=settings), ["segmenter"], None, arm)[-1] for arm in ("real", ""))
    assert (one.seconds, both.seconds) == (0.5 * 3 * 7, 2 * 0.5 * 3 * 7)
    assert one.memory == both.memory, "one arm after the other"
    assert len(built) == 1, "the same network is timed once"
