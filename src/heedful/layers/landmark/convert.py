"""Landmarks for models people already have: tokens are inserted before the decoder's layers and dropped behind them.

The decoder (`model.get_decoder()`) takes text and gives hidden states of that text, so that the head, the loss, labels and
generation stay the model's own; its layers see landmarks too, through an attention function of transformers.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from heedful.attention.documents import by_document, document_starts
from heedful.attention.landmark import landmark_attention
from heedful.layers.landmark.cache import LandmarkCache, LandmarkStep, insertion, rotate

IMPLEMENTATION = "heedful_landmark"
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def convert_to_landmark(
    model: PreTrainedModel,
    block_size: int = 63,
    *,
    landmark_token_id: int | None = None,
    top_k: int = 4,
    retrieval: str = "per_head",
    train_length: int | None = None,
) -> PreTrainedModel:
    """Turns a causal language model with rotary positions into a landmark model, to be fine-tuned; changes and returns it.

    The model takes and gives what it did: text without landmarks, labels and logits of that text. In its layers a landmark
    follows every `block_size` tokens, so that the token before one predicts the token after it. Without a cache
    (training, evaluation) attention is the grouped softmax over all of the input; with one (`generate`, `use_cache=True`)
    the input is read in chunks that fit the training length, each query reads the `top_k` blocks it finds, and the
    context has no limit. `landmark_token_id` is never generated.

    Example:
        >>> import heedful
        >>> from heedful.layers import convert_to_landmark, load_landmark
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> model = convert_to_landmark(model, block_size=31, train_length=512)
        >>> ids = tokenizer("It was the best of times", return_tensors="pt").input_ids
        >>> loss = model(input_ids=ids, labels=ids).loss  # train it: heedful.training.train_landmark, or any Trainer
        >>> model.save_pretrained("my-landmark-model")  # doctest: +SKIP
        >>> model = load_landmark("my-landmark-model")  # doctest: +SKIP

    Args:
        model: A `...ForCausalLM` of transformers whose attention goes through its attention interface: Llama, Qwen 2 and
            3, Mistral, Gemma 3 (text) and their like.
        block_size: Tokens of a block, its landmark not counted. Default 63: blocks of 64 fill the kernels' tiles.
        landmark_token_id: A token that stands for landmarks. Default None: a row is added to the embeddings, the mean of
            all rows, in the head too. A number below the vocabulary takes a row that is there, as it is.
        top_k: Blocks that a query reads at inference. Default 4.
        retrieval: See `LandmarkCache`. Default "per_head".
        train_length: Positions of a training row, landmarks counted: what bounds chunks and distances at inference. Default
            None: the model's context, or its sliding window where that is shorter.

    Returns:
        The model. `config.landmark` holds the arguments; `save_pretrained` keeps them, and **`load_landmark` loads**:
        `AutoModelForCausalLM` would give the plain model with an unused row.

    Raises:
        ValueError: If the model cannot be converted (no rotary positions or interleaved ones, softcapped scores, sink
            logits, attention dropout, several stacks, layers of other kinds, converted before), or an argument does not
            fit. A sliding window is honoured by distances that never exceed `train_length`, which must fit into it.

    Cost:
        One landmark for `block_size` tokens in every layer; see `heedful.attention.landmark_attention` and
        `LandmarkCache`. PEFT: add `modules_to_save=["embed_tokens", "lm_head"]`, so that the new row is trained.

    When not to use:
        Without fine-tuning: the landmarks of a fresh model mean nothing. Under `heedful.attach` with kernels, or parts that
        see scores or probabilities (queries, keys and outputs work): refused. With `heedful.generate`'s drafters, static
        caches, assisted generation or token-type masks: refused.

    Paper:
        "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami and Jaggi,
        arXiv 2305.16300.
    """
    name = type(model).__name__
    if getattr(model.config, "landmark", None) is not None:
        remedy = (
            "" if is_landmark_model(model) else "; it was loaded as a plain model: use heedful.layers.load_landmark"
        )
        raise ValueError(f"{name} has landmarks already: {model.config.landmark}{remedy}")
    decoder = _check_model(model)
    config = model.config
    LandmarkCache(block_size, top_k, retrieval)  # checks
    window = _window(config)
    limit = min(x for x in (config.max_position_embeddings, window) if x is not None)
    train_length = limit if train_length is None else train_length
    if window is not None and train_length > window:
        raise ValueError(
            f"train_length={train_length} exceeds the sliding window of {window} positions of {name}: give at most {window}"
        )
    if train_length < (top_k + 2) * (block_size + 1):
        raise ValueError(
            f"train_length={train_length} has no room for top_k={top_k} blocks of {block_size + 1} positions, one before "
            f"them and a chunk: give at least {(top_k + 2) * (block_size + 1)}, or smaller blocks"
        )
    rows: int = cast(Any, model.get_input_embeddings()).weight.shape[0]
    token = rows if landmark_token_id is None else landmark_token_id
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= rows:
        raise ValueError(
            f"landmark_token_id must be an integer from 0 to {rows} (a new row), got {landmark_token_id!r}"
        )
    if token == rows:
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                for values in (cast(Any, layer).weight, getattr(layer, "bias", None)):
                    if values is not None:
                        values[rows] = values[:rows].float().mean(0).to(values.dtype)
    config.landmark = {
        "block_size": block_size,
        "token_id": token,
        "top_k": top_k,
        "retrieval": retrieval,
        "train_length": train_length,
    }
    if model.generation_config is not None:
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = [*suppressed, token]
    _enable(model, decoder)
    return model


def load_landmark(folder: str, **options: Any) -> PreTrainedModel:
    """Loads a landmark model that `save_pretrained` wrote.

    Args:
        folder: The folder, or a hub id.
        **options: Of `AutoModelForCausalLM.from_pretrained`, without `attn_implementation`.

    Returns:
        The model, with its landmarks at work.

    Raises:
        ValueError: If its config has no entry `landmark`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if getattr(model.config, "landmark", None) is None:
        raise ValueError(f"{folder} is no landmark model: its config has no entry 'landmark'; see convert_to_landmark")
    _enable(model, _check_model(model))
    return cast(PreTrainedModel, model)


