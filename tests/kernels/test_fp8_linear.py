"""Products of fp8 operands with row scales and what follows them, against the definition."""

import pytest
import torch
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels import linear_fp8 as module
from vitgraph.kernels.activation import activation_ref
from vitgraph.kernels.aligned_rows import aligned_rows
from vitgraph.kernels.bounded_fp8 import bound_norms, quantize_bounded_ref
from vitgraph.kernels.linear import empty_output
from vitgraph.kernels.linear_fp8 import fp8_reason, linear_fp8, linear_fp8_op, linear_fp8_ref
from vitgraph.kernels.quantize import (
    FP8,
    Bounds,
    bound_ref,
    dequantize,
    quantize_ref,
)
from vitgraph.kernels.rope import rope_
from vitgraph.kernels.rotary_linear import Rotation, turns_of
from vitgraph.kernels.testing import rel_rms
from vitgraph.kernels.zero_padding import ZeroedPadding

BF16 = torch.bfloat16
ACTIVATIONS = [None, "gelu_tanh", "gelu_erf", "quick_gelu", "silu"]
TRANSFORMS = [*ACTIVATIONS, "swiglu"]


def operands(M, N, K, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g) * torch.logspace(-2, 2, M)[:, None]
    weight = torch.randn(N, K, generator=g) * torch.logspace(-1, 1, N)[:, None] * K**-0.5
    bias = torch.randn(N, generator=g).to(device, torch.bfloat16)
    moved = [t.to(device) for t in (*quantize_ref(x), *quantize_ref(weight))]
    return *moved, bias


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("M", "N", "K"), [(4, 16, 16), (52, 96, 160), (260, 1152, 4304)])
def test_matches_the_product_of_the_values(M, N, K, has_bias, device):
    x, xs, w, ws, bias = operands(M, N, K, device)
    bias = bias if has_bias else None
    exact = dequantize(x, xs).double() @ dequantize(w, ws).double().t()
    exact = exact if bias is None else exact + bias.double()
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    assert linear_fp8(x, xs, w, ws, bias, out=out) is out
    # bf16 keeps 8 bits; fast accumulation in the tensor cores loses more over a long sum
    bound = 4e-3 if device == "cpu" else 2e-2
    for row in range(0, M, max(1, M // 8)):  # rows differ in scale by four decades
        assert rel_rms(out[row], exact[row]) < bound


def test_reference_is_the_product_of_the_values(device):
    x, xs, w, ws, bias = operands(20, 32, 64, device)
    exact = dequantize(x, xs).double() @ dequantize(w, ws).double().t() + bias.double()
    assert rel_rms(linear_fp8_ref(x, xs, w, ws, bias), exact) < 1e-6


def test_zero_rows_give_the_bias(device):
    x, xs, w, ws, bias = operands(8, 32, 64, device)
    q, scale = quantize_ref(torch.zeros(4, 64))
    x[4:], xs[4:] = q.to(device), scale.to(device)
    out = torch.empty(8, 32, dtype=torch.bfloat16, device=device)
    linear_fp8(x, xs, w, ws, bias, out=out)
    assert torch.equal(out[4:], bias.expand(4, 32))


def test_no_rows(device):
    x, xs, w, ws, bias = operands(4, 32, 64, device)
    out = torch.empty(0, 32, dtype=torch.bfloat16, device=device)
    assert linear_fp8(x[:0], xs[:0], w, ws, bias, out=out).shape == (0, 32)


def width(N, transform):
    return N // 2 if transform == "swiglu" else N


def transformed(s, transform):
    """f by its definition."""
    if transform is None:
        return s
    if transform == "swiglu":
        gate, up = s.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up
    return activation_ref(s, transform)


def bound_of(x, xs, w, ws, bias):
    norms = bound_norms(w, ws, bias)
    return bound_ref(dequantize(x, xs), Bounds(xs, norms))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, has_bias, device):
    M, N, K = 20, 96, 160
    x, xs, w, ws, bias = operands(M, N, K, device)
    bias = bias if has_bias else None
    s = dequantize(x, xs).double() @ dequantize(w, ws).double().t()
    exact = transformed(s if bias is None else s + bias.double(), transform)
    out = torch.empty(M, width(N, transform), dtype=BF16, device=device)
    assert linear_fp8(x, xs, w, ws, bias, transform=transform, out=out) is out
    for row in range(M):
        assert rel_rms(out[row], exact[row]) < (4e-3 if device == "cpu" else 2e-2)
    reference = linear_fp8_ref(x, xs, w, ws, bias, transform)
    assert reference.dtype == torch.float32
    assert rel_rms(reference, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_residual_is_added_to_in_place(dtype, device):
    if device == "cuda" and dtype != BF16:
        pytest.skip("what a GPU writes is bf16")
    x, xs, w, ws, _ = operands(20, 96, 160, device)
    before = torch.randn(20, 96, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    wide = torch.full((20, 128), 7.0, dtype=dtype, device=device)
    residual = wide[:, 16:112]
    residual.copy_(before)
    assert linear_fp8(x, xs, w, ws, residual=residual) is residual
    exact = dequantize(x, xs).double() @ dequantize(w, ws).double().t() + before.double()
    limit = 1e-6 if dtype == torch.float32 else 4e-3 if device == "cpu" else 2e-2
    for row in range(20):
        assert rel_rms(residual[row], exact[row]) < limit
    assert (wide[:, :16] == 7).all()
    assert (wide[:, 112:] == 7).all()


@pytest.mark.parametrize("transform", ACTIVATIONS)
def test_fp8_output(transform):
    M, N, K = 20, 96, 160
    x, xs, w, ws, bias = operands(M, N, K, "cpu")
    bound = bound_of(x, xs, w, ws, bias)
    wide = torch.full((M, N + 32), 13.0).to(FP8)
    out = wide[:, 16 : 16 + N]
    assert linear_fp8(x, xs, w, ws, bias, transform=transform, bound=bound, out=out) is out
    # once: f of the sums in fp32, not of what they are rounded to
    want = quantize_bounded_ref(linear_fp8_ref(x, xs, w, ws, bias, transform), bound)
    assert torch.equal(out.contiguous().view(torch.uint8), want.view(torch.uint8))
    assert (wide[:, :16].float() == 13).all()
    assert (wide[:, 16 + N :].float() == 13).all()


@pytest.mark.parametrize("K", [16, 144, 4304])
def test_rows_may_be_strided(K, device):
    """As `aligned_rows` has them, and by the least stride that products take."""
    M, N = 5, 32
    x, xs, w, ws, bias = operands(M, N, K, device)
    want = linear_fp8(x, xs, w, ws, bias, out=torch.empty(M, N, dtype=BF16, device=device))
    wide = torch.zeros(M, K + 16, device=device).to(FP8)
    for a, b in (
        (aligned_rows(x, M, K, dtype=FP8), aligned_rows(w, N, K, dtype=FP8)),
        (wide[:, :K], aligned_rows(w, N, K, dtype=FP8)),
    ):
        a.copy_(x), b.copy_(w)
        out = torch.empty(M, 2 * N, dtype=BF16, device=device)[:, :N]
        linear_fp8(a, xs, b, ws, bias, out=out)
        for row in range(M):  # sums in another order
            assert rel_rms(out[row], want[row]) < 4e-3


@pytest.mark.parametrize("live", [0, 2, 6, 100])
@pytest.mark.parametrize("case", ["out", "residual", "fp8"])
def test_live_rows_are_those_of_a_call_without(case, live, device):
    M, N, K = 6, 32, 64
    x, xs, w, ws, bias = operands(M, N, K, device)
    n = min(live, M)
    right = bound_of(x, xs, w, ws, bias)

    def call(xs, bound, **options):
        start = torch.ones(M, N, device=device).to(FP8 if case == "fp8" else BF16)
        given = {
            "out": {"bias": bias, "out": start},
            "residual": {"residual": start},
            "fp8": {"bias": bias, "bound": bound, "out": start},
        }[case]
        return linear_fp8(x, xs, w, ws, **given, **options)

    want = call(xs, right)
    stale_scale, stale_bound = xs.clone(), right.clone()
    stale_scale[n:], stale_bound[n:] = float("nan"), float("nan")
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    got = call(stale_scale, stale_bound, live_rows=live_rows)
    assert torch.equal(got[:n].float(), want[:n].float())


@pytest.fixture
def library(monkeypatch):
    """The library's product as it is on a GPU, in fp32 here; a list of how it was called."""
    calls = []

    def scaled_mm(
        a, b, *, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False, out=None
    ):
        calls.append(out)
        assert a.dtype == b.dtype == FP8
        assert b.stride(0) == 1  # column-major
        assert scale_a.shape == (a.shape[0], 1)
        assert scale_b.shape == (1, b.shape[1])
        assert out_dtype == BF16
        assert bias is None or bias.dtype == BF16
        y = (a.float() @ b.float()) * scale_a * scale_b
        y = (y if bias is None else y + bias.float()).to(BF16)
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    return calls


def by_library(x, xs, w, ws, bias=None, transform=None, bound=None, residual=None, out=None,
               live_rows=None):  # fmt: skip
    target = out if residual is None else residual
    module._by_library(x, xs, w, ws, bias, transform, bound, residual, target, live_rows)
    return target


@pytest.mark.parametrize(
    ("transform", "has_bound"),
    [*((f, False) for f in TRANSFORMS), *((f, True) for f in ACTIVATIONS)],
)
def test_passes_after_the_library(transform, has_bound, library):
    """What a GPU does with the library's product, on the CPU: s is rounded to bf16, then f."""
    M, N, K = 12, 96, 64
    x, xs, w, ws, bias = operands(M, N, K, "cpu")
    bound = bound_of(x, xs, w, ws, bias) if has_bound else None
    out = torch.ones(M, width(N, transform)).to(FP8 if has_bound else BF16)
    live = torch.tensor([7], dtype=torch.int32)
    by_library(x, xs, w, ws, bias, transform, bound, out=out, live_rows=live)
    s = linear_fp8_ref(x, xs, w, ws, bias).to(BF16).float()
    want = transformed(s, transform)
    if bound is None:
        assert rel_rms(out[:7], want[:7]) < 4e-3
    else:
        steps = (
            out.view(torch.uint8).int() - quantize_bounded_ref(want, bound).view(torch.uint8).int()
        )
        # where values come out as zero, their signs may differ
        assert (steps[:7].abs() % 128 <= 1).all()
    # a gate of its own leaves rows past the live ones alone; the product itself takes all
    if bound is not None:
        assert not out[7:].view(torch.uint8).any()
    elif transform == "swiglu":
        assert (out[7:] == 1).all()
    assert (library[0] is out) == (bound is None and transform != "swiglu")


def test_residual_after_the_library(library):
    x, xs, w, ws, _ = operands(12, 32, 64, "cpu")
    residual = torch.full((12, 32), 2.0, dtype=BF16)
    by_library(x, xs, w, ws, residual=residual)
    assert rel_rms(residual, linear_fp8_ref(x, xs, w, ws) + 2) < 8e-3
    assert library == [None]


@pytest.mark.parametrize("at_lines", [True, False])
@pytest.mark.parametrize("leaves_padding", [True, False])
@pytest.mark.parametrize("backend", ["library", "hopper"])
def test_output_is_zero_where_padding_may_be_left_alone(
    backend, leaves_padding, at_lines, monkeypatch
):
    monkeypatch.setattr(linear_module, "choose_backend", lambda *a, **options: (backend, None))
    live_rows = torch.tensor([2], dtype=torch.int32)
    with ZeroedPadding(live_rows) as padding:
        out = empty_output(
            torch.zeros(3, 8), torch.zeros(5, 8),
            padding=padding, leaves_padding=leaves_padding, at_lines=at_lines,
        )  # fmt: skip
    assert out.shape == (3, 5)
    is_library = backend == "library" and not leaves_padding
    assert out.is_contiguous() == (is_library or not at_lines)
    assert out[:2].isnan().all()  # not written: what new memory holds in these tests
    if is_library:
        assert out[2].isnan().all()
    else:
        assert not out[2].any()


GOOD = {
    "x": torch.zeros(4, 32).to(FP8), "x_scale": torch.ones(4),
    "weight": torch.zeros(16, 32).to(FP8), "w_scale": torch.ones(16),
    "bias": torch.zeros(16), "out": torch.zeros(4, 16),
}  # fmt: skip


def fp8(*shape):
    return torch.zeros(shape).to(FP8)


RESIDUAL = {"out": None, "bias": None, "residual": torch.zeros(4, 16)}
BOUND = {"out": fp8(4, 16), "bound": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 32)}, TypeError, "x is torch.float32, expected torch.float8_e4m3fn"),
        ({"weight": torch.zeros(16, 32).half()}, TypeError, "weight is torch.float16"),
        ({"x_scale": torch.ones(4, 1)}, ValueError, r"x_scale must be \[4\] .* got \[4, 1\]"),
        ({"x_scale": torch.ones(8)[::2]}, ValueError, r"x_scale must be .* strides \(2,\)"),
        ({"w_scale": torch.ones(16).double()}, TypeError, "w_scale is torch.float64"),
        ({"w_scale": torch.ones(1).expand(16)}, ValueError, r"w_scale must be .* strides \(0,\)"),
        ({"bias": torch.zeros(16).half()}, TypeError, "bias is torch.float16, expected"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias must be \[16\] .* got \[15\]"),
        ({"out": torch.zeros(16, 4).t()}, ValueError, r"out must be \[4, 16\] with adjacent"),
        ({"out": torch.zeros(4, 17)}, ValueError, r"out must be \[4, 16\] .* got \[4, 17\]"),
        ({"weight": fp8(32, 16).t()}, ValueError, r"weight must be .* strides \(1, 16\)"),
        ({"weight": fp8(16, 48)}, ValueError, r"weight must be \[16, 32\] .* got \[16, 48\]"),
        ({"transform": "relu"}, ValueError, "transform='relu' is not None or one of"),
        ({"transform": "swiglu"}, ValueError, r"out must be \[4, 8\] .* got \[4, 16\]"),
        ({"out": None}, ValueError, "give one of out and residual"),
        ({"residual": torch.zeros(4, 16)}, ValueError, "give one of out and residual"),
        (RESIDUAL | {"residual": torch.zeros(4, 8)}, ValueError, r"residual must be \[4, 16\]"),
        (RESIDUAL | {"bias": torch.zeros(16)}, ValueError, r"to residual, not \['bias'\]"),
        (RESIDUAL | {"transform": "silu"}, ValueError, r"to residual, not \['transform'\]"),
        (
            RESIDUAL | {"bound": torch.ones(4), "bias": torch.zeros(16)},
            ValueError, r"to residual, not \['bias', 'bound'\]",
        ),
        (BOUND | {"out": torch.zeros(4, 16)}, TypeError, "out is torch.float32, expected"),
        (BOUND | {"bound": torch.ones(3)}, ValueError, r"bound must be \[4\] .* got \[3\]"),
        (BOUND | {"bound": torch.ones(4).double()}, TypeError, "bound is torch.float64"),
        (BOUND | {"transform": "swiglu"}, ValueError, "too wide for fp8; write it to out without"),
        (
            {"x": fp8(4, 24), "weight": fp8(16, 24)},
            ValueError, "K = 24 and N = 16 must be multiples of 16",
        ),
        (
            {
                "weight": fp8(8, 32), "w_scale": torch.ones(8), "bias": None,
                "out": torch.zeros(4, 8),
            },
            ValueError, "K = 32 and N = 8 must be multiples of 16",
        ),
        ({"x": fp8(4, 40)[:, :32]}, ValueError, r"multiples of 16 bytes, got strides \(40, 1\)"),
        ({"x": fp8(4, 48)[:, 8:40]}, ValueError, "multiples of 16 bytes"),
        ({"weight": fp8(16, 40)[:, :32]}, ValueError, r"\(32, 1\), \(40, 1\) and \(16, 1\)"),
        ({"out": torch.zeros(4, 17)[:, :16]}, ValueError, r"16 bytes, got .* and \(17, 1\)"),
        ({"live_rows": torch.ones(1)}, ValueError, "live_rows must be one int32"),
        ({"backend": "cublas"}, ValueError, "backend='cublas' is not one of"),
        ({"backend": "hopper"}, ValueError, "device is cpu.*; use 'auto'"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        linear_fp8(**GOOD | change)


@pytest.mark.parametrize("change", [{}, RESIDUAL, BOUND], ids=["out", "residual", "fp8"])
@pytest.mark.parametrize("backend", ["auto", "library"])
def test_what_the_errors_start_from_is_right(change, backend):
    linear_fp8(**GOOD | change, backend=backend)


def test_old_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = fp8_reason(torch.device("cuda"))
    assert reason is not None
    assert "compute capability 8.0" in reason
    assert fp8_reason(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8_reason(torch.device("cuda")) is None
    assert module.MIN_CAPABILITY == (8, 9)


def test_opcheck(device):
    """Without "test_schema", which does arithmetic on the operands: fp8 has none."""
    x, xs, w, ws, bias = operands(4, 16, 32, device)
    args = (x, xs, w, ws, bias, torch.bfloat16)
    torch.library.opcheck(linear_fp8_op, args, test_utils="test_faketensor")


def rotation_of(T, H, D, device):
    position = torch.arange(T, dtype=torch.int32)[:, None].expand(T, 4).contiguous()
    inv_freq = 1e4 ** -(torch.arange(D // 4) / (D // 4))
    angle = (position[:, :2, None] * inv_freq).flatten(1)
    parts = position, turns_of(inv_freq, H), angle.cos(), angle.sin()
    return Rotation(*(part.to(device) for part in parts))


@pytest.mark.parametrize("backend", ["auto", "library"])
def test_rotation_of_q_and_k(backend, device):
    x, xs, w, ws, bias = operands(52, 96, 160, device)
    rotation = rotation_of(52, 2, 16, device)
    live = torch.tensor([40], dtype=torch.int32, device=device)
    plain, out = (torch.empty(52, 96, dtype=BF16, device=device) for _ in range(2))
    linear_fp8(x, xs, w, ws, bias, out=plain, backend=backend)
    given = {"rotation": rotation, "live_rows": live, "backend": backend}
    assert linear_fp8(x, xs, w, ws, bias, out=out, **given) is out
    rope_(plain.view(52, 3, 2, 16), rotation.cos, rotation.sin, live, neighbours=True)
    for row in range(40):  # rows differ in scale by four decades
        assert rel_rms(out[row], plain[row]) < 1e-2
    qk, rotated = (t.view(52, 3, 32)[1:40, :2] for t in (linear_fp8_ref(x, xs, w, ws, bias), out))
    assert all(rel_rms(a, b) > 0.1 for a, b in zip(rotated, qk, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": "silu"}, r"rotated in out alone, not with \['transform'\]"),
        (BOUND, r"not with \['bound'\]"),
        (RESIDUAL, r"not with \['residual'\]"),
        ({"rotation": rotation_of(4, 1, 8, "cpu")}, r"contiguous \[T, 3 H \* 8\] .* got \[4, 16\]"),
    ],
)
def test_rotations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_fp8(**GOOD | {"rotation": rotation_of(4, 1, 8, "cpu")} | change)
