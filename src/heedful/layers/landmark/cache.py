"""The cache of landmark attention: blocks of keys and values, of which each query reads the k whose landmarks score highest.

A sequence, landmarks counted, fills slots 0, 1, ...: block n has slots n (l + 1) to n (l + 1) + l, the last its landmark's. A call brings
a chunk of new slots. Its queries attend to the unfinished block and the chunk by the grouped softmax of training, and to k finished
blocks: one softmax over both, as the gates compete with the tokens at hand.

Positions ("stingy", the paper's): only k + 1 blocks are placed before the chunk, however many there are. The k most recent blocks are
scored where they are, older ones as if in the first of these places; the j-th block that is retrieved, in order of time, takes
place j, or j + 1 if it is a recent one. So no distance exceeds that of training. Keys are kept as if their block came first, and
are not moved: rotary scores depend on differences, so the query is turned back by its block's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from heedful.attention.landmark import attention_with_lse

_RETRIEVALS = ("per_head", "per_layer", "per_chunk")
_POSITIONS = ("stingy", "true")
#: Numbers of gathered keys at a time: what bounds the memory of a chunk's retrieval.
_GATHERED = 1 << 25
#: Steps of a unit in which scores are compared.
_GRID = 1 << 14


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Turns `(..., D)` by `positions` (broadcast against `(...)`), in rotary halves, as Llama's family of models has them.

    The first `2 * len(inv_freq)` dimensions are turned (partial rotary embeddings leave the others).
    """
    half = inv_freq.shape[0]
    angle = positions[..., None].double() * inv_freq.double()
    cos, sin = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
    if x.dtype == torch.float64:
        cos, sin = angle.cos(), angle.sin()
    wide = x.to(cos.dtype)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)


@dataclass
class LandmarkStep:
    """The new slots of one call, the same in every layer: `(B, T)` of what follows, made by `LandmarkCache.begin`.

    Attributes:
        is_landmark: Where landmarks are.
        real: Where there is something; None if everywhere. A row's real slots are numbered in order.
        slots: Slot numbers.
        positions: What rotary embeddings take.
        source: `(B, T)`, the column of the text that a slot has its token from. of_token: `(B, columns)`, the reverse.
        packed: Whether rows hold several documents, in each of which slots count from 0.
        cache: Where keys and values go, None for a call without one; of its blocks, for each row and, `most_`, the
            greatest on the host:
        finished: Blocks finished before the call.
        filled: Slots of the unfinished block.
        completes: Blocks that the call finishes.
        rotary: The model's rotary embedding.
    """

    is_landmark: Tensor
    real: Tensor | None
    slots: Tensor
    positions: Tensor
    source: Tensor
    of_token: Tensor
    packed: bool = False
    cache: LandmarkCache | None = None
    finished: Tensor | None = None
    most_finished: int = 0
    filled: Tensor | None = None
    most_filled: int = 0
    completes: Tensor | None = None
    most_completes: int = 0
    rotary: Any = None


