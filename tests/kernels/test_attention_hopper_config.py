"""Which configuration of the attention for compute capability 9.0 serves a call, and what fits."""

import pytest
import torch
from vitgraph.kernels.attention_hopper import (
    CANDIDATES,
    ROWS,
    LaunchConfig,
    holds_maximum,
    launch_config,
    q_buffers,
    short_step,
    split_head_dim,
    usable_configs,
)

BF16 = torch.bfloat16
PAIR = LaunchConfig(groups=2, block_n=128, num_stages=3)


@pytest.mark.parametrize(
    ("D", "expected"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (56, (64, 0)), (64, (64, 0)),
     (72, (64, 16)), (80, (64, 16)), (88, (64, 32)), (96, (64, 32)), (104, (128, 0)),
     (128, (128, 0))],
)  # fmt: skip
def test_split_head_dim(D, expected):
    assert split_head_dim(D) == expected


def shared_bytes(D, config):
    """Of q, k and v, and of the tiles that are stored, one a group."""
    first, second = split_head_dim(D)
    rows_q = q_buffers(config, D, BF16) * config.groups * ROWS
    parts = config.groups if holds_maximum(config, D, BF16) else 0
    loaded = rows_q + (2 * config.num_stages + parts) * config.block_n
    return 2 * (loaded * (first + second) + config.groups * ROWS * first)


@pytest.mark.parametrize("D", range(8, 129, 8))
@pytest.mark.parametrize("num_rows", [1, 196, 528, 529, 784, 65536])
@pytest.mark.parametrize("num_heads", [1, 16])
def test_a_config_fits(D, num_rows, num_heads):
    config = launch_config(D, num_rows, num_heads, num_sms=132)
    assert shared_bytes(D, config) * config.programs_per_sm <= 226 << 10
    assert config.num_stages >= 2
    assert config in usable_configs(D)


@pytest.mark.parametrize("D", range(8, 129, 8))
def test_usable_configs_are_those_that_fit(D):
    usable = usable_configs(D)
    assert usable == [c for c in CANDIDATES if c in usable]
    for config in CANDIDATES:
        bytes_used = shared_bytes(D, config) * config.programs_per_sm
        assert (config in usable) == (bytes_used <= 226 << 10), config
    assert str(LaunchConfig(1, 64, 4, 2)) == "64/64x4 by 2"


@pytest.mark.parametrize(
    ("head_dim", "num_rows", "num_heads", "config"),
    [
        (64, 196, 16, LaunchConfig(1, 64, 8)),
        (64, 512, 16, LaunchConfig(1, 64, 8)),  # 128 tiles of one group, a multiprocessor for each
        (64, 513, 16, LaunchConfig(1, 64, 5, 2)),
        (80, 196, 16, LaunchConfig(1, 64, 4, 2)),
        (64, 1024, 16, LaunchConfig(1, 64, 5, 2)),
        (64, 1025, 16, LaunchConfig(3, 64, 4)),  # 272 tiles of one group, of 264 at once
        (80, 2112, 8, LaunchConfig(1, 64, 4, 2)),
        (80, 2113, 8, LaunchConfig(3, 64, 4)),
        (64, 1536, 16, LaunchConfig(3, 64, 4)),  # 128 of three
        (64, 1537, 16, LaunchConfig(1, 64, 5, 2)),
        (64, 8191, 16, LaunchConfig(1, 64, 5, 2)),
        (64, 8192, 16, LaunchConfig(2, 128, 4)),
        (64, 10000, 12, LaunchConfig(1, 64, 5, 2)),
        (72, 512, 16, LaunchConfig(1, 64, 5)),
        (72, 513, 16, LaunchConfig(2, 64, 5)),
        (72, 512, 17, LaunchConfig(2, 64, 5)),
        (72, 1024, 16, LaunchConfig(2, 64, 5)),
        (72, 1025, 16, LaunchConfig(3, 64, 4)),
        (72, 1600, 16, LaunchConfig(2, 64, 5)),  # two rounds either way
        (72, 2304, 16, LaunchConfig(3, 64, 4)),  # two of three groups, three of two
        (72, 4096, 16, LaunchConfig(2, 64, 5)),
        (80, 1024, 16, LaunchConfig(1, 64, 4, 2)),
        (80, 1025, 16, LaunchConfig(3, 64, 4)),
        (80, 1536, 16, LaunchConfig(3, 64, 4)),
        (80, 1537, 16, LaunchConfig(1, 64, 4, 2)),
        (80, 6144, 16, LaunchConfig(1, 64, 4, 2)),
        (80, 6145, 16, LaunchConfig(3, 64, 4)),
        (72, 6272, 16, LaunchConfig(3, 64, 4)),
        (72, 65536, 16, LaunchConfig(3, 64, 4)),
        (128, 512, 16, LaunchConfig(1, 64, 4)),
        (96, 512, 16, LaunchConfig(1, 64, 4)),
        (96, 1296, 16, LaunchConfig(2, 64, 5)),
        (96, 65536, 16, LaunchConfig(2, 64, 5)),
        (128, 65536, 16, LaunchConfig(2, 64, 4)),
    ],
)
def test_config_by_width_and_number_of_tiles(head_dim, num_rows, num_heads, config):
    assert launch_config(head_dim, num_rows, num_heads, num_sms=132) == config


@pytest.mark.parametrize(
    ("head_dim", "config", "buffers", "rows", "held"),
    [
        (72, PAIR, 2, 64, True),
        (80, PAIR, 2, 64, True),
        (88, PAIR, 2, 0, False),  # registers for no short step, no shared memory to begin again
        (96, PAIR, 2, 0, False),
        (72, LaunchConfig(2, 64, 5), 2, 32, True),
        (128, LaunchConfig(2, 64, 4), 1, 32, True),
        (128, LaunchConfig(2, 64, 5), 1, 32, False),
        (64, LaunchConfig(1, 64, 5, 2), 1, 0, True),  # one group
        (64, LaunchConfig(1, 128, 3, 2), 1, 0, False),
        (72, LaunchConfig(3, 64, 4), 2, 0, True),  # three have fewer registers
        (128, LaunchConfig(1, 64, 4), 1, 0, True),
    ],
)
def test_what_a_program_has_room_for(head_dim, config, buffers, rows, held):
    assert q_buffers(config, head_dim, BF16) == buffers
    assert short_step(config, head_dim) == rows
    assert holds_maximum(config, head_dim, BF16) == held
    assert not holds_maximum(config, head_dim, torch.float16)  # it ends at 65,504
