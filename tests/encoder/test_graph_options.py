import re
from dataclasses import fields

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphConfig
from vitgraph.encoder.graph_options import FLAGS, graph_choice, in_options

BUDGETS = "--encoder-cudagraph-token-budgets"
ITEMS = "--encoder-cudagraph-max-vision-items-per-batch"
FRAMES = "--encoder-cudagraph-max-frames-per-batch"
BYTES = "--encoder-cudagraph-max-bytes"
SLOTS = "--encoder-cudagraph-num-slots"
NOT_GIVEN = {key: False if key in ("calibrate", "nvtx") else None for key in FLAGS}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_flags_are_the_keys_of_the_configuration():
    assert list(FLAGS) == [field.name for field in fields(EncoderCudaGraphConfig)]
    assert FLAGS["max_frames_per_batch"] == FRAMES


@pytest.mark.parametrize("enable", [None, False])
def test_without_options_nothing_is_decided_here(enable):
    assert graph_choice(enable) is enable
    assert graph_choice(enable, **NOT_GIVEN) is enable
    assert graph_choice(enable, layers=True, **(NOT_GIVEN | {"token_budgets": []})) is False


@pytest.mark.parametrize(
    "texts",
    [["512,1024"], ["512", "1024"], ["[512, 1024]"], [" [1024]", "512"], ["1024, 512,512"]],
)
def test_lists_of_budgets(texts, gpu):
    config = graph_choice(None, token_budgets=texts)
    assert config == EncoderCudaGraphConfig((512, 1024))
    assert graph_choice(True, token_budgets=texts) == config


@pytest.mark.parametrize(
    "text",
    ["", ",", "512,", "x", "0", "-8", "512,0", "1.5", "[]", "[1.5]", "[true]", "[8, true]", "[[8]]",
     "[8", "{}", "[null]"],
)  # fmt: skip
def test_refuses_budgets(text, gpu):
    message = rf"{BUDGETS} {re.escape(text)}: give whole numbers of at least 1, .* or leave it out"
    with pytest.raises(ValueError, match=message):
        graph_choice(None, token_budgets=["512", text])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"token_budgets": ["8"]}, BUDGETS),
        ({"max_vision_items_per_batch": 8}, ITEMS),
        ({"max_frames_per_batch": 8}, FRAMES),
        ({"modality": "image"}, "--encoder-cudagraph-modality"),
        ({"num_slots": 1}, SLOTS),
        ({"calibrate": True}, "--encoder-cudagraph-calibrate"),
        ({"max_bytes": "1GiB"}, BYTES),
        ({"nvtx": True}, "--encoder-cudagraph-nvtx"),
    ],
)
def test_every_option_asks_for_graphs(arguments, flag, gpu, monkeypatch):
    asked = graph_choice(None, **(NOT_GIVEN | arguments))
    assert isinstance(asked, EncoderCudaGraphConfig)
    assert asked == graph_choice(True, **arguments)
    with pytest.raises(ValueError, match=rf"^{flag}: .* with --no-enable-vit-cuda-graph; leave"):
        graph_choice(False, **arguments)
    with pytest.raises(ValueError, match=rf"^{flag}: calls that return --layers"):
        graph_choice(None, **arguments, layers=True)
    with pytest.raises(ValueError, match=rf"^{flag}: CUDA graphs need .* goes to cpu; leave it"):
        graph_choice(None, **arguments, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^{flag}: CUDA graphs need a CUDA device"):
        graph_choice(None, **arguments)


def test_graphs_asked_for_by_name(gpu):
    assert graph_choice(True) is True
    with pytest.raises(ValueError, match=r"^--enable-vit-cuda-graph: calls that return --layers"):
        graph_choice(True, layers=True)
    with pytest.raises(ValueError, match=r"^--enable-vit-cuda-graph: CUDA graphs need"):
        graph_choice(True, token_budgets=["8"], device="cpu")


def test_errors_of_the_configuration_name_options(gpu):
    message = rf"^{ITEMS}=9 exceeds the smallest of {BUDGETS}, 8.*lower {ITEMS} to 8$"
    with pytest.raises(ValueError, match=message):
        graph_choice(True, token_budgets=["8,64"], max_vision_items_per_batch=9)
    with pytest.raises(ValueError, match=rf"^{FRAMES}=3 is below {ITEMS}=4"):
        graph_choice(True, max_vision_items_per_batch=4, max_frames_per_batch=3)
    with pytest.raises(ValueError, match=r"^--encoder-cudagraph-modality='audio' is unknown"):
        graph_choice(True, modality="audio")
    for slots in (0, 9):
        with pytest.raises(ValueError, match=rf"^{SLOTS}={slots} must be .* from 1 to 8; pass 1"):
            graph_choice(None, num_slots=slots)


def test_errors_of_a_capture_name_options():
    message = "capture: max_bytes=5 is less than the 9 bytes of a rung; use smaller token_budgets"
    assert in_options(message) == (
        f"capture: {BYTES}=5 is less than the 9 bytes of a rung; use smaller {BUDGETS}"
    )
    for other in ("calibrate: /tmp/max_bytes.json is damaged", "nvtx.jpg: no such file"):
        assert in_options(other) == other


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("8589934592", 2**33),
        (" 7 B", 7),
        ("1.0", 1),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("500MB", 500_000_000),
        ("500mb", 500_000_000),
        ("3kB", 3000),
        ("2TiB", 2 * 2**40),
        ("1.5KiB", 1536),
        ("0.29GB", 290_000_000),  # not 0.29 as a float
        ("1.2345kB", 1234),
    ],
)
def test_sizes(text, size, gpu):
    assert graph_choice(None, max_bytes=text) == EncoderCudaGraphConfig(max_bytes=size)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GiB", "-1", "8G", "8Gi", "8iB", "1.5", "1.5B", "0.0001kB", "1e9", "GiB", "8GiB/s",
     "8,5GB", "8 EB", "inf"],
)  # fmt: skip
def test_refuses_sizes(text, gpu):
    message = rf"^{BYTES} {re.escape(text)}: give a whole number of bytes of at least 1, or a size"
    with pytest.raises(ValueError, match=message + ".* such as 8GiB or 500MB, or leave it out"):
        graph_choice(None, max_bytes=text)
