"""Which attention serves a device, and what the one for compute capability 9.0 says of others."""

import pytest
import torch
from vitgraph.kernels import attention, attention_hopper
from vitgraph.kernels.attention_hopper import varlen_attention_hopper

BF16 = torch.bfloat16


def test_reasons(monkeypatch):
    reason = attention_hopper.unusable_reason
    cuda = torch.device("cuda", 0)
    assert reason(torch.device("cpu")) == "needs a CUDA device, this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert reason(cuda) == "needs compute capability 9.0, this is 10.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert "needs torch.float16 or torch.bfloat16" in str(reason(cuda, 72, torch.float32))
    assert "multiple of 8 up to 128, not 136" in str(reason(cuda, 136, BF16))
    assert "multiple of 8 up to 128, not 12" in str(reason(cuda, 12, BF16))
    monkeypatch.setattr(attention_hopper, "_gluon_reason", lambda: None)
    assert reason(cuda, 128, BF16) is None
    monkeypatch.setattr(attention_hopper, "_gluon_reason", lambda: "Triton lacks it")
    assert reason(cuda, 128, BF16) == "Triton lacks it"


def test_the_interpreter_cannot_run_it(monkeypatch):
    attention_hopper._gluon_reason.cache_clear()
    monkeypatch.setattr(attention_hopper, "is_interpreting", lambda: True)
    try:
        assert "unset TRITON_INTERPRET" in str(attention_hopper._gluon_reason())
    finally:
        attention_hopper._gluon_reason.cache_clear()


@pytest.fixture
def without_packages(monkeypatch):
    """Let the chooser find an H200 without FlashAttention-4."""
    attention._reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_hopper, "_gluon_reason", lambda: None)
    monkeypatch.setattr(
        "vitgraph.kernels.attention_fa4.unusable_reason", lambda *a: "flash-attn-4 is not installed"
    )
    yield torch.device("cuda", 0)
    attention._reason.cache_clear()


def test_chosen_by_what_is_there(without_packages, monkeypatch):
    device = without_packages
    assert attention.choose_backend(device, BF16, 72) == "hopper"
    assert attention.choose_backend(device, torch.float16, 128) == "hopper"
    assert attention.choose_backend(device, torch.float32, 72) == "triton"
    attention._reason.cache_clear()
    monkeypatch.setattr("vitgraph.kernels.attention_fa4.unusable_reason", lambda *a: None)
    assert attention.choose_backend(device, BF16, 72) == "hopper"
    attention._reason.cache_clear()
    monkeypatch.setattr(attention_hopper, "unusable_reason", lambda *a: "needs another Triton")
    assert attention.choose_backend(device, BF16, 72) == "fa4"


def test_other_gpus_take_triton(without_packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert attention.choose_backend(without_packages, BF16, 72) == "triton"


def test_cpu_tensors_are_refused():
    x = torch.zeros(4, 1, 64, dtype=BF16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r'needs a CUDA device, this is cpu; use backend="triton"'):
        varlen_attention_hopper(x, x, x, cu, scale=1.0, out=x.clone())
