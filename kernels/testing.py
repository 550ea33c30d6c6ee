"""The one comparison that tests and benchmarks use."""

import torch


def rel_rms(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """RMS of the error over RMS of the oracle, both taken in fp64."""
    a, o = actual.double(), oracle.double()
    scale = o.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return ((a - o).square().mean().sqrt() / scale).item()


def error_ratio(actual: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> float:
    """Error of `actual` over the error that eager PyTorch makes in the same dtype.

    Eager's error is floored at half a unit in the last place of the dtype, which keeps the ratio
    meaningful where eager happens to be exact. NaN anywhere in `actual` gives NaN.
    """
    floor = torch.finfo(eager.dtype).eps / 2
    return rel_rms(actual, oracle) / max(rel_rms(eager, oracle), floor)


def assert_as_accurate(
    actual: torch.Tensor,
    eager: torch.Tensor,
    oracle: torch.Tensor,
    *,
    factor: float = 2.0,
    name: str = "output",
) -> None:
    """Fail unless `actual` is within `factor` of eager's own error against the fp64 `oracle`."""
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} instead of {eager.dtype}"
    assert actual.shape == eager.shape, f"{name}: {actual.shape} instead of {eager.shape}"
    assert not actual.isnan().any(), f"{name}: NaN (an element was never written?)"
    ratio = error_ratio(actual, eager, oracle)
    worst = (actual.double() - oracle.double()).abs().argmax().item() if actual.numel() else 0
    assert ratio <= factor, f"{name}: {ratio:.2f} times eager's error; worst at flat index {worst}"
