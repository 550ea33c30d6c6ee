import pytest
import torch
from vitgraph.kernels import zero_padding as module
from vitgraph.kernels.launch import launch_kernel
from vitgraph.kernels.zero_padding import (
    BLOCK,
    MOST_BUFFERS,
    ZeroedPadding,
    programs,
    zero_padding_,
    zero_padding_op,
    zero_padding_ref,
)

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16, FP8]
LIVE = [0, 1, 5, 9, 12]  # of 9 rows


def live_rows(live, device):
    return torch.tensor([live], dtype=torch.int32, device=device)


def as_bytes(x):
    return x.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("width", [1, 127, 1152, 4304])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeroes_padding_alone(dtype, width, live, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, width, generator=g).to(device, dtype)
    # NaN in every dtype
    x.view(torch.uint8)[live:] = 0xFF
    kept = as_bytes(x[:live])
    assert zero_padding_(x, live_rows(live, device)) is x
    assert torch.equal(as_bytes(x[:live]), kept)
    assert not as_bytes(x[live:]).any()


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference(dtype, live):
    x = torch.randn(9, 24).to(dtype)
    before = as_bytes(x).clone()
    y = zero_padding_ref(x, live)
    assert torch.equal(as_bytes(x), before)
    assert torch.equal(as_bytes(y[:live]), before[:live])
    assert not as_bytes(y[live:]).any()


@pytest.mark.parametrize("live", [0, 1, 6, 7])
def test_cpu_tensors_take_the_reference(live, monkeypatch):
    x = torch.randn(7, 3, 5)
    want = zero_padding_ref(x, live)
    monkeypatch.setattr(module, "use_reference", lambda x: True)
    assert zero_padding_(x, live_rows(live, "cpu")) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("live", [0, 2, 1000])
def test_programs_that_loop(live, device, monkeypatch):
    """More blocks than programs, the last one not whole, and many rows in each."""
    monkeypatch.setattr(module, "programs", lambda nbytes, device: 3)
    x = torch.ones(1000, 3, 11, device=device, dtype=torch.bfloat16)
    assert x.nbytes > 8 * BLOCK
    zero_padding_(x, live_rows(live, device))
    assert (x[:live] == 1).all()
    assert not x[live:].any()


def test_what_lies_around_a_buffer_stays(device):
    memory = torch.ones(12, 40, device=device)
    zero_padding_(memory[2:9], live_rows(4, device))
    assert (memory[:6] == 1).all()
    assert not memory[6:9].any()
    assert (memory[9:] == 1).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 2, 8)])
def test_empty(shape, device):
    assert zero_padding_(torch.ones(shape, device=device), live_rows(0, device)).shape == shape


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_several_in_as_few_launches_as_hold_them(count, live, device, monkeypatch):
    launches = []

    def launch(*args, **options):
        launches.append(args)
        launch_kernel(*args, **options)

    monkeypatch.setattr(module, "launch_kernel", launch)
    dtypes = [DTYPES[i % len(DTYPES)] for i in range(count)]
    buffers = [torch.ones(9, 3 + 5 * i, device=device).to(d) for i, d in enumerate(dtypes)]
    with ZeroedPadding(live_rows(live, device)) as padding:
        for x in buffers:
            assert padding.of(x) is x
            padding.of(x[:0])
        assert not launches
    assert len(launches) == -(-count // MOST_BUFFERS)
    for x in buffers:
        assert (x[:live].float() == 1).all()
        assert not as_bytes(x[live:]).any()


def test_nothing_is_launched_for_nothing(monkeypatch):
    monkeypatch.setattr(module, "_zero", None)  # not called
    with ZeroedPadding(live_rows(1, "cpu")) as padding:
        padding.of(torch.ones(3, 0))
    with ZeroedPadding(None) as padding:
        padding.of(torch.ones(3, 4))


def test_an_error_is_not_held_up(monkeypatch):
    monkeypatch.setattr(module, "_zero", None)  # not called
    padding = ZeroedPadding(live_rows(1, "cpu"))
    padding.of(torch.ones(3, 4))
    with pytest.raises(KeyError), padding:
        raise KeyError


def test_buffers_of_other_lengths_are_refused():
    padding = ZeroedPadding(live_rows(1, "cpu"))
    padding.of(torch.ones(3, 4))
    with pytest.raises(ValueError, match="x has 4 rows, the buffers before it have 3"):
        padding.of(torch.ones(4, 4))


def test_no_live_rows_are_all_rows(device):
    x = torch.ones(3, 4, device=device)
    assert (zero_padding_(x, None) == 1).all()


def test_programs():
    cpu = torch.device("cpu")  # of 4 multiprocessors
    assert [programs(n, cpu) for n in (1, BLOCK, BLOCK + 1, 8 * BLOCK)] == [1, 1, 2, 8]
    assert programs(131_072 * 15_360 * 4, cpu) == 32


def test_bad_arguments():
    live = live_rows(1, "cpu")
    with pytest.raises(ValueError, match=r"x must be contiguous .* strides \(8, 1\)"):
        zero_padding_(torch.zeros(3, 8)[:, :4], live)
    with pytest.raises(ValueError, match=r"x must be contiguous \[T, \.\.\.\], got shape \(\)"):
        zero_padding_(torch.tensor(1.0), live)
    with pytest.raises(ValueError, match=r"live_rows must be one int32 on cpu, got \(1,\) .*int64"):
        zero_padding_(torch.zeros(3, 8), live.long())


@pytest.mark.gpu
def test_offsets_past_an_int32():
    x = torch.ones(131_072, 15_360, dtype=torch.float32, device="cuda")  # 7.5 GiB
    live = len(x) - 40
    zero_padding_(x, live_rows(live, "cuda"))
    assert not x[live:].any()
    assert (x[:live].amin(1) == 1).all()


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (torch.ones(2, 8, device=device), live_rows(1, device))
    torch.library.opcheck(zero_padding_op, args, test_utils=check)
