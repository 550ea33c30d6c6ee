import pytest
import torch
from vitgraph.kernels import norm as norm_module
from vitgraph.kernels.norm import NormConfig, blocks, config, norm, norm_op, norm_ref
from vitgraph.kernels.residual import residual
from vitgraph.kernels.testing import assert_as_accurate

SHAPES = [
    pytest.param(1, 1152, id="one"),
    pytest.param(3, 127, id="odd"),
    pytest.param(4, 1152, id="qwen3-vl-8b"),
    pytest.param(5, 1280, id="qwen2.5-vl"),
    pytest.param(2, 4608, id="deepstack"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(T, D, dtype, device, kind):
    g = torch.Generator().manual_seed(T * D)
    # an offset row mean catches one-pass variance
    x = torch.randn(T, D, generator=g) + 3
    weight = torch.randn(D, generator=g) + 1
    bias = torch.randn(D, generator=g) if kind == "layer" else None
    offset = torch.randn(D, generator=g).to(device)
    move = lambda v: None if v is None else v.to(device, dtype)  # noqa: E731
    return (move(x), move(weight), move(bias), 1e-6), offset


def double(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_matches_oracle(T, D, dtype, kind, device):
    args, offset = arguments(T, D, dtype, device, kind)
    eager = norm_ref(*args, kind=kind, offset=offset)
    oracle = norm_ref(*double(args), kind=kind, offset=offset.double())
    assert_as_accurate(norm(*args, kind=kind, offset=offset), eager, oracle)


@pytest.mark.parametrize(
    ("T", "D", "widths"),
    [
        (2047, 1152, (2048, 0)),
        (2048, 1152, (1024, 256)),
        (2048, 1280, (1024, 256)),
        (2048, 1024, (1024, 0)),
        (2048, 1025, (1024, 256)),
        (2048, 1600, (1024, 1024)),
        (2048, 100, (64, 64)),
        (2048, 2048, (2048, 0)),
        (2048, 2049, (4096, 0)),
        (2048, 31, (32, 0)),
        (10**6, 1152, (1024, 256)),
        (10**6, 4608, (8192, 0)),
    ],
)
def test_rows_are_split_where_that_is_faster(T, D, widths):
    assert blocks(D, config(T, D)) == widths


@pytest.mark.parametrize(
    ("T", "D", "rows", "num_warps"),
    [
        (1, 1025, 1, 8), (1024, 2048, 1, 8), (1025, 1152, 2, 4), (2047, 1152, 2, 4),
        (512, 1024, 1, 4), (513, 1024, 2, 4), (2048, 768, 2, 1),
        (1024, 2049, 1, 8), (4096, 8192, 1, 8), (1, 8193, 1, 16),
    ],
)  # fmt: skip
def test_warps_by_rows_and_width(T, D, rows, num_warps):
    launch = config(T, D)
    assert (launch.rows, launch.num_warps) == (rows, num_warps)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("D", [96, 127, 1152, 1280])
def test_split_rows(D, kind, device, monkeypatch):
    monkeypatch.setattr(norm_module, "config", lambda T, D: NormConfig(2, 1, split=True))
    args, offset = arguments(5, D, torch.bfloat16, device, kind)
    eager = norm_ref(*args, kind=kind, offset=offset)
    oracle = norm_ref(*double(args), kind=kind, offset=offset.double())
    assert_as_accurate(norm(*args, kind=kind, offset=offset), eager, oracle)
    # padding is not read and written as zeros in both blocks, and rows go where they are sent
    order = torch.tensor([3, 0, 4, 2, 1], dtype=torch.int32, device=device)
    args[0][3:] = float("nan")
    live = torch.tensor([3], dtype=torch.int32, device=device)
    moved = norm(*args, kind=kind, offset=offset, destination=order, live_rows=live)
    assert (moved[order.long()[3:]] == 0).all()
    assert_as_accurate(moved[order.long()[:3]], eager[:3], oracle[:3])


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("live", [0, 1, 4, 7])
def test_padding_is_zero_and_never_read(live, kind, device):
    args, offset = arguments(7, 96, torch.float32, device, kind)
    clean = norm(*args, kind=kind, offset=offset)
    args[0][live:] = float("nan")
    live_rows = torch.tensor([live * 4], dtype=torch.int32, device=device)
    y = norm(*args, kind=kind, offset=offset, live_rows=live_rows, live_group=4)
    assert torch.equal(y[:live], clean[:live])
    assert (y[live:] == 0).all()


def test_more_live_rows_than_there_are(device):
    """What lies behind x and y is left alone, also by the program of their last row."""
    T, D = 2049, 32  # two rows a program
    weight = torch.ones(D, device=device)
    stream, target = (torch.full((T + 3, D), 7.0, device=device) for _ in range(2))
    stream[:T].normal_()
    live = torch.tensor([T + 3], dtype=torch.int32, device=device)
    assert config(T, D).rows > 1
    norm(stream[:T], weight, None, 1e-6, kind="rms", live_rows=live, out=target[:T])
    torch.testing.assert_close(target[:T], norm_ref(stream[:T], weight, None, 1e-6, kind="rms"))
    assert (target[T:] == 7.0).all()


def test_destination(device):
    args, offset = arguments(9, 64, torch.float32, device, "rms")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).int().to(device)
    live = torch.tensor([9], dtype=torch.int32, device=device)
    plain = norm(*args, kind="rms", offset=offset)
    moved = norm(*args, kind="rms", offset=offset, destination=order, live_rows=live)
    assert torch.equal(moved[order.long()], plain)
    oracle = norm_ref(*args, kind="rms", offset=offset, destination=order)
    assert torch.equal(oracle[order.long()], norm_ref(*args, kind="rms", offset=offset))


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("live", [0, 5, 7])
@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize(("T", "D"), [(7, 96), (7, 1152), (2050, 100)])
def test_state_is_that_of_residual(T, D, splits, live, with_offset, device):
    """Bit for bit; rows in their own order while those of the norm go elsewhere."""
    args, offset = arguments(T, D, torch.bfloat16, device, "layer")
    offset = offset if with_offset else None
    live = live if T == 7 else T - 7 + live
    args[0][live:] = float("nan")
    g = torch.Generator().manual_seed(1)
    partials = torch.randn(splits, T, D, generator=g).to(device) if splits else None
    options = {"live_rows": torch.tensor([live], dtype=torch.int32, device=device)}
    streams = [args[0].clone() for _ in range(3)]
    want = residual(streams[0], offset, partials=partials, **options)
    options |= {"kind": "layer", "offset": offset, "partials": partials}
    options["destination"] = torch.randperm(T, generator=g).int().to(device)
    state = torch.full_like(want, float("nan"))
    y = norm(streams[1], *args[1:], state=state, **options)
    assert torch.equal(state, want)
    assert torch.equal(y, norm(streams[2], *args[1:], **options))
    assert torch.equal(streams[1][:live], streams[2][:live])


def test_rows_do_not_depend_on_their_neighbours(device):
    args, _ = arguments(6, 1152, torch.bfloat16, device, "layer")
    whole = norm(*args, kind="layer")
    for t in range(6):
        alone = norm(args[0][t : t + 1], *args[1:], kind="layer")
        assert torch.equal(alone[0], whole[t])


def test_writes_into_out_and_empty(device):
    args, _ = arguments(3, 64, torch.float32, device, "layer")
    out = torch.full_like(args[0], float("nan"))
    assert norm(*args, kind="layer", out=out) is out
    assert torch.equal(out, norm(*args, kind="layer"))
    assert norm(args[0][:0], *args[1:], kind="layer").shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batch"}, "'layer' or 'rms'"),
        ({"weight": torch.ones(7)}, r"weight \(7,\) must be \[8\]"),
        ({"offset": torch.ones(9)}, "offset"),
        ({"x": torch.zeros(8, 4).T}, "contiguous"),
        ({"weight": torch.ones(16)[::2]}, "weight .* contiguous"),
        ({"out": torch.zeros(2, 8)}, r"out must be contiguous \[4, 8\], got \[2, 8\]"),
        ({"out": torch.zeros(4, 16)[:, :8]}, "out must be contiguous"),
        ({"state": torch.zeros(4, 16)[:, :8]}, "state must be contiguous"),
        ({"state": torch.zeros(4, 7)}, r"state must be contiguous \[4, 8\], got \[4, 7\]"),
        ({"x": torch.zeros(1, 20000), "weight": torch.ones(20000)}, "over the limit"),
    ],
)
def test_bad_arguments(change, message):
    args = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "bias": None, "kind": "rms"} | change
    with pytest.raises(ValueError, match=message):
        norm(args["x"], args["weight"], args["bias"], 1e-6, kind=args["kind"],
             offset=args.get("offset"), state=args.get("state"), out=args.get("out"))  # fmt: skip


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    (x, w, b, eps), offset = arguments(2, 8, torch.float32, device, "layer")
    args = (x, w, b, eps, "layer", offset, None, None, 1)
    torch.library.opcheck(norm_op, args, test_utils=check)
