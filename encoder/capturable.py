"""What encoders ask and prepare before their work is recorded in CUDA graphs."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from ..capture import RungLimits, SupportsEncoderCudaGraph
from ..capture.staging import leading_slices
from ..kernels.launch import compiling


def check_capturable(device: torch.device, attention: Iterable[str]) -> None:
    """Refuse an encoder on `device` with these attention backends.

    Raises:
        RuntimeError: it is not on a CUDA device.
        ValueError: a backend is "reference".
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"capture: CUDA graphs need a CUDA device, this tower is on {device}; load it or move "
            "it there, or call the encoder without capture"
        )
    if "reference" in attention:
        raise ValueError(
            "capture: attention = 'reference' reads offsets on the host, which a graph cannot; "
            "choose another backend (see `vitgraph info`) or call the encoder without capture"
        )


def compile_by_halves(
    encoder: SupportsEncoderCudaGraph,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    rungs: Sequence[RungLimits],
) -> None:
    """Compile the kernels of some of `rungs`, several at a time, over the buffers of the largest.

    Kernels differ by thresholds of rows, so the rungs are taken by halves; what only one of the
    others launches is compiled when that is warmed up.
    """
    with compiling():
        patches = 2 * rungs[-1].max_patches
        for limits in reversed(rungs):
            if 2 * limits.max_patches <= patches:
                patches = limits.max_patches
                encoder.graph_forward(
                    leading_slices(inputs, encoder.input_specs(limits)),
                    leading_slices(outputs, encoder.output_specs(limits)),
                    limits,
                )
