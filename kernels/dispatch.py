"""Where a launcher runs: its Triton kernel, or its plain PyTorch definition.

Kernels run on CUDA tensors, and on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`
set before Triton is imported). Any other CPU tensor is computed by the operator's `*_ref`.
"""

import torch
from triton import knobs


def use_reference(tensor: torch.Tensor) -> bool:
    """True if an operator on `tensor` has to run its `*_ref` definition."""
    return not tensor.is_cuda and not knobs.runtime.interpret


def is_interpreting() -> bool:
    """True under `TRITON_INTERPRET=1`, where inline assembly and PDL are not available."""
    return bool(knobs.runtime.interpret)
