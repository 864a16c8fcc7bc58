"""The linear layers of a decode step: a few rows against large weights, limited by reading the weights once.

`compile_forward` compiles a model's forward with torch.compile, after linear layers with the same input have been put together
into one launch of a kernel made for few rows: query, key and value; and gate and up with the silu and the product behind
them. Where a layer has too few outputs to occupy the device, its sums are cut into shares, which whatever comes next (the
residual, the norm) adds up in its own kernel.
"""

from __future__ import annotations

import operator
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

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
        # Read once: the weights need not stay in the L2 cache.
        weight = tl.load(weights + start, eviction_policy="evict_first")
        total += weight.to(tl.float32) * tl.load(x + start + columns).to(tl.float32)[None, :]
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


@triton.jit
def _silu_times(gate, up, like):
    """In float32, of what the two layers would have given in their own precision."""
    gate, up = gate.to(like.dtype.element_ty).to(tl.float32), up.to(like.dtype.element_ty).to(tl.float32)
    return (gate * tl.sigmoid(gate) * up).to(like.dtype.element_ty)


@triton.jit
def _one_row_gated(x, w0, w1, y, k, K: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, K)
    gates, ups = w0 + row.to(tl.int64) * k + columns, w1 + row.to(tl.int64) * k + columns
    gate = tl.zeros((K,), tl.float32)
    up = tl.zeros((K,), tl.float32)
    for start in range(0, k, K):
        value = tl.load(x + start + columns).to(tl.float32)
        gate += tl.load(gates + start, eviction_policy="evict_first").to(tl.float32) * value
        up += tl.load(ups + start, eviction_policy="evict_first").to(tl.float32) * value
    tl.store(y + row, _silu_times(tl.sum(gate), tl.sum(up), y))


@triton.jit(do_not_specialize=["m"])
def _few_rows_gated(x, w0, w1, y, n, k, m, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, inputs, columns = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, M), tl.arange(0, K)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    gates, ups = w0 + at, w1 + at
    values = x + inputs[:, None] * k + columns[None, :]
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    for _ in range(0, k, K):
        value = tl.load(values, mask=inputs[:, None] < m, other=0.0)
        gate = tl.dot(value, tl.load(gates).T, gate)
        up = tl.dot(value, tl.load(ups).T, up)
        gates += K
        ups += K
        values += K
    tl.store(y + inputs[:, None] * n + rows[None, :], _silu_times(gate, up, y), mask=inputs[:, None] < m)


class _Tiles(NamedTuple):
    outputs: int  # of a program
    columns: int  # of a step
    shares: int  # of the sum over the inputs
    num_warps: int
    num_stages: int


#: Programs that occupy the device: a layer is cut into shares until it has as many, or until it is cut into `_MOST_SHARES`.
_PROGRAMS = 160
_MOST_SHARES = 4
#: Of each of two layers in a program of `_few_rows_gated`.
_GATED = _Tiles(32, 128, 1, 4, 3)


def _tiles(outputs: int) -> _Tiles:
    """For `_few_rows`."""
    width = 128 if outputs >= 65536 else 64
    shares = 1
    while shares < _MOST_SHARES and outputs // width * shares < _PROGRAMS:
        shares *= 2
    return _Tiles(width, 128, shares, 4, 3)


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
    tiles = _tiles(sum(outputs))
    fits = inputs % (tiles.shares * tiles.columns) == 0 and all(n % tiles.outputs == 0 for n in outputs)
    return tiles.shares if fits else 1


def _launch(x: Tensor, weights: list[Tensor], outputs: list[Tensor], tiles: _Tiles | None) -> None:
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
        tiles = _tiles(sum(sizes))._replace(shares=1)
    fits = k % 512 == 0 if tiles is None else k % tiles.columns == 0 and not any(n % tiles.outputs for n in sizes)
    if not (fits and 1 <= rows <= _MOST_ROWS and _takes(x, weights)):
        return [torch.nn.functional.linear(x, w) for w in weights]
    outputs = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
    _launch(x.contiguous(), weights, outputs, tiles)
    return outputs


@fused_linear.register_fake
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


