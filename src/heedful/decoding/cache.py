"""Full-length key-value caches from which an accepted path is kept and the rest of a tree is dropped.

A model's own cache drops the keys that have left a sliding window, and with them the rows a rejected draft would need
again. The engine therefore keeps every key and puts windows and chunks into its masks (`heedful.decoding.masks`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

#: The cache layers of models whose attention is a function of keys, values and a mask, by exact class name. `DummyLayer`
#: (layers that share another layer's keys) does not exist in older transformers, hence the name.
SUPPORTED_LAYERS = (DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__, "DummyLayer")


class AmortizedLayer(DynamicLayer):
    """A `DynamicLayer` with spare room at its end: a step writes its rows in place, and only a full buffer is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _reserve(self, end: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self._room is None or end > self._room[0].shape[2]:
            capacity = end + max(128, end // 2)
            grown = tuple(s.new_empty((*s.shape[:2], capacity, s.shape[3])) for s in (key_states, value_states))
            if self._room is not None:
                for new, old in zip(grown, self._room, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            self._room = (grown[0], grown[1])
        return self._room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends ``(B, H, n, D)`` keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        keys, values = self._reserve(end, key_states, value_states)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.resize(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def resize(self, length: int) -> None:
        """Keeps the first ``length`` rows."""
        if self._room is not None:
            self.length = length
            self.keys, self.values = self._room[0][:, :, :length], self._room[1][:, :, :length]

    def get_seq_length(self) -> int:
        return self.length


class TreeCache(Cache):
    """The engine's cache: every layer keeps every key; `commit` moves the accepted rows down and drops the others.

    Args:
        model: the model the cache is for.
        max_cache_len: rows of a static cache; None gives a dynamic one.

    Attributes:
        capacity: rows of a static cache, None for a dynamic one.
    """

    def __init__(self, model: PreTrainedModel, max_cache_len: int | None = None) -> None:
        own = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        super().__init__(layers=[_full_length(cast(CacheLayerMixin, layer), max_cache_len) for layer in own])
        self.capacity = max_cache_len

    def commit(self, sources: Tensor | None, targets: Tensor | None, length: int) -> None:
        """Copies rows ``sources`` to rows ``targets`` (both ``(B, m)``, or None: nothing moves) and keeps ``length`` rows."""
        moved: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for layer in cast(list[CacheLayerMixin], self.layers):
            if layer.keys is None or layer.values is None:  # shares another layer's keys
                continue
            if sources is not None and targets is not None:
                device = layer.keys.device
                if device not in moved:
                    moved[device] = (sources.to(device), targets.to(device))
                for states in (layer.keys, layer.values):
                    _move(states, *moved[device])
            if isinstance(layer, AmortizedLayer):
                layer.resize(length)
            else:
                cast(StaticLayer, layer).cumulative_length.fill_(length)


class GraphLayer(DynamicLayer):
    """A layer of `GraphCache`: room for ``capacity`` rows, made once and kept from generate to generate.

    While a prompt is read it grows like a dynamic layer. While trees are verified (``rows`` is set) every row of the batch
    writes its nodes right behind its own text, and attention is handed the whole room, whose end means nothing.
    """

    is_compileable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        #: (B, n or more): where the rows of a verification go.
        self.rows: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: what was never written is multiplied by a probability of zero, and must not be NaN.
        self.keys, self.values = (
            states.new_zeros((states.shape[0], states.shape[1], self.capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes ``(B, H, n, D)`` keys and values; returns those written so far, or the whole room in a verification."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        if self.rows is not None:
            put_rows(keys, values, key_states, value_states, self.rows[:, : key_states.shape[2]])
            return keys, values
        start, end = self.length, self.length + key_states.shape[2]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return 0 if self.rows is not None else self.length


class GraphCache(Cache):
    """The cache of the CUDA-graph engine: its tensors never move, so that a captured step may read and write them.

    Args:
        model: the model the cache is for.
        capacity: rows of each layer.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        own = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        layers = [layer if type(layer).__name__ == "DummyLayer" else GraphLayer(capacity) for layer in own]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.capacity = capacity

    @property
    def own_layers(self) -> list[GraphLayer]:
        """Without the layers that share another one's keys."""
        return [layer for layer in self.layers if isinstance(layer, GraphLayer)]

    @property
    def nbytes(self) -> int:
        states = [s for layer in self.own_layers for s in (layer.keys, layer.values) if s is not None]
        return sum(s.numel() * s.element_size() for s in states)

    def close(self) -> None:
        """Lets go of the tensors."""
        self.layers.clear()

    def restart(self) -> None:
        """A new prompt is read into the same tensors."""
        for layer in self.own_layers:
            layer.length, layer.rows = 0, None

    def verify_at(self, rows: Tensor | None) -> None:
        """Where the rows of the coming verification are written: ``(B, n)`` indices, of which a layer that has fewer rows takes the
        first; None: no longer."""
        for layer in self.own_layers:
            layer.rows = rows

    def move(self, batch: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copies rows ``sources (B, m)`` of every layer to rows ``targets (B, m)``; ``batch``: ``(B, 1)``."""
        for layer in self.own_layers:
            for states in (cast(Tensor, layer.keys), cast(Tensor, layer.values)):
                states[batch, :, targets] = states[batch, :, sources]


def put_rows(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, places: Tensor) -> None:
    """Row ``places[b, i]`` of ``keys[b]`` and ``values[b]`` ``(B, H, T, D)`` becomes row i of the new ones ``(B, H, n, D)``."""
    if keys.is_cuda and not torch.compiler.is_compiling():  # which puts it into one kernel with what comes before
        from heedful.decoding.write_rows import write_rows

        with torch.cuda.device_of(keys):
            write_rows(keys, values, new_keys, new_values, places)
        return
    batch = torch.arange(len(places), device=places.device)[:, None]
    keys[batch, :, places] = new_keys.transpose(1, 2).to(keys.dtype)
    values[batch, :, places] = new_values.transpose(1, 2).to(values.dtype)


def _full_length(layer: CacheLayerMixin, max_cache_len: int | None) -> CacheLayerMixin:
    if layer.keys is None and type(layer).__name__ == "DummyLayer":
        return layer
    return AmortizedLayer() if max_cache_len is None else StaticLayer(max_cache_len=max_cache_len)


def _move(states: Tensor, sources: Tensor, targets: Tensor) -> None:
    """In place: rows ``targets`` of ``(B, H, T, D)`` become what rows ``sources`` were; the ranges may overlap."""
    if states.shape[0] == 1:
        states.index_copy_(2, targets[0], states.index_select(2, sources[0]))
        return
    heads, width = states.shape[1], states.shape[3]
    rows = states.gather(2, sources[:, None, :, None].expand(-1, heads, -1, width))
    states.scatter_(2, targets[:, None, :, None].expand(-1, heads, -1, width), rows)
