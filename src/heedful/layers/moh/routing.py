"""Who works for whom: the choice of heads, their gates, and the loss that spreads the work."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.attention import choose_heads


def load_balance(probabilities: Tensor, chosen: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """`E * sum_e f_e P_e` over real tokens: f_e the share that has head e, P_e its mean probability. Balanced: count of heads chosen.

    Args:
        probabilities: `(B, T, E)`, softmax over the routed heads.
        chosen: bool `(B, T, E)`.
        attention_mask: `(B, T)`, non-zero for real tokens; None for all.
    """
    if attention_mask is None:
        real = torch.ones_like(probabilities[..., 0])
    else:
        real = attention_mask.to(probabilities.dtype)
    share = real / real.sum().clamp(min=1)
    # `where`, since what a padded token computes may be anything.
    mean = torch.where(real[..., None] > 0, probabilities, 0).mul(share[..., None]).sum((0, 1))
    load = chosen.to(share.dtype).mul(share[..., None]).sum((0, 1))
    return probabilities.shape[-1] * (load * mean).sum()


def norm_scores(query: Tensor) -> Tensor:
    """Routing scores `(B, T, E)`, float32 or float64, of the routed heads' queries `(B, E, T, D)`.

    The norm of a head's query over the deviation of the norms among the token's heads. Rotary embeddings keep norms, so
    rotated queries give the scores of those before rotation, and a token's queries times a positive number give the same.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    # Of a zero query (padding) the norm's gradient is 0 here, not NaN.
    norms = query.to(wide).square().sum(-1).clamp(min=torch.finfo(wide).tiny).sqrt().transpose(1, 2)
    if norms.shape[-1] < 2:
        return torch.ones_like(norms) if norms.shape[-1] else norms
    centred = norms - norms.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (norms.shape[-1] - 1)
    # Equal norms have no deviation: the scores are then equal, and so are their probabilities.
    floor = (norms.detach().mean(-1, keepdim=True) * 1e-6).clamp(min=1e-18)
    return norms / variance.clamp(min=floor.square()).sqrt()


def norm_routing(query: Tensor, shared: int, active: int) -> tuple[Tensor, Tensor]:
    """The hard choice bool `(B, T, H)` and the routed heads' probabilities `(B, T, E)`, from queries `(B, H, T, D)`.

    Chosen are the first `shared` heads and those of the highest query norms, `active` in all.
    """
    scores = norm_scores(query[:, shared:])
    # By the norms themselves would be the same order: one positive factor a token.
    chosen = choose_heads(scores, active - shared)
    always = chosen.new_ones(*chosen.shape[:2], shared)
    return torch.cat([always, chosen], -1), scores.softmax(-1)
