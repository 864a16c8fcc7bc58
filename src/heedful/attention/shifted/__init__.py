"""Shifted sparse attention (SinkLoRA, arXiv 2406.05678; LongLoRA, 2309.12307): causal inside groups, for training."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.shifted import reference

__all__ = ["shifted_sparse_attention"]

_BOUNDARIES = ("separate", "wrap")


def shifted_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    *,
    shift_ratio: float = 0.25,
    num_sink_tokens: int = 4,
    boundary: str = "separate",
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal self-attention inside groups of G tokens, some heads shifted by half a group, and to the first tokens.

    Query i of head h sees key j <= i if both are in one group of that head, or if j is one of the `num_sink_tokens`
    first tokens: one softmax over these. A plain head groups by `floor(i / G)`; the last `floor(shift_ratio * Hq + 1/2)`
    query heads by `floor((i - G // 2) / G)`, so that what a plain head keeps apart meets there. Positions count from
    each row's first real token, and a row of at most G tokens is dense causal attention, no head shifted: padding
    changes nothing. The defaults are SF-Attn (Sink Fixed Attention); `shift_ratio=0.5, num_sink_tokens=0,
    boundary="wrap"` is LongLoRA's S2-Attn, `shift_ratio=0, num_sink_tokens=0` plain attention in groups.

    Example:
        >>> import torch
        >>> from heedful.attention import shifted_sparse_attention
        >>> query = torch.randn(1, 8, 1000, 64, requires_grad=True)
        >>> key, value = torch.randn(2, 1, 2, 1000, 64)
        >>> output = shifted_sparse_attention(query, key, value, 250)
        >>> output.sum().backward()

    Args:
        query: `(B, Hq, T, D)`, float32, bfloat16, float16 or float64, rotated by the true positions. Any strides.
        key: `(B, Hkv, T, D)`, Hq a multiple of Hkv, not repeated to the query heads.
        value: `(B, Hkv, T, Dv)`.
        group_size: G, in tokens. LongLoRA takes a quarter of the length. G >= T is dense causal attention.
        shift_ratio: Share of the query heads that are shifted, 0 to 1. LongLoRA: 1/2. Default 1/4: the paper returns
            heads "proportionally" to their state before the shift and does not say in which proportion.
        num_sink_tokens: First tokens of each row that every later token sees in every head. Default 4, 0 for none.
        boundary: What a shifted head does with the half group at either end. "separate" (default): each is a group of
            its own. "wrap": as rolling the sequence does, the tokens 0 to G // 2 - 1 also see those of the last group,
            **the end of the sequence: not causal**. Rows whose length is not a multiple of G count as padded to one.
        scale: Factor on the dot products; None for `D ** -0.5`.
        attention_mask: Bool `(B, T)`, True for real tokens: padding on either side, or holes, is not seen, gives
            0 and takes no gradient. None: all are real.
        impl: "reference" (plain PyTorch, on every device), "triton" (CUDA; float32, bfloat16 or float16; D = Dv one of
            16, 32, 64, 128, 256) or "auto": Triton where it can, else the reference. Both are differentiable.

    Returns:
        `(B, Hq, T, Dv)` in the query's dtype. Sums are float32 (float64 for float64).

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work.

    Cost:
        `2 * Hq * T * (G + 2 * num_sink_tokens) * D` floating-point operations forward, linear in T at fixed G: a quarter
        of dense causal attention at G = T / 4. Memory is linear in T, beside the output one float a query and head.

    When not to use:
        At inference: the model is then read with dense attention (or H2O, `heedful.kernels.H2OAttention`); keys of other
        groups are not seen at all, and a cache of it has no meaning. For short rows: groups below some hundred tokens
        save nothing that training would notice.

    Paper:
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", Zhang,
        arXiv 2406.05678 (SF-Attn, of which it gives no formula: the one here is ours); "LongLoRA: Efficient Fine-tuning
        of Long-Context Large Language Models", Chen, Qian, Tang, Lai, Liu, Han, Jia, arXiv 2309.12307 (S2-Attn).
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    inputs.check_qkv(query, key, value, "self-attention over whole rows, no cache")
    inputs.check_attention_mask(attention_mask, key)
    check_arguments(group_size, shift_ratio, num_sink_tokens, boundary, impl)
    _, heads, length, dim = query.shape
    inputs.check_positive("scale", scale)
    geometry = reference.Geometry(
        group_size=min(group_size, max(1, length)),
        num_shifted_heads=int(shift_ratio * heads + 0.5),
        num_sink_tokens=min(num_sink_tokens, length),
        wrap=boundary == "wrap",
        scale=float(dim**-0.5 if scale is None else scale),
    )
    with torch.autocast(device, enabled=False):  # sums stay float32
        if inputs.wants_kernels(impl, query):
            reason = inputs.kernels_refuse(query, value.shape[-1])
            if reason is None:
                from heedful.attention.shifted import triton

                return triton.shifted_sparse_attention(query, key, value, geometry, attention_mask)
            if impl == "triton":
                inputs.refuse_triton(reason)
        return reference.shifted_sparse_attention(query, key, value, geometry, attention_mask)


def check_arguments(group_size: int, shift_ratio: float, num_sink_tokens: int, boundary: str, impl: str) -> None:
    """Raises ValueError for arguments that do not fit, whatever the tensors are."""
    inputs.check_count("group_size", group_size, 1)
    if isinstance(shift_ratio, bool) or not isinstance(shift_ratio, int | float) or not 0 <= shift_ratio <= 1:
        raise ValueError(f"shift_ratio must be a share of the heads, from 0 to 1, got {shift_ratio!r}")
    inputs.check_count("num_sink_tokens", num_sink_tokens, 0)
    inputs.check_choice("boundary", boundary, _BOUNDARIES)
    inputs.check_impl(impl)
