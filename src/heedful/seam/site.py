"""What happens inside one attached attention call: who acts, on which rows, and the stages in their order."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from heedful.seam.call import AttentionCall
from heedful.seam.masks import Visibility, put, take
from heedful.seam.parts import Edit, Kernel, Part, stages_of

# Keywords by which a model asks its attention function for something that is not a masked softmax over the given keys.
UNKNOWN_TO_DENSE = ("indices", "block_indices", "sinks", "cache", "cu_seq_lens_q")


class PartError(RuntimeError):
    """An attached part did something that cannot be used; the message names the layer and the remedy."""


def _nothing(*args: Any) -> None:
    """What a pickled model keeps in the place of our pre-hook."""


def _inert_hook() -> Callable[..., None]:
    return _nothing


def thread() -> int:
    """Key of what belongs to one running forward. A compiled graph has no threads of its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def padded_indices(chosen: Tensor) -> Tensor:
    """The True places of each row of (B, T), in order, as (B, R) indices padded with -1."""
    count = chosen.sum(1, keepdim=True)
    size = int(count.max()) if len(chosen) else 0
    index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    return index.masked_fill(torch.arange(size, device=index.device) >= count, -1)


@dataclass(eq=False)
class Tally:
    """What one part did on one layer."""

    calls: int = 0
    rows: int | Tensor = 0
    heads: set[int] = field(default_factory=set)
    mass: dict[int, Tensor] = field(default_factory=dict)  # query head -> sum over rows of the mass that moved
    mass_rows: int | Tensor = 0


