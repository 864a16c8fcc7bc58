"""HiP attention for one new token a row over a static cache: the choice of keys lives on the device and is renewed there.

Nothing here reads a tensor on the host, and all shapes are fixed by the capacity of the cache, so a step can be
captured in a CUDA graph, refresh included: whether a row's choice is due is decided on the device, from its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.hip import check_sink_logits, reference

__all__ = ["HiPDecodeState", "hip_decode"]


class HiPDecodeState:
    """The choices of keys of one layer while it decodes, in buffers that never move: for static caches and CUDA graphs.

    One per layer and batch. `hip_decode` fills and uses it. Call `reset` when a new sequence begins.

    Example:
        >>> import torch
        >>> from heedful.attention.hip.decode import HiPDecodeState, hip_decode
        >>> key, value = torch.randn(2, 1, 2, 4096, 64)  # a static cache, 3000 tokens of it in use
        >>> state = HiPDecodeState(1, 6, 4096, top_k=256)
        >>> lengths = torch.tensor([3000])
        >>> output = hip_decode(torch.randn(1, 6, 1, 64), key, value, lengths, state, refresh_interval=8)
        >>> output.shape, state.keys_read(lengths)[0, 0].item()
        (torch.Size([1, 6, 1, 64]), 528)

    Args:
        batch: Rows of the batch, B.
        heads: Query heads, Hq.
        max_length: Capacity of the cache, in tokens: decides how many rounds a search may take.
        top_k: Keys chosen for a row and head, beside window and sinks. Default 512.
        block_size_k: Keys that are chosen together. Default 2.
        block_stride_k: Every so-many-th key of a block is scored. Default 1.
        sliding_window: Latest keys that are always read. Default 256.
        num_sink_tokens: First real tokens, which are always read. Default 16.
        head_group_size: Heads that share a choice, as in `hip_attention`. Default 1.
        device: Where the buffers are. Default: torch's default device.

    Attributes:
        blocks: int32 `(B, S, n)`, the chosen key blocks as in `HiPMask.blocks`, of S = `Hq / head_group_size` sets.
        chosen_at: int32 `(B, S)`, keys in use when the choice was made; -1 for no choice yet.
        refreshes: int64 `(B, S)`, choices made since the last reset.

    Raises:
        ValueError: If a size is not an integer in its range.

    Cost:
        `4 * top_k / block_size_k` bytes for a row and head.

    Paper:
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"
        (HiP Attention), Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, arXiv 2406.09827.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        max_length: int,
        *,
        top_k: int = 512,
        block_size_k: int = 2,
        block_stride_k: int = 1,
        sliding_window: int = 256,
        num_sink_tokens: int = 16,
        head_group_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "batch": (batch, 0),
            "heads": (heads, 1),
            "max_length": (max_length, 1),
            "top_k": (top_k, 1),
            "block_size_k": (block_size_k, 1),
            "block_stride_k": (block_stride_k, 1),
            "sliding_window": (sliding_window, 0),
            "num_sink_tokens": (num_sink_tokens, 0),
            "head_group_size": (head_group_size, 1),
        }
        for name, (size, least) in sizes.items():
            inputs.check_count(name, size, least)
        if block_stride_k > block_size_k:
            raise ValueError(f"block_stride_k ({block_stride_k}) must not be above block_size_k ({block_size_k})")
        if heads % head_group_size:
            raise ValueError(f"heads ({heads}) must be a multiple of head_group_size ({head_group_size})")
        self.head_group_size = head_group_size
        self.batch, self.heads, self.max_length = batch, heads, max_length
        self.top_k, self.block_size_k, self.block_stride_k = top_k, block_size_k, block_stride_k
        self.sliding_window = sliding_window
        self.num_sink_tokens = num_sink_tokens
        most = max(0, -(-(max_length - self.sliding_window - num_sink_tokens) // block_size_k))
        self.nodes = min(-(-top_k // block_size_k), most)
        self.rounds = math.ceil(math.log2(most / self.nodes)) if self.nodes else 0
        sets = heads // head_group_size
        self.blocks = torch.full((batch, sets, self.nodes), -1, dtype=torch.int32, device=device)
        self.chosen_at = torch.full((batch, sets), -1, dtype=torch.int32, device=device)
        self.refreshes = torch.zeros((batch, sets), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forgets the choices: the next step makes new ones. In place, for a graph that was captured before."""
        self.blocks.fill_(-1)
        self.chosen_at.fill_(-1)
        self.refreshes.zero_()

    def reorder(self, beam_idx: Tensor) -> None:
        """Row b takes the choice of row `beam_idx[b]`, as beam search reorders the cache. In place."""
        beam_idx = beam_idx.to(self.blocks.device)
        for buffer in (self.blocks, self.chosen_at, self.refreshes):
            buffer.copy_(buffer.index_select(0, beam_idx))

    @torch.no_grad()
    def keys_read(self, lengths: Tensor, first_real: Tensor | None = None) -> Tensor:
        """Keys that a step at these lengths reads with the choice as it is: int64 `(B, Hq)`, on the device."""
        _, older = _slots(self, lengths, first_real, reach=0)
        first = torch.zeros_like(lengths) if first_real is None else first_real
        chosen_at = self.chosen_at.repeat_interleave(self.head_group_size, 1)
        window_start = torch.minimum(lengths[:, None], chosen_at) - self.sliding_window
        return older.sum(-1) + lengths[:, None] - torch.maximum(window_start, first[:, None])


def hip_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    state: HiPDecodeState,
    *,
    refresh_interval: int,
    first_real: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One decode step of HiP attention over a cache of fixed capacity; renews the choice of keys when it is due.

    Row b's query is the token at slot `lengths[b] - 1`. Its choice is made anew, by the tree search of `hip_attention`
    for a block of this one query, when there is none, when `refresh_interval` tokens have come since it was made, or
    when the row has become shorter than it was then. Otherwise the last one serves, its window extended to the present.
    The state is changed in place.

    Example:
        >>> import torch
        >>> from heedful.attention.hip.decode import HiPDecodeState, hip_decode
        >>> key, value = torch.randn(2, 1, 2, 4096, 64)
        >>> state = HiPDecodeState(1, 6, 4096)
        >>> for length in range(3000, 3010):
        ...     output = hip_decode(
        ...         torch.randn(1, 6, 1, 64), key, value, torch.tensor([length]), state, refresh_interval=8
        ...     )
        >>> state.refreshes[0, 0].item()
        2

    Args:
        query: `(B, Hq, 1, D)`, rotated.
        key: `(B, Hkv, capacity, D)`. Slots from `lengths` on may hold anything.
        value: `(B, Hkv, capacity, Dv)`.
        lengths: int32 or int64 `(B,)`, on the device: keys in use, the current token's included; at least 1, at most
            the capacity.
        state: The layer's `HiPDecodeState`, for at least this capacity.
        refresh_interval: Tokens that one choice serves.
        first_real: int32 or int64 `(B,)`, slot of the first real token of each row; what is before is left padding.
            None for 0.
        scale: Factor on the dot products; None for `D ** -0.5`.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        sink_logits: `(Hq,)`, a logit of each head that takes its share of the softmax and gives nothing.
        impl: "reference" (plain PyTorch), "triton" (CUDA; float32, bfloat16 or float16; no gradients) or "auto":
            Triton where it can, else the reference.

    Returns:
        `(B, Hq, 1, Dv)` in the query's dtype.

    Raises:
        ValueError: If a shape, dtype or argument does not fit, before any work.

    Cost:
        Reads about `top_k + sliding_window + num_sink_tokens` keys and values a head; a refresh reads
        `2 * top_k * ceil(log2(length / top_k))` keys more (a `block_stride_k`-th of them). The search of a head runs on
        one multiprocessor, so a refresh at batch 1 takes longer than the bytes alone would. On one H100 (32 query and 8
        key heads of 128, bfloat16, `block_stride_k=2`, CUDA graphs) a step at 128k takes 0.016 ms with a refresh every 8
        steps and 0.061 ms with one each step, where dense attention takes 0.180; at 512k 0.018, 0.075 and 0.692 ms.

    When not to use:
        At some thousand tokens, where dense decoding costs as little. For several new tokens a row use `hip_attention`.

    Paper:
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"
        (HiP Attention), Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, arXiv 2406.09827.
    """
    device = query.device.type
    query, key, value = inputs.in_autocast_dtype(query, key, value)
    _check(query, key, value, lengths, state, refresh_interval, first_real, scale, softcap, sink_logits, impl)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if 0 in query.shape:
        return query.new_zeros((*query.shape[:3], value.shape[-1]))
    with torch.autocast(device, enabled=False):  # sums stay float32
        run = _backend(query, value, key, sink_logits, state, impl)
        return run(query, key, value, lengths, state, refresh_interval, first_real, scale, softcap, sink_logits)


def _backend(
    query: Tensor, value: Tensor, key: Tensor, sink_logits: Tensor | None, state: HiPDecodeState, impl: str
) -> Callable[..., Tensor]:
    """What computes this step: the reference, or the kernels where they are asked for or can."""
    if not inputs.wants_kernels(impl, query):
        return _reference
    leaves = [x for x in (query, key, value, sink_logits) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        reason: str | None = "has no backward and an input needs a gradient (or call it under torch.no_grad())"
    elif not inputs.HAS_TRITON:
        reason = "needs the package triton, which is not installed"
    else:
        from heedful.attention.hip import triton

        reason = triton.refuses(query, key, value, state.nodes, 1, 1, state.head_group_size)
        if reason is None:
            return triton.decode
    if impl == "triton":
        inputs.refuse_triton(reason)
    return _reference


@torch.no_grad()
def _choose(query: Tensor, key: Tensor, lengths: Tensor, state: HiPDecodeState, first: Tensor) -> Tensor:
    """A choice for every row and set: int32 `(B, S, n)`. As many rounds as the capacity may need."""
    batch, heads, _, _ = query.shape
    origin = (first + state.num_sink_tokens).view(batch, 1, 1, 1)
    end = (lengths - state.sliding_window).view(batch, 1, 1, 1)
    available = (end - origin).clamp(min=0).add(state.block_size_k - 1) // state.block_size_k
    score = reference.Scorer(
        query[:, :, None], key, None, end - 1, origin, state.block_size_k, state.block_stride_k, state.head_group_size
    )
    available = available.expand(batch, heads, 1, 1)
    start, size = reference.tree(score, available, state.nodes, state.rounds, "center", None)
    chosen = torch.where(size > 0, start, key.shape[2]).sort(-1).values
    return torch.where(chosen < key.shape[2], chosen, -1)[:, :: state.head_group_size, 0].int()


def _slots(state: HiPDecodeState, lengths: Tensor, first_real: Tensor | None, reach: int) -> tuple[Tensor, Tensor]:
    """Slots of sinks, chosen tokens and window, and which of them a row sees: `(B, Hq, m)`. `reach`: longest window."""
    batch, heads, shared = state.batch, state.heads, state.head_group_size
    device = lengths.device
    length = lengths.long().view(batch, 1, 1)
    first = torch.zeros_like(length) if first_real is None else first_real.long().view(batch, 1, 1)
    # The window reaches from where the search ended to the present.
    chosen_at = state.chosen_at.long().repeat_interleave(shared, 1)[..., None]
    window_start = torch.maximum(torch.minimum(length, chosen_at) - state.sliding_window, first)
    sinks = first + torch.arange(state.num_sink_tokens, device=device)
    blocks = state.blocks.long().repeat_interleave(shared, 1)
    tokens = first + state.num_sink_tokens + blocks * state.block_size_k
    tokens = (tokens[..., None] + torch.arange(state.block_size_k, device=device)).flatten(-2)
    empty = (blocks < 0).repeat_interleave(state.block_size_k, -1)
    window = length - reach + torch.arange(reach, device=device)
    visible = torch.cat(
        [(sinks < window_start).expand(batch, heads, -1), (tokens < window_start) & ~empty, window >= window_start], -1
    )
    slots = torch.cat([sinks.expand(batch, heads, -1), tokens, window.expand(batch, heads, -1)], -1)
    return slots, visible


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    state: HiPDecodeState,
    refresh_interval: int,
    first_real: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1]
    length = lengths.long()
    first = torch.zeros_like(length) if first_real is None else first_real.long()
    age = length[:, None] - state.chosen_at
    due = (state.chosen_at < 0) | (age < 0) | (age >= refresh_interval)
    if query.is_cuda or torch.compiler.is_compiling() or bool(due.any()):
        if state.nodes:
            chosen = _choose(query, key, length, state, first)
            state.blocks.copy_(torch.where(due[..., None], chosen, state.blocks))
        state.chosen_at.copy_(torch.where(due, length[:, None].int(), state.chosen_at))
        state.refreshes.add_(due)

    slots, visible = _slots(state, length, first, min(state.sliding_window + refresh_interval - 1, key.shape[2]))
    # What is hidden is not read, whatever it holds.
    slots = torch.where(visible, slots, (length - 1)[:, None, None])
    row = torch.arange(batch, device=key.device)[:, None, None]
    head = torch.arange(heads, device=key.device)[:, None] // (heads // kv_heads)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (x[row, head, slots].to(dtype) for x in (key, value))  # (B, Hq, m, D)
    logits = (query.to(dtype) * scale) @ keys.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits.to(dtype).view(1, heads, 1, 1).expand(batch, -1, -1, -1)], -1)
    weights = torch.softmax(logits, -1)[..., : slots.shape[-1]]
    return (weights @ values).to(query.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    state: HiPDecodeState,
    refresh_interval: int,
    first_real: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str,
) -> None:
    inputs.check_qkv(query, key, value)
    batch, heads, rows, _ = query.shape
    if rows != 1:
        raise ValueError(f"query must be (B, Hq, 1, D), got shape {tuple(query.shape)}; hip_attention takes more rows")
    for name, number in (("lengths", lengths), ("first_real", first_real)):
        if number is None:
            continue
        fits = number.shape == (batch,) and number.dtype in (torch.int32, torch.int64)
        if not fits or number.device != query.device:
            raise ValueError(
                f"{name} must be int32 or int64 ({batch},) on {query.device}, got {number.dtype} "
                f"{tuple(number.shape)} on {number.device}"
            )
    if (state.batch, state.heads) != (batch, heads) or state.blocks.device != query.device:
        raise ValueError(
            f"state is for (B, Hq) = {(state.batch, state.heads)} on {state.blocks.device}, query has "
            f"{(batch, heads)} on {query.device}; make a HiPDecodeState for these"
        )
    if key.shape[2] > state.max_length:
        raise ValueError(
            f"the cache holds {key.shape[2]} tokens, state was made for max_length={state.max_length}; make it larger"
        )
    inputs.check_count("refresh_interval", refresh_interval, 1)
    inputs.check_positive("scale", scale)
    inputs.check_positive("softcap", softcap)
    if sink_logits is not None:
        check_sink_logits(sink_logits, query)
    inputs.check_impl(impl)
    if not query.is_cuda and not torch.compiler.is_compiling() and batch:
        shortest, longest = (int(x) for x in lengths.aminmax())
        if shortest < 1 or longest > key.shape[2]:
            raise ValueError(f"lengths must be from 1 to the capacity {key.shape[2]}, got {shortest} to {longest}")
