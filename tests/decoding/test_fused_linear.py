"""Linear layers of a decode step put together: the rewritten graph on the CPU, the kernels under the interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from heedful.decoding import fused_linear


class Block(nn.Module):
    """Three layers with one input, one with a bias; two with another; one alone; one too small for the kernels' tiles."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(512, 256, bias=True), nn.Linear(512, 128, bias=False)
        self.v, self.o = nn.Linear(512, 128, bias=False), nn.Linear(512, 512, bias=False)
        self.gate, self.up = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024, bias=False)
        self.down, self.small = nn.Linear(1024, 512, bias=False), nn.Linear(512, 24)

    def forward(self, x):
        x = x + self.o(torch.cat([self.q(x), self.k(x), self.v(x)], -1).sin())
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.small(x)


@pytest.mark.parametrize("shape", [(1, 1, 512), (1, 5, 512), (3, 7, 512), (1, 80, 512)])
def test_rewritten_graph_gives_what_the_layers_give(shape):
    torch.manual_seed(0)
    block = Block().bfloat16().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.bfloat16)
    targets = []

    def backend(graph, inputs):
        graph = fused_linear.put_linears_together(graph)
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    got = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(x)
    want = block.double()(x.double())
    assert (got.double() - want).norm() / want.norm() < 2e-2
    assert torch._C._nn.linear not in targets
    counts = [targets.count(getattr(torch.ops.heedful, name).default) for name in ("fused_linear", "shared_linear")]
    assert sum(counts) == 5  # query, key and value; o; gate and up; down; the small one
    rows = shape[0] * shape[1]
    assert counts == ([1, 4] if 1 < rows <= 64 else [5, 0])


def test_registered_operators():
    x, weights = torch.randn(2, 3, 64), [torch.randn(16, 64), torch.randn(32, 64)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.heedful.fused_linear.default, (x, weights), test_utils=tests)
    torch.library.opcheck(torch.ops.heedful.shared_linear.default, (x, weights, 4), test_utils=tests)
    for part, w in zip(torch.ops.heedful.shared_linear(x, weights, 4), weights, strict=True):
        assert torch.allclose(part.sum(0), x @ w.T, atol=1e-4)


def test_kernels_under_the_interpreter():
    code = """
        import torch
        from heedful.decoding import fused_linear as fl
        torch.manual_seed(0)
        for rows, sizes, k, tiles in [
            (1, [48], 1536, None),
            (1, [16, 32, 48], 512, None),
            (5, [64, 32, 32], 128, fl._Tiles(32, 64, 1, 4, 3)),
            (20, [32], 256, fl._Tiles(32, 32, 4, 4, 3)),
            (64, [64, 128], 256, fl._Tiles(64, 64, 2, 4, 3)),
        ]:
            x = torch.randn(1, rows, k, dtype=torch.float16)
            weights = [torch.randn(n, k, dtype=torch.float16) / k**0.5 for n in sizes]
            cut = 1 if tiles is None else tiles.shares
            kind = {"dtype": torch.float32 if cut > 1 else torch.float16}
            outputs = [torch.full((cut, rows, n), torch.nan, **kind) for n in sizes]
            fl._launch(x, weights, outputs, tiles)
            for out, w in zip(outputs, weights):
                want = x[0].double() @ w.double().T
                assert (out.double().sum(0) - want).norm() / want.norm() < 1e-3, (rows, sizes)
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


def test_each_session_compiles_for_itself(monkeypatch):
    class Session:
        def __init__(self, outputs):
            self.weight = torch.randn(outputs, 8)

        def forward(self, x):
            return x @ self.weight.T

    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(fused_linear, "_backend", backend)
    with torch._dynamo.config.patch(recompile_limit=2):  # fullgraph: one more is an error
        for outputs in range(1, 5):
            session = Session(outputs)
            forward = fused_linear.compile_forward(session.forward)
            for rows in (1, 3):
                x = torch.randn(rows, 8)
                assert torch.allclose(forward(x), session.forward(x))
    assert len(compiled) == 8  # for every session and shape
    assert all(isinstance(size, int) for shapes in compiled for shape in shapes for size in shape)
