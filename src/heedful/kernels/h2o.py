"""H2O: a cache that keeps the latest keys and the heaviest hitters, and the part that tells it which these are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from heedful.kernels._causal import check_mask, positions_in_documents, refuse, window_of
from heedful.seam import AttentionCall, Kernel

_NAME = "H2OAttention"
_BLOCK = 1 << 25  # logits that are made at a time


class H2OLayer(DynamicLayer):
    """One layer of an `H2OCache`: keys and values of the kept tokens, a set for each sample and KV head.

    Attributes:
        keys, values: `(B, Hkv, S, D)`, by position; S is at most the largest budget of the batch between two calls.
        positions: int64 `(B, Hkv, S)`, the slot of each kept token in its row of the prompt and what followed, padding
            included; -1 where a sample has fewer tokens than another.
        scores: `(B, Hkv, S)`, float32 or wider, the softmax weight that each has got so far, summed over queries and over the
            query heads of the KV head.
        seen: Tokens that went through, padding included.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, heavy_budget: int | float, recent_budget: int | float, **_: Any) -> None:
        super().__init__()
        self.heavy_budget, self.recent_budget = heavy_budget, recent_budget
        self.seen = 0
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.waiting = False  # for the column sums of the keys that came last
        self.positions: Tensor | None = None
        self.scores: Tensor | None = None
        self.heavy: Tensor | None = None  # budgets of each sample, (B,)
        self.recent: Tensor | None = None
        self.most = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.waiting:
            raise ValueError(
                "H2OCache got new keys, but never the attention weights of the last ones: run the model with its part, "
                "`with heedful.attach(model, heedful.kernels.H2OAttention()): ...`, on every layer of the cache."
            )
        self.waiting = True
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def observe(self, sums: Tensor, real: Tensor) -> None:
        """Takes the column sums of the weights of a call, and drops what is over the budget.

        Args:
            sums: `(B, Hkv, S)`, float32 or wider, over the keys that `update` returned.
            real: bool `(B, Tq)`, which of the newest keys are no padding.
        """
        batch, kv_heads = self.keys.shape[:2]
        new = real.shape[1]
        at = torch.arange(self.seen - new, self.seen, device=sums.device)
        positions = torch.where(real, at, -1)[:, None].expand(-1, kv_heads, -1)
        if self.positions is None:
            self.heavy, self.recent = (_sizes(b, real.sum(1)) for b in (self.heavy_budget, self.recent_budget))
            self.most = int((self.heavy + self.recent).max()) if batch else 0
            self.positions, self.scores = positions, sums
        else:
            assert self.scores is not None
            self.positions = torch.cat([self.positions, positions], 2)
            self.scores = sums + torch.nn.functional.pad(self.scores, (0, new))
        self.waiting = False
        self._evict()

    def _evict(self) -> None:
        """Keeps the `recent` last tokens of each sample, and the `heavy` ones of the others with the largest scores."""
        assert self.positions is not None
        assert self.scores is not None
        assert self.heavy is not None
        assert self.recent is not None
        kept = self.positions >= 0
        behind = kept.flip(2).cumsum(2).flip(2)  # tokens from each on, itself included
        recent = kept & (behind <= self.recent[:, None, None])
        rank = (
            self.scores.masked_fill(recent | ~kept, -torch.inf).argsort(dim=2, descending=True, stable=True).argsort(2)
        )
        kept = recent | (kept & (rank < self.heavy[:, None, None]))
        size = min(kept.shape[2], self.most)
        # The kept ones in their order, behind the free places.
        index = kept.to(torch.uint8).argsort(dim=2, stable=True)[:, :, kept.shape[2] - size :]
        if size < kept.shape[2]:
            deep = index[..., None]
            self.keys = self.keys.gather(2, deep.expand(-1, -1, -1, self.keys.shape[3]))
            self.values = self.values.gather(2, deep.expand(-1, -1, -1, self.values.shape[3]))
            self.positions, self.scores = self.positions.gather(2, index), self.scores.gather(2, index)
            kept = kept.gather(2, index)
        self.positions = self.positions.masked_fill(~kept, -1)
        self.scores = self.scores.masked_fill(~kept, 0.0)

    # ---- what transformers asks of a cache layer

    def get_seq_length(self) -> int:
        """Tokens that went through: the next one has this position. (Kept ones: `keys.shape[2]`.)"""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.keys.shape[2] if self.is_initialized else 0
        return kept + query_length, self.seen - kept

    def reset(self) -> None:
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("H2OCache cannot be cropped: what it has dropped is gone. Use it without drafted tokens.")

    def _state(self) -> tuple[str, ...]:
        return () if self.positions is None else ("positions", "scores", "heavy", "recent")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name in ("keys", "values", *self._state()) if self.is_initialized else ():
            setattr(self, name, getattr(self, name).repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values", *self._state()) if self.is_initialized else ():
            x = getattr(self, name)
            setattr(self, name, x[indices.to(x.device)])


def _sizes(budget: int | float, lengths: Tensor) -> Tensor:
    """Tokens of a budget in each sample: so many, or a fraction of its prompt of `lengths (B,)` tokens."""
    if isinstance(budget, int):
        return torch.full_like(lengths, budget)
    return (lengths * budget).long()


class H2OCache(Cache):
    """A key-value cache of fixed size: the latest tokens, and the heavy hitters among the earlier ones.

    A token's score is the softmax weight that all queries so far have given it, the prompt's too. Whenever more than
    `heavy + recent` tokens are there, the `recent` latest stay, and of the others the `heavy` ones with the largest scores;
    the rest is dropped, each sample, layer and KV head for itself. Kept keys keep the rotation of their true position.
    The scores come from `H2OAttention`, which has to be attached.

    Example:
        >>> import heedful
        >>> from heedful.kernels import H2OAttention, H2OCache
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> inputs = tokenizer("It was the best of times, " * 200, return_tensors="pt")
        >>> cache = H2OCache(model.config, heavy_budget=0.1, recent_budget=0.1)
        >>> with heedful.attach(model, H2OAttention()):
        ...     tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)

    Args:
        config: The model's config: layers with a sliding window keep transformers' own cache for it. None: all layers are
            H2O's.
        heavy_budget: Heavy hitters kept, an integer, or as a float a fraction of the prompt's tokens (of the first call
            of a cache; padding does not count, and each sample has its own). Default 0.1.
        recent_budget: Latest tokens kept, likewise. Default 0.1.

    Raises:
        ValueError: If a budget is negative, a fraction above 1, or both are 0; in `update`, if no part has handed over
            weights; in `crop` (drafted tokens).

    Cost:
        `heavy + recent` keys and values a KV head in place of all, and a float and an integer for each; a step of decoding
        sorts the scores of what is kept.

    When not to use:
        Where a single place far back must be found that nothing pointed at while the prompt was read: it is dropped by
        then. With `heedful.generate` and drafters. With fractions and a prompt given in chunks: the first chunk counts.

    Paper:
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", Zhang et al.,
        arXiv 2306.14048; used at inference by SinkLoRA, arXiv 2406.05678.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        heavy_budget: int | float = 0.1,
        recent_budget: int | float = 0.1,
    ) -> None:
        for name, budget in (("heavy_budget", heavy_budget), ("recent_budget", recent_budget)):
            if isinstance(budget, bool) or not isinstance(budget, int | float) or budget < 0:
                raise ValueError(f"{name} must be a number of tokens (int) or a fraction of the prompt, got {budget!r}")
            if isinstance(budget, float) and budget > 1:
                raise ValueError(
                    f"{name} is a fraction of the prompt and at most 1.0, got {budget}; give tokens as an int"
                )
        if heavy_budget == 0 and recent_budget == 0:
            raise ValueError("heavy_budget and recent_budget are both 0: nothing would be kept")

        def new() -> H2OLayer:
            return H2OLayer(heavy_budget, recent_budget)

        if config is None:
            super().__init__(layer_class_to_replicate=lambda *_: new())  # type: ignore[arg-type]
            return
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None)
        window: Any = getattr(text, "sliding_window", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
        other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if other:
            raise ValueError(f"H2OCache knows layers of full and of sliding attention, and this model has {other}")
        super().__init__(
            layers=[new() if kind == "full_attention" else DynamicSlidingWindowLayer(window) for kind in kinds]
        )


class H2OAttention(Kernel):
    """Attention over an `H2OCache`, which it hands the column sums of the softmax weights.

    Blocks of queries at a time, so a prefill makes no T x T tensor. A layer whose cache has a sliding window of
    transformers' own runs the model's attention, and so does a call without a cache, where there is nothing to drop.

    Example:
        See `H2OCache`.

    Args:
        layers: Layers to act on. Default None: all. Each layer of an `H2OCache` needs the part.

    The report of `attach` has, for each layer, of the last sequence: `tokens_seen`, `tokens_kept` (largest number of a
    sample and KV head) and `dense_calls`.

    Honoured: batches, left padding, chunks of a prompt, beam search, GQA (a KV head has the sum over its query heads),
    sliding windows, Gemma 2's softcap, gpt-oss's sink logits.

    Raises:
        ValueError: In the first call of a layer with another cache than H2O's, or that is not causal, has a position bias,
            dropout or packed documents.

    Cost:
        Prefill: the products of dense attention, in PyTorch, with the weights of a block of queries in memory; slower
        than a fused kernel, which gives no weights. Decoding: attention over `heavy + recent + 1` keys.

    When not to use:
        In training; with drafters of `heedful.generate`.

    Paper:
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", Zhang et al.,
        arXiv 2306.14048.
    """

    honours_mask = False
    has_probabilities = False

    def __init__(self, *, layers: Iterable[int] | None = None) -> None:
        super().__init__(layers=layers)
        self._reports: dict[int, dict[str, int]] = {}

    @torch.compiler.disable
    def __call__(self, call: AttentionCall) -> Tensor:
        report = self._reports.setdefault(call.layer, {"tokens_seen": 0, "tokens_kept": 0, "dense_calls": 0})
        layer = self._cache_layer(call)
        if layer is None:
            report["dense_calls"] += 1
            return call.original()
        refuse(call, _NAME, softcap=True, sinks=True)
        queries = call.query.shape[2]
        real = call.real_keys()[:, -queries:] if call.mask is not None else None
        every = torch.ones(len(call.query), queries, dtype=torch.bool, device=call.query.device)
        real = every if real is None else real
        if layer.positions is None:
            if positions_in_documents(call.positions, real) is not None:
                raise ValueError(
                    f"layer {call.layer}: {_NAME} reads one document a row, and position_ids restart here."
                )
            if window_of(call) is None:
                check_mask(call, _NAME, real)
        output, sums = _attend(call, layer, real)
        layer.observe(sums, real)
        assert layer.positions is not None
        report["tokens_seen"], report["tokens_kept"] = layer.seen, layer.keys.shape[2]
        return output

    def summary(self, layer: int) -> dict[str, Any]:
        """The report of a layer: see the class."""
        return dict(self._reports.get(layer, {"tokens_seen": 0, "tokens_kept": 0, "dense_calls": 0}))

    def _cache_layer(self, call: AttentionCall) -> H2OLayer | None:
        """The call's layer of the cache; None where the model's own attention is right."""
        if call.cache is None:
            return None
        layers = getattr(call.cache, "self_attention_cache", call.cache).layers
        layer = layers[getattr(call.module, "layer_idx", None) or 0]
        if isinstance(layer, H2OLayer):
            return layer
        if isinstance(call.cache, H2OCache):
            return None  # a sliding window
        raise ValueError(
            f"layer {call.layer}: {_NAME} works on an H2OCache, and the model got a {type(call.cache).__name__}: pass "
            "past_key_values=heedful.kernels.H2OCache(model.config) to the model or to generate."
        )


def _attend(call: AttentionCall, layer: H2OLayer, real: Tensor) -> tuple[Tensor, Tensor]:
    """Output `(B, Hq, Tq, Dv)`, and the column sums `(B, Hkv, S)` of the weights; a block of queries at a time."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, slots = call.key.shape[1:3]
    at = torch.arange(layer.seen - queries, layer.seen, device=call.query.device)
    positions = torch.where(real, at, -1)[:, None].expand(-1, kv_heads, -1)
    if layer.positions is not None:
        positions = torch.cat([layer.positions, positions], 2)
    window = window_of(call)
    query = call.query.unflatten(1, (kv_heads, -1))  # (B, Hkv, G, Tq, D)
    wide = torch.promote_types(query.dtype, torch.float32)
    output = call.query.new_empty(batch, heads, queries, call.value.shape[3])
    sums = torch.zeros(batch, kv_heads, slots, dtype=wide, device=query.device)
    step = max(1, _BLOCK // max(1, batch * heads * slots))
    for begin in range(0, queries, step):
        rows = slice(begin, min(begin + step, queries))
        end = slots - queries + rows.stop  # later keys are in the future
        logits = (query[:, :, :, rows] @ call.key[:, :, None, :end].mT).to(wide) * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        here = positions[:, :, None, :end]
        seen = (here >= 0) & (here <= at[rows, None]) & real[:, None, rows, None]
        if window is not None:
            seen = seen & (here > at[rows, None] - window)
        seen = seen[:, :, None]  # (B, Hkv, 1, R, S)
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = torch.softmax(logits, -1).masked_fill(~seen, 0.0)  # padding sees nothing
        if call.sinks is not None:
            share = torch.logsumexp(logits, -1) - call.sinks.to(wide).view(kv_heads, -1, 1)
            weights = weights * torch.sigmoid(share)[..., None]
        sums[:, :, :end] += weights.sum((2, 3))
        output[:, :, rows] = (weights.to(call.value.dtype) @ call.value[:, :, None, :end]).flatten(1, 2)
    return output, sums
