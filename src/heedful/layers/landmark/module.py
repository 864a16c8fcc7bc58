"""Landmark attention as a layer to build models with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heedful.attention.landmark import landmark_attention
from heedful.layers.landmark.cache import LandmarkCache, LandmarkStep, rotate


class LandmarkAttention(nn.Module):
    """Causal self-attention with landmarks and rotary positions: grouped softmax in training, block retrieval with a cache.

    The rows that come in hold tokens and landmarks: the caller has put a landmark's embedding after every `block_size`
    tokens (blocks of other lengths are fine without a cache).

    Example:
        >>> import torch
        >>> from heedful.layers import LandmarkAttention, LandmarkCache
        >>> attention = LandmarkAttention(64, num_heads=4)
        >>> x = torch.randn(2, 32, 64)
        >>> is_landmark = torch.arange(32) % 8 == 7  # blocks of 7 tokens
        >>> attention(x, is_landmark).shape
        torch.Size([2, 32, 64])
        >>> cache = LandmarkCache(block_size=7, top_k=2)
        >>> for chunk in x.split(16, 1):  # each chunk reads two blocks of the earlier ones
        ...     step = cache.begin_slots(2, 16, x.device)
        ...     with torch.no_grad():
        ...         y = attention(chunk, cache=cache, step=step)
        ...     cache.finish()

    Args:
        dim: Width of the rows.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, of which `num_heads` is a multiple. Default None: as many.
        head_dim: Of each head, even. Default None: `dim // num_heads`.
        layer_idx: Its place in a cache. Default 0.
        rope_theta: Base of the rotary frequencies. Default 10000.
        bias: Whether the projections have one. Default False.

    `forward(x, is_landmark=None, *, attention_mask=None, cache=None, step=None)`: x `(B, T, dim)`; is_landmark and
    attention_mask as in `heedful.attention.landmark_attention`; or, in their place, a cache and what its `begin_slots`
    returned, for inference without gradients. Returns `(B, T, dim)`.

    Raises:
        ValueError: If sizes do not fit, neither `is_landmark` nor a cache is given, or gradients are asked with a cache.

    Cost:
        See `heedful.attention.landmark_attention` and `LandmarkCache`.

    When not to use:
        To change an existing model: `heedful.layers.convert_to_landmark`.

    Paper:
        "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami and Jaggi,
        arXiv 2305.16300.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        rope_theta: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}: give head_dim")
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self.num_heads, self.num_kv_heads, self.layer_idx = num_heads, kv_heads, layer_idx
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.rope_theta = rope_theta
        self.register_buffer("inv_freq", torch.empty(self.head_dim // 2), persistent=False)
        self.reset_frequencies()

    def _apply(self, fn: Any, recurse: bool = True) -> LandmarkAttention:
        """The frequencies stay what they are in float32, whatever dtype the module goes to: far positions need them."""
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:
            self.reset_frequencies()
        return self

    def reset_frequencies(self) -> None:
        """Writes the rotary frequencies anew (after a module was made on the meta device)."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=self.inv_freq.device) / self.head_dim
        self.inv_freq = self.rope_theta**-exponent

    def forward(
        self,
        x: Tensor,
        is_landmark: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: LandmarkCache | None = None,
        step: LandmarkStep | None = None,
    ) -> Tensor:
        batch, length, _ = x.shape
        query = self.q_proj(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        key, value = (
            proj(x).unflatten(2, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        scale = self.head_dim**-0.5
        if (cache is None) != (step is None) or (cache is None and is_landmark is None):
            raise ValueError("give is_landmark, or a cache and the step that its begin_slots returned")
        if cache is None:
            assert is_landmark is not None
            if attention_mask is None:
                positions = torch.arange(length, device=x.device).expand(batch, -1)
            else:
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            query, key = (rotate(t, positions[:, None], self.inv_freq) for t in (query, key))
            output = landmark_attention(query, key, value, is_landmark, scale, attention_mask=attention_mask)
        else:
            assert step is not None
            if torch.is_grad_enabled() and query.requires_grad:
                raise ValueError("a LandmarkCache has no gradients: call under torch.no_grad()")
            query, key = (rotate(t, step.positions[:, None], self.inv_freq) for t in (query, key))
            key, value = cache.update(key, value, self.layer_idx)
            output = cache.layer(self.layer_idx).attend(query, key, value, step, self.inv_freq, scale)
        return self.o_proj(output.transpose(1, 2).flatten(2))
