"""HiP attention as a part: sparse prefill, and decoding that reuses its choice of keys for some steps."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.attention import HiPMask, hip_attention
from heedful.attention.hip import check_arguments
from heedful.seam import AttentionCall, Kernel
from heedful.seam.site import UNKNOWN_TO_DENSE

# Latest keys by which a batch row is known again after beam search has reordered the cache.
_TAIL = 4


class HiPAttention(Kernel):
    """Sparse attention for long inputs, with no training: each block of queries reads about `top_k` keys that it finds.

    In the prefill every `block_size_q` queries of a head share a choice of keys, found by a tree search in O(T log T).
    In decoding a choice is made every `mask_refresh_interval` tokens; those between use the last one, its window
    extended to the present. Nothing is dropped from the cache. While a call has no more keys than are read anyway it
    runs the model's own attention, and so does a layer with its own sliding window once the keys exceed that window.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> inputs = tokenizer("It was the best of times, " * 200, return_tensors="pt")
        >>> with heedful.attach(model, heedful.HiPAttention(top_k=256)) as attached:
        ...     tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        >>> share = attached.report()[0]["share_of_keys_read"]

    Args:
        top_k: Keys searched for, a query block and head, beside window and sinks.
        block_size_q: Queries that share a choice. A prefill in chunks makes the same choices if the chunks are
            multiples of this.
        block_stride_q: Every so-many-th query of a block takes part in the search.
        block_size_k: Keys that are chosen together.
        sliding_window: Latest keys that are always read.
        num_sink_tokens: First tokens of a sample that are always read.
        sample_method: Which block represents a node of the tree: see `heedful.attention.hip_attention`.
        mask_refresh_interval: Decode steps that one choice serves. Default 1: a search for each token. The authors'
            demos use 8, which is cheaper, and loses where each token is copied from another place.
        dense_layers: The first so many layers keep the model's own attention. Default 0; the authors' evaluations
            use 3.
        prefill_dense_threshold: Prompts up to this many tokens (padding included) are read by the model's own
            attention; decoding is sparse all the same. Default None: none are.
        impl: "auto" or "reference".
        layers: Layers to act on. Default None: all from `dense_layers` on.
        heads: Query heads to act on. Others keep the model's attention, which then runs too. Default None: all.
        rows: Query rows to act on, as in `heedful.Kernel`; the others keep the model's attention. Default None: all.
        steps: "prefill" or "decode" for only these calls, or decode steps. Default None: all.

    The report of `attach` has, for each layer, of the calls that were sparse: `keys_read` and `keys_visible` (sums over
    samples, heads and rows), their ratio `share_of_keys_read` (1.0 if there was none), `refreshes` (choices made in
    decoding), and `dense_calls` (how often the model's own attention ran). They count over the life of the part.

    Honoured: batches, left and right padding, dynamic and static caches, chunked prefill, beam search, GQA, Gemma 2's
    softcap, gpt-oss's sink logits, backward (with the choice held constant). In a compiled model the kernel runs
    outside the graph, and every decode step is a refresh.

    Raises:
        ValueError: At construction if an argument does not fit; in the first call of a layer that cannot be computed
            as the model means it: attention that is not causal, cross-attention, a position bias (T5), dropout, packed
            sequences, a mask that is not causal with padding (token trees, prefixes, chunks), a BlockMask.

    Cost:
        See `heedful.attention.hip_attention`. On one CPU core (6 heads of 64, float32) the attention of a prefill takes
        2.1 times as long as PyTorch's fused dense attention at 4k tokens, as long at 16k, half at 32k. Memory is linear
        in T (masks that the model builds for padded batches are not). A decode step reads
        `top_k + sliding_window + num_sink_tokens` keys, and at a refresh about `2 * top_k * log2(T / top_k)` more.

    When not to use:
        Prompts below some thousand tokens; with drafters of `heedful.generate`, whose token trees it cannot honour;
        where a single place far back must be found for certain. Of ten needles of five digits at 4k tokens the bundled
        model finds all after a sparse prefill with dense decoding (`steps="prefill"`), which costs little, eight with
        sparse decoding, four with one choice for 8 steps (`reproductions/hip.py`).

    Paper:
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"
        (HiP Attention), Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, arXiv 2406.09827.
    """

    honours_mask = False
    has_probabilities = False

    def __init__(
        self,
        *,
        top_k: int = 512,
        block_size_q: int = 64,
        block_stride_q: int = 2,
        block_size_k: int = 2,
        sliding_window: int = 256,
        num_sink_tokens: int = 16,
        sample_method: str = "center",
        mask_refresh_interval: int = 1,
        dense_layers: int = 0,
        prefill_dense_threshold: int | None = None,
        impl: str = "auto",
        layers: Iterable[int] | None = None,
        heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
        rows: str | Tensor | None = None,
        steps: str | Iterable[int] | None = None,
    ) -> None:
        super().__init__(layers=layers, heads=heads, rows=rows, steps=steps)
        self.arguments: dict[str, Any] = {
            "top_k": top_k,
            "block_size_q": block_size_q,
            "block_stride_q": block_stride_q,
            "block_size_k": block_size_k,
            "sliding_window": sliding_window,
            "num_sink_tokens": num_sink_tokens,
            "sample_method": sample_method,
            "impl": impl,
        }
        check_arguments(**self.arguments)
        if mask_refresh_interval < 1:
            raise ValueError(f"mask_refresh_interval must be at least 1, got {mask_refresh_interval}")
        if dense_layers < 0:
            raise ValueError(f"dense_layers must be at least 0, got {dense_layers}")
        self.mask_refresh_interval = mask_refresh_interval
        self.dense_layers = dense_layers
        self.prefill_dense_threshold = prefill_dense_threshold
        self._keys_a_row = max(sliding_window, block_size_q - 1) + num_sink_tokens + top_k
        self._tallies: dict[int, _Tally] = {}
        self._last_mask: tuple[Any, int, Tensor] | None = None

    @torch.compiler.disable
    def __call__(self, call: AttentionCall) -> Tensor:
        _refuse(call)
        tally = self._tallies.setdefault(call.layer, _Tally())
        total = int(call.past) + call.query.shape[2]  # a static cache has more slots, empty ones
        if call.layer < self.dense_layers or self._dense_is_due(call, total):
            call.memory.clear()
            tally.dense_calls += 1
            return call.original()
        if total > call.key.shape[2]:
            raise ValueError(
                f"layer {call.layer}: the cache holds {call.key.shape[2]} of {total} tokens; HiPAttention needs all. "
                "Use a cache that drops nothing, or leave this layer out with layers=."
            )
        real = self._real_tokens(call, total)
        key, value = call.key[:, :, :total], call.value[:, :, :total]
        choice = self._recall(call, key) if call.phase == "decode" else None
        output, mask = hip_attention(
            call.query,
            key,
            value,
            mask=None if choice is None else choice.mask,
            return_mask=True,
            attention_mask=real,
            scale=call.scaling,
            softcap=call.softcap,
            sink_logits=call.sinks,
            **self.arguments,
        )
        assert isinstance(mask, HiPMask)
        tally.count(mask)
        call.memory.clear()
        if call.phase == "decode":
            tally.refreshes += choice is None
            uses = 1 if choice is None else choice.uses + 1
            call.memory["choice"] = _Choice(mask, uses, key[:, 0, -_TAIL:].clone())
        return output

    def summary(self, layer: int) -> dict[str, Any]:
        """The report of a layer: see the class."""
        return self._tallies.get(layer, _Tally()).summary()

    def _dense_is_due(self, call: AttentionCall, total: int) -> bool:
        """Whether the model's own attention is asked for, or reads no more than this part would."""
        module_window = getattr(call.module, "sliding_window", None)
        window = call.keywords.get("sliding_window", module_window)
        if isinstance(window, int) and total > window:
            return True
        threshold = self.prefill_dense_threshold
        if call.phase == "prefill" and threshold is not None and total <= threshold:
            return True
        return total <= self._keys_a_row

    def _recall(self, call: AttentionCall, key: Tensor) -> _Choice | None:
        """The choice of an earlier decode step, if it still serves this one."""
        choice: _Choice | None = call.memory.get("choice")
        if choice is None or choice.uses >= self.mask_refresh_interval:
            return None
        batch = key.shape[0]
        then = choice.mask.num_keys
        if batch != choice.mask.blocks.shape[0] or key.shape[2] <= then:  # a cache that was split or cropped
            return None
        if batch == 1:
            return choice
        # Beam search reorders the cache between steps: the row whose latest keys are these keys made the choice.
        same = (key[:, None, 0, then - choice.tail.shape[1] : then] == choice.tail).flatten(2).all(-1)
        row = (2 * same + torch.eye(batch, device=same.device)).argmax(1)
        mask = choice.mask
        mask = dataclasses.replace(mask, blocks=mask.blocks[row], search_end=mask.search_end[row])
        return dataclasses.replace(choice, mask=mask)

    def _real_tokens(self, call: AttentionCall, total: int) -> Tensor | None:
        """The call's mask as padding, bool `(B, total)`; refuses a mask that says anything else."""
        mask = call.mask
        if mask is None:
            return None
        last = self._last_mask  # the layers of a forward share their mask
        if last is not None and last[0]() is mask and last[1] == mask._version and last[2].shape[1] == total:
            return last[2]
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"layer {call.layer}: HiPAttention cannot read a {type(mask).__name__}; load the model with "
                "attn_implementation='sdpa'."
            )
        real = call.real_keys()
        if mask.dim() == 4 and not _is_causal_with_padding(call, real, total):
            raise ValueError(
                f"layer {call.layer}: HiPAttention honours causal masks with padding, and this mask is another one "
                "(drafted tokens, packed sequences, a prefix, chunks). Call the model with a 2-D attention_mask, or "
                "leave this layer out with layers=."
            )
        real = real[:, :total]
        self._last_mask = weakref.ref(mask), mask._version, real
        return real


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A choice of keys, how many steps it has served, and the latest keys it saw of each sample: (B, tail, D)."""

    mask: HiPMask
    uses: int
    tail: Tensor


@dataclasses.dataclass
class _Tally:
    """What happened on one layer. Sums stay on the device until they are asked for."""

    dense_calls: int = 0
    refreshes: int = 0
    keys_read: int | Tensor = 0
    keys_visible: int | Tensor = 0

    @torch.no_grad()
    def count(self, mask: HiPMask) -> None:
        batch, heads = mask.blocks.shape[:2]
        real = mask.attention_mask
        if real is None:
            real = torch.ones(batch, mask.num_keys, dtype=torch.bool, device=mask.blocks.device)
        visible = (real.cumsum(1) * real)[:, mask.num_keys - mask.num_queries :]
        self.keys_visible = self.keys_visible + heads * visible.sum()
        self.keys_read = self.keys_read + (mask.keys_read() * (visible > 0)[:, None]).sum()

    def summary(self) -> dict[str, Any]:
        read, visible = int(self.keys_read), int(self.keys_visible)
        return {
            "keys_read": read,
            "keys_visible": visible,
            "share_of_keys_read": read / visible if visible else 1.0,
            "refreshes": self.refreshes,
            "dense_calls": self.dense_calls,
        }


def _refuse(call: AttentionCall) -> None:
    """Raises for a call that is more than causal attention over the keys it gives."""
    reason = None
    if call.cross or not call.causal:
        reason = "is causal self-attention, and this layer attends in both directions or across"
    elif call.position_bias is not None:
        reason = "knows no position bias"
    elif call.dropout > 0:
        reason = "has no dropout; call model.eval() or set the config's attention_dropout to 0"
    for name in UNKNOWN_TO_DENSE:
        if call.keywords.get(name) is not None:
            reason = f"does not know `{name}`, which this model passes to its attention"
    if reason is not None:
        raise ValueError(f"layer {call.layer}: HiPAttention {reason}. Leave this layer out with layers=.")


def _is_causal_with_padding(call: AttentionCall, real: Tensor, total: int) -> bool:
    """Whether each real row of a 4-D mask sees exactly the real keys up to its own, with nothing added to them."""
    mask = call.mask
    queries, keys = call.query.shape[2:3] + call.key.shape[2:3]
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
        return False
    slot = torch.arange(keys, device=mask.device)
    rows = torch.arange(total - queries, total, device=mask.device)
    fine = torch.ones((), dtype=torch.bool, device=mask.device)
    step = max(1, (1 << 22) // (keys * len(real)))  # rows at a time: no second tensor of the mask's size
    for some in rows.split(step):
        part = mask[:, 0, some - rows[0], :keys]
        seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        right = seen == (real[:, None] & (slot <= some[:, None]))
        if part.dtype != torch.bool:
            right = right & ((part == 0) | ~seen)
        fine = fine & (right | ~real[:, some, None]).all()
    return bool(fine)
