"""Tree attention (LongSpec, arXiv 2502.17421): the nodes of a draft tree over a long prefix that they all see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.tree import reference

__all__ = ["merge_attention_states", "tree_attention"]

_INTEGERS = (torch.int32, torch.int64)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: int | Tensor,
    *,
    prefix_start: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of n tree nodes to a prefix of P keys, without a mask, and to each other, with one: exact.

    In row b the prefix is `key[b, :, prefix_start[b]:P_b]`, and the keys of the tree's nodes lie right behind it in the
    same tensor: `key[b, :, P_b:P_b + n]`. Node i sees the whole prefix and the nodes j with `tree_mask[i, j]`: its
    ancestors and itself. Tk is a capacity: what lies past `P_b + n` or before `prefix_start[b]` may be anything, NaN
    too, and has no part in the result. A tree of one node is plain decoding.

    Example:
        >>> import torch
        >>> from heedful.attention import tree_attention
        >>> query = torch.randn(1, 8, 3, 64)  # a root and its two children
        >>> key, value = torch.randn(2, 1, 2, 1024, 64)  # a cache of 1024 places, 503 in use
        >>> tree_mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
        >>> tree_attention(query, key, value, tree_mask, 500).shape
        torch.Size([1, 8, 3, 64])

    Args:
        query: `(B, Hq, n, D)`, float32, bfloat16, float16 or float64, rotated. Any strides.
        key: `(B, Hkv, Tk, D)`, Hq a multiple of Hkv, not repeated to the query heads: prefix, tree, unused places.
        value: `(B, Hkv, Tk, Dv)`.
        tree_mask: bool `(n, n)` or `(B, n, n)`, True where node i sees node j. A node that sees no node, not itself
            either, still sees the prefix.
        prefix_length: P, an integer, or an int32 or int64 tensor `(B,)` on the query's device, which stays there: no
            host synchronisation, so a CUDA graph may be replayed with other lengths. 0 for no prefix.
        prefix_start: int32 or int64 `(B,)`, the first real key of each row: left padding before it is hidden. None for 0.
        window: Sliding window in positions along a node's own path. A node of depth d (the number of nodes it sees,
            less itself) is at position P + d and sees prefix key j if `j > P + d - window`, and the ancestors less than
            `window` above it. None for no window.
        softcap: Logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
        scale: Factor on the dot products; None for `D ** -0.5`.
        impl: "reference" (plain PyTorch, on every device, differentiable), "triton" (CUDA; float32, bfloat16 or
            float16; D = Dv one of 16, 32, 64, 128, 256; no gradients) or "auto": Triton where it can, else the
            reference.

    Returns:
        `(B, Hq, n, Dv)` in the query's dtype. Sums are float32 (float64 for float64). A row that sees no key gives 0, no
        node or an empty batch an empty output. A node's value that is not finite reaches all nodes of its batch row and
        heads, those that do not see it too, as under a dense mask.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work. Values of `prefix_length` above
            `Tk - n` are refused on the CPU and, given as an integer, everywhere; in a tensor on a GPU they cannot be
            looked at, and count as `Tk - n`.

    Cost:
        `4 * Hq * n * (P + n) * D` floating-point operations. The Triton kernels read each key and value once from the
        GPU's memory whatever n is, so a small tree costs what plain decoding costs; from about 32 nodes on (D = 128, 4
        query heads a KV head) the matrix products take longer than the reading. The reference takes n * Tk floats a
        head; the kernels a few copies of the output.

        On one H200 (32 query and 8 key heads of 128, bfloat16, CUDA graphs) a call at 128k keys takes as long as reading
        them once with up to 16 nodes, 1.2 times as long with 32 and 2.1 times with 64; at 512k keys 1.0, 1.4 and 2.5 times.
        On an H100, which reads slower, 32 nodes cost no more than one, and 64 take 1.7 times as long. A dense mask takes 20
        times as long as a call with 8 or 16 nodes, 10 times with 64 (`benchmarks/operators/tree.py`).

    When not to use:
        For prefill, where all rows are new: `scaled_dot_product_attention` with `is_causal=True`. On a CPU it is no
        faster than a dense mask.

    Paper:
        "LongSpec: Long-Context Lossless Speculative Decoding with Efficient Drafting and Verification", Yang, Du, Zhang,
        Wang, Pang, Du, An, arXiv 2502.17421 (hybrid tree attention).
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check_tensors(query, key, value, tree_mask)
    batch, _, nodes, dim = query.shape
    capacity = key.shape[2]
    inputs.check_impl(impl)
    if window is not None:
        inputs.check_count("window", window, 1)
    inputs.check_positive("softcap", softcap)
    inputs.check_positive("scale", scale)
    scale = dim**-0.5 if scale is None else scale
    if prefix_start is not None:
        _check_per_row("prefix_start", prefix_start, query)
    longest = capacity - nodes
    if isinstance(prefix_length, Tensor):
        _check_per_row("prefix_length", prefix_length, query)
        if device == "cpu" and batch and not torch.compiler.is_compiling():
            shortest, longest = (int(x) for x in prefix_length.aminmax())
            _check_lengths(shortest, longest, nodes, capacity)
    elif isinstance(prefix_length, bool) or not isinstance(prefix_length, int | torch.SymInt):
        raise ValueError(f"prefix_length must be an integer or a tensor of shape (B,), got {prefix_length!r}")
    else:
        longest = prefix_length
        _check_lengths(prefix_length, prefix_length, nodes, capacity)
        prefix_length = torch.full((batch,), prefix_length, dtype=torch.int32, device=query.device)

    if 0 in query.shape[:3]:
        return query.new_zeros((*query.shape[:3], value.shape[-1])) + 0 * query.sum()

    options: dict[str, Any] = {"prefix_start": prefix_start, "window": window, "softcap": softcap, "scale": scale}
    with torch.autocast(device, enabled=False):  # sums stay float32
        if inputs.wants_kernels(impl, query):
            reason = inputs.kernels_refuse(query, value.shape[-1], gradients=(query, key, value))
            if reason is None:
                from heedful.attention.tree import triton

                return triton.tree_attention(query, key, value, tree_mask, prefix_length, **options)
            if impl == "triton":
                inputs.refuse_triton(reason)
        prefix_length = prefix_length.clamp(0, capacity - nodes)
        return reference.tree_attention(query, key, value, tree_mask, prefix_length, longest=longest, **options)


def merge_attention_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys, from the attention over each: exact, and differentiable.

    `o = w * o1 + (1 - w) * o2` with `w = sigmoid(lse1 - lse2)`. A side without keys has `lse = -inf` and a finite
    output, and takes no part.

    Example:
        >>> import torch
        >>> from heedful.attention import merge_attention_states
        >>> logits, value = torch.randn(5, 10), torch.randn(10, 4)
        >>> halves = [(x.softmax(-1) @ v, x.logsumexp(-1)) for x, v in zip(logits.split(5, -1), value.split(5))]
        >>> o, lse = merge_attention_states(*halves[0], *halves[1])
        >>> torch.allclose(o, logits.softmax(-1) @ value, atol=1e-6)
        True

    Args:
        o1: `(..., D)`, the softmax-weighted values of the first set.
        lse1: `(...)`, the natural logarithm of the sum of the exponentials of its scaled scores; -inf for no key.
        o2: `(..., D)`, of the second set.
        lse2: `(...)`.

    Returns:
        `(o, lse)`: `(..., D)` in the dtype of `o1`, and `(...)`. Where both sets are empty: as `o1` and `o2` say (0, as
        `tree_attention` has it), and -inf.

    Raises:
        ValueError: If the shapes do not fit.

    Cost:
        Elementwise, in the wider of the dtypes.

    When not to use:
        Where one kernel can read both sets: `tree_attention` merges inside.

    Paper:
        "LongSpec", arXiv 2502.17421 (hybrid tree attention); the rule is that of online softmax.
    """
    if o1.shape != o2.shape or lse1.shape != o1.shape[:-1] or lse2.shape != o1.shape[:-1]:
        raise ValueError(
            f"o1 and o2 must be alike, (..., D), and lse1 and lse2 (...), got shapes {tuple(o1.shape)}, "
            f"{tuple(o2.shape)}, {tuple(lse1.shape)}, {tuple(lse2.shape)}"
        )
    return reference.merge_attention_states(o1, lse1, o2, lse2)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, tree_mask: Tensor) -> None:
    inputs.check_qkv(query, key, value)
    batch, _, nodes, _ = query.shape
    capacity = key.shape[2]
    if nodes > capacity:
        raise ValueError(f"query has {nodes} rows and key only {capacity}: the keys of the tree must be among them")
    if tree_mask.dtype != torch.bool or tree_mask.shape not in ((nodes, nodes), (batch, nodes, nodes)):
        raise ValueError(
            f"tree_mask must be bool ({nodes}, {nodes}) or ({batch}, {nodes}, {nodes}), True where a node sees a node, "
            f"got {tree_mask.dtype} {tuple(tree_mask.shape)}"
        )
    inputs.check_device("tree_mask", tree_mask, query)


def _check_per_row(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype not in _INTEGERS or tensor.shape != query.shape[:1]:
        raise ValueError(
            f"{name} must be an int32 or int64 tensor of shape ({query.shape[0]},), got {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )
    inputs.check_device(name, tensor, query)


def _check_lengths(shortest: int, longest: int, nodes: int, capacity: int) -> None:
    if shortest < 0:
        raise ValueError(f"prefix_length must not be negative, got {shortest}")
    if longest + nodes > capacity:
        raise ValueError(
            f"prefix_length {longest} and {nodes} tree nodes need {longest + nodes} keys and key has {capacity}: write "
            f"the keys of the tree behind the prefix before the call"
        )
