"""The layer of Lightning Attention-2 as TransNormerLLM has it, and the cache layer that holds its state."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.cache_utils import CacheLayerMixin

from heedful.attention import lightning_attention
from heedful.attention.lightning import slopes

__all__ = ["LightningAttention", "LightningCacheLayer"]


class LightningCacheLayer(CacheLayerMixin):
    """What a lightning layer remembers in generation: one state, of the same size after any number of tokens.

    For `transformers.cache_utils.Cache(layers=[...])`, one a layer. Beam search reorders it; it cannot go back (`crop`).

    Attributes:
        state: float32 `(B, H, D, E)` (float64 for float64 models), or None before the first token. It is overwritten in
            place, so that a CUDA graph may read and write it.
        seen: Tokens passed so far, padding included.

    Example:
        >>> import torch
        >>> from heedful.layers import LightningAttention, LightningCacheLayer
        >>> layer, cache = LightningAttention(64, 4), LightningCacheLayer()
        >>> with torch.no_grad():
        ...     for x in torch.randn(10, 1, 1, 64):  # token by token
        ...         y = layer(x, cache=cache)
        >>> cache.state.shape, cache.get_seq_length()
        (torch.Size([1, 4, 16, 16]), 10)

    Cost:
        `B * H * D * E` floats.

    When not to use:
        With `cache_implementation="static"` or "quantized": there are no keys to keep.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.seen = 0

    def update_state(self, state: Tensor, tokens: int) -> None:
        """Stores the state after `tokens` more tokens."""
        if self.state is not None and self.state.shape == state.shape and not state.requires_grad:
            self.state.copy_(state)
        else:
            self.state = state
        self.seen += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens passed so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens so far and `query_length` new ones."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything, keeping the memory."""
        if self.state is not None:
            self.state.zero_()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        """To the CPU."""
        if self.state is not None:
            self.device = self.state.device
            self.state = self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Back to the device it was on."""
        if self.state is not None and self.state.device != getattr(self, "device", self.state.device):
            self.state = self.state.to(self.device, non_blocking=True)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: a state cannot forget its last tokens."""
        raise ValueError(
            "the state of lightning attention cannot be cropped: copy the cache before the tokens that may be taken back"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Refused: see `update`."""
        self.update(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there are no keys and values here."""
        raise ValueError(
            "LightningCacheLayer holds a state, not keys and values: give softmax attention layers a DynamicLayer"
        )


class LightningAttention(nn.Module):
    """Lightning attention as a layer: projections with SiLU, decayed linear attention, norm, output gate, projection.

    `q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)`; `o = lightning_attention(q, k, v, decay, scale=1)`;
    `y = (norm(o) * sigmoid(gate(x))) W_o`. There are no positions but the decay, and no biases. Takes the place of a softmax
    attention layer in a model that is trained with it.

    Example:
        >>> import torch
        >>> from heedful.layers import LightningAttention
        >>> layer = LightningAttention(512, 8, layer=0, num_layers=12)
        >>> layer(torch.randn(2, 100, 512)).shape
        torch.Size([2, 100, 512])

    Args:
        dim: Width of the input and the output.
        num_heads: Query heads H.
        num_kv_heads: Heads of keys and values, a divisor of H; None for H. The state is one a query head all the same.
        head_dim: D; None for `dim // num_heads`.
        layer: This layer's number in the model, from 0; later layers forget more slowly.
        num_layers: Layers of the model.
        decay: H rates instead of `alibi_slopes(num_heads, layer, num_layers)`, not negative, not trained.
        use_output_gate: Whether to multiply by the gate.
        gate_rank: Width of the gate's bottleneck; None for D as in TransNormerLLM; 0 for one full matrix, as in MiniMax-01.
        norm: "layer" (LayerNorm over all heads together, the authors' layer), "rms" (RMSNorm with weights, MiniMax-01) or
            "simple_rms" (without weights, TransNormerLLM).
        norm_eps: The norm's epsilon.
        impl: As for `lightning_attention`.

    Raises:
        ValueError: If the sizes do not fit.

    Cost:
        That of softmax attention's projections and the gate; the operator is linear in the length. A state of
        `H * D * D` floats a row in generation.

    When not to use:
        To swap it into a trained softmax model without training.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658; "TransNormerLLM", arXiv 2307.14995; "MiniMax-01", arXiv 2501.08313.
    """

    decay: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        decay: list[float] | None = None,
        use_output_gate: bool = True,
        gate_rank: int | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(dim, num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"dim and heads must be positive and num_heads a multiple of num_kv_heads, got dim={dim}, "
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}: give head_dim")
        head_dim = dim // num_heads if head_dim is None else head_dim
        rates = slopes(num_heads, layer, num_layers) if decay is None else [float(x) for x in decay]
        if len(rates) != num_heads or not all(0 <= x < float("inf") for x in rates):
            raise ValueError(f"decay must be {num_heads} rates, finite and not negative, got {rates}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.impl = impl
        width = num_heads * head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)
        norms = {
            "layer": lambda: nn.LayerNorm(width, eps=norm_eps),
            "rms": lambda: nn.RMSNorm(width, eps=norm_eps),
            "simple_rms": lambda: nn.RMSNorm(width, eps=norm_eps, elementwise_affine=False),
        }
        if norm not in norms:
            raise ValueError(f"norm must be one of {', '.join(map(repr, norms))}, got {norm!r}")
        self.norm: nn.Module = norms[norm]()
        self.gate: nn.Module | None = None
        if use_output_gate:
            rank = head_dim if gate_rank is None else gate_rank
            self.gate = nn.Linear(dim, width, bias=False)
            if rank:
                self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, width, bias=False))
        self._rates = rates
        self.register_buffer("decay", torch.tensor(rates, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> LightningAttention:
        """The rates stay what they are in float32, whatever dtype the module goes to."""
        super()._apply(fn, recurse)
        if not self.decay.is_meta:
            self.reset_decay()
        return self

    def reset_decay(self) -> None:
        """Writes the rates anew (after a module was made on the meta device)."""
        self.decay = torch.tensor(self._rates, dtype=torch.float32, device=self.decay.device)

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cache: LightningCacheLayer | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`(B, T, dim)`, and with `output_final_state=True` the state `(B, H, D, D)`.

        Args:
            x: `(B, T, dim)`.
            attention_mask: bool `(B, T)`, True for real tokens.
            cu_seqlens: `(N + 1,)`, where documents begin and the last one ends, if B = 1 row holds several of them.
            initial_state: The state before the first token, as `lightning_attention` has it.
            cache: Gives the initial state, and takes the final one.

        Raises:
            ValueError: If the arguments exclude one another or do not fit.
        """
        if cache is not None:
            if initial_state is not None or cu_seqlens is not None:
                raise ValueError(
                    "cache holds the state of one sequence a row: give no initial_state or cu_seqlens with it"
                )
            initial_state = cache.state
        query, key, value = (
            silu(projection(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        result = lightning_attention(
            query, key, value, self.decay, 1.0, initial_state=initial_state, attention_mask=attention_mask,
            cu_seqlens=cu_seqlens, output_final_state=output_final_state or cache is not None, impl=self.impl,
        )  # fmt: skip
        output, state = result if isinstance(result, tuple) else (result, None)
        y = self.norm(output.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        y = self.o_proj(y)
        if cache is not None and state is not None:
            cache.update_state(state, x.shape[1])
        if output_final_state and state is not None:
            return y, state
        return y