@torch.library.custom_op("heedful::gated_linear", mutates_args=())
def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` in one launch. Without gradients."""
    rows, k, n = x.numel() // x.shape[-1], x.shape[-1], gate.shape[0]
    fits = k % 512 == 0 if rows == 1 else k % _GATED.columns == 0 and n % _GATED.outputs == 0
    if not (fits and 1 <= rows <= _MOST_ROWS and gate.shape == up.shape and _takes(x, [gate, up])):
        linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
        return (silu(linear(x, gate).float()) * linear(x, up).float()).to(x.dtype)
    x, out = x.contiguous(), x.new_empty((*x.shape[:-1], n))
    if rows == 1:
        _one_row_gated[(n,)](x, gate, up, out, k, K=1024 if k % 1024 == 0 else 512, num_warps=4)
        return out
    _few_rows_gated[(n // _GATED.outputs,)](
        x, gate, up, out, n, k, rows, M=max(16, triton.next_power_of_2(rows)), N=_GATED.outputs, K=_GATED.columns,
        num_warps=_GATED.num_warps, num_stages=_GATED.num_stages,
    )  # fmt: skip
    return out


@gated_linear.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


@torch.library.custom_op("heedful::shared_linear", mutates_args=())
def shared_linear(x: Tensor, weights: list[Tensor], shares: int) -> list[Tensor]:
    """`fused_linear` before its last addition: float32 ``(shares, ..., N_i)``, each share the sum over K / shares inputs."""
    sizes = [w.shape[0] for w in weights]
    if not _takes(x, weights):
        parts = [x.float().unflatten(-1, (shares, -1)).movedim(-2, 0)] * len(weights)
        return [
            torch.einsum("s...k,nsk->s...n", part, w.float().unflatten(1, (shares, -1))).contiguous()
            for part, w in zip(parts, weights, strict=True)
        ]
    outputs = [x.new_empty((shares, *x.shape[:-1], n), dtype=torch.float32) for n in sizes]
    _launch(x.contiguous(), weights, outputs, _tiles(sum(sizes)))
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
    for linears in groups.values():
        if len(linears) == 2 and _gate(graph.graph, linears):
            continue
        for start in range(0, len(linears), _TOGETHER):
            _replace(graph.graph, linears[start : start + _TOGETHER])
    graph.graph.lint()
    graph.recompile()
    return graph


def _bias(linear: fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")


def _gate(graph: fx.Graph, linears: list[fx.Node]) -> bool:
    """Replaces two linear layers that nothing reads but ``silu(one) * other``, and says whether it did."""
    for gate, up in (linears, linears[::-1]):
        silu, product = (next(iter(node.users)) for node in (gate, up))
        alone = all(len(node.users) == 1 and _bias(node) is None for node in (gate, up)) and len(silu.users) == 1
        if (
            alone
            and silu.target is torch.nn.functional.silu
            and product.target in (operator.mul, torch.mul)
            and set(product.args) == {silu, up}
        ):
            with graph.inserting_before(product):
                arguments = (gate.args[0], gate.args[1], up.args[1])
                fused = graph.call_function(torch.ops.heedful.gated_linear.default, arguments)
            fused.meta = dict(product.meta)
            product.replace_all_uses_with(fused)
            for node in (product, silu, gate, up):
                graph.erase_node(node)
            return True
    return False


def _replace(graph: fx.Graph, linears: list[fx.Node]) -> None:
    x = cast(fx.Node, linears[0].args[0])  # as it is by now: it may have been replaced itself
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
            if (bias := _bias(node)) is not None:
                out = graph.call_function(torch.add, (out, bias))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def _backend(graph: fx.GraphModule, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(put_linears_together(graph), inputs)


def compile_forward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the forward of a decode step, with the linear layers put together; anew for every shape."""
    return torch.compile(forward, backend=_backend, fullgraph=True, dynamic=False)


def compile_other(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """torch.compile for the rest of a step."""
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: torch.compile keeps what it made, and counts recompilations, by code
    object."""
    code, given = function.__code__.replace(), (function.__defaults__, function.__closure__)
    return types.FunctionType(code, function.__globals__, function.__name__, *given)
