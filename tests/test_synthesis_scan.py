"""Both selective scans, blocks in torch and kernels in numba, against a plain loop over the tokens, there and back."""

from __future__ import annotations

import multiprocessing
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from connectomics_neurodiff.errors import ShapeMismatch
from connectomics_neurodiff.synthesis.nets import scan, scan_blocks, scan_kernel, scan_vectors

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """h = exp(delta A) h + delta B u; y = C h + D u; y *= silu(z), one token after another."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + delta[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def arguments(b: int, d: int, n: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random arguments in the order of `NAMES`; A negative as in Mamba."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decays = -torch.exp(normal(d, n))
    rest = [normal(d), normal(b, d, tokens), normal(d)]
    values = [normal(b, d, tokens), normal(b, d, tokens), decays, normal(b, n, tokens), normal(b, n, tokens), *rest]
    return [value.requires_grad_() for value in values]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 tokens for b d n = 24, so that short sequences have several."""
    monkeypatch.setattr(scan_blocks, "BLOCK_NUMBERS", 24 * 32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 64, 150])
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_and_gradients_match_the_loop(tokens: int, softplus: bool) -> None:
    values = arguments(2, 3, 4, tokens)
    if not softplus:
        values[1] = values[1].detach().abs().requires_grad_()
        values[7] = values[7].detach().abs().requires_grad_()
    weights = torch.randn(2, 3, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = scan.selective_scan(*values, delta_softplus=softplus)
    expected = selective_scan_reference(*values, delta_softplus=softplus)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(y, values, weights)
    wanted = torch.autograd.grad(expected, values, weights)
    for name, mine, theirs in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@settings(deadline=None, max_examples=25)
@given(
    b=st.integers(1, 3), d=st.integers(1, 5), n=st.integers(1, 6), tokens=st.integers(1, 90), block=st.integers(1, 9)
)
def test_any_shape_in_any_block_size(b: int, d: int, n: int, tokens: int, block: int) -> None:
    values = arguments(b, d, n, tokens, seed=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_blocks, "BLOCK_NUMBERS", block * scan_blocks.CHUNK * b * d * n)
        y = scan.selective_scan(*values, delta_softplus=True)
        got = torch.autograd.grad(y.square().sum(), values)
    expected = selective_scan_reference(*values, delta_softplus=True)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    for mine, theirs in zip(got, torch.autograd.grad(expected.square().sum(), values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_numerical_gradients() -> None:
    values = arguments(1, 2, 2, 18)

    def call(*args: Tensor) -> Tensor:
        return scan.selective_scan(*args, delta_softplus=True)

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_arguments(present: tuple[str, ...]) -> None:
    named = dict(zip(NAMES, arguments(2, 3, 4, 20), strict=True))
    kept = {name: value for name, value in named.items() if name in NAMES[:5] or name in present}
    kept["delta"] = kept["delta"].abs()
    torch.testing.assert_close(scan.selective_scan(**kept), selective_scan_reference(**kept), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("step", [1e-6, 1.0, 50.0, 1e4])
def test_large_and_small_steps_stay_finite(step: float) -> None:
    """Steps of 1e4 make every decay underflow: quotients of cumulative products would be 0 / 0 there."""
    u, _, A, B, C, *_ = arguments(1, 3, 4, 100, dtype=torch.float32)
    delta = torch.full((1, 3, 100), step, requires_grad=True)
    y = scan.selective_scan(u, delta, A, B, C)
    gradients = torch.autograd.grad(y.sum(), (u, delta, A, B, C))
    assert all(torch.isfinite(g).all() for g in gradients)
    expected = selective_scan_reference(*(v.detach().double() for v in (u, delta, A, B, C)))
    torch.testing.assert_close(y.detach().double(), expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1000, 5000])
def test_float32_over_long_sequences(tokens: int) -> None:
    values = [v.detach() for v in arguments(1, 2, 16, tokens, dtype=torch.float32)]
    expected = selective_scan_reference(*(v.double() for v in values), delta_softplus=True)
    got = scan.selective_scan(*values, delta_softplus=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_input_under_autocast_keeps_a_float32_state() -> None:
    """A bfloat16 state (8 bits) could not hold the sum of 4096 equal inputs; it would stop growing at 256."""
    ones = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = scan.selective_scan(ones, ones, torch.full((1, 1), -1e-9), ones, ones)
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, -1]) == pytest.approx(4096, rel=0.01)


def test_backward_inside_autocast_is_float32_too() -> None:
    values = [v.detach().requires_grad_() for v in arguments(1, 3, 4, 50, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(scan.selective_scan(*values, delta_softplus=True).sum(), values)
    outside = torch.autograd.grad(scan.selective_scan(*values, delta_softplus=True).sum(), values)
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("delta", (2, 3, 9)),
        ("A", (4, 4)),
        ("B", (2, 3, 10)),
        ("C", (1, 4, 10)),
        ("D", (4,)),
        ("z", (2, 3, 11)),
        ("delta_bias", (1,)),
        ("u", (3, 10)),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    named = dict(zip(NAMES, arguments(2, 3, 4, 10), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ShapeMismatch, match="Got"):
        scan.selective_scan(**named)


def test_the_kernel_is_looked_for_and_its_absence_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    scan._cuda_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert scan._cuda_kernel() is None
    scan._cuda_kernel.cache_clear()
    name = "mamba_ssm.ops.selective_scan_interface"
    fake = types.ModuleType(name)
    fake.selective_scan_fn = selective_scan_reference  # type: ignore[attr-defined]
    for part in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, fake)
    assert scan._cuda_kernel() is selective_scan_reference
    scan._cuda_kernel.cache_clear()


def test_arguments_reach_the_kernel_in_its_types() -> None:
    """mamba-ssm wants u, delta, B, C, z of one type and A, D, delta_bias in float32."""
    seen = {}

    def kernel(*args: Tensor, z: Tensor, delta_bias: Tensor, delta_softplus: bool) -> Tensor:
        seen.update(zip(NAMES, [*args, z, delta_bias], strict=True))
        return args[0]

    values = [v.detach() for v in arguments(1, 2, 3, 7, dtype=torch.float32)]
    scan._scan_on_cuda(kernel, values[0].bfloat16(), *values[1:], True)
    assert {n: t.dtype for n, t in seen.items()} == {
        n: torch.float32 if n in ("A", "D", "delta_bias") else torch.bfloat16 for n in NAMES
    }


# The kernels: everything above in float32 on the CPU runs them, everything in float64 the blocks.


def test_which_scan_runs_where() -> None:
    assert scan._scan_for(torch.zeros(1)) is scan_kernel.scan_in_kernels
    assert scan._scan_for(torch.zeros(1, dtype=torch.float64)) is scan_blocks.scan_in_blocks
    assert scan._scan_for(torch.zeros(1, device="meta")) is scan_blocks.scan_in_blocks


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 3),
    d=st.sampled_from([1, 2, 17, 63, 64, 65, 130]),
    n=st.integers(1, 17),
    tokens=st.sampled_from([1, 2, 31, 32, 33, 64, 77]),
    transposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_kernels_match_the_loop(b: int, d: int, n: int, tokens: int, transposed: bool, seed: int) -> None:
    values = arguments(b, d, n, tokens, seed, torch.float32)
    if transposed:  # as the network makes them: channels last in memory
        values = [v if v.ndim < 3 else v.detach().mT.contiguous().mT.requires_grad_() for v in values]
    weights = torch.randn(b, d, tokens, generator=torch.Generator().manual_seed(1))
    y = scan.selective_scan(*values, delta_softplus=True)
    exact = [v.detach().double().requires_grad_() for v in values]
    expected = selective_scan_reference(*exact, delta_softplus=True)
    got = (y, *torch.autograd.grad(y, values, weights))
    wanted = (expected, *torch.autograd.grad(expected, exact, weights.double()))
    for name, mine, theirs in zip(("y", *NAMES), got, wanted, strict=True):
        near = {"rtol": 1e-4, "atol": 1e-5 * float(theirs.detach().abs().max())}
        torch.testing.assert_close(mine.double(), theirs, **near, msg=lambda m, name=name: f"{name}: {m}")


def test_kernels_match_the_blocks_over_many_tokens() -> None:
    """Sums over all tokens, such as the gradient of A, keep their digits."""
    values = arguments(1, 70, 16, 9000, dtype=torch.float32)[:5]
    values[1] = (0.1 * values[1].detach().abs()).requires_grad_()
    found = torch.autograd.grad(scan_kernel.scan_in_kernels(*values).sum(), values)
    exact = [v.detach().double().requires_grad_() for v in values]
    expected = torch.autograd.grad(scan_blocks.scan_in_blocks(*exact).sum(), exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_kernels_power_of_two() -> None:
    from numba import njit

    @njit
    def each(x: np.ndarray, out: np.ndarray) -> None:
        for i in range(0, len(x), scan_vectors.LANES):
            scan_vectors.store(out, (i,), scan_vectors.exp2(scan_vectors.load(x, (i,))))

    x = np.concatenate([np.linspace(-126, 127.4, 199_984), np.linspace(-1e-3, 1e-3, 1008)]).astype(np.float32)
    out = np.empty_like(x)
    each(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 1.5e-7
    special = np.array([0, -0.0, 1, -3, -127, -1e30, -np.inf, 128, 1e30, np.inf, np.nan, 5, 6, 7, -1, -2], np.float32)
    out = np.empty_like(special)
    each(special, out)
    infinite = [np.inf, np.inf, np.inf]
    np.testing.assert_array_equal(out, [1, 1, 2, 0.125, 0, 0, 0, *infinite, np.nan, 32, 64, 128, 0.5, 0.25])


def test_vectors_of_a_kernel() -> None:
    """Arithmetic with vectors and scalars on either side, and a sum over the lanes of a strided row."""
    from numba import njit

    @njit
    def some(x: np.ndarray, out: np.ndarray) -> float:
        value = scan_vectors.load(x, (1, 2))
        two = np.float32(2)
        scan_vectors.store(out, (0,), two * value - value * value + two - scan_vectors.spread(two + two))
        return scan_vectors.total(value)

    x = np.arange(80, dtype=np.float32).reshape(2, 2, 20)[:, 1]
    row = x[1, 2:18]
    out = np.empty(scan_vectors.LANES, np.float32)
    assert some(x, out) == row.sum()
    np.testing.assert_array_equal(out, 2 * row - row * row - 2)


def test_nan_is_not_hidden() -> None:
    values = arguments(1, 3, 4, 40, dtype=torch.float32)[:5]
    values[0].data[0, 1, 20] = float("nan")
    y = scan.selective_scan(*values)
    assert torch.isfinite(y[0, :, :20]).all()
    assert torch.isnan(y[0, 1, 20:]).all()
    assert torch.isfinite(y[0, [0, 2]]).all()


def gradients_of_one_seed(_: object = None) -> list[np.ndarray]:
    values = arguments(2, 200, 5, 70, dtype=torch.float32)
    y = scan.selective_scan(*values, delta_softplus=True)
    return [tensor.detach().numpy() for tensor in (y, *torch.autograd.grad(y.square().sum(), values))]


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        found.append(gradients_of_one_seed())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_several_callers_at_once() -> None:
    expected = gradients_of_one_seed()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(gradients_of_one_seed, range(8)):
            for mine, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_process_that_has_scanned(start: str) -> None:
    # One thread of torch: its own pool, unlike the kernels', does not survive a fork.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = gradients_of_one_seed()
        with multiprocessing.get_context(start).Pool(2, torch.set_num_threads, (1,)) as pool:
            for found in pool.map_async(gradients_of_one_seed, range(2)).get(timeout=120):
                for mine, theirs in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


def test_without_gradients_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    forward = scan_kernel._forward
    monkeypatch.setattr(scan_kernel, "_forward", lambda *arrays: (kept.append(arrays[6].shape), forward(*arrays)))
    values = arguments(1, 3, 4, 70, dtype=torch.float32)
    y = scan.selective_scan(*values)
    with torch.no_grad():
        torch.testing.assert_close(scan.selective_scan(*values), y.detach(), rtol=0, atol=0)
    assert kept == [(3, 4, 64), (0, 4, 64)]


def test_the_compiled_kernels_are_cached_on_disk() -> None:
    gradients_of_one_seed()
    for kernel in (scan_kernel._forward, scan_kernel._backward):
        assert Path(kernel.stats.cache_path).is_dir()
        assert kernel._cache.load_overload(kernel.signatures[0], kernel.targetctx) is not None


def test_kernels_without_a_folder_for_their_cache_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return numba_njit(**options)

    numba_njit = scan_kernel.njit
    monkeypatch.setattr(scan_kernel, "njit", refuse)
    out = np.zeros(1)
    scan_kernel._kernel(_write_three)(out)
    assert out[0] == 3
    assert "NUMBA_CACHE_DIR" in caplog.text


def _write_three(out: np.ndarray) -> None:
    out[0] = 3
