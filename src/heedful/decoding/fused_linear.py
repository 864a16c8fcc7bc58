"""The linear layers of a decode step: a few rows against large weights, limited by reading the weights once.

`compile_forward` compiles a model's forward with torch.compile, after linear layers with the same input (query, key and value;
gate and up) have been put together into one launch of a kernel made for few rows. Where a layer has too few outputs to occupy
the device, its sums are cut into shares, which whatever comes next (the residual, the norm) adds up in its own kernel.
"""

from __future__ import annotations

import operator
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

_MOST_ROWS = 64
_TOGETHER = 3
_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _of_program(w0, w1, w2, y0, y1, y2, n0, n1, n2, pid, N: tl.constexpr):
    """Which weight, output and block of its rows a program works on."""
    b0, b1 = n0 // N, n1 // N
    if pid < b0:
        w, y, block, size = w0, y0, pid, n0
    elif pid < b0 + b1:
        w, y, block, size = w1, y1, pid - b0, n1
    else:
        w, y, block, size = w2, y2, pid - b0 - b1, n2
    return w, y, block, size


@triton.jit
def _one_row(x, w0, w1, w2, y0, y1, y2, n0, n1, n2, k, N: tl.constexpr, K: tl.constexpr):
    w, y, block, _ = _of_program(w0, w1, w2, y0, y1, y2, n0, n1, n2, tl.program_id(0), N)
    rows, columns = block * N + tl.arange(0, N), tl.arange(0, K)
    weights = w + rows[:, None].to(tl.int64) * k + columns[None, :]
    total = tl.zeros((N, K), tl.float32)
    for start in range(0, k, K):
        total += tl.load(weights + start).to(tl.float32) * tl.load(x + start + columns).to(tl.float32)[None, :]
    tl.store(y + rows, tl.sum(total, 1).to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["m"])
def _few_rows(
    x, w0, w1, w2, y0, y1, y2, n0, n1, n2, k, share, m,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    w, y, block, size = _of_program(w0, w1, w2, y0, y1, y2, n0, n1, n2, tl.program_id(0), N)
    rows, inputs, columns = block * N + tl.arange(0, N), tl.arange(0, M), tl.arange(0, K)
    begin = tl.program_id(1) * share
    weights = w + rows[:, None].to(tl.int64) * k + begin + columns[None, :]
    values = x + inputs[:, None] * k + begin + columns[None, :]
    total = tl.zeros((M, N), tl.float32)
    for _ in range(0, share, K):
        total = tl.dot(tl.load(values, mask=inputs[:, None] < m, other=0.0), tl.load(weights).T, total)
        weights += K
        values += K
    at = y + inputs[:, None] * size + rows[None, :]
    if SHARES > 1:
        at += tl.program_id(1) * m * size
    tl.store(at, total.to(y.dtype.element_ty), mask=inputs[:, None] < m)


class _Tiles(NamedTuple):
    outputs: int  # of a program
    columns: int  # of a step
    shares: int  # of the sum over the inputs
    num_warps: int
    num_stages: int


def _tiles(rows: int, outputs: int, inputs: int) -> _Tiles:
    """For `_few_rows`."""
    if outputs >= 16384:
        return _Tiles(64, 128, 1, 4, 3)
    return _Tiles(128, 64, 4, 4, 4)


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels take these inputs."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and len(weights) <= _TOGETHER
        and all(w.is_contiguous() and w.dtype == x.dtype for w in weights)
    )


def shares(rows: int, outputs: Sequence[int], inputs: int) -> int:
    """Into how many shares the sums over the inputs are best cut: 1 for one row, or for sizes that the tiles do not fit."""
    if not 1 < rows <= _MOST_ROWS:
        return 1
    tiles = _tiles(rows, sum(outputs), inputs)
    fits = inputs % (tiles.shares * tiles.columns) == 0 and all(n % tiles.outputs == 0 for n in outputs)
    return tiles.shares if fits else 1


