import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from vitgraph.kernels import dispatch
from vitgraph.kernels.interpreter import from_bf16_bits, to_bf16_bits, to_e4m3_bits

pytestmark = pytest.mark.skipif(
    not dispatch.is_interpreting(), reason="tests the interpreter, which is off on CUDA"
)


def test_rounding_matches_torch():
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40, 1.00390625]
    x = torch.cat(
        [torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor(special)]
    )
    expected = x.bfloat16()
    actual = torch.from_numpy(from_bf16_bits(to_bf16_bits(x.numpy())))
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, count_ptr, out_ptr, rounded_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    total = a * b
    for _ in range(tl.load(count_ptr)):
        total = total + 1.0
    tl.store(out_ptr + offsets, tl.where(a > b, total, -total))
    tl.store(rounded_ptr + offsets, a.to(tl.float32) / 3.0)


def test_bf16_arithmetic_and_loaded_loop_bound():
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out, rounded = torch.empty_like(a), torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, torch.tensor([2], dtype=torch.int32), out, rounded, BLOCK=64)
    total = a * b + 1.0 + 1.0
    assert torch.equal(out, torch.where(a > b, total, -total))
    assert torch.equal(rounded, (a.float() / 3.0).bfloat16())


@triton.jit
def _sum_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(a_ptr + tl.arange(0, BLOCK)), axis=0))


def test_bf16_reduction_is_refused():
    a = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"cast to tl\.float32 first"):
        _sum_kernel[(1,)](a, a.clone(), BLOCK=16)


def test_kernel_tests_run_kernels(device):
    assert not dispatch.use_reference(torch.empty(1, device=device))
    assert torch.empty(1, device=device).isnan().all()


def test_e4m3_is_torchs_cast_saturated():
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        464.0,
        465.0,
        1e9,
        2**-9,
        2**-10,
        1.5 * 2**-9,
    ]
    x = torch.cat(
        [torch.randn(8192) * 10.0 ** torch.randint(-4, 3, (8192,)), torch.tensor(special)]
    )
    bits = torch.from_numpy(to_e4m3_bits(x.numpy()))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(bits, expected)
    assert to_e4m3_bits(np.array([np.nan], dtype=np.float32))[0] & 0x7F == 0x7F
    # nearest, by distance to every finite value
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    got = bits[:8192].view(torch.float8_e4m3fn).double().abs()
    value = x[:8192].double().abs().clamp(max=448)
    nearest = (grid[None, :] - value[:, None]).abs().amin(1)
    assert torch.equal((got - value).abs(), nearest)


@triton.jit
def _e4m3_kernel(x_ptr, q_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(q_ptr + offsets, tl.load(x_ptr + offsets).to(tl.float8e4nv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casts_to_e4m3_in_a_kernel(dtype):
    x = (torch.randn(256, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    q = torch.empty(256, dtype=torch.float8_e4m3fn)
    _e4m3_kernel[(1,)](x, q, BLOCK=256)
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
