"""Shifted sparse attention (SinkLoRA, arXiv 2406.05678; LongLoRA, 2309.12307): causal inside groups, for training."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from heedful.attention.shifted import reference

__all__ = ["shifted_sparse_attention"]

_IMPLEMENTATIONS = ("auto", "reference", "triton")
_BOUNDARIES = ("separate", "wrap")

# Looked up once: a traced call must not look.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


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
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    _check_tensors(query, key, value, attention_mask)
    check_arguments(group_size, shift_ratio, num_sink_tokens, boundary, impl)
    _, heads, length, dim = query.shape
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    geometry = reference.Geometry(
        group_size=min(group_size, max(1, length)),
        num_shifted_heads=int(shift_ratio * heads + 0.5),
        num_sink_tokens=min(num_sink_tokens, length),
        wrap=boundary == "wrap",
        scale=float(dim**-0.5 if scale is None else scale),
    )
    with torch.autocast(device, enabled=False):  # sums stay float32
        if impl == "triton" or (impl == "auto" and device == "cuda"):
            reason = _triton_refuses(query, value)
            if reason is None:
                from heedful.attention.shifted import triton

                return triton.shifted_sparse_attention(query, key, value, geometry, attention_mask)
            if impl == "triton":
                raise ValueError(f"impl='triton' {reason}; use impl='reference', or 'auto' to choose by the inputs")
        return reference.shifted_sparse_attention(query, key, value, geometry, attention_mask)


def check_arguments(group_size: int, shift_ratio: float, num_sink_tokens: int, boundary: str, impl: str) -> None:
    """Raises ValueError for arguments that do not fit, whatever the tensors are."""
    if isinstance(group_size, bool) or not isinstance(group_size, int | torch.SymInt) or group_size < 1:
        raise ValueError(f"group_size must be an integer of at least 1 (tokens), got {group_size!r}")
    if isinstance(shift_ratio, bool) or not isinstance(shift_ratio, int | float) or not 0 <= shift_ratio <= 1:
        raise ValueError(f"shift_ratio must be a share of the heads, from 0 to 1, got {shift_ratio!r}")
    if isinstance(num_sink_tokens, bool) or not isinstance(num_sink_tokens, int) or num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens must be an integer of at least 0, got {num_sink_tokens!r}")
    if boundary not in _BOUNDARIES:
        raise ValueError(f"boundary must be one of {', '.join(map(repr, _BOUNDARIES))}, got {boundary!r}")
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {impl!r}")


def _triton_refuses(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, to follow "impl='triton'"; None if they can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {query.dtype}"
    dim = query.shape[-1]
    if dim not in (16, 32, 64, 128, 256) or value.shape[-1] != dim:
        return f"takes D = Dv = 16, 32, 64, 128 or 256, not D = {dim} and Dv = {value.shape[-1]}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not query.is_cuda:
        from heedful.attention.shifted import triton

        if not triton.INTERPRETED:
            return f"runs on CUDA devices, not on {query.device} (or set TRITON_INTERPRET=1 before triton is imported)"
    return None


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (B, H, T, D), got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and query {query.dtype} on {query.device}, not alike"
            )
        if tensor.shape[1] == 0 or tensor.shape[3] == 0:
            raise ValueError(f"{name} has no head or no dimension: shape {tuple(tensor.shape)}")
    batch, heads, length, dim = query.shape
    if key.shape[0] != batch or key.shape[2:] != (length, dim):
        raise ValueError(
            f"key must be ({batch}, Hkv, {length}, {dim}) like query (self-attention over whole rows, no cache), got "
            f"shape {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be ({batch}, {key.shape[1]}, {length}, Dv) like key, got shape {tuple(value.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads, which is not a multiple of the {key.shape[1]} heads of key")
    if attention_mask is None:
        return
    if attention_mask.dtype != torch.bool or attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be bool ({batch}, {length}), True for real tokens, got {attention_mask.dtype} "
            f"{tuple(attention_mask.shape)}; convert 0/1 with .bool()"
        )
    if attention_mask.device != query.device:
        raise ValueError(f"attention_mask is on {attention_mask.device}, query on {query.device}: move it there")