def is_landmark_model(model: PreTrainedModel) -> bool:
    """Whether landmarks are at work in it, not in its config alone."""
    return isinstance(model.get_decoder(), _LandmarkDecoder)


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return window if isinstance(window, int) and window > 0 else None


def _check_model(model: PreTrainedModel) -> Any:
    """The decoder of a model that can have landmarks; raises for any other, with why."""
    name = type(model).__name__
    config = model.config

    def refuse(why: str) -> ValueError:
        return ValueError(f"{name} cannot have landmarks: {why}")

    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise refuse("it has several stacks; convert a text-only causal language model")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or model.get_output_embeddings() is None:
        raise refuse("it is not a ...ForCausalLM with a decoder and a head")
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise refuse("its decoder has no rotary embedding (rotary_emb)")
    kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
    for kind in kinds:
        if kind not in _ROPE_TYPES:
            raise refuse(
                f"rotary frequencies of type {kind!r} change with the length; it takes {', '.join(_ROPE_TYPES)}"
            )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise refuse("it caps attention scores (attn_logit_softcapping)")
    if getattr(config, "attention_dropout", 0.0):
        raise refuse("config.attention_dropout is not 0: set it to 0")
    layers = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj") and hasattr(m, "q_proj")]
    if len(layers) != config.num_hidden_layers:
        raise refuse(f"{len(layers)} of its {config.num_hidden_layers} layers are attention with q_proj and k_proj")
    for layer in layers:
        if getattr(layer, "sinks", None) is not None:
            raise refuse("its attention has sink logits")
        if not getattr(layer, "is_causal", True):
            raise refuse("its attention is not causal")
        if "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(layer).__module__]):
            raise refuse("its attention does not go through transformers' attention interface")
        _check_rotation(layer, frequencies(rotary, layer), refuse)
    return decoder


def _check_rotation(layer: Any, inv_freq: Tensor, refuse: Any) -> None:
    """Our rotation by a difference is the model's own: rotary halves, not interleaved pairs."""
    apply = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise refuse("its module has no apply_rotary_pos_emb to compare rotations with")
    half = inv_freq.shape[0]
    x = torch.linspace(-1, 1, 2 * half)[None, None, None]
    turned = []
    for position in (5.0, 12.0):
        angle = torch.cat([position * inv_freq.float().cpu()] * 2)[None, None]
        turned.append(apply(x, x, angle.cos(), angle.sin())[0])
    moved = rotate(turned[0], torch.tensor([7]), inv_freq.float().cpu())
    if not torch.allclose(moved, turned[1], atol=1e-4):
        raise refuse("its rotary embedding turns other pairs of dimensions than halves")


