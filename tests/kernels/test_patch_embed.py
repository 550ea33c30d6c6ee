import pytest
import torch
from vitgraph.kernels.layout import layout_ref
from vitgraph.kernels.patch_embed import (
    choose_backend,
    patch_embed,
    patch_embed_op,
    patch_embed_ref,
)
from vitgraph.kernels.testing import assert_as_accurate

GRID = torch.tensor([[1, 4, 6], [2, 2, 10], [1, 2, 2]], dtype=torch.int32)
ROWS = 24 + 40 + 4


def arguments(P, D, side, dtype, device, padding=0):
    g = torch.Generator().manual_seed(P + D)
    make = lambda *s: torch.randn(*s, generator=g).to(device, dtype)  # noqa: E731
    plan = layout_ref(
        GRID.to(device), torch.ones(1), num_rows=ROWS + padding, num_frames=4, num_windows=8,
        merge=2, window=4,
    )  # fmt: skip
    args = (make(ROWS + padding, P), make(D, P) * P**-0.5, make(D))
    extra = {"source": plan.source, "position": plan.position}
    if side:
        extra["table"] = make(side**2, D)
    return args, extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("P", "D", "side", "sampling"),
    [
        (24, 16, 4, "bilinear_corners"),
        (1176, 40, 0, "bilinear_corners"),
        (96, 136, 9, "bilinear_corners"),
        (588, 40, 5, "bilinear"),
        (24, 40, 5, "bicubic"),
        (48, 72, 16, "bilinear_antialias"),
    ],
)
def test_matches_oracle(P, D, side, sampling, dtype, device):
    args, extra = arguments(P, D, side, dtype, device)
    extra["sampling"] = sampling
    oracle_extra = extra | ({"table": extra["table"].double()} if side else {})
    eager = patch_embed_ref(*args, **extra)
    oracle = patch_embed_ref(*(a.double() for a in args), **oracle_extra)
    # fp32: one running sum over P, where the library keeps several
    factor = 3.0 if dtype == torch.float32 else 2.0
    assert_as_accurate(patch_embed(*args, **extra), eager, oracle, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("P", "D", "side", "sampling"),
    [
        (24, 16, 4, "bilinear_corners"),
        (1176, 40, 0, "bilinear_corners"),
        (588, 136, 5, "bilinear"),
        (24, 40, 5, "bicubic"),
        (48, 72, 16, "bilinear_antialias"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_by_the_library(P, D, side, sampling, has_bias, dtype, device):
    (pixels, weight, bias), extra = arguments(P, D, side, dtype, device)
    bias = bias if has_bias else None
    source = extra.pop("source")
    extra["sampling"] = sampling
    oracle_extra = extra | ({"table": extra["table"].double()} if side else {})
    exact = patch_embed_ref(
        pixels.double(), weight.double(), None if bias is None else bias.double(), **oracle_extra
    )
    x = patch_embed(pixels, weight, bias, **extra, backend="library")
    assert_as_accurate(x, patch_embed_ref(pixels, weight, bias, **extra), exact)
    # rounded once: as near as the nearest value, but for the error of sums in fp32
    half_a_step = torch.finfo(dtype).eps * exact.abs() / 2
    assert (x.double() - exact).abs().le(half_a_step + 1e-5).all()
    with pytest.raises(ValueError, match="takes rows in the order of the pixels; use 'triton'"):
        patch_embed(pixels, weight, bias, source=source, backend="library")


def test_where_the_library_is_taken():
    def backend(
        T=512,
        P=1536,
        D=1152,
        dtype=torch.bfloat16,
        device="cuda",
        has_source=False,
        has_table=False,
    ):
        place = torch.device(device)
        return choose_backend(
            T, P, D, dtype, place, has_source=has_source, has_table=has_table
        )  # fmt: skip

    assert backend() == backend(dtype=torch.float16) == "library"
    assert backend(T=511) == backend(P=588) == backend(D=1150) == "triton"
    assert backend(dtype=torch.float32) == backend(device="cpu") == "triton"
    assert backend(has_source=True) == "triton"
    assert backend(has_table=True) == backend(T=65535 * 16, has_table=True) == "library"
    assert backend(T=65535 * 16 + 1, has_table=True) == "triton"
    assert backend(T=65535 * 16 + 1) == "library"


def test_more_rows_than_a_launch_has():
    pixels, table = torch.zeros(65535 * 16 + 1, 1), torch.zeros(4, 1)
    position = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 1048560 rows, not 1048561; use 'triton'"):
        patch_embed(
            pixels, torch.zeros(1, 1), table=table, position=position, backend="library"
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("has_table", [False, True], ids=["plain", "table"])
@pytest.mark.parametrize("live", [0, 1, 600, 703, 704])
def test_many_rows(live, has_table):
    """Of which "auto" takes the library on a GPU: NaN past the live rows reaches nothing."""
    g = torch.Generator().manual_seed(live)
    make = lambda *s: torch.randn(*s, generator=g).to("cuda", torch.bfloat16)  # noqa: E731
    pixels, weight, bias = make(704, 1176), make(72, 1176), make(72)
    extra, exact = {}, {}
    if has_table:
        r = torch.arange(704, device="cuda")
        position = torch.stack([r // 32, r % 32, 0 * r + 22, 0 * r + 32], 1).int()
        extra = {"table": make(81, 72), "position": position}
        exact = extra | {"table": extra["table"].double()}
    clean = patch_embed(pixels, weight, bias, **extra)
    assert torch.equal(clean, patch_embed(pixels, weight, bias, **extra, backend="library"))
    oracle = patch_embed_ref(pixels.double(), weight.double(), bias.double(), **exact)
    eager = patch_embed_ref(pixels, weight, bias, **extra)
    for backend in ("library", "triton"):
        x = patch_embed(pixels, weight, bias, **extra, backend=backend)
        assert_as_accurate(x, eager, oracle)
    pixels[live:] = float("nan")
    live_rows = torch.tensor([live], dtype=torch.int32, device="cuda")
    x = patch_embed(pixels, weight, bias, **extra, live_rows=live_rows)
    assert torch.equal(x[:live], clean[:live])
    assert (x[live:] == 0).all()


@pytest.mark.parametrize("backend", ["triton", "library"])
@pytest.mark.parametrize("side", [0, 4], ids=["plain", "table"])
@pytest.mark.parametrize("live", [0, 1, 24, 68])
def test_padding_is_zero_whatever_stale_pixels_hold(live, side, backend, device):
    args, extra = arguments(24, 16, side, torch.float32, device, padding=12)
    del extra["source"]
    extra["backend"] = backend
    clean = patch_embed(*args, **extra)
    args[0][live:] = float("nan")
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    x = patch_embed(*args, **extra, live_rows=live_rows)
    assert torch.equal(x[:live], clean[:live])
    assert (x[live:] == 0).all()


@pytest.mark.parametrize(
    ("pixels", "weight", "table", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(6, 7), None, r"weight \[D, 8\]"),
        (torch.zeros(8, 4).T, torch.zeros(6, 8), None, "contiguous"),
        (torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(8, 6), "square grid"),
        (torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(9, 6), "`position`"),
    ],
)
def test_bad_arguments(pixels, weight, table, message):
    with pytest.raises(ValueError, match=message):
        patch_embed(pixels, weight, table=table)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cublas' is not one of"):
        patch_embed(torch.zeros(4, 8), torch.zeros(6, 8), backend="cublas")


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args, extra = arguments(24, 16, 4, torch.float32, device)
    full = (*args, extra["source"], extra["table"], extra["position"], None, "bicubic")
    torch.library.opcheck(patch_embed_op, full, test_utils=check)
