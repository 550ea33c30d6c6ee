"""A captured ladder: rungs, their graphs over shared buffers, and what each of them cost.

A ladder is built aside and published whole, so that calls see the old one or the new one.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from .graph import BudgetGraphMetadata, GraphPool, Recorder
from .protocol import BufferSpec, RecordsVariants, RungLimits, SupportsEncoderCudaGraph
from .sample_layouts import full_item
from .slots import Slot, SlotRing
from .staging import allocate, leading_slices

# What a rung of an encoder that records none is recorded as.
ONLY_VARIANT = ""


@dataclass(frozen=True)
class CapturedRung:
    """One rung, for every slot.

    Attributes:
        graphs: one set of graphs a slot.
        capture_seconds: warm-up and recording.
        bytes: device memory that capturing it took; the largest rung also carries the shared
            static buffers and most of the pool.
    """

    graphs: tuple[BudgetGraphMetadata, ...]
    capture_seconds: float
    bytes: int


@dataclass
class CapturedLadder:
    """Everything that replays need.

    Attributes:
        rungs: captured rungs by their limits, ascending.
        ring: the slots.
        pool: the memory pool of the graphs.
        recorder: what recorded them, and would record more into the same pool.
        generation: 1 for the first ladder of a manager, one more for each that replaced it.
    """

    rungs: dict[RungLimits, CapturedRung]
    ring: SlotRing
    pool: GraphPool
    recorder: Recorder
    generation: int = 1
    limits: tuple[RungLimits, ...] = field(init=False)

    def __post_init__(self):
        self.limits = tuple(self.rungs)

    @property
    def total_bytes(self) -> int:
        """Device memory of all rungs."""
        return sum(rung.bytes for rung in self.rungs.values())


def capture_ladder(
    encoder: SupportsEncoderCudaGraph,
    rungs: Sequence[RungLimits],
    *,
    recorder: Recorder,
    pool: GraphPool,
    num_slots: int,
    generation: int = 1,
    show_progress: bool = False,
) -> CapturedLadder:
    """Allocate static buffers for the largest of `rungs` (ascending) and record all of them.

    All rungs are warmed up before the first is recorded: the memory of the warm-ups is then given
    back, so that it never lies beside that of the graphs. Both go from the largest rung down.

    Raises:
        ValueError: a rung that holds no image, or specs that differ between rungs.
    """
    meter = _Meter(encoder.device)
    meter.settle()
    specs = encoder.input_specs(rungs[-1]), encoder.output_specs(rungs[-1])
    slots = [Slot(*specs, encoder.device) for _ in range(num_slots)]
    static_bytes = meter.take()
    seconds = dict.fromkeys(rungs, 0.0)
    captured: dict[RungLimits, CapturedRung] = {}
    limits = rungs[-1]
    descending = rungs[::-1]
    bar = tqdm(total=2 * len(rungs), desc="capture", file=sys.stderr, disable=not show_progress)
    try:
        bar.set_postfix_str("compile")
        inputs, outputs = dict(slots[0].inputs), dict(slots[0].outputs)
        # where the warm-ups run: memory that is used on one stream cannot serve another
        recorder.warm_up(lambda: encoder.compile_kernels(inputs, outputs, rungs))
        for limits in descending:
            bar.set_postfix_str(f"warm up {limits.token_budget} tokens")
            full_item(encoder, limits)
            started = time.perf_counter()
            for variant in variants_of(encoder, limits):
                recorder.warm_up(_work(encoder, limits, variant, slots[0].inputs, slots[0].outputs))
            seconds[limits] = time.perf_counter() - started
            bar.update()
        meter.settle()
        for limits in descending:
            bar.set_postfix_str(f"record {limits.token_budget} tokens")
            started = time.perf_counter()
            graphs = tuple(_record(encoder, limits, slot, recorder, pool) for slot in slots)
            # The first launch uploads a graph. The tables are empty: no row is live.
            for recording in (r for graph in graphs for r in graph.recordings.values()):
                recording.replay()
            seconds[limits] += time.perf_counter() - started
            captured[limits] = CapturedRung(graphs, seconds[limits], meter.take() + static_bytes)
            static_bytes = 0
            bar.update()
    except BaseException as error:
        error.add_note(f"while capturing the rung of {limits.token_budget} tokens")
        raise
    finally:
        bar.close()
    return CapturedLadder(
        {limits: captured[limits] for limits in rungs}, SlotRing(slots), pool, recorder, generation
    )


def extend_ladder(
    encoder: SupportsEncoderCudaGraph, ladder: CapturedLadder, rungs: Sequence[RungLimits]
) -> CapturedLadder:
    """A ladder of `rungs` (ascending) over the buffers of `ladder`, which may go on replaying.

    Rungs that `ladder` has are taken over. New ones are warmed up on scratch memory, because the
    static buffers are in use, and recording runs nothing.

    Raises:
        ValueError: the largest of `rungs` exceeds the static buffers.
    """
    slots = ladder.ring.slots
    captured = {}
    for limits in rungs[::-1]:
        if limits in ladder.rungs:
            captured[limits] = ladder.rungs[limits]
            continue
        started = time.perf_counter()
        full_item(encoder, limits)
        inputs = allocate(encoder.input_specs(limits), encoder.device)
        outputs = allocate(encoder.output_specs(limits), encoder.device)
        for variant in variants_of(encoder, limits):
            ladder.recorder.warm_up(_work(encoder, limits, variant, inputs, outputs))
        meter = _Meter(encoder.device)
        graphs = tuple(
            _record(encoder, limits, slot, ladder.recorder, ladder.pool) for slot in slots
        )
        captured[limits] = CapturedRung(graphs, time.perf_counter() - started, meter.take())
    return CapturedLadder(
        {limits: captured[limits] for limits in rungs},
        ladder.ring,
        ladder.pool,
        ladder.recorder,
        ladder.generation + 1,
    )


def fits_buffers(
    encoder: SupportsEncoderCudaGraph, ladder: CapturedLadder, rung: RungLimits
) -> bool:
    """True if the static buffers of `ladder` are exactly those that `rung` as the largest needs."""
    return _rows(encoder.input_specs(rung)) == _rows_of(ladder.ring.slots[0].inputs)


def _rows(specs: Mapping[str, BufferSpec]) -> dict[str, int]:
    return {name: spec.shape[0] for name, spec in specs.items()}


def _rows_of(buffers: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: len(buffer) for name, buffer in buffers.items()}


def variants_of(encoder: SupportsEncoderCudaGraph, limits: RungLimits) -> tuple[str, ...]:
    """The ways in which a rung is recorded; one, without a name, if the encoder names none.

    Raises:
        ValueError: the encoder names a way twice, or an empty list of them.
    """
    if not isinstance(encoder, RecordsVariants):
        return (ONLY_VARIANT,)
    names = encoder.variants(limits)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"capture: {type(encoder).__name__}.variants is {names} for the rung of "
            f"{limits.token_budget} tokens; it must name one variant or more, each of them once"
        )
    return names


def _work(
    encoder: SupportsEncoderCudaGraph,
    limits: RungLimits,
    variant: str,
    all_inputs: Mapping[str, torch.Tensor],
    all_outputs: Mapping[str, torch.Tensor],
) -> Callable[[], None]:
    inputs = leading_slices(all_inputs, encoder.input_specs(limits))
    outputs = leading_slices(all_outputs, encoder.output_specs(limits))
    # Copies: an encoder that pops names must not empty the dictionaries kept here.
    if isinstance(encoder, RecordsVariants):
        return lambda: encoder.variant_forward(variant, dict(inputs), dict(outputs), limits)
    return lambda: encoder.graph_forward(dict(inputs), dict(outputs), limits)


def _record(
    encoder: SupportsEncoderCudaGraph,
    limits: RungLimits,
    slot: Slot,
    recorder: Recorder,
    pool: GraphPool,
) -> BudgetGraphMetadata:
    inputs = leading_slices(slot.inputs, encoder.input_specs(limits))
    outputs = leading_slices(slot.outputs, encoder.output_specs(limits))
    recordings = {
        variant: recorder.record(_work(encoder, limits, variant, inputs, outputs), pool)
        for variant in variants_of(encoder, limits)
    }
    return BudgetGraphMetadata(limits, recordings, inputs, outputs)


class _Meter:
    """Device memory used since the last look, as the driver counts it; 0 without CUDA."""

    def __init__(self, device: torch.device):
        self._device = device
        self._free = self._look()

    def take(self) -> int:
        """Bytes gone since the last look, and look again."""
        before, self._free = self._free, self._look()
        return max(0, before - self._free)

    def settle(self) -> None:
        """Give cached memory back to the device, and look again."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            self._free = self._look()

    def _look(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 0