def _launch(x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor], tiles: _Tiles | None) -> None:
    """tiles None: `_one_row`, else `_few_rows`."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    spare = _TOGETHER - len(weights)
    sizes = [w.shape[0] for w in weights] + [0] * spare
    arguments = [x, *weights, *weights[:1] * spare, *outputs, *outputs[:1] * spare, *sizes, k]
    if tiles is None:
        _one_row[(sum(sizes),)](*arguments, N=1, K=1024 if k % 1024 == 0 else 512, num_warps=4)
        return
    _few_rows[(sum(sizes) // tiles.outputs, tiles.shares)](
        *arguments, k // tiles.shares, rows, M=max(16, triton.next_power_of_2(rows)), N=tiles.outputs,
        K=tiles.columns, SHARES=tiles.shares, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


@torch.library.custom_op("heedful::fused_linear", mutates_args=())
def fused_linear(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """``[x @ w.T for w in weights]`` in one launch: x ``(..., K)``, weights ``(N_i, K)``. Without gradients."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    sizes = [w.shape[0] for w in weights]
    tiles: _Tiles | None = None
    if rows != 1:
        tiles = _tiles(rows, sum(sizes), k)._replace(shares=1)
    fits = k % 512 == 0 if tiles is None else k % tiles.columns == 0 and not any(n % tiles.outputs for n in sizes)
    if not (fits and 1 <= rows <= _MOST_ROWS and _takes(x, weights)):
        return [torch.nn.functional.linear(x, w) for w in weights]
    outputs = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
    _launch(x.contiguous(), weights, outputs, tiles)
    return outputs


@fused_linear.register_fake
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


@torch.library.custom_op("heedful::shared_linear", mutates_args=())
def shared_linear(x: Tensor, weights: list[Tensor], shares: int) -> list[Tensor]:
    """`fused_linear` before its last addition: float32 ``(shares, ..., N_i)``, each share the sum over K / shares inputs."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    sizes = [w.shape[0] for w in weights]
    if not _takes(x, weights):
        parts = [x.float().unflatten(-1, (shares, -1)).movedim(-2, 0)] * len(weights)
        return [
            torch.einsum("s...k,nsk->s...n", part, w.float().unflatten(1, (shares, -1))).contiguous()
            for part, w in zip(parts, weights, strict=True)
        ]
    outputs = [x.new_empty((shares, *x.shape[:-1], n), dtype=torch.float32) for n in sizes]
    _launch(x.contiguous(), weights, outputs, _tiles(rows, sum(sizes), k))
    return outputs


@shared_linear.register_fake
def _(x: Tensor, weights: list[Tensor], shares: int) -> list[Tensor]:
    return [x.new_empty((shares, *x.shape[:-1], w.shape[0]), dtype=torch.float32) for w in weights]


def put_linears_together(graph: fx.GraphModule) -> fx.GraphModule:
    """Replaces the linear layers of a traced forward: those with one input become one call, their biases are added after it."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch._C._nn.linear:
            groups[node.args[0]].append(node)
    for x, linears in groups.items():
        for start in range(0, len(linears), _TOGETHER):
            _replace(graph.graph, x, linears[start : start + _TOGETHER])
    graph.graph.lint()
    graph.recompile()
    return graph


def _replace(graph: fx.Graph, x: fx.Node, linears: list[fx.Node]) -> None:
    given = x.meta["example_value"]
    outputs = [node.meta["example_value"].shape[-1] for node in linears]
    cut = 1
    if given.dtype in _DTYPES and all(isinstance(size, int) for size in given.shape):
        cut = shares(given.numel() // given.shape[-1], outputs, given.shape[-1])
    weights = [node.args[1] for node in linears]
    # Weights are inputs of the graph, so all are there where the first layer runs.
    with graph.inserting_before(linears[0]):
        if cut == 1:
            fused = graph.call_function(torch.ops.heedful.fused_linear.default, (x, weights))
        else:
            fused = graph.call_function(torch.ops.heedful.shared_linear.default, (x, weights, cut))
    for i, node in enumerate(linears):
        with graph.inserting_before(node):
            out = graph.call_function(operator.getitem, (fused, i))
            if cut > 1:
                out = graph.call_method("to", (graph.call_function(torch.sum, (out, 0)), given.dtype))
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            if bias is not None:
                out = graph.call_function(torch.add, (out, bias))
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def _backend(graph: fx.GraphModule, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(put_linears_together(graph), inputs)


def compile_forward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the forward of a decode step, with the linear layers put together; anew for every shape."""
    return torch.compile(with_own_code(forward), backend=_backend, fullgraph=True, dynamic=False)


def with_own_code(function: Any) -> Any:
    """The same function or bound method with a code object of its own: torch.compile counts recompilations by code object, and
    each session compiles for itself."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__), function.__self__)
    code, given = function.__code__.replace(), (function.__defaults__, function.__closure__)
    return types.FunctionType(code, function.__globals__, function.__name__, *given)
