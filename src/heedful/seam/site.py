"""What happens inside one attached attention call: who acts, on which rows, and the stages in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from heedful.seam.call import AttentionCall, is_recording
from heedful.seam.masks import Visibility, put
from heedful.seam.parts import Kernel, PartError
from heedful.seam.selection import Rows, Selected
from heedful.seam.weights import Weights

# Keywords by which a model asks its attention function for something that is not a masked softmax over the given keys.
UNKNOWN_TO_DENSE = ("indices", "block_indices", "sinks", "cache", "cu_seq_lens_q", "landmark")


def nothing(*args: Any) -> None:
    """What a pickled model keeps in the place of our pre-hook."""


def _inert_hook() -> Callable[..., None]:
    return nothing


def thread() -> int:
    """Key of what belongs to one running forward. A compiled graph has no threads of its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


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
        """One attention call: its output (B, Tq, Hq, Dv), and the weights where the original gives them."""
        inputs = self.inputs.pop(thread(), None) or self.inputs.pop(0, None) or Inputs(cross=self.cross)
        name, function = self.original_function()
        call = self._call(inputs, name, function, query, key, value, mask, keywords)
        rows = self._who_acts(call)
        if not rows:
            output, weights = function(self.module, query, key, value, mask, **keywords)
            return output, weights

        calls = {s: self._for_part(call, s, rows[s]) for s in rows}
        for s, own in calls.items():
            s.tally.count(own)
            if "queries_keys" in s.stages:
                self._edit_queries_keys(s, own, call)
                for other in calls.values():
                    other.query, other.key = call.query, call.key

        weighing = [s for s in rows if s.weighs]
        kernel = next((s for s in rows if isinstance(s.part, Kernel)), None)
        for s in rows if name == "moh" else ():
            if s is kernel or (s.weighs and s.edits):
                raise PartError(
                    f"layer {self.layer}: this model's attention chooses heads for each token (heedful.layers.convert_to_moh), "
                    f"and {s.name} computes all of them. Use parts of the stages queries_keys or outputs there, or probes."
                )
        # An edit of all weights leaves nothing of the original's output (under eager its weights are wanted too).
        covered = name != "eager" and any(s.edits and s.heads is None and rows[s].index is None for s in weighing)
        heads_out, weights = None, None
        if kernel is not None:
            heads_out = self._run_kernel(kernel, calls[kernel], call)
        elif not covered:
            heads_out, weights = call.original_with_weights()
        if weighing:
            heads_out, weights = self._run_weights(weighing, calls, rows, heads_out, weights)
        assert heads_out is not None
        for s, own in calls.items():
            if "outputs" in s.stages:
                heads_out = self._run_outputs(s, own, heads_out)
        return heads_out.transpose(1, 2).contiguous(), weights

    def _call(
        self, inputs: Inputs, name: str, function: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
        keywords: dict[str, Any],
    ) -> AttentionCall:  # fmt: skip
        batch, _, queries, width = query.shape
        causal = keywords.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        flash = "flash" in name
        past = inputs.past
        layers = getattr(getattr(inputs.cache, "self_attention_cache", inputs.cache), "layers", None) or ()
        own = layers[self._cache_index() : self._cache_index() + 1]
        static = isinstance(past, Tensor) or any(layer.is_compileable for layer in own)
        slot: int | Tensor | None = key.shape[2] - queries
        if static:
            slot = None if any(layer.is_sliding for layer in own) else past
        if inputs.cross:
            slot = None
            past = 0 if inputs.cache is None else past - queries  # the layer's self-attention has just added its rows
        elif not static and not isinstance(past, Tensor):
            past = max(past, key.shape[2] - queries)  # layers that read another layer's cache
        positions = keywords.get("position_ids")
        if positions is None:
            positions = inputs.positions
        if positions is not None:
            positions = positions.expand(batch, -1) if positions.dim() == 2 and positions.shape[1] == queries else None
        rotary = inputs.rotary if isinstance(inputs.rotary, tuple) and len(inputs.rotary) == 2 else None
        scaling = keywords.get("scaling")
        return AttentionCall(
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
            softcap=keywords.get("softcap") if name != "sdpa" else None,  # SDPA ignores both; newer versions refuse
            sinks=keywords.get("s_aux") if name != "sdpa" else None,
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
                slot=slot,
                device=query.device,
            ),
            function=function,
            keywords=keywords,
        )

    def _who_acts(self, call: AttentionCall) -> dict[Selected, Rows]:
        """The parts that act in this call, outermost first, and their rows."""
        step = self._track(call)
        known: dict[str, Rows] = {}
        acting = {}
        for s in self.selected():
            if call.cross and not s.cross:
                continue
            if s.acts(call, step):
                rows = s.find_rows(call, known)
            else:
                rows = Rows("none", torch.empty(call.query.shape[0], 0, dtype=torch.long, device=call.query.device))
            if rows.any or s.part.every_call:
                acting[s] = rows
        return acting

    def _track(self, call: AttentionCall) -> Callable[[], int]:
        """Remembers where the sequence's prompt ended; forgets what belonged to the cache's last sequence."""
        cache, counted = call.cache, any(s.counts_steps for s in self.selected())
        if cache is None or (call.cross and not counted):
            return lambda: 0
        remembered = not is_recording(call.query) and any(cache in s.memories for s in self.selected())
        if remembered and call.phase == "prefill" and int(call.past) == 0:
            for s in self.selected():
                s.memories.pop(cache, None)
        if counted:
            if call.phase == "prefill":
                self.prompt_ends[cache] = call.past + call.query.shape[2]
            elif cache not in self.prompt_ends:
                self.prompt_ends[cache] = call.past
        return lambda: int(call.past) - int(self.prompt_ends[cache])

    def _for_part(self, call: AttentionCall, s: Selected, rows: Rows) -> AttentionCall:
        remembered = partial(s.memory, call.cache, {})
        return replace(
            call, heads=s.heads, rows=rows.index, remembered=remembered, for_kernel=isinstance(s.part, Kernel)
        )

    # ---- the stages

    def _edit_queries_keys(self, s: Selected, own: AttentionCall, call: AttentionCall) -> None:
        query, key = own.take(call.query), call.key
        with _Untouched(s, "queries_keys", key, query):
            result = s.part.queries_keys(own, query, key)  # type: ignore[attr-defined]
        if not s.edits:
            return
        if not isinstance(result, tuple) or len(result) != 2:
            raise PartError(f"layer {self.layer}: {s.name}.queries_keys must return the pair (query, key).")
        sees = None if own.sees_all else own.sees_any()
        _check(s, "queries_keys", result[0], query, None if sees is None else sees[..., None])
        if result[1] is not key:
            _check(s, "queries_keys", result[1], key, None)
        call.query = put(call.query, result[0], s.heads, own.rows, sees)
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
        return put(call.original(), chosen, s.heads, own.rows, None)

    def _run_weights(
        self,
        weighing: Sequence[Selected],
        calls: Mapping[Selected, AttentionCall],
        rows: Mapping[Selected, Rows],
        output: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stages logits and probabilities, and what follows from them for the output."""
        for s in weighing:
            self._check_affordable(s, calls[s])
        first = calls[weighing[0]]
        tiles = Weights(first, [(calls[s].head_list, rows[s]) for s in weighing])
        for s in weighing:
            if "logits" in s.stages:
                self._edit_weights(s, "logits", calls[s], tiles, rows[s])
        if any(s.edits or "probabilities" in s.stages for s in weighing):
            tiles.softmax()
        for s in weighing:
            if "probabilities" in s.stages:
                self._edit_weights(s, "probabilities", calls[s], tiles, rows[s])

        writers = [s for s in weighing if s.edits]
        if output is None:  # one of them covers all heads and rows
            writers = [next(s for s in writers if s.heads is None and rows[s].index is None)]
        for s in writers:
            own = calls[s]
            values, visible = tiles.get(own.head_list, rows[s])
            mixed = own.mix(torch.dropout(values, own.dropout, self.module.training))
            sees = None if visible is None else visible.any(-1)
            output = mixed if output is None else put(output, mixed, s.heads, rows[s].index, sees)
            if weights is not None:
                weights = put(weights, values, s.heads, rows[s].index, sees)
        assert output is not None
        return output, weights

    def _check_affordable(self, s: Selected, own: AttentionCall) -> None:
        for name in UNKNOWN_TO_DENSE:
            if own.keywords.get(name) is not None:
                raise PartError(
                    f"layer {self.layer}: this model passes `{name}` to its attention, which the logits and "
                    "probabilities of heedful do not know. Use parts of the stages queries_keys or outputs there."
                )
        batch, _, queries, _ = own.query.shape
        heads, rows, keys = len(own.head_list), queries if own.rows is None else own.rows.shape[1], own.key.shape[2]
        size = 4 * batch * heads * rows * keys
        if s.max_bytes is not None and size > s.max_bytes:
            raise PartError(
                f"layer {self.layer}: {s.name} would take {size:,} bytes for {heads} heads x {rows} rows x {keys} keys"
                f", over max_bytes={s.max_bytes:,}. Ask for fewer rows= or heads=."
            )

    def _edit_weights(self, s: Selected, stage: str, own: AttentionCall, tiles: Weights, rows: Rows) -> None:
        values, visible = tiles.get(own.head_list, rows)
        method = getattr(s.part, stage)
        if not s.edits:
            with _Untouched(s, stage, values):
                method(own, values)
            return
        before = None
        if not torch.compiler.is_compiling():  # now, since the part may work in place
            with torch.no_grad():
                before = own.softmax(values) if stage == "logits" else values.clone()
        new = method(own, values)
        _check(s, stage, new, values, visible)
        new = new.float()
        if visible is not None:
            new = new.masked_fill(~visible, -torch.inf if stage == "logits" else 0.0)
        if before is not None:
            with torch.no_grad():
                after = own.softmax(new) if stage == "logits" else new
                s.tally.count_moved(before, after, visible)
        tiles.set(own.head_list, rows, new)

    def _run_outputs(self, s: Selected, own: AttentionCall, output: Tensor) -> Tensor:
        chosen = own.take(output)
        method = s.part.outputs  # type: ignore[attr-defined]
        if not s.edits:
            with _Untouched(s, "outputs", chosen):
                method(own, chosen)
            return output
        new = method(own, chosen.clone() if chosen is output else chosen)  # the part may work in place
        sees = None if own.sees_all else own.sees_any()
        _check(s, "outputs", new, chosen, None if sees is None else sees[..., None])
        return put(output, new, s.heads, own.rows, sees)


def _check(s: Selected, stage: str, new: Any, like: Tensor, matters: Tensor | None) -> None:
    """Refuses what an edit returned if it is no tensor of the same shape that is finite wherever it matters."""
    where = f"layer {s.layer}: {s.name}.{stage}"
    if not isinstance(new, Tensor):
        raise PartError(f"{where} returned {type(new).__name__}; an Edit must return the tensor (a Probe reads only).")
    if new.shape != like.shape:
        raise PartError(f"{where} returned shape {tuple(new.shape)}; it must keep {tuple(like.shape)}.")
    if torch.compiler.is_compiling():
        return  # a graph cannot ask
    fine = torch.isfinite(new)
    if matters is not None:
        fine = fine | ~matters
    if not bool(fine.all()):
        remedy = "to hide a visible key use a large negative number such as -1e4" if stage == "logits" else "check it"
        raise PartError(f"{where} returned values that are not finite; {remedy}.")


class _Untouched:
    """Raises if tensors that a part only reads were changed in place (the key belongs to the model's cache)."""

    def __init__(self, s: Selected, stage: str, *tensors: Tensor) -> None:
        self.where = f"layer {s.layer}: {s.name}.{stage}"
        self.tensors = () if torch.compiler.is_compiling() else tuple(t for t in tensors if not t.is_inference())

    def __enter__(self) -> None:
        self.versions = [t._version for t in self.tensors]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and any(t._version != v for t, v in zip(self.tensors, self.versions, strict=True)):
            raise PartError(
                f"{self.where} changed its tensor in place; a Probe only reads, and an Edit of queries_keys must "
                "return new tensors."
            )
