from types import SimpleNamespace

import pytest
import torch
from vitgraph.encoder import branch
from vitgraph.encoder.branch import MOST_ROWS, Branch


def test_in_line_on_a_cpu():
    x = torch.zeros(3)
    branch = Branch(torch.device("cpu"), rows=1)
    with branch.after_main(x):
        x += 1
    branch.join()
    assert (x == 1).all()


class FakeStream:
    """One of the few streams that are handed out in turn."""

    pool = (11, 12, 13)
    handed_out = 0

    def __init__(self, device):
        self.device = device
        self.cuda_stream = self.pool[FakeStream.handed_out % len(self.pool)]
        FakeStream.handed_out += 1


@pytest.mark.parametrize("main_is", FakeStream.pool)
def test_the_branch_is_never_the_main_line_itself(main_is, monkeypatch):
    """A graph may be recorded on the very stream that would be handed out next."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(FakeStream, "handed_out", 0)
    main = SimpleNamespace(device=torch.device("cuda", 1), cuda_stream=main_is)
    find = branch._side_stream.__wrapped__
    side = find(main)
    assert side.cuda_stream != main_is
    assert side.device == main.device
    monkeypatch.setattr(FakeStream, "handed_out", FakeStream.pool.index(main_is))
    assert find(main).cuda_stream != main_is


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "is_beside"), [(MOST_ROWS, True), (MOST_ROWS + 1, False)], ids=["few", "many"]
)
def test_beside_the_main_line_of_a_graph(rows, is_beside):
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.arange(4.0, device=device)
    squares, sums = torch.zeros_like(x), torch.zeros_like(x)
    streams = []

    def work():
        branch = Branch(device, rows)
        copied = x + 0
        with branch.after_main(copied):
            streams.append(torch.cuda.current_stream())
            squares.copy_(copied * copied)
        sums.copy_(copied + x)
        branch.join()
        sums.add_(squares)

    work()  # eager calls are in line
    assert streams.pop() == torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        work()
    assert (streams.pop() != main) == is_beside
    for start in (0.0, 5.0):
        x.copy_(torch.arange(4.0) + start)
        graph.replay()
        assert torch.equal(sums, x * x + 2 * x)
