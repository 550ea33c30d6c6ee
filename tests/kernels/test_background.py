"""Products on few multiprocessors: when they are chosen, and that they compute the same."""

import pytest
import torch
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels.background import MOST_ROWS, PROGRAMS, TILE, suits_background
from vitgraph.kernels.gemm import gemm, gemm_ref, hopper_reason
from vitgraph.kernels.testing import assert_as_accurate

BF16 = torch.bfloat16
CUDA = torch.device("cuda")


class Matrix:
    """What `suits_background` asks of a tensor on the GPU."""

    def __init__(self, rows, columns, dtype=BF16, address=0, pitch=None):
        self.shape, self.dtype, self.device = (rows, columns), dtype, CUDA
        self.itemsize = dtype.itemsize
        self._address, self._strides = address, (pitch or columns, 1)

    def __len__(self):
        return self.shape[0]

    def data_ptr(self):
        return self._address

    def stride(self, axis):
        return self._strides[axis]


FC1, FC2 = Matrix(4608, 4608), Matrix(4096, 4608)


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)


def test_for_few_rows(h200):
    assert suits_background(Matrix(1, 4608), FC1, FC2)
    assert suits_background(Matrix(MOST_ROWS, 4608), FC1, FC2)
    assert not suits_background(Matrix(MOST_ROWS + 1, 4608), FC1, FC2)


@pytest.mark.parametrize(
    ("x", "fc1", "fc2"),
    [
        pytest.param(Matrix(8, 4608, torch.float32), FC1, FC2, id="fp32"),
        pytest.param(Matrix(8, 4608, address=8), FC1, FC2, id="x-not-aligned"),
        pytest.param(Matrix(8, 4608), Matrix(4608, 4608, pitch=4612), FC2, id="pitch"),
        pytest.param(Matrix(8, 4608), FC1, Matrix(4092, 4608), id="rows-of-the-output"),
    ],
)
def test_not_for_what_the_kernel_cannot_compute(x, fc1, fc2, h200):
    assert not suits_background(x, fc1, fc2)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_not_on_other_gpus(capability, h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert not suits_background(Matrix(8, 4608), FC1, FC2)


def test_not_on_a_cpu():
    x = torch.zeros(8, 16, dtype=BF16)
    assert not suits_background(x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("live", [0, 1, 49, 64, 65, 96])
@pytest.mark.parametrize("N", [1000, 4096])
def test_few_programs_compute_what_many_do(N, live):
    if reason := hopper_reason(CUDA, BF16):
        pytest.skip(reason)
    M, K = 96, 4608
    g = torch.Generator("cuda").manual_seed(live)
    x = torch.randn(M, K, device="cuda", generator=g).to(BF16)
    x[live:] = float("nan")
    weight = (torch.randn(N, K, device="cuda", generator=g) * K**-0.5).to(BF16)
    bias = torch.randn(N, device="cuda", generator=g).to(BF16)
    live_rows = torch.tensor([live], dtype=torch.int32, device="cuda")

    def run(programs):
        out = torch.full((M, N), 7.0, dtype=BF16, device="cuda")
        gemm(
            x, weight, bias, activation="gelu_erf", out=out, live_rows=live_rows,
            config=TILE, programs=programs,
        )  # fmt: skip
        return out

    few = run(PROGRAMS)
    for programs in (None, 1):
        other = run(programs)
        assert torch.equal(other[:live], few[:live])
    written = -(-live // TILE.block_m) * TILE.block_m
    assert (few[written:] == 7).all()
    if live:
        operands = x[:live], weight, bias
        eager = gemm_ref(*operands, activation="gelu_erf")
        oracle = gemm_ref(*(t.double() for t in operands), activation="gelu_erf")
        assert_as_accurate(few[:live], eager, oracle, name="y")