class Selected:
    """One part on one layer, with its selectors as they were when `attach` was called."""

    def __init__(
        self,
        part: Part,
        layer: int,
        heads: tuple[int, ...] | None,
        rows: Any,
        steps: Any,
        cross: bool,
        max_bytes: int | None,
    ) -> None:
        self.part, self.layer, self.heads, self.rows, self.steps = part, layer, heads, rows, steps
        self.cross, self.max_bytes = cross, max_bytes
        self.stages = stages_of(part)
        self.weights = bool(self.stages & {"logits", "probabilities"})
        self.edits = isinstance(part, Edit)
        self.name = type(part).__name__
        self.tally = Tally()
        self.memories: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

    def acts(self, call: AttentionCall, step: Callable[[], int]) -> bool:
        """Whether the part acts in this kind of call at all (a verification is sorted out row by row)."""
        if isinstance(self.rows, str) and self.rows == "generated" and call.phase != "decode":
            return False
        if self.steps is None:
            return True
        if isinstance(self.steps, str):
            return call.phase == self.steps
        return call.phase == "decode" and (call.verification is not None or step() in self.steps)

    def find_rows(self, call: AttentionCall) -> Tensor | None:
        """The query rows to hand over: (B, R) indices, or None for all."""
        tree = call.verification
        if tree is not None:
            by_step = self.steps is not None and not isinstance(self.steps, str)
            if self.rows is None and not by_step:
                return None
            chosen = tree.steps.cpu() >= 0
            if by_step:
                chosen = chosen & torch.tensor([[s in self.steps for s in line] for line in tree.steps.tolist()])
            if isinstance(self.rows, Tensor):
                chosen = chosen & self._tokens(call, tree.prompt_length + tree.steps.cpu())
            return padded_indices(chosen).to(call.query.device)
        if self.rows is None or (isinstance(self.rows, str) and self.rows == "generated"):
            return None
        if isinstance(self.rows, str):
            return call.visibility.last_row()
        tokens = int(call.past) + torch.arange(call.query.shape[2])[None]
        return padded_indices(self._tokens(call, tokens)).to(call.query.device)

    def _tokens(self, call: AttentionCall, tokens: Tensor) -> Tensor:
        """Looks tokens (1 or B, T) up in the boolean mask given as `rows`."""
        batch, mask = call.query.shape[0], self.rows
        if batch % mask.shape[0]:
            raise PartError(
                f"layer {self.layer}: rows of {self.name} is a mask for {mask.shape[0]} samples, but the call has "
                f"{batch}. Give a mask (T,) or (B, T) for this batch."
            )
        mask = mask.repeat_interleave(batch // mask.shape[0], 0)  # generate expands samples to beams in this way
        tokens = tokens.expand(batch, -1)
        inside = (tokens >= 0) & (tokens < mask.shape[1])
        return inside & mask.gather(1, tokens.clamp(0, mask.shape[1] - 1))

    def memory(self, cache: Any) -> dict[Any, Any]:
        if cache is None or torch.compiler.is_compiling():
            return {}
        return self.memories.setdefault(cache, {})


class Weights:
    """Logits, then probabilities, of exactly the heads and rows that the acting parts ask about.

    Heads with the same rows share a tile, so that a one-row probe beside an all-rows edit of one head stays one row.
    """

    def __init__(self, call: AttentionCall, asked: Sequence[tuple[tuple[int, ...], Tensor | None]]) -> None:
        self.call = call
        wanted: dict[int, list[Tensor | None]] = {}
        for heads, rows in asked:
            for head in heads:
                known = wanted.setdefault(head, [])
                if all(rows is not other for other in known):
                    known.append(rows)
        groups: dict[tuple[int, ...], list[int]] = {}
        for head, rows_of_head in wanted.items():
            key = (id(None),) if any(r is None for r in rows_of_head) else tuple(sorted(map(id, rows_of_head)))
            groups.setdefault(key, []).append(head)
        self.tiles = [Tile(call, heads, self._union(wanted[heads[0]])) for heads in groups.values()]

    def _union(self, rows: list[Tensor | None]) -> Tensor | None:
        some = [r for r in rows if r is not None]
        if len(some) < len(rows):
            return None
        if len(some) == 1:
            return some[0]
        queries = self.call.query.shape[2]
        chosen = torch.zeros(self.call.query.shape[0], queries + 1, dtype=torch.bool, device=self.call.query.device)
        for r in some:
            chosen.scatter_(1, torch.where(r >= 0, r, queries), True)
        return padded_indices(chosen[:, :queries])

    def softmax(self) -> None:
        for tile in self.tiles:
            tile.softmax()

    def get(self, heads: tuple[int, ...], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values (B, h, R, Tk) and visible keys (B or 1, h or 1, R, Tk)."""
        pieces, seen, order = [], [], []
        for tile in self.tiles:
            mine = [h for h in heads if h in tile.place]
            if mine == tile.heads and rows is tile.rows and len(mine) == len(heads):
                return tile.values, tile.visible
            if mine:
                places = [tile.place[h] for h in mine]
                slots = tile.slots(rows)
                valid = rows is None or (rows >= 0)[:, None, :, None]
                pieces.append(take(tile.values, places, slots))
                seen.append((take(tile.visible, places, slots) & valid).expand(-1, len(mine), -1, -1))
                order += mine
        back = [order.index(h) for h in heads]
        return torch.cat(pieces, 1)[:, back], torch.cat(seen, 1)[:, back]

    def set(self, heads: tuple[int, ...], rows: Tensor | None, new: Tensor) -> None:
        for tile in self.tiles:
            mine = [h for h in heads if h in tile.place]
            if mine == tile.heads and rows is tile.rows and len(mine) == len(heads):
                tile.values = new
            elif mine:
                piece = new if len(mine) == len(heads) else new[:, [heads.index(h) for h in mine]]
                slots = tile.slots(rows)
                valid = (
                    torch.ones(1, 1, 1, dtype=torch.bool, device=new.device) if slots is None else (slots >= 0)[:, None]
                )
                tile.values = put(
                    tile.values, piece, [tile.place[h] for h in mine], slots, valid.expand(piece.shape[:3])
                )


class Tile:
    """Heads that are asked about in the same rows, and their logits or probabilities."""

    def __init__(self, call: AttentionCall, heads: list[int], rows: Tensor | None) -> None:
        self.heads, self.rows = heads, rows
        self.place = {head: i for i, head in enumerate(heads)}
        self.call = call.at(heads, rows)
        self.values = self.call.logits()
        self.visible = self.call.visible()

    def softmax(self) -> None:
        self.values = self.call.softmax(self.values)

    def slots(self, rows: Tensor | None) -> Tensor | None:
        """Where the given rows stand in this tile (-1 stays -1)."""
        if rows is None or rows is self.rows or self.rows is None:
            return rows if rows is not self.rows else self._own(rows)
        found = (self.rows[:, None, :] == rows[:, :, None]).int().argmax(-1)
        return torch.where(rows >= 0, found, -1)

    @staticmethod
    def _own(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        own = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        return torch.where(rows >= 0, own, -1)


@dataclass(eq=False)
class Inputs:
    """What the attention module was called with and its attention function does not get."""

    cache: Any = None
    past: int | Tensor = 0
    rotary: Any = None
    positions: Tensor | None = None
    cross: bool = False


class Site:
    """The attach state of one attention module: its original config, and the parts of every attach, outermost first."""

    def __init__(
        self, module: nn.Module, layer: int, cross: bool, parameters: tuple[str, ...], functions: Any, eager: Any
    ) -> None:
        self.module, self.layer, self.cross = module, layer, cross
        self.config: Any = module.config
        self.parameters, self.functions, self.eager = parameters, functions, eager
        self.frames: tuple[tuple[object, tuple[Selected, ...]], ...] = ()
        self.inputs: dict[int, Inputs] = {}
        self.verifications: dict[int, Any] = {}
        self.prompt_ends: WeakKeyDictionary[Any, int | Tensor] = WeakKeyDictionary()
        self.hook: Any = None

    def selected(self) -> Iterator[Selected]:
        for _, frame in self.frames:
            yield from frame

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self  # a copied module is unattached: it has its plain config, and this hook knows only its own module

    def __reduce__(self) -> Any:
        return _inert_hook, ()

    def forget_hook(self, memo: dict[int, Any]) -> None:
        """Takes our pre-hook out of a module that is being deep-copied."""
        for hooks in (self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs):
            memo.get(id(hooks), {}).pop(self.hook.id, None)

    # ---- before the call: this object is the pre-hook on the attention module

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.module:
            return
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = next((x for x in given.values() if isinstance(x, Cache)), None)
        cross = any(given.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        past: int | Tensor = 0
        if cache is not None:
            past = cache.get_seq_length(self._cache_index())
            if isinstance(past, Tensor):
                past = past.clone()  # the cache updates its own tensor in place
        self.inputs[thread()] = Inputs(
            cache, past, given.get("position_embeddings"), given.get("position_ids"), cross or self.cross
        )

    def _cache_index(self) -> int:
        return getattr(self.module, "layer_idx", None) or 0

    # ---- the call

    def original_function(self) -> tuple[str, Callable[..., Any]]:
        """The model's own function, looked up now: `set_attn_implementation` may have been called since."""
        name = self.config._attn_implementation or "eager"
        return name, self.functions.get_interface(name, self.eager)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        inputs = self.inputs.pop(thread(), None) or Inputs(cross=self.cross)
        name, function = self.original_function()
        asked, call = self._prepare(inputs, name, function, query, key, value, mask, keywords)
        if not asked:
            output, weights = function(self.module, query, key, value, mask, **keywords)
            return output, weights

        rows = self._rows(asked, call)
        acting = [s for s in asked if rows[s] is None or rows[s].shape[1] > 0 or s.part.every_call]
        calls = {s: self._for_part(call, s, rows[s]) for s in acting}
        for s in acting:
            self._count(s, calls[s])

        for s in acting:
            if "queries_keys" in s.stages:
                self._edit_queries_keys(s, calls[s], call)
                for other in calls.values():
                    other.query, other.key = call.query, call.key

        weighing = [s for s in acting if s.weights]
        kernel = next((s for s in acting if isinstance(s.part, Kernel)), None)
        covered = (
            kernel is None
            and name != "eager"
            and any(s.edits and s.heads is None and rows[s] is None for s in weighing)
        )
        output, weights = None, None
        if kernel is not None:
            output = self._run_kernel(kernel, calls[kernel], call)
        elif not covered:
            output, weights = call.original_with_weights()

        if weighing:
            output, weights = self._run_weights(weighing, calls, rows, call, output, weights)
        assert output is not None
        for s in acting:
            if "outputs" in s.stages:
                output = self._run_outputs(s, calls[s], output)
        return output.transpose(1, 2).contiguous(), weights

    def _prepare(
        self, inputs: Inputs, name: str, function: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
        keywords: dict[str, Any],
    ) -> tuple[dict[Selected, bool], AttentionCall]:  # fmt: skip
        batch, _, queries, width = query.shape
        causal = keywords.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        flash = "flash" in name
        past = inputs.past
        layers = getattr(getattr(inputs.cache, "self_attention_cache", inputs.cache), "layers", None) or ()
        own = layers[self._cache_index() : self._cache_index() + 1]
        static = isinstance(past, Tensor) or any(layer.is_compileable for layer in own)
        if inputs.cross:
            past = (
                past - queries if inputs.cache is not None else 0
            )  # the layer's self-attention has just added its rows
        elif not static and not isinstance(past, Tensor):
            past = max(past, key.shape[2] - queries)  # layers that read another layer's cache
        positions = keywords.get("position_ids")
        if positions is None:
            positions = inputs.positions
        if positions is not None:
            positions = positions.expand(batch, -1) if positions.dim() == 2 and positions.shape[1] == queries else None
        rotary = inputs.rotary if isinstance(inputs.rotary, tuple) and len(inputs.rotary) == 2 else None
        scaling = keywords.get("scaling")
        call = AttentionCall(
            module=self.module,
            layer=self.layer,
            query=query,
            key=key,
            value=value,
            scaling=width**-0.5 if scaling is None else scaling,
            dropout=keywords.get("dropout", 0.0),
            positions=positions,
            rotary=rotary,
            cross=inputs.cross,
            causal=bool(causal) and not inputs.cross,
            softcap=keywords.get("softcap"),
            sinks=keywords.get("s_aux"),
            position_bias=keywords.get("position_bias"),
            cache=inputs.cache,
            past=past,
            original_mask=mask,
            verification=None if inputs.cross else self.verifications.get(thread()),
            visibility=Visibility(
                mask=mask,
                batch=batch,
                queries=queries,
                keys=key.shape[2],
                causal=bool(causal) and not inputs.cross and name != "eager",
                flash=flash,
                window=keywords.get("sliding_window") if flash else None,
                aligned=not static and not inputs.cross,
                device=query.device,
            ),
            function=function,
            keywords=keywords,
        )
        step = self._track(call)
        asked = {s: s.acts(call, step) for s in self.selected() if s.cross or not call.cross}
        return {s: acts for s, acts in asked.items() if acts or s.part.every_call}, call

    def _track(self, call: AttentionCall) -> Callable[[], int]:
        """Remembers where the sequence's prompt ended; forgets what belonged to the cache's last sequence."""
        cache, counted = call.cache, any(s.steps is not None and not isinstance(s.steps, str) for s in self.selected())
        if cache is None or (call.cross and not counted):
            return lambda: 0
        remembered = not torch.compiler.is_compiling() and any(cache in s.memories for s in self.selected())
        if remembered and call.phase == "prefill" and int(call.past) == 0:
            for s in self.selected():
                s.memories.pop(cache, None)
        if counted:
            if call.phase == "prefill":
                self.prompt_ends[cache] = call.past + call.query.shape[2]
            elif cache not in self.prompt_ends:
                self.prompt_ends[cache] = call.past
        return lambda: int(call.past) - int(self.prompt_ends[cache])

    def _rows(self, asked: Mapping[Selected, bool], call: AttentionCall) -> dict[Selected, Any]:
        """Rows of each part. Equal selectors give the same tensor, by which tiles are shared."""
        found: dict[Any, Any] = {}
        rows = {}
        for s, acts in asked.items():
            if not acts:  # it only watches this call
                rows[s] = torch.empty(call.query.shape[0], 0, dtype=torch.long, device=call.query.device)
                continue
            steps = s.steps if s.steps is None or isinstance(s.steps, str) else id(s.steps)
            key = (s.rows if isinstance(s.rows, str) else id(s.rows), steps if call.verification is not None else None)
            if key not in found:
                found[key] = s.find_rows(call)
            rows[s] = found[key]
        return rows

    def _for_part(self, call: AttentionCall, s: Selected, rows: Tensor | None) -> AttentionCall:
        own = copy.copy(call)
        own.heads, own.rows = s.heads, rows
        own.memory = s.memory(call.cache)
        own.for_kernel = isinstance(s.part, Kernel)
        return own

    # ---- the stages

    def _edit_queries_keys(self, s: Selected, own: AttentionCall, call: AttentionCall) -> None:
        query, key = own.take(call.query), call.key
        with self._untouched(s, "queries_keys", key, query):
            result = s.part.queries_keys(own, query, key)  # type: ignore[attr-defined]
        if not s.edits:
            return
        if not isinstance(result, tuple) or len(result) != 2:
            raise PartError(f"layer {self.layer}: {s.name}.queries_keys must return the pair (query, key).")
        sees = own.sees_any()
        self._check(s, "queries_keys", result[0], query, sees[..., None])
        if result[1] is not key:
            self._check(s, "queries_keys", result[1], key, None)
        call.query = put(call.query, result[0], s.heads, own.rows, sees.expand(query.shape[:3]))
        call.key = result[1].to(key.dtype)

    def _run_kernel(self, s: Selected, own: AttentionCall, call: AttentionCall) -> Tensor:
        output = s.part(own)  # type: ignore[operator]
        shape = (*call.query.shape[:3], call.value.shape[3])
        if not isinstance(output, Tensor) or tuple(output.shape) != shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PartError(f"layer {self.layer}: {s.name} must return the heads' outputs of shape {shape}, not {got}.")
        if s.heads is None and own.rows is None:
            return output.to(call.value.dtype)
        chosen = own.take(output)
        valid = torch.ones(chosen.shape[:3], dtype=torch.bool, device=chosen.device)
        return put(call.original(), chosen, s.heads, own.rows, valid)

    def _run_weights(
        self,
        weighing: Sequence[Selected],
        calls: Mapping[Selected, AttentionCall],
        rows: Mapping[Selected, Any],
        call: AttentionCall,
        output: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        for name in UNKNOWN_TO_DENSE:
            if call.keywords.get(name) is not None:
                raise PartError(
                    f"layer {self.layer}: this model passes `{name}` to its attention, which the logits and "
                    "probabilities of heedful do not know. Use parts of the stages queries_keys or outputs there."
                )
        heads = {s: calls[s].head_list for s in weighing}
        for s in weighing:
            number = call.query.shape[2] if rows[s] is None else rows[s].shape[1]
            size = 4 * call.query.shape[0] * len(heads[s]) * number * call.key.shape[2]
            if s.max_bytes is not None and size > s.max_bytes:
                raise PartError(
                    f"layer {self.layer}: {s.name} would take {size:,} bytes for {len(heads[s])} heads x {number} rows "
                    f"x {call.key.shape[2]} keys, over max_bytes={s.max_bytes:,}. Ask for fewer rows= or heads=."
                )
        tiles = Weights(call, [(heads[s], rows[s]) for s in weighing])
        for s in weighing:
            if "logits" in s.stages:
                self._edit_weights(s, "logits", calls[s], tiles, heads[s], rows[s])
        later = [s for s in weighing if s.edits or "probabilities" in s.stages]
        if later:
            tiles.softmax()
        for s in later:
            if "probabilities" in s.stages:
                self._edit_weights(s, "probabilities", calls[s], tiles, heads[s], rows[s])
        writers = [s for s in later if s.edits]
        if output is None:  # one of them covers all heads and rows; what the tiles hold now is final
            whole = next(s for s in writers if s.heads is None and rows[s] is None)
            values, _ = tiles.get(heads[whole], None)
            return calls[whole].mix(self._dropped(call, values)), None
        for s in writers:
            values, visible = tiles.get(heads[s], rows[s])
            sees = visible.any(-1).expand(values.shape[:3])
            output = put(output, calls[s].mix(self._dropped(call, values)), s.heads, rows[s], sees)
            if weights is not None:
                weights = put(weights, values, s.heads, rows[s], sees)
        return output, weights

    def _dropped(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        return torch.dropout(probabilities, call.dropout, self.module.training)

    def _edit_weights(
        self, s: Selected, stage: str, own: AttentionCall, tiles: Weights, heads: tuple[int, ...], rows: Tensor | None
    ) -> None:
        values, visible = tiles.get(heads, rows)
        method = getattr(s.part, stage)
        if not s.edits:
            with self._untouched(s, stage, values):
                method(own, values)
            return
        before = None
        if not torch.compiler.is_compiling():
            with torch.no_grad():
                before = own.softmax(values) if stage == "logits" else values.clone()
        new = method(own, values)
        self._check(s, stage, new, values, visible)
        new = new.float().masked_fill(~visible, -torch.inf if stage == "logits" else 0.0)
        if before is not None:
            with torch.no_grad():
                moved = ((own.softmax(new) if stage == "logits" else new) - before).abs_().sum(-1) / 2
                self._count_mass(s, heads, moved, visible.any(-1))
        tiles.set(heads, rows, new)

    def _run_outputs(self, s: Selected, own: AttentionCall, output: Tensor) -> Tensor:
        chosen = own.take(output)
        method = s.part.outputs  # type: ignore[attr-defined]
        if not s.edits:
            with self._untouched(s, "outputs", chosen):
                method(own, chosen)
            return output
        # `chosen` may be a view of the output that other rows keep: an edit in place must not reach it.
        new = method(own, chosen.clone())
        sees = own.sees_any()
        self._check(s, "outputs", new, chosen, sees[..., None])
        return put(output, new, s.heads, own.rows, sees.expand(chosen.shape[:3]))

    # ---- checks and counts

    def _untouched(self, s: Selected, stage: str, *tensors: Tensor) -> Any:
        return _Untouched(self.layer, s, stage, tensors)

    def _check(self, s: Selected, stage: str, new: Any, like: Tensor, matters: Tensor | None) -> None:
        where = f"layer {self.layer}: {s.name}.{stage}"
        if not isinstance(new, Tensor):
            raise PartError(
                f"{where} returned {type(new).__name__}; an Edit must return the tensor (a Probe returns nothing)."
            )
        if new.shape != like.shape:
            raise PartError(f"{where} returned shape {tuple(new.shape)}; it must keep {tuple(like.shape)}.")
        if torch.compiler.is_compiling():
            return
        fine = torch.isfinite(new)
        if matters is not None:
            fine = fine | ~matters
        if not bool(fine.all()):
            remedy = (
                "to hide a visible key use a large negative number, such as -1e4" if stage == "logits" else "check it"
            )
            raise PartError(f"{where} returned values that are not finite; {remedy}.")

    def _count(self, s: Selected, own: AttentionCall) -> None:
        if torch.compiler.is_compiling():
            return
        s.tally.calls += 1
        s.tally.heads.update(own.head_list)
        with torch.no_grad():
            sees = own.sees_any()
            s.tally.rows = s.tally.rows + sees.expand(own.query.shape[0], -1, -1).any(1).sum()

    def _count_mass(self, s: Selected, heads: Sequence[int], moved: Tensor, sees: Tensor) -> None:
        moved = moved * sees
        for head, mass in zip(heads, moved.sum((0, 2)), strict=True):
            s.tally.mass[head] = s.tally.mass.get(head, 0) + mass
        s.tally.mass_rows = s.tally.mass_rows + sees.expand(moved.shape)[:, 0].sum()


class _Untouched:
    """Raises if tensors that a part only reads were changed in place (the key belongs to the model's cache)."""

    def __init__(self, layer: int, s: Selected, stage: str, tensors: tuple[Tensor, ...]) -> None:
        self.layer, self.name, self.stage = layer, s.name, stage
        self.tensors = () if torch.compiler.is_compiling() else tuple(t for t in tensors if not t.is_inference())

    def __enter__(self) -> None:
        self.versions = [t._version for t in self.tensors]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and any(t._version != v for t, v in zip(self.tensors, self.versions, strict=True)):
            raise PartError(
                f"layer {self.layer}: {self.name}.{self.stage} changed its tensor in place; "
                "a Probe only reads, and an Edit of queries_keys must return new tensors."
            )
