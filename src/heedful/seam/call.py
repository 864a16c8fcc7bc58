"""AttentionCall: one call of one attention layer, as every part sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from heedful.seam.masks import Visibility, take


def is_recording(x: Tensor) -> bool:
    """Whether a graph is being compiled or captured: Python runs once for many replays, and nothing can be read."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(eq=False)
class AttentionCall:
    """One call of one attention layer: a forward, a chunk of the prompt, or a decode step; with the whole batch.

    Shapes: B samples, Hq query heads, Hkv key heads, Tq query rows and Tk key slots of this call. Query, key and value
    are what the model computes with: rotated, cached keys included, not repeated to query heads, after the
    `queries_keys` edits that came before. Slots are not positions: a static cache has empty slots at its end, a
    sliding one has dropped old tokens, and left padding shifts all; the mask knows.

    Attributes:
        module: The attention module.
        layer: Its layer index.
        query: (B, Hq, Tq, D).
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        scaling: Factor of the scores.
        dropout: Dropout probability of the weights (0 in evaluation).
        positions: (B, Tq) token positions of the query rows, or None where the model does not say.
        rotary: (cos, sin) as handed to the attention module in this call, or None.
        phase: "decode" when the call has one query row and the cache already held tokens, or when it verifies drafted
            tokens; else "prefill".
        cross: Whether this is cross-attention.
        causal: Whether the layer is causal. A mask of None then means rows 0..i only, except under eager (everything).
        heads: The query heads handed to this part, in its order; None for all.
        rows: (B, R) indices of the query rows handed to this part, -1 where a sample has fewer; None for all.
        softcap: Cap of the logits (Gemma 2), or None.
        sinks: (Hq,) learned sink logits (gpt-oss), or None. Rows of probabilities then sum to less than 1.
        position_bias: (1 or B, Hq, Tq, Tk) additive bias (T5), or None.
        cache: The `past_key_values` object of the sequence, or None.
        past: Tokens that the cache held before this call (padding included): an int, or with a static cache a tensor.
        original_mask: The mask as the model handed it over: None, boolean or additive 4-D, 2-D (flash) or BlockMask.
        memory: A dict of this part, for this layer and sequence: it lives as long as the cache object and is emptied
            when that cache starts a new sequence. Without a cache it lasts for one call. Beam search reorders the
            cache, not this.
        verification: The step of `heedful.generate` that this call verifies, or None.
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    dropout: float
    positions: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    cross: bool
    causal: bool
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None
    cache: Any
    past: int | Tensor
    original_mask: Any
    verification: Any
    visibility: Visibility = field(repr=False)
    function: Callable[..., tuple[Tensor, Tensor | None]] = field(repr=False)
    keywords: dict[str, Any] = field(repr=False)
    heads: tuple[int, ...] | None = None
    rows: Tensor | None = None
    remembered: Callable[[], dict[Any, Any]] = field(default=dict, repr=False)
    for_kernel: bool = field(default=False, repr=False)

    # ---- what kind of call this is

    @property
    def phase(self) -> str:
        if self.verification is not None:
            return "decode"
        if self.query.shape[2] != 1:
            return "prefill"
        if isinstance(self.past, Tensor):  # a static cache; a graph that is being recorded cannot read its length
            return "decode" if is_recording(self.query) or int(self.past) > 0 else "prefill"
        return "decode" if self.past > 0 else "prefill"

    @property
    def memory(self) -> dict[Any, Any]:
        return self.remembered()

    @property
    def groups(self) -> int:
        """Query heads per key head: query head h uses key head h // groups."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def head_list(self) -> tuple[int, ...]:
        """The query heads handed to this part, also when they are all."""
        return tuple(range(self.query.shape[1])) if self.heads is None else self.heads

    # ---- masks

    @property
    def mask(self) -> Any:
        """For a Kernel the mask as the model handed it over; for other parts the boolean visibility, or None.

        Boolean: (B or 1, 1 or Hq, Tq, Tk), True where the row may see the key. None: everything, or if `causal` and
        Tq > 1, row i sees the key slots 0..i. It is whole; `visible()` gives the asked rows only, at their cost.
        """
        if self.for_kernel or self.original_mask is None:
            return self.original_mask
        return self.visibility.whole

    @property
    def sees_all(self) -> bool:
        """Whether it is known, without looking, that the rows of this part see every key."""
        return self.rows is None and self.visibility.hides_nothing

    def visible(self) -> Tensor:
        """Keys that the rows of this part see: (B or 1, heads or 1, R, Tk), boolean; nothing where `rows` is -1."""
        return self.visibility.of(self.heads, self.rows)

    def sees_any(self) -> Tensor:
        """Whether the rows of this part see any key: (B or 1, heads or 1, R), boolean."""
        return self.visibility.sees(self.heads, self.rows)

    def real_rows(self) -> Tensor:
        """Query rows whose token is not padding (and, in a verification, is a drafted token): (B, Tq), boolean."""
        if self.verification is not None:
            return cast(Tensor, self.verification.steps >= 0).to(self.query.device)
        return self.visibility.real_rows()

    def real_keys(self) -> Tensor:
        """Key slots that any row of this call sees: (B, Tk), boolean. Its first True is the first real token (or the
        window's, with sliding windows), its last True the last filled slot."""
        return self.visibility.real_keys()

    # ---- tensors of the asked heads and rows

    def at(self, heads: Sequence[int] | None = None, rows: Tensor | None = None) -> AttentionCall:
        """The same call for other heads and rows; None means all of them."""
        return replace(self, heads=None if heads is None else tuple(heads), rows=rows)

    def take(self, x: Tensor) -> Tensor:
        """The asked heads and rows of a tensor (B, Hq, Tq, ...) of this call, for instance `call.query`."""
        return take(x, self.heads, self.rows)

    def logits(self) -> Tensor:
        """Logits of the asked heads and rows, as `Edit.logits` gets them but without any edit: (B, heads, R, Tk) fp32.

        O(B heads R Tk) memory: choose heads and rows with `at`.
        """
        scores = self._scores(self.take(self.query))
        scores = scores.mul_(self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.position_bias is not None:
            scores = scores + take(self.position_bias, self.heads, self.rows)
        bias = self.visibility.bias(self.heads, self.rows)
        if bias is not None:
            scores = scores + bias
        scores = scores.float()
        return scores if self.sees_all else scores.masked_fill_(~self.visible(), -torch.inf)

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax of logits (B, heads, R, Tk) whose hidden keys are -inf; with the sinks' share; 0 for blind rows."""
        weights = torch.softmax(logits, dim=-1)
        if not self.sees_all:
            hidden = logits == -torch.inf
            weights = weights.masked_fill(hidden, 0.0) if weights.requires_grad else weights.masked_fill_(hidden, 0.0)
        if self.sinks is not None:  # exp(l) / (sum exp(l) + exp(s)) = softmax(l) * sigmoid(lse(l) - s)
            sinks = self.sinks.float()[list(self.head_list)]
            weights = weights * torch.sigmoid(torch.logsumexp(logits, -1) - sinks[:, None])[..., None]
        return weights

    def probabilities(self) -> Tensor:
        """Softmax of `logits()`: (B, heads, R, Tk) fp32."""
        return self.softmax(self.logits())

    def mix(self, probabilities: Tensor) -> Tensor:
        """Outputs (B, heads, R, Dv) of weights (B, heads, R, Tk), in the value's dtype."""
        return self._per_key_head(
            probabilities.to(self.value.dtype), lambda weights, head: torch.bmm(weights, self.value[:, head])
        )

    def original(
        self, query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None, mask: Any = ...
    ) -> Tensor:
        """The model's own attention function on this call: (B, Hq, Tq, Dv).

        Args:
            query, key, value: Take the place of the call's own tensors.
            mask: Takes the place of `original_mask`; it must be of the same kind.
        """
        return self.original_with_weights(query, key, value, mask)[0]

    def original_with_weights(
        self, query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None, mask: Any = ...
    ) -> tuple[Tensor, Tensor | None]:
        """`original`, and the weights (B, Hq, Tq, Tk) where the model's own implementation gives them (eager)."""
        output, weights = self.function(
            self.module,
            self.query if query is None else query,
            self.key if key is None else key,
            self.value if value is None else value,
            self.original_mask if mask is ... else mask,
            **self.keywords,
        )
        return output.transpose(1, 2), weights

    def _scores(self, query: Tensor) -> Tensor:
        """Products (B, heads, R, Tk) of asked queries and keys, fp32, without a copy of all keys."""
        every = self.head_list == tuple(range(self.query.shape[1]))
        if every and self.key.dtype == torch.float32 and self.key.is_contiguous():
            batch, key_heads, keys, width = self.key.shape
            grouped = query.reshape(batch, key_heads, -1, width).float()
            return (grouped @ self.key.mT).view(batch, query.shape[1], query.shape[2], keys)
        return self._per_key_head(query, lambda q, head: torch.bmm(q.float(), self.key[:, head].float().mT))

    def _per_key_head(self, x: Tensor, product: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Applies `product` to the rows of all asked heads of a key head at once: the keys are never repeated."""
        batch, _, rows, _ = x.shape
        members: dict[int, list[int]] = {}
        for place, head in enumerate(self.head_list):
            members.setdefault(head // self.groups, []).append(place)
        out: Tensor | None = None
        for key_head, places in members.items():
            where: Any = slice(places[0], places[-1] + 1) if places[-1] - places[0] == len(places) - 1 else places
            piece = product(x[:, where].reshape(batch, -1, x.shape[3]), key_head)
            piece = piece.view(batch, len(places), rows, -1)
            if len(members) == 1:
                return piece
            if out is None:
                out = piece.new_empty(*x.shape[:3], piece.shape[3])
            out[:, where] = piece
        assert out is not None
        return out
