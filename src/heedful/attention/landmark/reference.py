"""Landmark Attention in plain PyTorch, to be read next to the paper; the oracle of the Triton kernels.

Query rows come in blocks, recomputed in the backward, so that no tensor of T x T is made or kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Scores of one block of query rows and one head: rows times keys, about.
_SCORES = 1 << 18


def landmark_attention(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float
) -> Tensor:
    """`(B, Hq, T, Dv)`. is_landmark `(B, T)`."""
    return attention_with_lse(query, key, value, is_landmark, attention_mask, scale)[0]


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The queries are those of the last rows; also the logarithm of the sum of the outer softmax, `(B, Hq, Tq)`."""
    batch, heads, queries, _ = query.shape
    length = key.shape[2]
    if batch == 0 or queries == 0:
        empty = query.new_empty(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))
        return query.new_empty(batch, heads, queries, value.shape[3]), empty
    real = torch.ones_like(is_landmark) if attention_mask is None else attention_mask
    token, mark = real & ~is_landmark, real & is_landmark
    block = mark.cumsum(1) - mark.long()  # landmarks before a position
    rows = max(16, min(queries, _SCORES // length))
    recompute = rows < queries and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    parts = []
    for first in range(0, queries, rows):
        until = min(first + rows, queries)
        last = length - queries + until  # later keys are not seen
        arguments = (
            query[:, :, first:until], key[:, :, :last], value[:, :, :last], block[:, :last], token[:, :last], mark[:, :last], scale
        )  # fmt: skip
        if recompute:
            parts.append(checkpoint(_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_rows(*arguments))
    outputs, lse = zip(*parts, strict=True)
    return torch.cat(outputs, 2).to(query.dtype), torch.cat(lse, 2)


def _rows(
    query: Tensor, key: Tensor, value: Tensor, block: Tensor, token: Tensor, mark: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The last R rows over J keys: `(B, Hq, R, Dv)` and `(B, Hq, R)`. block, token, mark: `(B, J)`."""
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    real_row = (token | mark)[:, None, -rows:, None]
    # All later rows attend to a token, and no earlier one does, whose weight of 0 would make a NaN of its NaN.
    bad = token[:, None] & ~value.isfinite().all(3)
    poisoned = (bad.cumsum(2) > 0)[:, :, -rows:].repeat_interleave(heads // kv_heads, 1)[..., None] & real_row
    value = value.masked_fill(bad[..., None], 0.0)
    query = torch.where(real_row, query, 0.0).to(exact)
    # What is not read may be anything, NaN too.
    key = torch.where((token | mark)[:, None, :, None], key, 0.0).to(exact).repeat_interleave(heads // kv_heads, 1)
    value = torch.where(token[:, None, :, None], value, 0.0).to(exact).repeat_interleave(heads // kv_heads, 1)
    scores = query @ key.mT * scale  # (B, H, R, J)

    at = torch.arange(keys, device=query.device)
    seen = at <= at[-rows:, None]
    block_of_row = block[:, None, -rows:, None]
    block, token, mark = (x[:, None, None, :] for x in (block, token, mark))
    own = token & (block == block_of_row) & seen & real_row
    earlier = (block < block_of_row) & real_row
    inside, gate = earlier & token, earlier & mark

    # Softmax of the tokens of each earlier block.
    index = block.expand(batch, heads, rows, keys)
    empty = scores.new_zeros(batch, heads, rows, keys)  # one place a block: no more than keys
    inner_scores = scores.masked_fill(~inside, -torch.inf)
    top = torch.full_like(empty, -torch.inf).scatter_reduce(3, index, inner_scores.detach(), "amax")
    top = torch.where(top == -torch.inf, 0.0, top)
    exponentials = torch.where(inside, (inner_scores - top.gather(3, index)).exp(), 0.0)
    sums = empty.scatter_add(3, index, exponentials)
    gate = gate & (empty.scatter_add(3, index, inside.to(exact).expand_as(scores)).gather(3, index) > 0)
    inner = torch.where(inside, exponentials / torch.where(inside, sums.gather(3, index), 1.0), 0.0)

    # One softmax over the row's own block and the landmarks of earlier blocks that have tokens.
    outer_scores = scores.masked_fill(~(own | gate), -torch.inf)
    top = outer_scores.detach().amax(3, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    exponentials = torch.where(own | gate, (outer_scores - top).exp(), 0.0)
    total = exponentials.sum(3, keepdim=True)
    outer = exponentials / torch.where(total == 0, 1.0, total)

    gates = empty.scatter_add(3, index, torch.where(gate, outer, 0.0))
    weights = torch.where(own, outer, 0.0) + gates.gather(3, index) * inner
    output = weights @ value * torch.where(poisoned, torch.nan, 1.0).to(exact)
    return output, (total.log() + top).squeeze(3).detach()
