"""The bytes that ranks send each other, in one process; test_data_parallel.py has several."""

import pytest
import torch
from vitgraph.capture import BufferSpec, EncoderItemSpec, rank_exchange
from vitgraph.capture.rank_exchange import RankStatus, RowExchange

# Rows of 3 bytes, of 10, of 8 and of one number: regions would be misaligned end to end.
SPECS = {
    "bytes": BufferSpec((9, 3), torch.uint8, "tokens"),
    "half": BufferSpec((9, 5), torch.bfloat16, "patches"),
    "long": BufferSpec((9,), torch.int64, "items"),
    "double": BufferSpec((9, 1), torch.float64, "frames"),
}
ITEMS = [EncoderItemSpec(4 * tokens, tokens, frames) for tokens, frames in [(3, 1), (1, 1), (6, 2)]]
SHARDS = [(0, 2), (), (1,)]
COUNTS = {"bytes": [3, 1, 6], "half": [12, 4, 24], "long": [1, 1, 1], "double": [1, 1, 2]}


def values(name, item):
    shape = (COUNTS[name][item], *SPECS[name].shape[1:])
    return (
        (torch.arange(torch.Size(shape).numel()) + 50 * item + 1).view(shape).to(SPECS[name].dtype)
    )


def outputs_of(indices):
    empty = {name: torch.empty(0, *s.shape[1:], dtype=s.dtype) for name, s in SPECS.items()}
    return {n: torch.cat([empty[n], *(values(n, i) for i in indices)]) for n in SPECS}


@pytest.fixture
def exchanges(monkeypatch):
    exchanges = [RowExchange(SPECS, ITEMS, SHARDS, rank, torch.device("cpu")) for rank in range(3)]

    def all_gather(received, sent, group):
        received.copy_(torch.cat([exchange._mine for exchange in exchanges]))

    monkeypatch.setattr(rank_exchange, "all_gather", all_gather)
    return exchanges


def test_rows_come_back_in_the_order_of_items(exchanges):
    for exchange, shard in zip(exchanges, SHARDS, strict=True):
        exchange.put(outputs_of(shard))
    for exchange in exchanges:
        results = exchange.gather(None)
        expected = outputs_of([0, 1, 2])
        assert list(results) == list(expected)
        for name, tensor in results.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
            # the caller's, not a view that keeps the blocks of all ranks alive
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_padding_is_zero(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(7))
    for rank, shard in enumerate(SHARDS):
        exchange = RowExchange(SPECS, ITEMS, SHARDS, rank, torch.device("cpu"))
        exchange.put(outputs_of(shard))
        live = sum(
            tensor.view(-1).view(torch.uint8).count_nonzero()
            for tensor in outputs_of(shard).values()
        )
        assert exchange._mine.count_nonzero() == live


def test_poisoned_rows(exchanges):
    for exchange, shard in zip(exchanges, SHARDS, strict=True):
        exchange.put(outputs_of(shard))
    exchanges[0].poison()
    results, expected = exchanges[2].gather(None), outputs_of([0, 1, 2])
    for name, tensor in results.items():
        own = slice(COUNTS[name][0], sum(COUNTS[name][:2]))  # item 1, of rank 2
        assert torch.equal(tensor[own], expected[name][own])
        for lost in (tensor[: own.start], tensor[own.stop :]):
            assert lost.isnan().all() if tensor.is_floating_point() else not lost.any()


def test_status_round_trip_cuts_long_messages():
    status = RankStatus(b"12345678", b"\0abcdefg", "rank: " + "é" * 1000)
    packed = status.pack()
    assert len(packed) == 512
    back = RankStatus.unpack(packed)
    assert (back.batch, back.setup) == (status.batch, status.setup)
    assert len(back.error) > 240
    assert status.error.startswith(back.error)
    assert RankStatus.unpack(RankStatus().pack()) == RankStatus()
