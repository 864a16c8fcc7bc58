"""Hybrid tree attention in plain PyTorch, to be read next to the paper; the oracle of the Triton kernels.

The prefix, which every node sees, and the tree, where a node sees its ancestors and itself, are attended to apart. Each
gives an output and the logarithm of its softmax's denominator, and these make the output of one softmax over both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: Tensor,
    *,
    longest: int,
    prefix_start: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """`(B, Hq, n, Dv)`. `longest` is a bound on `prefix_length`, known without asking the device: keys read."""
    nodes = query.shape[2]
    tree_mask = tree_mask.expand(query.shape[0], nodes, nodes)
    slots = torch.arange(max(1, longest), device=query.device)
    in_prefix = (slots < prefix_length[:, None])[:, None]  # (B, 1, T)
    if prefix_start is not None:
        in_prefix = in_prefix & (slots >= prefix_start[:, None])[:, None]
    if window is not None:
        depth = (tree_mask.sum(-1) - 1).clamp(min=0)  # (B, n)
        in_prefix = in_prefix & (slots > (prefix_length[:, None] + depth - window)[..., None])
        tree_mask = tree_mask & (depth[:, :, None] - depth[:, None, :] < window)

    behind = (prefix_length[:, None] + torch.arange(nodes, device=query.device))[:, None, :, None]
    tree_key, tree_value = (x.gather(2, behind.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    key, value = (x[:, :, : len(slots)] for x in (key, value))
    prefix = _attend(query, key, value, in_prefix, softcap=softcap, scale=scale)
    tree = _attend(query, tree_key, tree_value, tree_mask, softcap=softcap, scale=scale)
    return merge_attention_states(*prefix, *tree)[0].to(query.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, n, Dv)` and lse `(B, Hq, n)` of a softmax over the `visible (B, n or 1, T)` keys, 0 and -inf for
    none. Computed in float32 or float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # What no row sees may be anything, NaN too: 0 times NaN would reach the sums, or the gradients.
    seen = visible.any(-2)[:, None, :, None]
    key, value = (torch.where(seen, x, 0).to(dtype) for x in (key, value))
    query = query.to(dtype).unflatten(1, (key.shape[1], -1))  # (B, Hkv, G, n, D)
    logits = query @ key[:, :, None].mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(top == -torch.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    output = weights @ value[:, :, None] / total
    lse = torch.where(empty, -torch.inf, top + total.log())
    return output.flatten(1, 2), lse.squeeze(-1).flatten(1, 2)


def merge_attention_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    neither = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    first, second = (torch.where(neither, 0, lse) for lse in (lse1, lse2))
    weight = torch.sigmoid(first - second)[..., None]
    output = weight * o1 + (1 - weight) * o2
    lse = torch.where(neither, -torch.inf, torch.logaddexp(first, second))
    return output.to(o1.dtype), lse
