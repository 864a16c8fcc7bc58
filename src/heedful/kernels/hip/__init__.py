"""HiP attention as a part: sparse prefill, and decoding that reuses its choice of keys for some steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heedful.attention import HiPMask, by_document, hip_attention, inputs
from heedful.attention.hip import check_arguments
from heedful.attention.hip.decode import HiPDecodeState, hip_decode
from heedful.kernels._causal import check_mask, positions_in_documents, refuse, window_of
from heedful.kernels.hip import bounded
from heedful.kernels.hip.exact import best_blocks, due, renew
from heedful.kernels.hip.record import TAIL, Choice, DeviceChoice, Tally
from heedful.seam import AttentionCall, Kernel
from heedful.seam.call import is_recording

_NAME = "HiPAttention"
# Up to so many keys (slots, of a static cache) decoding looks at all of them: one product, where the tree misses needles.
_FEW_KEYS = 32768


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
        >>> longer = heedful.HiPAttention(trained_length=4096)  # reads texts of 16k or 32k tokens with this model

    Args:
        top_k: Keys searched for, a query block and head, beside window and sinks.
        block_size_q: Queries that share a choice. A prefill in chunks makes the same choices if the chunks are
            multiples of this.
        block_stride_q: Every so-many-th query of a block takes part in the search.
        block_size_k: Keys that are chosen together.
        sliding_window: Latest keys that are always read.
        num_sink_tokens: First tokens of a sample that are always read.
        block_stride_k: Every so-many-th key of a block is scored. Default 1.
        sample_method: Which block represents a node of the tree: see `heedful.attention.hip_attention`.
        decode_sample_method: The same for the searches of decoding. "oracle" looks at every key, in one product, and finds
            the exact top blocks; "center" is the tree. Default None: "oracle" for calls of up to 32,768 keys (slots of a
            static cache), beyond that, or if `sample_method` is given, as `sample_method`.
        head_group_size: Query heads that share a set of keys. Default 1: each has its own.
        stages: The staged scan of InfiniteHiP instead of the tree, for example `[(64, 4, 256, None), (64, 4, 32, 32768),
            (64, 1, 8, 8192)]`; it takes the place of the block arguments and sample methods, and `top_k` is its final budget.
        trained_length: Length extension: rows at this position and beyond read their keys at positions bounded as in
            InfiniteHiP, turned again from the cache's. Give the length that the model was trained on; `top_k`, window
            and sinks must fit into it. Default None: positions stay as they are.
        mask_refresh_interval: Decode steps that one choice serves. Default 1: a search for each token. The authors'
            demos use 8, which is cheaper, and loses where each token is copied from another place.
        dense_layers: The first so many layers keep the model's own attention. Default 0; the authors' evaluations
            use 3.
        prefill_dense_threshold: Prompts up to this many tokens (padding included) are read by the model's own
            attention; decoding is sparse all the same. Default None: none are.
        sampled_rows: Rows of a prefill on which the report's `mass_kept` is measured; each costs a row of dense attention.
            Default 8. 0 for none.
        impl: "auto", "reference" or "triton" (CUDA only, no gradients). What has no kernel is plain PyTorch with all three:
            bounded positions, and decoding that looks at every key chooses so.
        layers: Layers to act on. Default None: all from `dense_layers` on.
        heads: Query heads to act on. Others keep the model's attention, which then runs too. Default None: all.
        rows: Query rows to act on, as in `heedful.Kernel`; the others keep the model's attention. Default None: all.
        steps: "prefill" or "decode" for only these calls, or decode steps. Default None: all.

    The report of `attach` has, for each layer, of the calls that were sparse: `keys_read` and `keys_visible` (sums over
    samples, heads and rows, of whole calls also where heads= or rows= take a part of them), their ratio `share_of_keys_read` (1.0 if there was none), `mass_kept` (the share of dense
    attention's softmax that the keys read hold, mean over sampled rows of the later half of each prefill, heads and
    samples, of rows within `trained_length`; None if there was none), `refreshes` (choices made in decoding), and
    `dense_calls` (how often the model's own attention ran). They count over the life of the part.

    Honoured: batches, left and right padding, packed documents (position_ids that restart: nothing crosses into another
    document), dynamic and static caches, chunked prefill, beam search, GQA, Gemma 2's softcap, gpt-oss's sink logits,
    backward (with the choice held constant). With a static cache the choice lives on the device: after one eager step a
    decode step can be captured in a CUDA graph, refreshes included, and replayed for later sequences of that cache.
    Under capture nothing is checked: a row whose mask is not one run of real tokens then gives NaN. In a model compiled
    with torch.compile the kernel runs outside the graph.

    Raises:
        ValueError: At construction if an argument does not fit; in the first call of a layer that cannot be computed
            as the model means it: attention that is not causal, cross-attention, a position bias (T5), dropout, a mask
            that is not causal with padding and documents (token trees, prefixes, chunks), a BlockMask; with `trained_length`
            a rotary embedding that is not known here (it names it), or positions that do not count up one by one.

    Cost:
        See `heedful.attention.hip_attention`. On one CPU core (6 heads of 64, float32) the attention of a prefill takes
        2.1 times as long as PyTorch's fused dense attention at 4k tokens, as long at 16k, half at 32k. Memory is linear
        in T (masks that the model builds for padded batches are not). A decode step reads
        `top_k + sliding_window + num_sink_tokens` keys, and at a refresh about `2 * top_k * log2(T / top_k)` more, or all
        keys (not values) where it looks at all. Eagerly a step that is no refresh searches nothing; in a captured step
        the tree searches where it is due, and looking at all, and bounded positions, search every step. Beyond
        `trained_length` search and attention are plain PyTorch: several times slower, memory still linear in T.

    When not to use:
        Prompts below some thousand tokens; with drafters of `heedful.generate`, whose token trees it cannot honour;
        where a single place far back must be found for certain. A sparse prefill loses nothing there, the searches of
        decoding do. Of 20 needles of five digits at 4k tokens, on the bundled model (`reproductions/hip.py`), all are found
        if each step looks at every key, 13 by the tree, 9 if one choice serves 8 steps; all again if it serves 4 in blocks
        of 16, or 8 with 1,024 keys in blocks of 8. At 16k and 32k, positions bounded, the tree finds 3 and none of 10.

    Paper:
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"
        (HiP Attention), Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, arXiv 2406.09827. Stages and bounded
        positions: "InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on a Single GPU", Lee, Park,
        Suh, Hwang, arXiv 2502.08910.
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
        block_stride_k: int = 1,
        sliding_window: int = 256,
        num_sink_tokens: int = 16,
        sample_method: str = "center",
        decode_sample_method: str | None = None,
        head_group_size: int = 1,
        stages: Sequence[tuple[int, int, int, int | None]] | None = None,
        trained_length: int | None = None,
        mask_refresh_interval: int = 1,
        dense_layers: int = 0,
        prefill_dense_threshold: int | None = None,
        sampled_rows: int = 8,
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
            "block_stride_k": block_stride_k,
            "sliding_window": sliding_window,
            "num_sink_tokens": num_sink_tokens,
            "sample_method": sample_method,
            "head_group_size": head_group_size,
            "stages": stages,
            "impl": impl,
        }
        check_arguments(**self.arguments)
        if decode_sample_method is not None:
            check_arguments(**{**self.arguments, "sample_method": decode_sample_method})
        if stages is not None:
            blocks = zip(("block_size_q", "block_stride_q", "block_size_k"), stages[-1][:3], strict=True)
            self.arguments |= {**dict(blocks), "block_stride_k": 1}
        self.decode_sample_method = decode_sample_method
        inputs.check_count("mask_refresh_interval", mask_refresh_interval, 1)
        inputs.check_count("dense_layers", dense_layers, 0)
        inputs.check_count("sampled_rows", sampled_rows, 0)
        if prefill_dense_threshold is not None:
            inputs.check_count("prefill_dense_threshold", prefill_dense_threshold, 0)
        self.mask_refresh_interval = mask_refresh_interval
        self.dense_layers = dense_layers
        self.prefill_dense_threshold = prefill_dense_threshold
        self.sampled_rows = sampled_rows
        self.trained_length = trained_length
        self._window = max(sliding_window, (block_size_q if stages is None else stages[0][0]) - 1)
        self._keys_a_row = self._window + num_sink_tokens + top_k
        self.extends_context = trained_length is not None
        if trained_length is not None:
            inputs.check_count("trained_length", trained_length, 1)
            self._check_extension(trained_length)
        self._tallies: dict[int, Tally] = {}
        self._last_mask: tuple[Any, tuple[int, int], tuple[Tensor, Tensor | None]] | None = None
        # Buffers that captured graphs know: they live as long as the static cache, over all its sequences.
        self._choices: weakref.WeakKeyDictionary[Any, dict[int, DeviceChoice]] = weakref.WeakKeyDictionary()
        self._rotations: weakref.WeakKeyDictionary[nn.Module, bounded.Rotation] = weakref.WeakKeyDictionary()

    def _check_extension(self, trained_length: int) -> None:
        most = self._keys_a_row + self.mask_refresh_interval
        if trained_length < most:
            raise ValueError(
                f"trained_length ({trained_length}) is below what a row reads ({most}: top_k, window, sinks and the "
                "refresh interval), so its keys have no room within it; make top_k smaller."
            )
        if self.dense_layers or self.heads is not None or self.rows is not None or self.steps is not None:
            raise ValueError(
                "with trained_length, dense_layers, heads, rows and steps would leave the model's own attention beyond the "
                "length it was trained on; leave them out."
            )
        if self.prefill_dense_threshold is not None and self.prefill_dense_threshold > trained_length:
            raise ValueError(
                f"prefill_dense_threshold ({self.prefill_dense_threshold}) is above trained_length ({trained_length})."
            )

    @torch.compiler.disable
    def __call__(self, call: AttentionCall) -> Tensor:
        refuse(call, _NAME, softcap=True, sinks=True)
        tally = self._tallies.setdefault(call.layer, Tally())
        capturing = call.query.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._stays_dense(call):
            return self._dense(call, tally)
        if capturing:
            return self._captured(call, tally)
        total = int(call.past) + call.query.shape[2]  # a static cache has more slots, empty ones
        if self._dense_is_due(call, total):
            return self._dense(call, tally)
        if total > call.key.shape[2]:
            raise ValueError(
                f"layer {call.layer}: the cache holds {call.key.shape[2]} of {total} tokens; HiPAttention needs all. "
                "Use a cache that drops nothing, or leave this layer out with layers=."
            )
        real, documents = self._read_mask(call, total)
        if call.phase == "decode":
            static = self._is_static(call)
            if static or self.trained_length is not None or self._looks_at_all(call):
                first = _first_of_runs(real, call.query)
                key, value = (x if static else x[:, :, :total] for x in (call.key, call.value))
                if first is not None:
                    return self._decode_on_device(call, tally, key, value, first)
                if self.trained_length is not None:
                    raise ValueError(
                        f"layer {call.layer}: with trained_length, HiPAttention decodes rows of real tokens behind left "
                        "padding; this mask has holes. Pad on the left."
                    )
            return self._decode(call, tally, real, total)
        return self._prefill(call, tally, real, documents, total)

    def summary(self, layer: int) -> dict[str, Any]:
        """The report of a layer: see the class."""
        return self._tallies.get(layer, Tally()).summary()

    # ---- who computes

    def _dense(self, call: AttentionCall, tally: Tally) -> Tensor:
        call.memory.clear()
        tally.dense_calls += 1
        return call.original()

    def _stays_dense(self, call: AttentionCall) -> bool:
        """Whether this layer never is sparse: one of the first, or one whose static cache rolls with its own window."""
        rolls = window_of(call) is not None and call.visibility.slot is None
        return call.layer < self.dense_layers or rolls

    def _dense_is_due(self, call: AttentionCall, total: int) -> bool:
        """Whether the model's own attention is asked for, or reads no more than this part would."""
        window = window_of(call)
        if window is not None and total > window:
            return True
        threshold = self.prefill_dense_threshold
        if call.phase == "prefill" and threshold is not None and total <= threshold:
            return True
        return total <= self._keys_a_row

    def _is_static(self, call: AttentionCall) -> bool:
        """Whether a decode step of this call can keep its choice on the device."""
        known = self._decode_method(call) in ("center", "oracle")
        plain = self.arguments["stages"] is None and (known or self.trained_length is not None)
        return plain and isinstance(call.past, Tensor) and call.cache is not None

    def _decode_method(self, call: AttentionCall) -> str:
        """How the searches of decoding sample."""
        if self.decode_sample_method is not None:
            return self.decode_sample_method
        method: str = self.arguments["sample_method"]
        few = call.key.shape[2] <= _FEW_KEYS and self.arguments["stages"] is None
        return "oracle" if few and method == "center" else method

    def _looks_at_all(self, call: AttentionCall) -> bool:
        """Whether decoding looks at every key, by a search of its own."""
        return self.arguments["stages"] is None and self._decode_method(call) == "oracle"

    # ---- prefill

    def _prefill(
        self, call: AttentionCall, tally: Tally, real: Tensor | None, documents: Tensor | None, total: int
    ) -> Tensor:
        call.memory.clear()
        key, value = call.key[:, :, :total], call.value[:, :, :total]
        if documents is None:
            return self._attend(call, tally, call.query, key, value, real, None)

        def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
            return self._attend(
                call, tally, query, key, value, attention_mask, torch.zeros(len(query), device=query.device)
            )

        return by_document(attend, documents, call.query, key, value)

    def _attend(
        self,
        call: AttentionCall,
        tally: Tally,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        """Many rows. `offset`: position minus slot of each batch row, or None to look it up."""
        given: dict[str, Any] = {"scale": call.scaling, "softcap": call.softcap, "sink_logits": call.sinks}
        trained = self.trained_length
        if trained is None or key.shape[2] <= trained:
            far: HiPMask | None = None
            output, near = hip_attention(
                query, key, value, attention_mask=real, return_mask=True, **given, **self.arguments
            )
        else:
            whole = (
                torch.ones(len(query), key.shape[2], dtype=torch.bool, device=query.device) if real is None else real
            )
            rotation = self._rotation(call)
            if offset is None:
                offset = bounded.offsets(call, whole)
            output, near, far = bounded.prefill(
                query, key, value, real, offset.long(), rotation, trained, **given, **self.arguments
            )
        if far is not None:
            tally.count(far)
        if near is not None:  # beyond the trained length dense attention is no measure
            tally.count(near)
            rows, keys = query[:, :, : near.num_queries], key[:, :, : near.num_keys]
            tally.count_mass(rows, keys, near, call.scaling, call.softcap, self.sampled_rows)
        return output

    def _rotation(self, call: AttentionCall) -> bounded.Rotation:
        """The layer's rotary embedding, checked against what the model handed to this call."""
        rotation = self._rotations.get(call.module)
        if rotation is None or rotation.frequencies.device != call.query.device:
            with torch.inference_mode(False):
                rotation = bounded.Rotation.of(call.module, call.query.device)
        if call.positions is not None:
            rotation.check(call.rotary, call.positions, call.real_rows(), call.layer)
        self._rotations[call.module] = rotation
        return rotation

    # ---- decoding

    def _decode(self, call: AttentionCall, tally: Tally, real: Tensor | None, total: int) -> Tensor:
        """One row, over a cache that grows."""
        key, value = call.key[:, :, :total], call.value[:, :, :total]
        choice: Choice | None = call.memory.get("choice")
        if choice is not None:
            choice = None if choice.uses >= self.mask_refresh_interval else choice.for_rows_of(key, real is not None)
        output, mask = hip_attention(
            call.query, key, value, mask=None if choice is None else choice.mask, return_mask=True, attention_mask=real,
            scale=call.scaling, softcap=call.softcap, sink_logits=call.sinks,
            **{**self.arguments, "sample_method": self._decode_method(call)},
        )  # fmt: skip
        assert isinstance(mask, HiPMask)
        tally.count(mask)
        tally.refreshes += choice is None
        call.memory["choice"] = Choice(mask, 1 if choice is None else choice.uses + 1, key[:, 0, -TAIL:].clone())
        return output

    def _decode_on_device(
        self, call: AttentionCall, tally: Tally, key: Tensor, value: Tensor, first_real: Tensor
    ) -> Tensor:
        """One row, without a word to the host once its buffers are there."""
        query = call.query
        lengths = (torch.as_tensor(call.past, device=query.device) + 1).long().expand(len(query)).contiguous()
        choice = self._device_choice(call, tally, key)
        choice.recognise(key, lengths)
        before = choice.state.chosen_at.clone()
        given: dict[str, Any] = {
            "refresh_interval": self.mask_refresh_interval,
            "first_real": first_real,
            "scale": call.scaling,
            "softcap": call.softcap,
            "sink_logits": call.sinks,
        }
        if self.trained_length is None:
            if self._looks_at_all(call):
                renewed = due(choice.state, lengths, self.mask_refresh_interval)
                if is_recording(query) or bool(renewed.any()):
                    blocks = best_blocks(query, key, lengths, choice.state, first_real) if choice.state.nodes else None
                    renew(choice.state, blocks, renewed, lengths)
            output = hip_decode(query, key, value, lengths, choice.state, impl=self.arguments["impl"], **given)
        else:
            rotation = self._rotations.get(call.module)
            if rotation is None or rotation.frequencies.device != query.device:
                rotation = self._rotation(call)
            offset = bounded.place(call) - (lengths - 1)
            output = bounded.decode(
                query, key, value, lengths, choice.state, offset, rotation, self.trained_length,
                sample_method=self._decode_method(call), stages=self.arguments["stages"], **given,
            )  # fmt: skip
        choice.count(lengths, first_real, before)
        return output

    def _captured(self, call: AttentionCall, tally: Tally) -> Tensor:
        """A decode step while a CUDA graph is captured: nothing is asked, a mask that does not fit gives NaN."""
        fits = call.query.shape[2] == 1 and self._is_static(call)
        if not fits or call.layer not in self._choices.get(call.cache, {}):
            raise ValueError(
                f"layer {call.layer}: HiPAttention can be captured in a CUDA graph while it decodes one token over a static "
                "cache, without stages and with decode_sample_method 'center' or 'oracle', after one such step outside the graph."
            )
        slot = torch.arange(call.key.shape[2], device=call.query.device)
        end = call.past + 1
        seen = (slot < end).expand(len(call.query), -1)
        if call.mask is not None:
            mask = call.mask[:, 0, -1, : len(slot)] if call.mask.dim() == 4 else call.mask[:, : len(slot)]
            seen = mask.bool() if mask.dtype in (torch.bool, torch.long) else mask > torch.finfo(mask.dtype).min / 2
            seen = seen.expand(len(call.query), -1)
        first = seen.to(torch.uint8).argmax(1)
        honest = (seen == ((slot >= first[:, None]) & (slot < end))).all(1)
        output = self._decode_on_device(call, tally, call.key, call.value, first)
        return output.masked_fill(~honest[:, None, None, None], torch.nan)

    def _device_choice(self, call: AttentionCall, tally: Tally, key: Tensor) -> DeviceChoice:
        """The layer's buffers: with a static cache for all its sequences, else for this sequence, made larger as it grows."""
        static = self._is_static(call)
        known: dict[Any, DeviceChoice] = self._choices.setdefault(call.cache, {}) if static else call.memory
        choice = known.get(call.layer)
        batch, heads, capacity = len(key), call.query.shape[1], key.shape[2]
        if choice is not None and not choice.fits(batch, heads, key.dtype):
            choice = None
        if choice is None or choice.state.max_length < capacity:
            room = capacity if static else 1 << capacity.bit_length()
            names = ("top_k", "block_size_k", "block_stride_k", "num_sink_tokens", "head_group_size")
            sizes = {name: self.arguments[name] for name in names}
            with torch.inference_mode(False):  # they may outlive the mode
                state = HiPDecodeState(batch, heads, room, sliding_window=self._window, device=key.device, **sizes)
                known[call.layer] = DeviceChoice(state, key, tally.counts(key.device), choice)
        return known[call.layer]

    # ---- masks

    def _read_mask(self, call: AttentionCall, total: int) -> tuple[Tensor | None, Tensor | None]:
        """The call's mask as padding, bool `(B, total)`, and as packed documents, positions in them `(B, total)`.

        None: none. Refuses a mask that says anything else.
        """
        mask = call.mask
        whole = call.query.shape[2] == total
        if mask is None:
            documents = None
            if whole and call.visibility.flash:  # flash kernels are told of documents by positions alone
                every = torch.ones(len(call.query), total, dtype=torch.bool, device=call.query.device)
                documents = positions_in_documents(call.positions, every)
            return None, documents
        last = self._last_mask  # the layers of a forward share their mask
        version = None if not isinstance(mask, Tensor) or mask.is_inference() else mask._version
        if last is not None and version is not None and last[0]() is mask and last[1] == (version, total):
            return last[2]
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"layer {call.layer}: HiPAttention cannot read a {type(mask).__name__}; load the model with "
                "attn_implementation='sdpa'."
            )
        real = call.real_keys()
        documents = None
        if mask.dim() == 4 and not _is_causal_with_padding(call, real, total):
            if whole:
                documents = positions_in_documents(call.positions, real[:, :total])
            if documents is None:
                raise ValueError(
                    f"layer {call.layer}: HiPAttention honours causal masks with padding and packed documents whose "
                    "position_ids restart, and this mask is another one (drafted tokens, a prefix, chunks). Call the model "
                    "with a 2-D attention_mask, or leave this layer out with layers=."
                )
            check_mask(call, _NAME, real[:, :total], documents)
        elif mask.dim() == 2 and whole:
            documents = positions_in_documents(call.positions, real[:, :total])
        found = real[:, :total], documents
        if version is not None:  # that of inference mode may change unseen
            self._last_mask = weakref.ref(mask), (version, total), found
        return found


def _first_of_runs(real: Tensor | None, query: Tensor) -> Tensor | None:
    """The first real slot of each row, int64 `(B,)`; None if a row has padding elsewhere than in front."""
    if real is None:
        return torch.zeros(len(query), dtype=torch.long, device=query.device)
    first = real.to(torch.uint8).argmax(1)
    run = torch.arange(real.shape[1], device=real.device) >= first[:, None]
    return first if bool((run == real).all()) else None


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
