"""Slots: sets of static buffers in a ring, and leases on what a replay left in one.

With one slot every replay uses the same buffers. With more, the next batch is staged into another
slot while this one is replayed, and results can be read in place until their slot comes round.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import torch

from .protocol import BufferSpec
from .staging import allocate


class Slot:
    """Static buffers for the largest rung.

    Attributes:
        inputs, outputs: the buffers; smaller rungs use their leading rows.
        table: the grid table that was copied to `inputs` last; None if there was none.
        generation: how often the slot was taken; a lease of an earlier generation is stale.
    """

    def __init__(
        self,
        input_specs: Mapping[str, BufferSpec],
        output_specs: Mapping[str, BufferSpec],
        device: torch.device,
    ):
        self.inputs = allocate(input_specs, device)
        self.outputs = allocate(output_specs, device)
        self.table: torch.Tensor | None = None
        self.generation = 0
        self._on_cuda = device.type == "cuda"
        self._replayed: torch.cuda.Event | None = None
        self._released: torch.cuda.Event | None = None

    def take(self) -> None:
        """Begin a new generation, ordered after whoever released the last one."""
        self.generation += 1
        if self._released is not None:
            self._released.wait()
            self._released = None

    @contextmanager
    def staging_on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Fill `inputs` on `stream`: after their last replay, before what follows on this one."""
        with torch.cuda.stream(stream):
            if self._replayed is not None:
                stream.wait_event(self._replayed)
            yield
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def mark_replayed(self) -> None:
        """Note on the current stream that the inputs may be overwritten."""
        if self._on_cuda:
            if self._replayed is None:
                self._replayed = torch.cuda.Event()
            self._replayed.record()

    def mark_released(self) -> None:
        """Note on the current stream that the outputs may be overwritten."""
        if self._on_cuda:
            self._released = torch.cuda.Event()
            self._released.record()


class Lease:
    """Results that lie in static buffers, readable until their slot is taken again.

    A slot is taken again when it was released, or when all others are leased too, the oldest lease
    first. Use as a context manager or call `release`, on the stream that reads the results.
    """

    def __init__(self, slot: Slot | None, outputs: Mapping[str, torch.Tensor]):
        self._outputs: dict[str, torch.Tensor] = dict(outputs)
        self._slot = slot
        self._generation = 0 if slot is None else slot.generation
        self._released = False
        self._revoked = False

    @property
    def zero_copy(self) -> bool:
        """True if the results are rows of static buffers.

        False if the call needed several batches or ran eagerly: the results are the lease's own.
        """
        return self._slot is not None or self._revoked

    @property
    def valid(self) -> bool:
        """True until the lease is released or its slot is taken again."""
        return not self._released and not self._is_overtaken()

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """The encoder's outputs by name, rows in the order of the items.

        Raises:
            RuntimeError: the lease was released, or its slot holds a later call's results.
        """
        if self._released:
            raise RuntimeError(
                "lease: it was released; read its outputs before that, or copy what is needed"
            )
        if self._is_overtaken():
            raise RuntimeError(
                "lease: its slot was taken by a later call, or the graphs were cleared, so the "
                "outputs are gone; read them earlier, copy them, or capture with more num_slots"
            )
        return self._outputs

    def release(self) -> None:
        """Give the slot back; what the current stream was given so far is done before reuse."""
        if self._slot is not None and self.valid:
            self._slot.mark_released()
        self._released = True
        self._outputs.clear()

    def revoke(self) -> None:
        """Make the lease stale and let go of the static buffers."""
        self._revoked = True
        self._slot = None
        self._outputs.clear()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_overtaken(self) -> bool:
        if self._slot is None:
            return self._revoked
        return self._slot.generation != self._generation


class SlotRing:
    """Hands out slots: a free one if there is any, else the one leased longest ago."""

    def __init__(self, slots: Sequence[Slot]):
        self.slots = tuple(slots)
        self._clock = count()
        self._taken_at = [-1] * len(self.slots)
        self._leases: list[Lease | None] = [None] * len(self.slots)

    def next(self) -> int:
        """Take a slot and return its index."""
        several = len(self.slots) > 1
        index = min(range(len(self.slots)), key=self._precedence) if several else 0
        self._taken_at[index] = next(self._clock)
        self._leases[index] = None
        self.slots[index].take()
        return index

    def lease(self, index: int, outputs: Mapping[str, torch.Tensor]) -> Lease:
        """A lease on the slot taken last under `index`."""
        lease = Lease(self.slots[index], outputs)
        self._leases[index] = lease
        return lease

    def revoke_leases(self) -> None:
        """Make every lease stale, so that none keeps static buffers alive."""
        for lease in self._leases:
            if lease is not None:
                lease.revoke()

    def _precedence(self, index: int) -> tuple[bool, int]:
        lease = self._leases[index]
        return lease is not None and lease.valid, self._taken_at[index]
