"""What the ranks of a process group send each other: a status before results, and rows.

Sizes never travel. Every rank knows them from the grid of the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from .protocol import BufferSpec, EncoderItemSpec, Pruning, Rows
from .rows import row_counts

_STATUS_BYTES = 512
_DIGEST_BYTES = 8
_HEADER_BYTES = 2 * _DIGEST_BYTES
# Regions of a block start at multiples of this, so that any dtype can view them.
_ALIGNMENT = 16


@dataclass(frozen=True)
class RankStatus:
    """How far a rank has come.

    Attributes:
        batch: digest of the grid that it was given; 8 bytes.
        setup: digest of how it shares the work out and what it returns; 8 bytes.
        error: what went wrong, or empty; cut at about 490 bytes.
    """

    batch: bytes = bytes(_DIGEST_BYTES)
    setup: bytes = bytes(_DIGEST_BYTES)
    error: str = ""

    def pack(self) -> bytes:
        """512 bytes: both digests, then the error in UTF-8, then zeros."""
        error = self.error.encode(errors="replace")[: _STATUS_BYTES - _HEADER_BYTES]
        return (self.batch + self.setup + error).ljust(_STATUS_BYTES, b"\0")

    @classmethod
    def unpack(cls, packed: bytes) -> "RankStatus":
        """The reverse of `pack`."""
        error = packed[_HEADER_BYTES:].rstrip(b"\0").decode(errors="ignore")
        return cls(packed[:_DIGEST_BYTES], packed[_DIGEST_BYTES:_HEADER_BYTES], error)


class StatusBoard:
    """Exchanges a status between all ranks of `group`, beside the work on `device`.

    Through the CPU if the group has a backend for it. Otherwise on a stream of its own, so that the
    host waits for the other hosts and for earlier exchanges, but not for the encoder.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        backends = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
        if f"{device.type}:" not in backends:
            raise ValueError(
                f"DataParallelEncoder: the encoder is on {device}, and the process group has "
                f"backends for {backends} only; make one for {device.type} with "
                "torch.distributed.new_group(backend=...)"
            )
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._stream = None
        if "cpu:" in backends:
            device = torch.device("cpu")
        else:
            self._stream = torch.cuda.Stream(device)
        # Allocated now: a rank that has run out of memory must still be able to say so.
        with torch.inference_mode(False):
            self._mine = torch.zeros(_STATUS_BYTES, dtype=torch.uint8, device=device)
            self._all = torch.zeros(self._ranks * _STATUS_BYTES, dtype=torch.uint8, device=device)
        self.follow_current_stream()  # on which they were zeroed

    def exchange(self, status: RankStatus) -> list[RankStatus]:
        """The status of every rank. Waits until all ranks have called."""
        if self._ranks == 1:
            return [status]
        packed = torch.frombuffer(bytearray(status.pack()), dtype=torch.uint8)
        with torch.cuda.stream(self._stream):  # no effect without a stream
            self._mine.copy_(packed)
            all_gather(self._all, self._mine, self._group)
            received = self._all.cpu().numpy().tobytes()
        return [
            RankStatus.unpack(received[start : start + _STATUS_BYTES])
            for start in range(0, len(received), _STATUS_BYTES)
        ]

    def follow_current_stream(self) -> None:
        """Order later exchanges after collectives that the current stream has been given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


class RowExchange:
    """Gathers the output rows of all ranks, in the order of the items, by one collective.

    A rank sends a block of bytes with a region for each output, as long as the largest that any
    rank needs. Bytes, because not every backend gathers every dtype.

    Args:
        specs: the outputs to gather.
        items: the whole batch.
        shards: the items of each rank, ascending.
        rank: this one.
        device: where outputs and blocks live.
        pruning: what the items keep; None for all.
    """

    def __init__(
        self,
        specs: Mapping[str, BufferSpec],
        items: Sequence[EncoderItemSpec],
        shards: Sequence[Sequence[int]],
        rank: int,
        device: torch.device,
        pruning: Pruning | None = None,
    ):
        self._specs = specs
        self._items = items
        self._shards = shards
        self._rank = rank
        self._counts = {spec.rows: row_counts(spec.rows, items, pruning) for spec in specs.values()}
        self._starts: dict[str, int] = {}
        size = 0
        for name, spec in specs.items():
            self._starts[name] = size
            size += max(self._rows(spec.rows, r) for r in range(len(shards))) * _row_bytes(spec)
            size = -(-size // _ALIGNMENT) * _ALIGNMENT
        # Zeros, so that what other ranks receive as padding is never what was in memory before.
        # Both are allocated before any rank is waited for, where running out of memory can be told.
        self._mine = torch.zeros(size, dtype=torch.uint8, device=device)
        self._all = torch.empty(len(shards), size, dtype=torch.uint8, device=device)

    def put(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's outputs, of the shapes that its items have, into its block."""
        for name, spec in self._specs.items():
            region = self._region(name, self._mine, 0, self._rows(spec.rows, self._rank))
            region.copy_(outputs[name])

    def poison(self) -> None:
        """Send NaN in place of rows that could not be computed (zeros where there is no NaN)."""
        self._mine.zero_()
        for name, spec in self._specs.items():
            if spec.dtype.is_floating_point:
                rows = self._rows(spec.rows, self._rank)
                self._region(name, self._mine, 0, rows).fill_(torch.nan)

    def gather(self, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """Fresh tensors with the rows of all items; every rank of `group` has to call it."""
        if self._all.numel():
            all_gather(self._all.view(-1), self._mine, group)
        results = {}
        for name, spec in self._specs.items():
            pieces = [
                self._region(name, self._all[rank], first, rows)
                for rank, first, rows in self._pieces(spec.rows)
            ]
            if not pieces:
                pieces = [
                    torch.empty((0, *spec.shape[1:]), dtype=spec.dtype, device=self._all.device)
                ]
            results[name] = torch.cat(pieces)
        return results

    def _rows(self, kind: Rows, rank: int) -> int:
        return sum([self._counts[kind][index] for index in self._shards[rank]])

    def _pieces(self, kind: Rows) -> list[tuple[int, int, int]]:
        """(rank, first row in its region, rows) of stretches of items, in the order of the items.

        Neighbours on one rank are neighbours in its region, since shards ascend.
        """
        counts = self._counts[kind]
        owners = {index: rank for rank, shard in enumerate(self._shards) for index in shard}
        ends = [0] * len(self._shards)
        pieces: list[tuple[int, int, int]] = []
        for index in range(len(self._items)):
            rank, rows = owners[index], counts[index]
            if pieces and pieces[-1][0] == rank:
                pieces[-1] = (rank, pieces[-1][1], pieces[-1][2] + rows)
            else:
                pieces.append((rank, ends[rank], rows))
            ends[rank] += rows
        return pieces

    def _region(self, name: str, block: torch.Tensor, first: int, rows: int) -> torch.Tensor:
        """Rows [first, first + rows) of the output `name` in a block of bytes."""
        spec = self._specs[name]
        start = self._starts[name] + first * _row_bytes(spec)
        piece = block[start : start + rows * _row_bytes(spec)]
        return piece.view(spec.dtype).view(rows, *spec.shape[1:])


def all_gather(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Concatenate `sent` of every rank into `received`."""
    # torch 2.13 renamed the function and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent, group)


def _row_bytes(spec: BufferSpec) -> int:
    return prod(spec.shape[1:]) * spec.dtype.itemsize
