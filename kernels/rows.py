"""The number of live rows, and grids for kernels that read it on the device.

A captured graph has shapes for its largest batch. The rows of the present batch are counted by
`live_rows`, an int32 tensor [1] on the device, or None where all rows are live.
"""

import functools

import torch

# What the interpreter pretends to have: few enough that every persistent loop runs twice or more.
INTERPRETED_SMS = 4


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; `INTERPRETED_SMS` for the CPU."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def row_programs(device: torch.device, blocks: int) -> int:
    """Programs of a memory-bound kernel that loops over `blocks`.

    Eight programs of four warps fill a multiprocessor; a fixed grid costs no program for a block
    past the live rows, which a grid of one program a block would start and end.
    """
    return max(1, min(blocks, 8 * num_sms(device)))


def check_live_rows(operation: str, x: torch.Tensor, live_rows: torch.Tensor | None) -> None:
    """Raise ValueError unless `live_rows` is None or one int32 on the device of `x`."""
    if live_rows is None:
        return
    if live_rows.dtype != torch.int32 or live_rows.numel() != 1 or live_rows.device != x.device:
        raise ValueError(
            f"{operation}: live_rows must be one int32 on {x.device}, got "
            f"{tuple(live_rows.shape)} {live_rows.dtype} on {live_rows.device}"
        )