class LandmarkCacheLayer(CacheLayerMixin):
    """Blocks of one attention layer. Written by `attend`; `update` hands keys and values on."""

    is_sliding = False

    def __init__(self, cache: LandmarkCache) -> None:
        super().__init__()
        self.cache = cache
        self.blocks_seen = 0
        self.retrieved: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        size = self.cache.block_size + 1
        self.dtype, self.device = key_states.dtype, key_states.device
        home = torch.device("cpu") if self.cache.offload else self.device
        pin = self.cache.offload and self.device.type == "cuda"
        self.keys, self.values = (
            torch.zeros((batch, heads, 0, size, x.shape[3]), dtype=x.dtype, device=home, pin_memory=pin)
            for x in (key_states, value_states)
        )
        self.landmarks = key_states.new_zeros((batch, heads, 0, key_states.shape[3]))
        # The unfinished block stays where the model is.
        self.open_keys, self.open_values = (
            x.new_zeros((batch, heads, size, x.shape[3])) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def _tensors(self) -> tuple[str, ...]:
        return ("keys", "values", "landmarks", "open_keys", "open_values") if self.is_initialized else ()

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None

    def select(self, rows: Tensor) -> None:
        for name in self._tensors():
            old = getattr(self, name)
            setattr(self, name, old.index_select(0, rows.to(old.device)))

    def offload(self) -> None:
        raise ValueError("a LandmarkCache moves its blocks itself: LandmarkCache(offload=True)")

    # ---- one call

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: LandmarkStep, inv_freq: Tensor, scale: float
    ) -> Tensor:
        """`(B, Hq, T, Dv)` for the chunk's queries; its keys and values are then kept. All are rotated at `step.positions`."""
        assert step.finished is not None
        assert step.filled is not None
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        with torch.autocast(device, enabled=False):  # sums stay float32
            output, lse = self._local(query, key, value, step, inv_freq, scale)
            if step.most_finished:
                output = self._retrieve(query, output, lse, step, inv_freq, scale)
            self._append(key, value, step, inv_freq)
        return output

    def _local(
        self, query: Tensor, key: Tensor, value: Tensor, step: LandmarkStep, inv_freq: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The grouped softmax over the unfinished block and the chunk, and the logarithm of its sum."""
        length = query.shape[2]
        before = step.most_filled
        is_landmark, real = step.is_landmark, step.real
        if before:
            place = _place_of_open(step, self.cache)
            at = torch.arange(before, device=key.device)
            assert step.filled is not None
            slots = step.filled[:, None] - before + at  # the open slots, at the right end
            index = slots.clamp(min=0)[:, None, :, None]
            open_key = self.open_keys.gather(2, index.expand(-1, key.shape[1], -1, key.shape[3]))
            open_value = self.open_values.gather(2, index.expand(-1, value.shape[1], -1, value.shape[3]))
            open_key = rotate(open_key, place[:, None, None].expand(-1, 1, before), inv_freq)
            key, value = torch.cat([open_key, key], 2), torch.cat([open_value, value], 2)
            is_landmark = torch.nn.functional.pad(is_landmark, (before, 0))
            chunk = torch.ones_like(step.is_landmark) if real is None else real
            real = torch.cat([slots >= 0, chunk], 1)
        return attention_with_lse(query, key, value, is_landmark, real, scale, length)

    def _retrieve(
        self, query: Tensor, output: Tensor, lse: Tensor, step: LandmarkStep, inv_freq: Tensor, scale: float
    ) -> Tensor:
        assert step.finished is not None
        cache = self.cache
        batch, heads, length, dim = query.shape
        kv_heads = self.landmarks.shape[1]
        group = heads // kv_heads
        size = cache.block_size + 1
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        count = step.most_finished
        block = torch.arange(count, device=query.device)
        there = block < step.finished[:, None]  # (B, N)
        landmarks = self.landmarks[:, :, :count]
        # Old blocks are all scored in the first place.
        place = block if cache.positions == "true" else (block - _dropped(step.finished, cache)[:, None]).clamp(min=0)
        landmarks = rotate(landmarks, place.expand(batch, count)[:, None] * size, inv_freq)
        grouped = query.unflatten(1, (kv_heads, group))
        scores = torch.einsum("bhgtd,bhnd->bhgtn", grouped.to(exact), landmarks.to(exact)) * scale
        scores = scores.masked_fill(~there[:, None, None, None], -torch.inf).flatten(1, 2)  # (B, Hq, T, N)
        k = min(cache.top_k, count)
        if cache.retrieval == "per_layer":
            scores = scores.log_softmax(-1).amax(1, keepdim=True).expand_as(scores)
        elif cache.retrieval == "per_chunk":
            scores = scores.log_softmax(-1)
            if step.real is not None:
                scores = scores.masked_fill(~step.real[:, None, :, None], -torch.inf)
            scores = scores.amax(2, keepdim=True)
        # Ties go to the latest: in the first layer all old landmarks are alike, but for rounding.
        ranked = (scores * _GRID).nan_to_num(-(2.0**39), 2.0**39, -(2.0**40)).clamp(-(2.0**40), 2.0**40).long()
        chosen = (ranked * count + block).topk(k, -1).indices.sort(-1).values  # in order of time, (B, Hq, T or 1, k)
        self.retrieved = chosen if cache.keep_retrieved else None
        valid = there[:, None, None, :].expand(-1, heads, chosen.shape[2], -1).gather(3, chosen)
        if cache.positions == "true":
            slot = chosen
        else:
            j = torch.arange(k, device=query.device)
            n = step.finished[:, None, None, None]
            recent = chosen >= n - cache.top_k
            slot = torch.where(n <= cache.top_k, chosen, j + recent.long())
        # The query turned back by its block's place, rather than the keys turned forward: (B, Hq, T, k, D).
        rows = max(1, _GATHERED // max(1, batch * heads * k * size * dim))
        parts = []
        keys, values = self._gather(chosen) if chosen.shape[2] == 1 else (None, None)
        for first in range(0, length, rows):
            some = slice(first, min(first + rows, length))
            of = slice(None) if chosen.shape[2] == 1 else some
            key, value = self._gather(chosen[:, :, some]) if keys is None or values is None else (keys, values)
            turned = rotate(query[:, :, some, None].expand(-1, -1, -1, k, -1), -slot[:, :, of] * size, inv_freq)
            inner = torch.einsum("bhtkd,bhukld->bhtkl" if keys is not None else "bhtkd,bhtkld->bhtkl",
                                 turned.to(exact), key.to(exact)) * scale  # fmt: skip
            gate = inner[..., -1].masked_fill(~valid[:, :, of], -torch.inf)
            weights = inner[..., :-1].softmax(-1)
            local = lse[:, :, some].to(exact)
            top = torch.maximum(local, gate.amax(-1))
            top = torch.where(top == -torch.inf, 0.0, top)
            own, gates = (local - top).exp(), (gate - top[..., None]).exp()
            weights = weights * gates[..., None]
            read = torch.einsum("bhtkl,bhukld->bhtd" if keys is not None else "bhtkl,bhtkld->bhtd",
                                weights, value[..., :-1, :].to(exact))  # fmt: skip
            total = own + gates.sum(-1)
            mixed = output[:, :, some].to(exact) * own[..., None] + read
            parts.append(mixed / torch.where(total == 0, 1.0, total)[..., None])
        result = torch.cat(parts, 2).to(output.dtype)
        return result if step.real is None else result.masked_fill(~step.real[:, None, :, None], 0.0)

    def _gather(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks `(B, Hq, T, k)`: `(B, Hq, T, k, l + 1, D)`, brought to the model's device."""
        assert self.keys is not None
        assert self.values is not None
        batch, heads = chosen.shape[:2]
        index = chosen.to(self.keys.device)
        row = torch.arange(batch, device=index.device)[:, None, None, None]
        head = (torch.arange(heads, device=index.device) // (heads // self.keys.shape[1]))[:, None, None]
        return tuple(x[row, head, index].to(self.device) for x in (self.keys, self.values))  # type: ignore[return-value]

    def _append(self, key: Tensor, value: Tensor, step: LandmarkStep, inv_freq: Tensor) -> None:
        """Keeps the chunk: keys as if their block came first."""
        assert self.keys is not None
        assert self.values is not None
        assert step.finished is not None
        assert step.filled is not None
        size = self.cache.block_size + 1
        batch = key.shape[0]
        offset = step.slots % size
        key = rotate(key, (offset - step.positions)[:, None], inv_freq)
        # One row of slots for each sequence, from the unfinished block on; what is no token goes to a slot too many.
        most = (step.most_filled + key.shape[2] + size - 1) // size + 1
        slots = step.slots - step.finished[:, None] * size
        if step.real is not None:
            slots = torch.where(step.real, slots, most * size)
        index = slots[:, None, :, None]
        staged = []
        for new, old in ((key, self.open_keys), (value, self.open_values)):
            row = new.new_zeros((batch, new.shape[1], most * size + 1, new.shape[3]))
            row[:, :, :size] = old
            row.scatter_(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new)
            staged.append(row[:, :, :-1].unflatten(2, (most, size)))
        complete, number = step.completes, step.most_completes
        assert complete is not None
        pick = complete[:, None, None, None].expand(-1, key.shape[1], 1, 1)
        self.open_keys, self.open_values = (
            x.gather(2, pick[..., None].expand(-1, -1, -1, size, x.shape[4])).squeeze(2) for x in staged
        )
        if not number:
            return
        total = step.most_finished + number
        self._grow(total)
        # Rows have blocks of their own number: each block goes behind its row's.
        at = step.finished[:, None] + torch.arange(number, device=key.device)
        done = torch.arange(number, device=key.device) < complete[:, None]
        row = torch.arange(batch, device=key.device)[:, None].expand_as(at)[done]
        block, source = at[done], torch.arange(number, device=key.device).expand_as(at)[done]
        self.landmarks[row, :, block] = staged[0][row, :, source, -1]
        for store, new in ((self.keys, staged[0]), (self.values, staged[1])):
            store[row.to(store.device), :, block.to(store.device)] = new[row, :, source].to(store.device)

    def _grow(self, blocks: int) -> None:
        """Room for so many blocks: doubled when it is too small."""
        assert self.keys is not None
        assert self.values is not None
        now = self.keys.shape[2]
        if blocks <= now:
            return
        more = max(blocks, 2 * now, 8) - now
        for name in ("keys", "values", "landmarks"):
            old = getattr(self, name)
            shape = list(old.shape)
            shape[2] += more
            new = torch.zeros(shape, dtype=old.dtype, device=old.device, pin_memory=old.is_pinned())
            new[:, :, :now] = old
            setattr(self, name, new)


def _dropped(finished: Tensor, cache: LandmarkCache) -> Tensor:
    """Blocks that have no place before the chunk: all but the last k + 1."""
    return (finished - cache.top_k - 1).clamp(min=0) if cache.positions == "stingy" else torch.zeros_like(finished)


def _place_of_open(step: LandmarkStep, cache: LandmarkCache) -> Tensor:
    """Position of the unfinished block's first slot, `(B,)`."""
    assert step.finished is not None
    return (step.finished - _dropped(step.finished, cache)) * (cache.block_size + 1)


class LandmarkCache(Cache):
    """Keys and values by block, for models with landmarks: each query reads the `top_k` blocks whose landmarks score highest.

    A transformers cache: `model.generate(..., past_key_values=LandmarkCache(...))`; a model of `convert_to_landmark` makes
    one by itself. Lengths are those of the text: landmarks are inserted by the model and not counted.

    Example:
        >>> import torch
        >>> import heedful
        >>> from heedful.layers import LandmarkCache, convert_to_landmark
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> model = convert_to_landmark(model, block_size=31, train_length=512)
        >>> cache = LandmarkCache(block_size=31, top_k=4)
        >>> ids = torch.randint(3, 1000, (1, 900))
        >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        >>> out.shape
        torch.Size([1, 903])

    Args:
        block_size: Tokens of a block, its landmark not counted. Default 63.
        top_k: Blocks that a query reads. Default 4.
        retrieval: "per_head": each token and query head its own blocks; "per_layer": one set for all heads of a token,
            by the largest share that a head gives; "per_chunk": one set for all tokens of a call, for each head, which
            is what off-loading wants. Default "per_head".
        positions: "stingy" puts retrieved blocks into k + 1 places before the chunk, so that no distance exceeds that
            of training ("true" while no more than k blocks are cached); "true" leaves every block where it was.
        offload: Finished blocks live in host memory (pinned, beside a GPU); landmarks and the unfinished block stay.
            Retrieved blocks are copied back for each call. Default False.
        keep_retrieved: Layers keep the last call's choice, `cache.layers[i].retrieved`: `(B, Hq, T or 1, k)`, block
            numbers in order of time. Default False.

    Raises:
        ValueError: If an argument does not fit, or a batch of another size is given to a cache in use. Cropping, which
            assisted generation needs, is refused.

    Cost:
        Memory as any cache, l + 1 slots for l tokens, plus 1 / (l + 1) for the landmarks. A query scores N landmarks and
        reads k (l + 1) + chunk keys. Retrieval per head and token gathers copies of the blocks, in portions that are
        bounded: prefill is memory-bound and slower than dense attention for prompts of some thousand tokens.

    When not to use:
        With a model that was not trained with landmarks of this block size.

    Paper:
        "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami and Jaggi,
        arXiv 2305.16300 (sections on inference and on positional encoding).
    """

    def __init__(
        self,
        block_size: int = 63,
        top_k: int = 4,
        retrieval: str = "per_head",
        positions: str = "stingy",
        offload: bool = False,
        keep_retrieved: bool = False,
    ) -> None:
        for name, number in (("block_size", block_size), ("top_k", top_k)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
        if retrieval not in _RETRIEVALS:
            raise ValueError(f"retrieval must be one of {', '.join(map(repr, _RETRIEVALS))}, got {retrieval!r}")
        if positions not in _POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(map(repr, _POSITIONS))}, got {positions!r}")
        super().__init__(layers=[])
        self.block_size, self.top_k, self.retrieval, self.positions = block_size, top_k, retrieval, positions
        self.offload_blocks = offload
        self.keep_retrieved = keep_retrieved
        self._clear()

    def _clear(self) -> None:
        self.columns = 0  # of the text, padding counted
        self.tokens: Tensor | None = None  # (B,) real ones
        self.most_tokens = 0
        self.most_slots: int | None = None  # where landmarks come from the caller
        self._planned: tuple[Tensor | None, int, bool] = (None, 0, False)
        self._even = True  # all sequences have the same number of tokens

    @property
    def offload(self) -> bool:  # type: ignore[override]
        """Whether finished blocks live in host memory."""
        return self.offload_blocks

    def layer(self, index: int) -> LandmarkCacheLayer:
        """The cache of one attention layer, made on first use."""
        while len(self.layers) <= index:
            self.layers.append(LandmarkCacheLayer(self))
        return cast(LandmarkCacheLayer, self.layers[index])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layer(layer_idx).update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text so far, padding counted and landmarks not."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _check_batch(self, batch: int) -> None:
        if self.tokens is not None and self.tokens.shape[0] != batch:
            raise ValueError(
                f"the cache holds {self.tokens.shape[0]} sequences and the call has {batch}: take a new LandmarkCache, or reset()"
            )

    def _start(self, batch: int, device: torch.device) -> None:
        self._check_batch(batch)
        if self.tokens is None:
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)

    def open_tokens(self, batch: int) -> int | Tensor:
        """Tokens of the unfinished block, of each sequence `(B,)` where these have different numbers of tokens."""
        self._check_batch(batch)
        if self.tokens is None or self._even:
            return self.most_tokens % self.block_size
        return self.tokens % self.block_size

    def begin(self, batch: int, real: Tensor | None, columns: int, device: torch.device) -> LandmarkStep:
        """Plans a call of `columns` new tokens `(B, columns)`, padding among them; call `finish` when all layers are done.

        Returns the slots with landmarks among them: a landmark follows the last token of its block at once.
        """
        if self.most_slots is not None:
            raise ValueError(
                "this cache is in use by layers that take landmarks from the caller: take a new LandmarkCache"
            )
        size = self.block_size + 1
        self._start(batch, device)
        assert self.tokens is not None
        ragged = real is not None or not self._even
        if not ragged:
            old = self.most_tokens
            tokens = old + torch.arange(columns, device=device).expand(batch, -1)
            width = columns + (old + columns) // self.block_size - old // self.block_size
        else:
            given = torch.ones((batch, columns), dtype=torch.bool, device=device) if real is None else real
            tokens = self.tokens[:, None] + given.cumsum(1) - 1
            tokens = torch.where(given, tokens, -1)
            after = self.tokens + given.sum(1)
            widths = after - self.tokens + after // self.block_size - self.tokens // self.block_size
            width = max(1, int(widths.max()) if batch else 0)
        step = insertion(tokens, self.block_size, width)
        step.cache = self
        step.finished = self.tokens // self.block_size
        step.filled = self.tokens % self.block_size
        step.most_finished = self.most_tokens // self.block_size
        if ragged:
            step.completes = after // self.block_size - step.finished
            step.most_filled, step.most_completes = (
                int(x.max()) if batch else 0 for x in (step.filled, step.completes)
            )
        else:
            step.real = None
            step.most_filled = self.most_tokens % self.block_size
            step.most_completes = (self.most_tokens + columns) // self.block_size - step.most_finished
            step.completes = torch.full_like(self.tokens, step.most_completes)
        step.positions = step.slots - _dropped(step.finished, self)[:, None] * size
        if step.real is not None:
            step.positions = step.positions.masked_fill(~step.real, 0)
        self._planned = tokens, columns, ragged
        return step

    def begin_slots(self, batch: int, slots: int, device: torch.device) -> LandmarkStep:
        """Plans a call of `slots` new rows that hold their landmarks already, as `LandmarkAttention` takes them; then `finish`.

        Raises:
            ValueError: If the cache has been used with `begin`, where the model inserts landmarks, or with another batch size.
        """
        if self.columns and self.most_slots is None:
            raise ValueError("this cache is in use by a model that inserts landmarks: begin_slots needs one of its own")
        size = self.block_size + 1
        self._start(batch, device)
        before = self.most_slots or 0
        at = (before + torch.arange(slots, device=device)).expand(batch, -1)
        finished = torch.full((batch,), before // size, device=device)
        step = LandmarkStep(at % size == self.block_size, None, at, at, at, at)
        step.cache, step.finished, step.most_finished = self, finished, before // size
        step.filled, step.most_filled = finished * 0 + before % size, before % size
        step.most_completes = (before + slots) // size - before // size
        step.completes = torch.full_like(finished, step.most_completes)
        step.positions = at - _dropped(finished, self)[:, None] * size
        self._planned = None, slots, False
        return step

    def finish(self) -> None:
        """Counts the tokens of the call that `begin` or `begin_slots` planned; `columns` is for who called `begin` to count."""
        tokens, columns, ragged = self._planned
        if tokens is None:
            self.columns += columns
            self.most_slots = (self.most_slots or 0) + columns
            return
        assert self.tokens is not None
        if ragged:
            self.tokens = torch.maximum(self.tokens, tokens.amax(1) + 1)
            self._even = False
            self.most_tokens = int(self.tokens.max()) if len(self.tokens) else 0
        else:
            self.tokens = self.tokens + columns
            self.most_tokens += columns

    def reset(self) -> None:
        self.layers = []
        self._clear()

    def _select(self, rows: Tensor) -> None:
        for layer in self.layers:
            cast(LandmarkCacheLayer, layer).select(rows)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows.to(self.tokens.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens is not None:
            self._select(torch.arange(self.tokens.shape[0], device=self.tokens.device).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a LandmarkCache cannot be cropped: generate without an assistant model or prompt lookup")


def insertion(tokens: Tensor, block_size: int, width: int) -> LandmarkStep:
    """Where tokens and landmarks go, from the numbers of the tokens in their documents.

    Args:
        tokens: `(B, T)`, 0, 1, ... in each document; -1 for padding.
        block_size: A landmark follows every so many tokens.
        width: Columns of the longest row with landmarks and without padding.

    Returns:
        A step with `width` columns, each row at the right end.
    """
    batch, columns = tokens.shape
    given = tokens >= 0
    closes = given & (tokens % block_size == block_size - 1)
    used = given.long() + closes.long()
    end = used.cumsum(1)
    first = width - end[:, -1:] + end - used if columns else tokens
    spare = tokens.new_full((), width)
    of_token = torch.where(given, first, spare)
    of_landmark = torch.where(closes, first + 1, spare)
    slot = tokens + tokens.clamp(min=0) // block_size
    slots = tokens.new_full((batch, width + 1), -1)
    slots.scatter_(1, of_token, slot).scatter_(1, of_landmark, slot + 1)
    is_landmark = torch.zeros((batch, width + 1), dtype=torch.bool, device=tokens.device)
    is_landmark.scatter_(1, of_landmark, True)
    slots, is_landmark = slots[:, :width], is_landmark[:, :width]
    source = tokens.new_zeros((batch, width + 1))
    source.scatter_(1, of_token, torch.arange(columns, device=tokens.device).expand(batch, -1))
    of_token = of_token.clamp(max=max(0, width - 1))
    return LandmarkStep(is_landmark, slots >= 0, slots, slots.clamp(min=0), source[:, :width], of_token)
