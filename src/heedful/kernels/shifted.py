"""Shifted sparse attention (SF-Attn, S2-Attn) as a part: how a model is trained on long rows; it is read densely."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from heedful.attention import by_document, shifted_sparse_attention
from heedful.attention.shifted import check_arguments
from heedful.kernels._causal import check_mask, positions_in_documents, refuse, window_of
from heedful.seam import AttentionCall, Kernel

_NAME = "ShiftedSparseAttention"


class ShiftedSparseAttention(Kernel):
    """Attention in groups of tokens, some heads shifted by half a group, while a model is trained; dense in `eval()`.

    Acts only where the attention module is in training mode (`module.training`): after `model.eval()` the output is
    bit for bit the model's own, and generation has its ordinary cache. Rows are whole: packed documents (position_ids
    that restart) are kept apart, groups and sinks count in each from its first token, as they do behind left padding.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> batch = tokenizer("It was the best of times, " * 200, return_tensors="pt")
        >>> with heedful.attach(model.train(), heedful.kernels.ShiftedSparseAttention()):
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()

        The same by name, for a Trainer that is given the model (or `from_pretrained(..., attn_implementation=)`):

        >>> named = heedful.register_attention("sf_attention", heedful.kernels.ShiftedSparseAttention())
        >>> model.set_attn_implementation("sf_attention")

    Args:
        group_size: Tokens of a group. Default None: by `group_size_ratio`.
        group_size_ratio: Share of the call's row length (padding included) that is a group: `int(ratio * T)` tokens.
            Default 0.25, LongLoRA's.
        shift_ratio: Share of the query heads that are shifted. Default 0.25 (SF-Attn); 0.5 for S2-Attn.
        num_sink_tokens: First tokens of a document that all later ones see. Default 4; 0 for S2-Attn.
        boundary: "separate" (default) or "wrap" (S2-Attn: not causal). See `heedful.attention.shifted_sparse_attention`.
        impl: "auto", "reference" or "triton".
        layers: Layers to act on. Default None: all.

    The report of `attach` has, for each layer, `grouped_calls` (computed here) and `dense_calls` (the model's own: in
    evaluation, and where a layer's own sliding window is shorter than the row).

    Honoured: left and right padding, packed documents, GQA, gradient checkpointing, autocast, DDP. In a compiled model
    the kernel runs outside the graph.

    Raises:
        ValueError: At construction if an argument does not fit; in the first call of a layer that cannot be computed as
            the model means it: a cache that holds tokens, attention that is not causal, cross-attention, a position
            bias (T5), a softcap (Gemma 2), sink logits (gpt-oss), dropout, another mask than causal with padding and
            documents, a BlockMask.

    Cost:
        See `heedful.attention.shifted_sparse_attention`. A 4-D mask that the model builds is read once a forward to see
        that it is causal; without padding there is none.

    When not to use:
        At inference (`H2OAttention` compresses the cache there). Rows of a few thousand tokens, where attention is a
        small part of a step.

    Paper:
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", Zhang,
        arXiv 2406.05678; "LongLoRA", Chen et al., arXiv 2309.12307.
    """

    honours_mask = False
    has_probabilities = False

    def __init__(
        self,
        *,
        group_size: int | None = None,
        group_size_ratio: float = 0.25,
        shift_ratio: float = 0.25,
        num_sink_tokens: int = 4,
        boundary: str = "separate",
        impl: str = "auto",
        layers: Iterable[int] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        check_arguments(1 if group_size is None else group_size, shift_ratio, num_sink_tokens, boundary, impl)
        if not 0 < group_size_ratio <= 1:
            raise ValueError(
                f"group_size_ratio must be a share of the row, above 0 and at most 1, got {group_size_ratio}"
            )
        self.group_size = group_size
        self.group_size_ratio = group_size_ratio
        self.arguments: dict[str, Any] = {
            "shift_ratio": shift_ratio,
            "num_sink_tokens": num_sink_tokens,
            "boundary": boundary,
            "impl": impl,
        }
        self._calls: dict[int, dict[str, int]] = {}
        self._last: tuple[Any, int | None, Tensor | None, int | None, tuple[Tensor | None, Tensor | None]] | None = None

    @torch.compiler.disable
    def __call__(self, call: AttentionCall) -> Tensor:
        calls = self._calls.setdefault(call.layer, {"grouped_calls": 0, "dense_calls": 0})
        length, window = call.query.shape[2], window_of(call)
        if not call.module.training or (window is not None and length > window):
            calls["dense_calls"] += 1
            return call.original()
        refuse(call, _NAME)
        if call.key.shape[2] != length or int(call.past) > 0:
            raise ValueError(
                f"layer {call.layer}: {_NAME} trains on whole rows, and the cache holds {int(call.past)} tokens of this "
                "one. Call the model in training mode without past_key_values, or call model.eval() to generate."
            )
        real, documents = self._rows(call)
        size = self.group_size or max(1, int(self.group_size_ratio * length))
        calls["grouped_calls"] += 1

        def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
            return shifted_sparse_attention(
                query, key, value, size, scale=call.scaling, attention_mask=attention_mask, **self.arguments
            )

        if documents is None:
            return attend(call.query, call.key, call.value, real)
        return by_document(attend, documents, call.query, call.key, call.value)

    def summary(self, layer: int) -> dict[str, Any]:
        """The report of a layer: see the class."""
        return dict(self._calls.get(layer, {"grouped_calls": 0, "dense_calls": 0}))

    def _rows(self, call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
        """The real tokens `(B, T)`, None for all, and the positions in documents, None for one a row."""
        mask, positions = call.mask, call.positions
        last = self._last  # the layers of a forward share their mask and positions
        if last is not None:
            same_mask = last[0]() is mask and (mask is None or _unchanged(mask, last[1]))
            seen = last[2]
            same_positions = (seen is None) == (positions is None) and (
                seen is None
                or (
                    positions is not None
                    and seen.data_ptr() == positions.data_ptr()
                    and seen.shape == positions.shape
                    and seen.stride() == positions.stride()
                    and _unchanged(positions, last[3])
                )
            )
            if same_mask and same_positions and (mask is not None or positions is not None):
                return last[4]
        batch, _, length, _ = call.query.shape
        real = None if mask is None else call.real_keys()
        every = torch.ones(batch, length, dtype=torch.bool, device=call.query.device) if real is None else real
        documents = positions_in_documents(positions, every)
        check_mask(call, _NAME, every, documents)
        result = (None if bool(every.all()) else real, documents)
        # The positions are kept, so that no other tensor can take their place in memory; a mask is too large for that.
        nothing = lambda: None  # noqa: E731
        self._last = (
            nothing if mask is None else weakref.ref(mask), _version(mask), positions, _version(positions), result,
        )  # fmt: skip
        return result


def _version(x: Any) -> int | None:
    """How often a tensor was written in place; None where torch does not count: in inference mode."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _unchanged(x: Tensor, version: int | None) -> bool:
    return version is not None and version == _version(x)
