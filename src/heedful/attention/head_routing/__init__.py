"""Head routing (Mixture-of-Head attention, arXiv 2410.11842): attention in which each token has its own set of heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.head_routing import reference

__all__ = ["HeadDispatch", "choose_heads", "dispatch_heads", "routed_attention", "routed_output", "routed_projection"]

_MOST_TOKENS = 2**31 - 1


class HeadDispatch(NamedTuple):
    """Which tokens each head works for, as the kernels read it; made by `dispatch_heads`.

    Attributes:
        active: bool `(B, T, H)`.
        rows: int32 `(H, B * T)`: for each head its tokens, in ascending order, as `b * T + t`; what lies behind them is
            not read.
        before: int32 `(H, B * T + 1)`: how many of the first n tokens a head has.
    """

    active: Tensor
    rows: Tensor
    before: Tensor


def dispatch_heads(active: Tensor) -> HeadDispatch:
    """Sorts tokens by head, once for all operators of a layer, on the tensor's device and without a host synchronisation.

    Args:
        active: bool `(B, T, H)`, True where a token has a head.

    Raises:
        ValueError: If `active` is not that.
    """
    if active.dtype != torch.bool or active.ndim != 3:
        raise ValueError(f"active must be bool (B, T, H), got {active.dtype} of shape {tuple(active.shape)}")
    if active.is_cuda and inputs.HAS_TRITON and active.numel():
        from heedful.attention.head_routing import triton

        return HeadDispatch(active, *triton.dispatch_heads_op(active))
    chosen = active.flatten(0, 1).T
    heads, tokens = chosen.shape
    before = torch.zeros(heads, tokens + 1, dtype=torch.int32, device=active.device)
    before[:, 1:] = chosen.cumsum(1, dtype=torch.int32)
    # Tokens that were not chosen all go to one place behind the list.
    place = torch.where(chosen, before[:, :-1], tokens).long()
    token = torch.arange(tokens, dtype=torch.int32, device=active.device).expand(heads, tokens)
    rows = torch.zeros(heads, tokens + 1, dtype=torch.int32, device=active.device).scatter(1, place, token)
    return HeadDispatch(active, rows[:, :tokens].contiguous(), before)


def choose_heads(scores: Tensor, k: int) -> Tensor:
    """The k heads of the highest scores of each token; of equal scores the lower index.

    Example:
        >>> import torch
        >>> from heedful.attention import choose_heads
        >>> choose_heads(torch.tensor([0.2, 0.5, 0.5, 0.1]), 1)
        tensor([False,  True, False, False])

    Args:
        scores: `(..., E)`, floating-point. Not differentiable: a choice is a constant.
        k: 0 to E.

    Returns:
        bool `(..., E)`, k True in a row. A NaN counts as the highest.

    Raises:
        ValueError: If k is not 0 to E.

    Cost:
        One kernel on a GPU, for float32; a stable sort elsewhere.

    When not to use:
        For more than a few hundred candidates: `torch.topk`, whose choice among equal scores is not defined.

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.
    """
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be 0 to the {scores.shape[-1]} heads, got {k}")
    scores = scores.detach()
    if scores.is_cuda and inputs.HAS_TRITON and scores.dtype == torch.float32 and scores.numel():
        from heedful.attention.head_routing import triton

        return triton.choose_heads_op(scores, k)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor | HeadDispatch | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of chosen (token, head) pairs: exact for those, 0 for the others, whose queries are not read.

    Keys and values of all tokens stay visible to every head: routing is by query token. Query row i is at position
    `Tk - Tq + i` of the keys.

    Example:
        >>> import torch
        >>> from heedful.attention import routed_attention
        >>> query, key, value = torch.randn(3, 2, 8, 100, 64)
        >>> active = torch.rand(2, 100, 8) < 0.5  # (B, T, H)
        >>> output = routed_attention(query, key, value, active)
        >>> bool((output.transpose(1, 2)[~active] == 0).all())
        True

    Args:
        query: `(B, Hq, Tq, D)`, float32, bfloat16, float16 or float64. Any strides.
        key: `(B, Hkv, Tk, D)`, Hq a multiple of Hkv, not repeated; `Tk >= Tq` if causal.
        value: `(B, Hkv, Tk, Dv)`.
        active: bool `(B, Tq, Hq)`, True where the token has the head, or what `dispatch_heads` made of it (saves making
            it again). None: every token has every head.
        causal: A row sees the keys up to its own position. False: all keys.
        window: A row sees only the `window` latest keys, its own included; causal only. None for no window.
        attention_mask: bool `(B, Tk)`, True for real tokens: the others are seen by nobody, whatever they hold. None: all are.
        scale: Factor on the dot products, positive; None for `D ** -0.5`.
        impl: "reference" (plain PyTorch, everywhere: all heads, then zeros), "triton" (CUDA; float32, bfloat16 or float16; D = Dv one of
            16, 32, 64, 128, 256) or "auto": Triton where it can, else the reference.

    Returns:
        `(B, Hq, Tq, Dv)` in the query's dtype. Sums are float32 (float64 for float64). A row that sees no key gives 0.
        Differentiable in query, key and value, deterministic; a pair that was not chosen gives and gets no gradient.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work.

    Cost:
        `4 * (chosen pairs) * Tk * D` floating-point operations (half of it if causal), and as much memory as dense
        attention: the tensors of queries and outputs are full. A tile of 128 chosen rows spans more positions than 128
        rows in a row, so the causal diagonal is a little broader.

    When not to use:
        When nearly all pairs are chosen: `scaled_dot_product_attention` has faster kernels. To save keys and values too,
        route whole groups of heads.

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin, Zhu, Yuan, Yan, arXiv 2410.11842 (its released code
        computes all heads and multiplies by 0).
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check_attention(query, key, value, causal, window, attention_mask, scale, impl)
    batch, heads, length, dim = query.shape
    chosen = active.active if isinstance(active, HeadDispatch) else active
    if chosen is not None and (chosen.dtype != torch.bool or chosen.shape != (batch, length, heads)):
        raise ValueError(
            f"active must be bool (B, Tq, Hq) = ({batch}, {length}, {heads}), got {chosen.dtype} of shape {tuple(chosen.shape)}"
        )
    scale = dim**-0.5 if scale is None else scale
    if 0 in query.shape or 0 in key.shape:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    with torch.autocast(device, enabled=False):  # sums stay float32
        if _use_triton(impl, query, value.shape[-1]):
            from heedful.attention.head_routing import triton

            if chosen is None:
                chosen = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(batch, length, heads)
            dispatch = active if isinstance(active, HeadDispatch) else dispatch_heads(chosen)
            output, _ = triton.routed_attention_op(
                query, key, value, attention_mask, dispatch.rows, dispatch.before, causal, window or 0, scale
            )
            return output.transpose(1, 2)
        return reference.routed_attention(
            query, key, value, chosen, causal=causal, window=window or 0, attention_mask=attention_mask, scale=scale
        )


def routed_projection(
    x: Tensor, weight: Tensor, active: Tensor | HeadDispatch, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """`x[b, t] @ weight[h]` for the chosen (token, head) pairs, 0 for the others: a query projection of chosen heads.

    Example:
        >>> import torch
        >>> from heedful.attention import routed_projection
        >>> x, weight = torch.randn(2, 10, 32), torch.randn(4, 32, 16)
        >>> routed_projection(x, weight, torch.rand(2, 10, 4) < 0.5).shape
        torch.Size([2, 10, 4, 16])

    Args:
        x: `(B, T, C)`, float32, bfloat16, float16 or float64.
        weight: `(H, C, D)`, any strides; of a linear layer `(H * D, C)` it is `layer.weight.unflatten(0, (H, D)).mT`.
        active: bool `(B, T, H)`, or what `dispatch_heads` made of it.
        bias: `(H, D)`, or None.
        impl: "reference" (all heads, then zeros), "triton" (CUDA; not float64) or "auto".

    Returns:
        `(B, T, H, D)` in the dtype of `x`. Differentiable, deterministic.

    Raises:
        ValueError: If a shape, dtype or argument does not fit.

    Cost:
        `2 * (chosen pairs) * C * D` operations forward. Backward are two dense products, as of all heads: of rows gathered
        by head they would not be faster.

    When not to use:
        When nearly all pairs are chosen: `torch.nn.functional.linear` has faster kernels.

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.
    """
    device = x.device.type
    x, weight = inputs.in_autocast_dtype(x, weight)
    bias = bias if bias is None else bias.to(x.dtype)
    chosen = _check_product("x", x, x.shape[-1:], weight, active, impl)
    if bias is not None and bias.shape != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"bias must be (H, D) = {(weight.shape[0], weight.shape[2])}, got {tuple(bias.shape)}")
    if 0 in x.shape[:2]:
        return x.new_zeros(*x.shape[:2], weight.shape[0], weight.shape[2])
    with torch.autocast(device, enabled=False):
        if _use_triton(impl, x, None):
            from heedful.attention.head_routing import triton

            dispatch = active if isinstance(active, HeadDispatch) else dispatch_heads(chosen)
            flat = triton.routed_projection_op(
                x.flatten(0, 1), weight, bias, dispatch.active.flatten(0, 1), dispatch.rows, dispatch.before
            )
            return flat.unflatten(0, x.shape[:2])
        return reference.routed_projection(x, weight, bias, chosen)


def routed_output(
    heads: Tensor, weight: Tensor, active: Tensor | HeadDispatch, *, most: int | None = None, impl: str = "auto"
) -> Tensor:
    """`sum_h heads[b, t, h] @ weight[h]` over a token's chosen heads: an output projection of those alone.

    Example:
        >>> import torch
        >>> from heedful.attention import routed_output
        >>> heads, weight = torch.randn(2, 10, 4, 16), torch.randn(4, 16, 32)
        >>> routed_output(heads, weight, torch.rand(2, 10, 4) < 0.5).shape
        torch.Size([2, 10, 32])

    Args:
        heads: `(B, T, H, D)`, float32, bfloat16, float16 or float64; what was not chosen may be anything.
        weight: `(H, D, C)`; of a linear layer `(C, H * D)` it is `layer.weight.T.unflatten(0, (H, D))`.
        active: bool `(B, T, H)`, or what `dispatch_heads` made of it.
        most: No token has more heads than this; memory grows with it. None for H.
        impl: "reference" (all heads, zeros for the others), "triton" (CUDA; not float64) or "auto".

    Returns:
        `(B, T, C)` in the dtype of `heads`. Differentiable, deterministic.

    Raises:
        ValueError: If a shape, dtype or argument does not fit. That a token has more heads than `most` cannot be seen without
            waiting for a GPU; the result is then undefined.

    Cost:
        `2 * (chosen pairs) * D * C` operations, and `B * T * most * C` numbers written and read again.

    When not to use:
        Where a token has more than an eighth or so of the heads: an element of the result takes 2 D operations of a head and 4
        bytes of traffic, so one dense product over zeros is faster (on an H200, D = 128, half of 16 heads: 4 times).

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.
    """
    device = heads.device.type
    heads, weight = inputs.in_autocast_dtype(heads, weight)
    chosen = _check_product("heads", heads, heads.shape[2:], weight, active, impl)
    most = weight.shape[0] if most is None else most
    if not 1 <= most <= weight.shape[0]:
        raise ValueError(f"most must be 1 to the {weight.shape[0]} heads, got {most}")
    if 0 in heads.shape[:2]:
        return heads.new_zeros(*heads.shape[:2], weight.shape[2])
    with torch.autocast(device, enabled=False):
        if _use_triton(impl, heads, None):
            from heedful.attention.head_routing import triton

            dispatch = active if isinstance(active, HeadDispatch) else dispatch_heads(chosen)
            flat = triton.routed_output_op(
                heads.flatten(0, 1), weight, chosen.flatten(0, 1), dispatch.rows, dispatch.before, most
            )
            return flat.unflatten(0, heads.shape[:2])
        return reference.routed_output(heads, weight, chosen)


def _check_product(
    name: str, x: Tensor, last: torch.Size, weight: Tensor, active: Tensor | HeadDispatch, impl: str
) -> Tensor:
    """The choice, of a product of `x (B, T, *last)` with one matrix a head."""
    inputs.check_impl(impl)
    chosen = active.active if isinstance(active, HeadDispatch) else active
    wanted = "(B, T, C)" if name == "x" else "(B, T, H, D)"
    fits = weight.ndim == 3 and tuple(last) == tuple(weight.shape[1:2] if name == "x" else weight.shape[:2])
    if x.ndim != 2 + len(last) or not fits or weight.dtype != x.dtype or not x.is_floating_point():
        raise ValueError(
            f"{name} must be {wanted} and weight {'(H, C, D)' if name == 'x' else '(H, D, C)'} of one dtype, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if chosen.dtype != torch.bool or chosen.shape != (*x.shape[:2], weight.shape[0]):
        raise ValueError(
            f"active must be bool (B, T, H) = {(*x.shape[:2], weight.shape[0])}, got {chosen.dtype} of shape {tuple(chosen.shape)}"
        )
    return chosen


def _use_triton(impl: str, x: Tensor, value_dim: int | None) -> bool:
    """Whether the kernels take the call.

    Raises:
        ValueError: If they were asked for by name and cannot.
    """
    if not inputs.wants_kernels(impl, x):
        return False
    reason = inputs.kernels_refuse(x, value_dim)
    if x.numel() // x.shape[-1] > _MOST_TOKENS:
        reason = f"takes at most {_MOST_TOKENS} tokens and heads in a call"
    if reason is not None and impl == "triton":
        inputs.refuse_triton(reason)
    return reason is None


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int | None, attention_mask: Tensor | None,
    scale: float | None, impl: str,
) -> None:  # fmt: skip
    inputs.check_qkv(query, key, value)
    length, keys = query.shape[2], key.shape[2]
    if causal and length > keys:
        raise ValueError(
            f"query has {length} rows and key only {keys}: causal rows need their own keys; or set causal=False"
        )
    if window is not None:
        inputs.check_count("window", window, 1)
    if window is not None and not causal:
        raise ValueError("window is for causal attention: set causal=True or window=None")
    inputs.check_positive("scale", scale)
    inputs.check_impl(impl)
    inputs.check_attention_mask(attention_mask, key)
