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
    """Layers with one input, some with a bias; gates, and what only looks like one; one too small for the kernels' tiles."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(512, 256, bias=True), nn.Linear(512, 128, bias=False)
        self.v, self.o = nn.Linear(512, 128, bias=False), nn.Linear(512, 512, bias=False)
        self.gate, self.up = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024, bias=False)
        self.down, self.small = nn.Linear(1024, 512, bias=False), nn.Linear(512, 24)

    def forward(self, x):
        x = x + self.o(torch.cat([self.q(x), self.k(x), self.v(x)], -1).sin())
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        y = x.cos()
        x = x + self.down(self.gate(y) * nn.functional.silu(self.up(y)))
        y = x.sin()
        x = x + self.down(nn.functional.silu(self.gate(y)) + self.up(y))  # no product
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
    names = ("fused_linear", "shared_linear", "gated_linear")
    counts = [targets.count(getattr(torch.ops.heedful, name).default) for name in names]
    few = 1 < shape[0] * shape[1] <= 64
    assert counts == ([1, 6, 2] if few else [7, 0, 2])  # small; q, k, v, o, down three times, gate and up; gated


def test_registered_operators():
    x, weights = torch.randn(2, 3, 64), [torch.randn(16, 64), torch.randn(32, 64)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.heedful.fused_linear.default, (x, weights), test_utils=tests)
    torch.library.opcheck(torch.ops.heedful.shared_linear.default, (x, weights, 4), test_utils=tests)
    weights = [torch.randn(32, 64), torch.randn(32, 64)]
    torch.library.opcheck(torch.ops.heedful.gated_linear.default, (x, *weights), test_utils=tests)
    want = nn.functional.silu(x @ weights[0].T) * (x @ weights[1].T)
    assert torch.allclose(torch.ops.heedful.gated_linear(x, *weights), want, atol=1e-4)
    for part, w in zip(torch.ops.heedful.shared_linear(x, weights, 4), weights, strict=True):
        assert torch.allclose(part.sum(0), x @ w.T, atol=1e-4)


def test_kernels_under_the_interpreter():
    code = """
        import torch
        from heedful.decoding import fused_linear as fl
        torch.manual_seed(0)
        for rows, sizes, k, tiles in [
            (1, [24], 1536, None),
            (1, [8, 16, 8], 512, None),
            (5, [64, 32, 32], 128, fl._Tiles(32, 64, 1, 4, 3)),
            (20, [32], 256, fl._Tiles(32, 32, 4, 4, 3)),
            (64, [64], 128, fl._Tiles(64, 64, 2, 4, 3)),
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
        for rows, n, k in [(1, 24, 1024), (7, 32, 64), (64, 64, 128)]:
            x, gate, up = (torch.randn(m, k, dtype=torch.float16) / k**0.25 for m in (rows, n, n))
            out = torch.full((rows, n), torch.nan, dtype=torch.float16)
            if rows == 1:
                fl._one_row_gated[(n,)](x, gate, up, out, k, K=512)
            else:
                fl._few_rows_gated[(n // 32,)](x, gate, up, out, n, k, rows, M=64, N=32, K=64)
            want = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
            assert (out.double() - want).norm() / want.norm() < 2e-3, (rows, n)
        from heedful.decoding.row_argmax import row_argmax
        x = torch.randn(17, 1, 200).half()
        assert torch.equal(row_argmax(x), x.argmax(-1))
        x = torch.randn(1, 2, 9000).half()
        for poisoned in ({}, {7: -0.0}, {3000: torch.inf}, {4500: torch.nan, 3000: torch.inf}):
            for at, value in poisoned.items():
                x[..., at] = value
            assert torch.equal(row_argmax(x), x.argmax(-1)), poisoned
        for x in (torch.randint(-3, 3, x.shape), torch.full(x.shape, -torch.inf), torch.zeros(x.shape)):
            x = x.half()
            x[..., 1::2] *= -1.0  # ties, of both zeros too
            assert torch.equal(row_argmax(x), x.argmax(-1))
        from heedful.decoding.move_rows import RowMover
        tensors = [torch.randn(2, 3, 40, 24) for _ in range(3)]
        before = [t.clone() for t in tensors]
        sources = torch.tensor([[10, 12, 13, 19, 19], [7, 8, 9, 10, 10]])
        targets = torch.tensor([[10, 11, 12, 13, 14], [8, 9, 10, 11, 12]])  # ranges overlap
        RowMover(tensors)(sources, targets)
        batch = torch.arange(2)[:, None]
        for moved, want in zip(tensors, before):
            want[batch, :, targets] = want[batch, :, sources]
            assert torch.equal(moved, want)
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


def test_functions_with_their_own_code_are_compiled_apart(monkeypatch):
    def forward(weight, x):
        return x @ weight.T

    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(fused_linear, "_backend", backend)
    with torch._dynamo.config.patch(recompile_limit=1):  # fullgraph: one more is an error
        for rows in range(1, 5):
            own = fused_linear.compile_forward(fused_linear.with_own_code(forward))
            for _ in range(2):  # other tensors of the same shapes: nothing new
                weight, x = torch.randn(6, 8), torch.randn(rows, 8)
                assert torch.allclose(own(weight, x), forward(weight, x))
    assert len(compiled) == 4
    assert all(isinstance(size, int) for shapes in compiled for shape in shapes for size in shape)