def frequencies(rotary: Any, layer: Any) -> Tensor:
    """Rotary frequencies of an attention module; Gemma 3 has them by type of layer."""
    inv_freq = getattr(rotary, "inv_freq", None)
    if inv_freq is None:
        inv_freq = getattr(rotary, f"{layer.config.layer_types[layer.layer_idx]}_inv_freq")
    return cast(Tensor, inv_freq)


def _enable(model: PreTrainedModel, decoder: Any) -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(model).__name__} cannot have landmarks: transformers does not let its attention be set"
        )
    decoder.__class__ = _landmark_class(cast(Any, type(decoder)))


@functools.cache
def _landmark_class(decoder: type) -> type:
    # By its old name: transformers looks classes up by it, to record hidden states and to save.
    return type(decoder.__name__, (_LandmarkDecoder, decoder), {"__module__": decoder.__module__})


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Padding and documents are known from the step."""
    return


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark: LandmarkStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer; `landmark` comes from the decoder."""
    if landmark is None:
        raise ValueError("attn_implementation='heedful_landmark' is set by convert_to_landmark and load_landmark alone")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"landmark attention does not know `{name}`, which this model passes to its attention")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    step = landmark
    if step.cache is not None:
        if torch.is_grad_enabled() and query.requires_grad:
            raise ValueError("a LandmarkCache has no gradients: call under torch.no_grad(), or without use_cache")
        inv_freq = frequencies(step.rotary, module)
        layer = step.cache.layer(cast(int, module.layer_idx))
        output = layer.attend(query, key, value, step, inv_freq, scale)
    elif step.packed:
        assert step.real is not None
        documents = step.slots.masked_fill(~step.real, -5)  # each padded slot by itself

        def run(q: Tensor, k: Tensor, v: Tensor, marks: Tensor, attention_mask: Tensor) -> Tensor:
            return landmark_attention(q, k, v, marks, scale, attention_mask=attention_mask)

        output = by_document(run, documents, query, key, value, step.is_landmark)
    else:
        output = landmark_attention(query, key, value, step.is_landmark, scale, attention_mask=step.real)
    return output.transpose(1, 2).contiguous(), None


class _LandmarkDecoder:
    """Put before the class of a decoder: its forward takes and gives text, and runs the layers on text with landmarks."""

    config: Any
    rotary_emb: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        batch, columns = given.shape[:2]
        options = self.config.landmark
        cache = _cache(past_key_values, use_cache, options)
        real = _padding(attention_mask, columns)
        if cache is None:
            step = _whole(real, position_ids, given, options["block_size"])
            return self._run(input_ids, inputs_embeds, step, kwargs)
        numbered = real is None and position_ids is not None and columns > 1
        if numbered and bool(document_starts(position_ids.expand(batch, -1))[:, 1:].any()):  # type: ignore[union-attr]
            raise ValueError("a LandmarkCache holds one document a row and position_ids restart: give use_cache=False")
        chunk = options["train_length"] // (cache.block_size + 1) - cache.top_k - 1
        chunk = max(1, chunk) * cache.block_size
        outputs, parts = [], _chunks(real, columns, chunk, cache.open_tokens(batch))
        for some, part in parts:
            step = cache.begin(batch, part, given[:, some].shape[1], given.device)
            ids, embeds = (None if x is None else x[:, some] for x in (input_ids, inputs_embeds))
            outputs.append(self._run(ids, embeds, step, kwargs))
            cache.finish()
        cache.columns += columns
        result = outputs[-1]
        result.past_key_values = cache
        result.last_hidden_state = _join([x.last_hidden_state for x in outputs], parts, columns)
        if result.get("hidden_states") is not None:
            layers = zip(*(x.hidden_states for x in outputs), strict=True)
            result.hidden_states = tuple(_join(list(x), parts, columns) for x in layers)
        return result

    def _run(self, ids: Tensor | None, embeds: Tensor | None, step: LandmarkStep, kwargs: dict[str, Any]) -> Any:
        if self.config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} knows no landmarks: "
                f"call model.set_attn_implementation({IMPLEMENTATION!r})"
            )
        step.rotary = self.rotary_emb
        token = self.config.landmark["token_id"]
        if ids is not None:
            ids = ids.gather(1, step.source).masked_fill(step.is_landmark, token)
        else:
            assert embeds is not None
            landmark = cast(Any, self).get_input_embeddings()(step.source.new_tensor(token))
            embeds = embeds.gather(1, step.source[..., None].expand(-1, -1, embeds.shape[2]))
            embeds = torch.where(step.is_landmark[..., None], landmark.to(embeds.dtype), embeds)
        result = super().forward(  # type: ignore[misc]
            input_ids=ids, inputs_embeds=embeds, attention_mask=None, position_ids=step.positions, past_key_values=step.cache,
            use_cache=step.cache is not None, landmark=step, **kwargs,
        )  # fmt: skip

        def text(x: Tensor) -> Tensor:
            return x.gather(1, step.of_token[..., None].expand(-1, -1, x.shape[2]))

        result.last_hidden_state = text(result.last_hidden_state)
        if result.get("hidden_states") is not None:
            result.hidden_states = tuple(text(x) for x in result.hidden_states)
        return result


