"""An encoder that names and fills its own static inputs."""

import pytest
import torch
from vitgraph.capture import BufferSpec, EncoderCudaGraphManager


class EagerRecorder:
    """A replay runs the work again on the same buffers."""

    class Recording:
        def __init__(self, work):
            self.replay = work

    def new_pool(self):
        return None

    def warm_up(self, work):
        work()

    def record(self, work, pool):
        return self.Recording(work)


@pytest.fixture
def manager_of():
    def build(encoder):
        config = {"token_budgets": [16, 32]}
        manager = EncoderCudaGraphManager(encoder, config, recorder=EagerRecorder())
        manager.capture()
        return manager

    return build


@pytest.fixture
def staging_encoder(fake_encoder):
    class StagingEncoder(fake_encoder):
        """The grid of every frame as (h, w), and how many frames there are."""

        def __init__(self):
            super().__init__()
            self.staged = []

        def input_specs(self, limits):
            specs = super().input_specs(limits)
            del specs["grid"]
            frames = limits.max_frames
            specs["frames"] = BufferSpec((frames + 1, 2), torch.int64, "frames")
            specs["count"] = BufferSpec((frames,), torch.int64, "windows")
            return specs

        def stage(self, grid_thw, limits):
            self.staged.append((list(grid_thw), limits.token_budget))
            frames = torch.ones(limits.max_frames + 1, 2, dtype=torch.int64)
            sides = [(h, w) for t, h, w in grid_thw for _ in range(t)]
            frames[: len(sides)] = torch.tensor(sides)
            return {"frames": frames, "count": torch.full((limits.max_frames,), len(sides))}

        def graph_forward(self, inputs, outputs, limits):
            assert inputs.keys() == {"pixel_values", "frames", "count"}
            grid = torch.zeros(limits.max_frames, 3, dtype=torch.int64)
            live = torch.arange(limits.max_frames) < inputs["count"][0]
            grid[:, 0] = live
            grid[:, 1:] = inputs["frames"][:-1] * live[:, None]
            self._forward(inputs["pixel_values"], grid, outputs, limits.max_frames)

    return StagingEncoder


def test_tables_of_its_own(staging_encoder, manager_of, pixels_for):
    encoder = staging_encoder()
    manager = manager_of(encoder)
    grid = [(1, 4, 6), (2, 4, 4), (1, 6, 8), (1, 8, 8)]  # two replays
    pixels = pixels_for(grid)
    got = manager.execute(pixels, grid)
    expected = encoder.eager_forward(pixels, grid)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert manager.stats()["misses"] == 0
    assert sorted(item for items, _ in encoder.staged for item in items) == sorted(grid)
    assert len(encoder.staged) == 2


def test_an_input_may_be_called_grid(staging_encoder, manager_of, pixels_for):
    """It is the encoder's own, of any shape."""
    encoder = staging_encoder()
    specs, stage, forward = encoder.input_specs, encoder.stage, encoder.graph_forward
    encoder.input_specs = lambda limits: (
        specs(limits) | {"grid": BufferSpec((limits.max_frames, 4), torch.int32, "frames")}
    )
    encoder.stage = lambda grid, limits: (
        stage(grid, limits) | {"grid": torch.full((limits.max_frames, 4), 9, dtype=torch.int32)}
    )
    encoder.graph_forward = lambda inputs, outputs, limits: forward(
        {name: inputs[name] for name in ("pixel_values", "frames", "count")}, outputs, limits
    )
    manager, grid = manager_of(encoder), [(1, 4, 4)]
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid)
    got = manager.execute(pixels, grid)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    (slot,) = manager.ladder.ring.slots
    assert (slot.inputs["grid"][: manager.rungs[0].max_frames] == 9).all()


def test_no_gradients_of_what_it_stages(staging_encoder, manager_of, pixels_for):
    """A table may be made of weights, such as positions."""
    encoder = staging_encoder()
    specs, stage, forward = encoder.input_specs, encoder.stage, encoder.graph_forward
    weight = torch.ones(1, requires_grad=True)
    encoder.input_specs = lambda limits: (
        specs(limits) | {"weights": BufferSpec((limits.max_frames, 1), torch.float32, "frames")}
    )
    encoder.stage = lambda grid, limits: (
        stage(grid, limits) | {"weights": weight.expand(limits.max_frames, 1) * 2}
    )
    encoder.graph_forward = lambda inputs, outputs, limits: forward(
        {name: inputs[name] for name in ("pixel_values", "frames", "count")}, outputs, limits
    )
    manager = manager_of(encoder)
    got = manager.execute(pixels_for([(1, 4, 4)]), [(1, 4, 4)])
    (slot,) = manager.ladder.ring.slots
    assert (slot.inputs["weights"][: manager.rungs[0].max_frames] == 2).all()
    assert not any(tensor.requires_grad for tensor in (*slot.inputs.values(), *got.values()))


def test_pixels_are_not_optional(staging_encoder):
    class Nameless(staging_encoder):
        def input_specs(self, limits):
            specs = super().input_specs(limits)
            del specs["pixel_values"]
            return specs

    with pytest.raises(ValueError, match=r"input_specs names \['count', 'frames'\]"):
        EncoderCudaGraphManager(Nameless(), {"token_budgets": [16]}, recorder=EagerRecorder())


def test_other_names_need_a_stage(staging_encoder):
    class Without(staging_encoder):
        stage = None

    with pytest.raises(ValueError, match=r"must name exactly grid and pixel_values"):
        EncoderCudaGraphManager(Without(), {"token_budgets": [16]}, recorder=EagerRecorder())
