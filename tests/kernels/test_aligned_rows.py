"""Memory whose rows start at lines of the cache."""

import pytest
import torch
from vitgraph.kernels.aligned_rows import LINE, aligned_rows, with_aligned_rows
from vitgraph.kernels.quantize import FP8
from vitgraph.kernels.zero_padding import ZeroedPadding

DTYPES = [FP8, torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("F", [1, 131, 4304])
def test_rows_start_at_lines(F, dtype, device):
    like = torch.empty(0, device=device, dtype=torch.bfloat16)
    out = aligned_rows(like, 3, F, dtype=dtype)
    assert out.shape == (3, F)
    assert out.dtype == (dtype or torch.bfloat16)
    assert out.device == like.device
    assert out.stride(1) == 1
    step = out.stride(0) * out.itemsize
    assert step % LINE == 0
    assert step - F * out.itemsize < LINE, "no further apart than they have to be"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [131, 256])
@pytest.mark.parametrize("live", [0, 2, 3])
def test_padding_is_zero(live, F, dtype, device):
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    with ZeroedPadding(live_rows) as padding:
        out = aligned_rows(torch.empty(0, device=device), 3, F, dtype=dtype, padding=padding)
    assert out[:live].float().isnan().all()  # not written: what new memory holds in these tests
    assert not out[live:].float().any()


def test_rows_of_whole_lines_are_contiguous():
    assert aligned_rows(torch.empty(0), 5, 1152, dtype=FP8).is_contiguous()
    assert aligned_rows(torch.empty(0), 5, 1152, dtype=torch.bfloat16).is_contiguous()


def at_a_line(T, F, device):
    """bf16 [T, F] of which row 0 starts at a line, as all memory of a GPU does."""
    memory = torch.zeros(LINE + T * F, dtype=torch.bfloat16, device=device)
    start = -memory.data_ptr() % LINE // 2
    return memory[start : start + T * F].view(T, F)


def test_a_matrix_is_copied_only_if_it_has_to_be(device):
    whole = at_a_line(4, 128, device).copy_(torch.arange(4 * 128).view(4, 128))
    assert with_aligned_rows(whole) is whole
    assert with_aligned_rows(whole[:, :96]).data_ptr() == whole.data_ptr()
    for matrix in (whole[:, 1:], whole[:, :72].contiguous(), whole.t()):
        copy = with_aligned_rows(matrix)
        assert copy.data_ptr() != matrix.data_ptr()
        assert torch.equal(copy, matrix)
        assert copy.stride(0) * copy.itemsize % LINE == 0
