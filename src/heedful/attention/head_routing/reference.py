"""Attention of the chosen (token, head) pairs in plain PyTorch: all heads are computed, and what was not chosen is 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # rows of queries whose logits exist at a time


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor | None,
    *,
    causal: bool,
    window: int,
    attention_mask: Tensor | None,
    scale: float,
) -> Tensor:
    length, keys = query.shape[2], key.shape[2]
    if query.dtype in (torch.float16, torch.bfloat16):
        return routed_attention(
            query.float(), key.float(), value.float(), active, causal=causal, window=window,
            attention_mask=attention_mask, scale=scale,
        ).to(query.dtype)  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None:  # a padded key or value may be anything, NaN too
        hidden = ~attention_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    bad = ~value.isfinite().all(-1)
    clean = value.masked_fill(bad[..., None], 0)

    def rows(query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        """One chunk of queries, from position `first` on, against the keys it can see."""
        position = first + torch.arange(query.shape[2], device=query.device)[:, None]
        low = max(first - window + 1, 0) if window else 0
        high = first + query.shape[2] if causal else keys
        key, value, bad_keys = key[:, :, low:high], value[:, :, low:high], bad[:, :, low:high]
        j = torch.arange(low, high, device=query.device)
        seen = j < keys if not causal else j <= position
        if window:
            seen = seen & (j > position - window)
        seen = seen.expand(query.shape[2], high - low)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, low:high]
        queries = query.unflatten(1, (-1, groups)).flatten(2, 3)  # heads of a group as more rows of their KV head
        logits = (queries @ key.mT * scale).unflatten(2, (groups, -1))
        weights = logits.masked_fill(~(seen[:, :, None] if seen.ndim == 4 else seen), -torch.inf).softmax(-1)
        weights = weights.masked_fill(~seen.any(-1)[..., None].unsqueeze(-3), 0)  # a row that sees nothing
        output = (weights.flatten(2, 3) @ value).unflatten(2, (groups, -1)).flatten(1, 2)
        # A weight of 0 times a NaN is a NaN: only rows that see what is not finite may become so.
        poisoned = (seen & bad_keys[:, :, None]).any(-1).repeat_interleave(groups, 1)
        return output.masked_fill(poisoned[..., None], torch.nan)

    pieces = []
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    for start in range(0, length, CHUNK):
        piece = query[:, :, start : start + CHUNK]
        first = keys - length + start
        if needs_grad and length > CHUNK:  # the weights of all chunks together would be T x T
            pieces.append(checkpoint(rows, piece, key, clean, first, use_reentrant=False))
        else:
            pieces.append(rows(piece, key, clean, first))
    output = torch.cat(pieces, 2) if pieces else query.new_empty(*query.shape[:3], value.shape[3])
    return output if active is None else output.masked_fill(~active.transpose(1, 2)[..., None], 0)


def routed_projection(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor) -> Tensor:
    output = torch.einsum("btc,hcd->bthd", x, weight)
    output = output if bias is None else output + bias
    return output.masked_fill(~active[..., None], 0)


def routed_output(heads: Tensor, weight: Tensor, active: Tensor) -> Tensor:
    return torch.einsum("bthd,hdc->btc", heads.masked_fill(~active[..., None], 0), weight)
