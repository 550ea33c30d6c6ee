"""Attention that writes fp8 without a scale: every kernel that can, and those that cannot."""

import pytest
import torch
from vitgraph.kernels import attention, attention_fa4, attention_hopper
from vitgraph.kernels.attention import FP8_BACKENDS, attention_ref, varlen_attention
from vitgraph.kernels.quantize import FP8, FP8_MAX
from vitgraph.kernels.testing import rel_rms
from vitgraph.kernels.window_attention import window_attention, window_attention_ref

LENGTHS = [33, 0, 64, 1, 50]
T = sum(LENGTHS)
PAD = 6
NAN = float("nan")
NAN_BYTE = 0x7F


def make(D, device, dtype=torch.bfloat16, factor=20.0):
    """q, k, v (views of one buffer, NaN past the end), cu_seqlens and fp8 `out` of NaN."""
    g = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(T + PAD, 3, 2, D, device=device, generator=g)
    qkv[:, 2] = factor * (qkv[:, 2] + 1)
    qkv[T:] = NAN
    cu = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    out = torch.full((T + PAD, 2, D), NAN_BYTE, dtype=torch.uint8, device=device).view(FP8)
    return *qkv.to(dtype).unbind(1), cu, out


def run(backend, q, k, v, cu, out, scale=0.2):
    """The attention of `backend`, or of "window", whose rotation is by an angle of 0."""
    if backend == "window":
        cos = torch.ones(len(q), q.shape[2] // 2, device=q.device)
        sin = torch.zeros_like(cos)
        window_attention(q, k, v, cos, sin, cu, scale=scale, out=out)
    else:
        varlen_attention(q, k, v, cu, max_seqlen=64, scale=scale, out=out, backend=backend)


def check(out, reference, inputs, cu, scale=0.2):
    """As near to `reference` in fp64, clamped, as fp8 and its error in bf16 allow; nothing else."""
    live = [x[:T] for x in inputs]
    exact = reference(*(x.double() for x in live), cu, scale=scale)
    eager = reference(*live, cu, scale=scale).double()
    nearest = exact.clamp(-FP8_MAX, FP8_MAX)
    got = out[:T].double()
    assert got.isfinite().all()
    # half a step of 3 bits or of the smallest values, on top of what sums in bf16 have lost
    error = (got - nearest).abs()
    assert (error <= nearest.abs() / 16 + 2**-10 + 2 * (eager - exact).abs().max()).all()
    lost = rel_rms(nearest.to(FP8).double(), nearest), rel_rms(eager, exact)
    assert rel_rms(got, nearest) <= 1.05 * lost[0] + 2 * lost[1]
    assert (out[T:].view(torch.uint8) == NAN_BYTE).all(), "a row past the segments was written"


BACKENDS = ["reference", "triton", "window"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [16, 64, 72, 80])
def test_casts(D, backend, device):
    q, k, v, cu, out = make(D, device)
    run(backend, q, k, v, cu, out)
    check(out, attention_ref, (q, k, v), cu)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturates(backend, device):
    q, k, v, cu, out = make(64, device, factor=1e4)
    run(backend, q, k, v, cu, out)
    check(out, attention_ref, (q, k, v), cu)
    assert (out[:T].float().abs() == FP8_MAX).float().mean() > 0.5


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_segment(backend, device):
    q, k, v, cu, out = make(64, device)
    v[40] = NAN
    run(backend, q, k, v, cu, out)
    is_nan = out[:T].float().isnan().flatten(1)
    assert is_nan[33:97].all()
    assert not is_nan[:33].any()
    assert not is_nan[97:].any()


def test_the_rotation_of_windows_is_before_it(device):
    q, k, v, cu, out = make(64, device)
    angle = torch.rand(len(q), 32, device=device)
    tables = angle.cos(), angle.sin()
    window_attention(q, k, v, *tables, cu, scale=0.2, out=out)
    check(out, window_attention_ref, (q, k, v, *tables), cu)


REFUSAL = r"share one dtype; got .*float8_e4m3fn$"


@pytest.mark.parametrize("backend", sorted({*attention.BACKENDS} - {*FP8_BACKENDS}))
def test_others_refuse(backend):
    q, k, v, cu, out = make(64, "cpu")
    with pytest.raises(TypeError, match=REFUSAL):
        run(backend, q, k, v, cu, out)


def test_fa4_alone_refuses():
    q, k, v, cu, out = make(64, "cpu")
    with pytest.raises(TypeError, match=REFUSAL):
        attention_fa4.varlen_attention_fa4(q, k, v, cu, max_seqlen=64, scale=0.2, out=out)


def test_other_dtypes_are_refused():
    q, k, v, cu, out = make(64, "cpu")
    with pytest.raises(TypeError, match=r"but out may be torch.float8_e4m3fn; got .*e5m2"):
        run("reference", q, k, v, cu, out.view(torch.float8_e5m2))
    with pytest.raises(TypeError, match="share one dtype"):
        run("reference", q.to(FP8), k, v, cu, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("factor", [20.0, 1e4])
def test_hopper(factor, D, dtype):
    if reason := attention_hopper.unusable_reason(torch.device("cuda"), D, dtype):
        pytest.skip(reason)
    q, k, v, cu, out = make(D, "cuda", dtype, factor)
    run("hopper", q, k, v, cu, out)
    check(out, attention_ref, (q, k, v), cu)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 72, 80, 128])
def test_hopper_casts_what_it_writes_otherwise(D):
    """In every configuration that is chosen, and where rows begin again."""
    if reason := attention_hopper.unusable_reason(torch.device("cuda"), D, torch.bfloat16):
        pytest.skip(reason)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(7000, 3, 16, D, device="cuda", generator=g).bfloat16().unbind(1)
    k[500:600] *= 40
    for lengths in ([196], [784], [1296], [6500, 500], [300] * 20):
        rows = sum(lengths)
        cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        views = q[:rows], k[:rows], v[:rows], cu
        wide, out = (torch.empty(rows, 16, D, device="cuda", dtype=t) for t in (q.dtype, FP8))
        for result in (wide, out):
            attention_hopper.varlen_attention_hopper(*views, scale=0.3, out=result)
        # rounded once instead of twice: the one or the other of two neighbours
        error = (out.float() - wide.float()).abs()
        assert (error <= wide.float().abs() * (1 / 16 + 2**-8) + 2**-9).all()
        # one in 16 values of bf16 lies between two of fp8, and half of them had been rounded to it
        assert (out.float() == wide.to(FP8).float()).float().mean() > 0.95
