"""The layer with trained routers, for models trained from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heedful.attention import choose_heads, dispatch_heads, routed_attention, routed_output, routed_projection
from heedful.layers.moh.routing import load_balance

# Keys of a row times the share of heads that a token does not have, from which on skipping is faster than computing all heads
# (on an H200, in bfloat16: reproductions/results/attention-moh-h200.json).
SKIP_FROM = 4096
# The output projection skips heads where a token has at most one in so many of the routed ones: above, one dense product over
# zeros is faster than products of each head's rows and their sum.
OUTPUT_SHARE = 8


class MixtureOfHeads(nn.Module):
    """Multi-head attention in which each token has the first heads and a few routed ones, weighted by gates.

    `y_t = sum_h g_th head_th W_O^h`. Keys and values of all heads stay: routing is by query token. With routers at zero every
    active gate is 1.

    Example:
        >>> import torch
        >>> from heedful.layers import MixtureOfHeads
        >>> layer = MixtureOfHeads(256, num_heads=8, num_shared_heads=2, top_k_heads=2, causal=True)
        >>> y, (gates, balance_loss) = layer(torch.randn(2, 100, 256), return_routing=True)
        >>> gates.shape, int((gates[0, 0] > 0).sum())
        (torch.Size([2, 100, 8]), 4)
        >>> loss = y.square().mean() + 0.01 * balance_loss

    Args:
        dim: Width C of the input and the output.
        num_heads: H, query heads.
        num_shared_heads: The first heads, which every token has. All of them: no routed heads, a soft weighting of all.
        top_k_heads: Of the other heads, how many a token has: at least 1 where there are others, else 0.
        num_kv_heads: Heads of keys and values, a divisor of H; None for H.
        head_dim: D; None for `dim / num_heads`.
        causal: A token sees only itself and earlier ones.
        bias: Of the four projections. Routers have none.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: linear layers, named as in transformers.
        router: W_r, C to the routed heads, or None. shared_router: W_s, C to the shared heads, or None if there are fewer than two.
        kind_router: W_h, C to two (shared, routed), or None unless there are both.

    Raises:
        ValueError: If the numbers of heads do not fit.

    Cost:
        The parameters of multi-head attention and `C * (H + 2)` of routers. On a GPU, from 8,192 tokens on with half of the
        heads and from 16,384 with three quarters, a routed head that a token does not have costs no query projection, no scores
        and no product with the values, and where a token has at most an eighth of the routed heads, no output projection: with
        more, one dense product over zeros is faster (both are in `benchmarks/operators/moh.py`). Elsewhere all heads are
        computed. Backward, the weights' gradients are dense.

    When not to use:
        To shorten generation: at one token a step, keys and values are what is read, and they stay. It keeps no cache; models that
        generate are converted by `convert_to_moh`. At small scale it costs a little quality.

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin, Zhu, Yuan, Yan, arXiv 2410.11842.
    """

    router: nn.Linear | None
    shared_router: nn.Linear | None
    kind_router: nn.Linear | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared_heads: int,
        top_k_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        routed = num_heads - num_shared_heads
        if min(dim, num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"dim, num_heads and num_kv_heads must be positive and num_heads a multiple of num_kv_heads, got {dim}, "
                f"{num_heads} and {num_kv_heads}"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}: give head_dim")
        if not 0 <= num_shared_heads <= num_heads:
            raise ValueError(f"num_shared_heads must be 0 to num_heads={num_heads}, got {num_shared_heads}")
        if not (1 <= top_k_heads <= routed or routed == top_k_heads == 0):
            raise ValueError(
                f"top_k_heads must be 1 to {routed}, the number of routed heads (0 only where all heads are shared), got {top_k_heads}"
            )
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.num_shared_heads, self.top_k_heads = num_shared_heads, top_k_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.router = nn.Linear(dim, routed, bias=False) if routed else None
        self.shared_router = nn.Linear(dim, num_shared_heads, bias=False) if num_shared_heads > 1 else None
        self.kind_router = nn.Linear(dim, 2, bias=False) if routed and num_shared_heads else None

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_shared_heads={self.num_shared_heads}, top_k_heads={self.top_k_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"
        )

    def forward(
        self,
        x: Tensor,
        return_routing: bool = False,
        *,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """
        Args:
            x: `(B, T, C)`, the layer's input (after its norm).
            return_routing: Also return gates and balance loss; nothing of them is kept on the module.
            attention_mask: bool `(B, T)`, True for real tokens. The others are seen by nobody and count for no loss; their own
                output means nothing.
            rotary: `(cos, sin)`, each `(B or 1, T, D)`, the halves of the head rotated against each other as in Llama.

        Returns:
            `(B, T, C)`, or `(y, (gates, balance_loss))`: gates `(B, T, H)` in float32 (float64 for float64), 0 for heads a
            token does not have, and the loss, a scalar to be scaled (0.01 in the paper) and summed over layers; its minimum
            is `top_k_heads`, for routed layers, and it is 0 without routed heads.

        Raises:
            ValueError: If `x` or `attention_mask` has another shape.
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (B, T, {self.dim}), got {tuple(x.shape)}")
        if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape != x.shape[:2]):
            raise ValueError(
                f"attention_mask must be bool (B, T) = {tuple(x.shape[:2])}, got {attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
            )
        gates, loss = self._gates(x, attention_mask, return_routing)
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        key = key if rotary is None else _rotate(key, rotary)
        if self._skips(x, key):
            y = self._chosen_heads(x, key, value, gates, attention_mask, rotary)
        else:
            query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            query = query if rotary is None else _rotate(query, rotary)
            y = self.o_proj(_weighted(self._attend(query, key, value, attention_mask), gates).flatten(2))
        return (y, (gates, loss)) if return_routing else y

    def _gates(self, x: Tensor, attention_mask: Tensor | None, with_loss: bool) -> tuple[Tensor, Tensor]:
        """Gates `(B, T, H)` and, if asked for, the balance loss, in float32 whatever the layer computes in."""
        shared, k = self.num_shared_heads, self.top_k_heads
        with torch.autocast(x.device.type, enabled=False):
            routers = [r for r in (self.router, self.shared_router, self.kind_router) if r is not None]
            logits = _wide_linear(x, torch.cat([r.weight for r in routers])) if routers else None
            sizes = [r.out_features for r in routers]
            softmax = dict(
                zip(routers, () if logits is None else (l.softmax(-1) for l in logits.split(sizes, -1)), strict=True)
            )
            pieces = []
            if shared:
                ones = x.new_ones(*x.shape[:2], 1, dtype=torch.promote_types(x.dtype, torch.float32))
                pieces.append(ones if self.shared_router is None else shared * softmax[self.shared_router])
            loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
            if self.router is not None:
                p = softmax[self.router]
                chosen = choose_heads(p, k)
                kept = torch.where(chosen, p, 0)
                pieces.append(k * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps))
                if with_loss:
                    loss = load_balance(p, chosen, attention_mask)
            if self.kind_router is not None:
                kinds = 2 * softmax[self.kind_router]
                pieces = [pieces[0] * kinds[..., :1], pieces[1] * kinds[..., 1:]]
            return torch.cat(pieces, -1), loss

    def _skips(self, x: Tensor, key: Tensor) -> bool:
        return (
            x.is_cuda
            and self.router is not None
            and self.top_k_heads < self.router.out_features
            and x.shape[1] * (self.router.out_features - self.top_k_heads) >= SKIP_FROM * self.num_heads
            and self.head_dim in (16, 32, 64, 128, 256)
            and key.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and type(self.q_proj) is type(self.o_proj) is nn.Linear  # an adapter in its place is called, with all heads
        )

    def _chosen_heads(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The layer's output: the shared heads by the ordinary kernels, of the routed ones the chosen pairs."""
        shared, dim, k = self.num_shared_heads, self.head_dim, self.top_k_heads
        routed = self.num_heads - shared
        active = gates[..., shared:] > 0
        if attention_mask is not None:
            active = active & attention_mask[..., None]
        dispatch = dispatch_heads(active)
        weight, bias = self.q_proj.weight, self.q_proj.bias
        of_heads = weight[shared * dim :].unflatten(0, (routed, dim)).mT
        query = routed_projection(
            x, of_heads, dispatch, None if bias is None else bias[shared * dim :].view(routed, dim)
        )
        query = query.transpose(1, 2)
        query = query if rotary is None else _rotate(query, rotary)
        keys, values = (self._of_heads(t, shared, self.num_heads) for t in (key, value))
        heads = routed_attention(query, keys, values, dispatch, causal=self.causal, attention_mask=attention_mask)
        chosen = _weighted(heads, gates[..., shared:])
        pieces = []
        if shared:
            query = functional.linear(x, weight[: shared * dim], None if bias is None else bias[: shared * dim])
            query = query.unflatten(-1, (shared, dim)).transpose(1, 2)
            query = query if rotary is None else _rotate(query, rotary)
            keys, values = (self._of_heads(t, 0, shared) for t in (key, value))
            pieces.append(_weighted(self._attend(query, keys, values, attention_mask), gates[..., :shared]))
        if k * OUTPUT_SHARE > routed:
            return self.o_proj(torch.cat([*pieces, chosen], 2).flatten(2))
        out = self.o_proj.weight
        y = routed_output(chosen, out[:, shared * dim :].T.unflatten(0, (routed, dim)), dispatch, most=k)
        if shared:
            return y + functional.linear(pieces[0].flatten(2), out[:, : shared * dim], self.o_proj.bias)
        return y if self.o_proj.bias is None else y + self.o_proj.bias

    def _of_heads(self, t: Tensor, first: int, last: int) -> Tensor:
        """The keys or values of query heads `first` to `last`: a view where groups are not cut, else one head a query head."""
        group = self.num_heads // self.num_kv_heads
        if first % group == 0 and last % group == 0:
            return t[:, first // group : last // group]
        return t[:, torch.arange(first, last, device=t.device) // group]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None and self.causal:  # as one mask it would be T x T
            return routed_attention(query, key, value, attention_mask=attention_mask)
        mask = None if attention_mask is None else attention_mask[:, None, None]
        if mask is not None:  # a padded value may be anything, NaN too
            key, value = (t.masked_fill(~mask.mT, 0) for t in (key, value))
        grouped = query.shape[1] != key.shape[1]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal, enable_gqa=grouped
        )


def _weighted(heads: Tensor, gates: Tensor) -> Tensor:
    """Heads `(B, H, T, D)` times gates, `(B, T, H, D)`."""
    return heads.transpose(1, 2) * gates[..., None].to(heads.dtype)


class _WideProduct(torch.autograd.Function):
    """`x @ weight.T` of half-precision matrices in float32: their products are exact there, and the sum is not rounded again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.T @ x


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The linear layer without bias, in float32 at least."""
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        product: Tensor = _WideProduct.apply(x.flatten(0, 1), weight)  # without a copy of x in float32
        return product.unflatten(0, x.shape[:2])
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.linear(x.to(wide), weight.to(wide))


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t[:, None].to(x.dtype) for t in rotary)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
