import re

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphConfig
from vitgraph.encoder.graph_options import FLAGS, graph_choice

BUDGETS = "--encoder-cudagraph-token-budgets"
ITEMS = "--encoder-cudagraph-max-vision-items-per-batch"
FRAMES = "--encoder-cudagraph-max-frames-per-batch"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_every_flag_is_a_key_of_the_configuration():
    assert set(FLAGS) <= set(EncoderCudaGraphConfig.__dataclass_fields__)


@pytest.mark.parametrize("enable", [None, False])
def test_without_options_nothing_is_decided_here(enable):
    assert graph_choice(enable) is enable
    assert graph_choice(enable, [], layers=True) is False


@pytest.mark.parametrize(
    "texts",
    [["512,1024"], ["512", "1024"], ["[512, 1024]"], [" [1024]", "512"], ["1024, 512,512"]],
)
def test_lists_of_budgets(texts, gpu):
    config = graph_choice(None, texts)
    assert config == EncoderCudaGraphConfig((512, 1024))
    assert graph_choice(True, texts) == config


@pytest.mark.parametrize(
    "text",
    ["", ",", "512,", "x", "0", "-8", "512,0", "1.5", "[]", "[1.5]", "[true]", "[8, true]", "[[8]]",
     "[8", "{}", "[null]"],
)  # fmt: skip
def test_refuses_budgets(text, gpu):
    message = rf"{BUDGETS} {re.escape(text)}: give whole numbers of at least 1, .* or leave it out"
    with pytest.raises(ValueError, match=message):
        graph_choice(None, ["512", text])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"token_budgets": ["8"]}, BUDGETS),
        ({"max_vision_items_per_batch": 8}, ITEMS),
        ({"max_frames_per_batch": 8}, FRAMES),
        ({"modality": "image"}, "--encoder-cudagraph-modality"),
    ],
)
def test_every_option_asks_for_graphs(arguments, flag, gpu, monkeypatch):
    assert isinstance(graph_choice(None, **arguments), EncoderCudaGraphConfig)
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
        graph_choice(True, ["8"], device="cpu")


def test_errors_of_the_configuration_name_options(gpu):
    message = rf"^{ITEMS}=9 exceeds the smallest of {BUDGETS}, 8.*lower {ITEMS} to 8$"
    with pytest.raises(ValueError, match=message):
        graph_choice(True, ["8,64"], 9)
    with pytest.raises(ValueError, match=rf"^{FRAMES}=3 is below {ITEMS}=4"):
        graph_choice(True, None, 4, 3)
    with pytest.raises(ValueError, match=r"^--encoder-cudagraph-modality='audio' is unknown"):
        graph_choice(True, modality="audio")