def _chunks(
    real: Tensor | None, columns: int, size: int, open_tokens: int | Tensor
) -> list[tuple[slice, Tensor | None]]:
    """Columns of `size` tokens in each row, and which of them are in the chunk: a row's chunks do not depend on its padding. The
    first has fewer where a block is unfinished: it counts among the positions before the chunk."""
    if isinstance(open_tokens, Tensor):
        open_tokens = open_tokens[:, None]
        if real is None:
            real = torch.ones((len(open_tokens), columns), dtype=torch.bool, device=open_tokens.device)
    elif real is None:
        edges = [0, *range(size - open_tokens, columns, size), columns]
        return [(slice(first, until), None) for first, until in itertools.pairwise(edges)]
    number = real.cumsum(1) - 1 + open_tokens
    parts: list[tuple[slice, Tensor | None]] = []
    for first in range(0, int(number.max()) + 1 if number.numel() else 1, size):
        mine = real & (number >= first) & (number < first + size)
        used = mine.any(0).nonzero()
        some = slice(int(used.min()), int(used.max()) + 1) if len(used) else slice(0, columns)
        parts.append((some, mine[:, some]))
    return parts


def _join(pieces: list[Tensor], parts: list[tuple[slice, Tensor | None]], columns: int) -> Tensor:
    """Rows of the chunks in their columns."""
    if parts[0][1] is None:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    whole = pieces[0].new_zeros(pieces[0].shape[0], columns, pieces[0].shape[2])
    for piece, (some, mine) in zip(pieces, parts, strict=True):
        assert mine is not None
        whole[:, some] = torch.where(mine[..., None], piece, whole[:, some])
    return whole


def _cache(given: Any, use_cache: bool | None, options: dict[str, Any]) -> LandmarkCache | None:
    if given is None and not use_cache:
        return None
    if isinstance(given, LandmarkCache):
        if given.block_size != options["block_size"]:
            raise ValueError(f"the cache has block_size={given.block_size} and the model {options['block_size']}")
        return given
    # What `generate` makes by default; the model's own cache takes its place.
    if given is None or (isinstance(given, DynamicCache) and given.get_seq_length() == 0):
        return LandmarkCache(options["block_size"], options["top_k"], options["retrieval"])
    raise ValueError(
        f"a landmark model needs a heedful.layers.LandmarkCache as past_key_values, not {type(given).__name__}"
    )


def _padding(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """The mask of the new columns, bool; None if all are real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < columns:
        raise ValueError(
            f"a landmark model takes a padding mask (B, T) as attention_mask, got shape {tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, attention_mask.shape[1] - columns :].bool()
    return None if bool(real.all()) else real


def _whole(real: Tensor | None, position_ids: Tensor | None, given: Tensor, block_size: int) -> LandmarkStep:
    """Landmarks for rows without a cache; positions that restart begin a document."""
    batch, columns = given.shape[:2]
    index = torch.arange(columns, device=given.device).expand(batch, -1)
    packed = False
    if real is not None:
        tokens = torch.where(real, real.cumsum(1) - 1, -1)
    else:
        tokens = index
        if position_ids is not None and columns > 1:
            starts = document_starts(position_ids.expand(batch, -1))
            packed = bool(starts[:, 1:].any())
            if packed:
                tokens = index - torch.where(starts, index, 0).cummax(1).values
    if real is None and not packed:
        step = insertion(tokens, block_size, columns + columns // block_size)
        step.real = None
        return step
    closes = (tokens >= 0) & (tokens % block_size == block_size - 1)
    width = max(1, int(((tokens >= 0).sum(1) + closes.sum(1)).max()) if batch else 0)
    step = insertion(tokens, block_size, width)
    step.packed = packed
    return step
