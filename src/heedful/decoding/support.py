"""Which models and arguments the engine decodes exactly. Everything else is refused by name before the first forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel

from heedful.decoding.cache import SUPPORTED_LAYERS

#: Processors of transformers that keep state from call to call: exact when called once per token of one sequence only.
_STATEFUL_PROCESSORS = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
)
_REMEDY = "use model.generate, which this model supports"


def check_model(model: PreTrainedModel) -> None:
    """ValueError when the engine cannot promise the tokens of `model.generate` for this model."""
    name = type(model).__name__
    config = model.config
    text = config.get_text_config(decoder=True)

    def refuse(reason: str) -> ValueError:
        return ValueError(f"heedful.generate cannot decode with {name}: {reason}; {_REMEDY}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder model")
    # GPT-NeoX and others leave is_decoder at False though they are decoders: what decides is whether attention is causal.
    decoder = model.get_decoder() or model  # without the vision tower, which attends in both directions
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise refuse("its attention is not causal (an encoder), so it keeps no cache")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refuse(
            "its forward takes no position_ids, so the nodes of a draft tree cannot be placed (ALiBi or own positions)"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("its attention does not go through transformers' attention interface and may ignore a tree's mask")
    try:
        layers = DynamicCache(config=text).layers
    except Exception as error:
        raise refuse(f"it has no cache of plain attention layers ({type(error).__name__}: {error})") from error
    for layer in layers:
        if type(layer).__name__ not in SUPPORTED_LAYERS:
            raise refuse(
                f"its cache has layers of class {type(layer).__name__} (recurrent, hybrid, indexed or compressed), from which "
                f"rejected drafts cannot be removed"
            )
    if getattr(text, "cross_attention_layers", None):
        raise refuse("its text layers attend to another modality's cache")
    for owner in {id(c): c for c in (config, text)}.values():
        implementation = getattr(owner, "_attn_implementation", None)
        if getattr(owner, "landmark", None) is not None:
            raise refuse("a landmark model reads blocks that each token finds, over which no tree mask can be laid")
        if routes_heads(owner):  # each token by itself, over the masks of the attention beneath
            implementation = owner.moh["attention"]
            if implementation == "routed":
                raise ValueError(
                    f"heedful.generate cannot decode with {name}: heads computed by 'routed' attention take no tree mask; call "
                    f"heedful.layers.convert_to_moh again with the ratios of config.moh and attention='sdpa' or 'eager' first"
                )
        if implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"heedful.generate cannot decode with {name}: its attention implementation {implementation!r} takes no "
                f"tree mask; call model.set_attn_implementation('sdpa') or 'eager' first"
            )


def routes_heads(config: Any) -> bool:
    """Whether this is the config of a model that `heedful.layers.convert_to_moh` made."""
    return getattr(config, "_attn_implementation", None) == "moh" and getattr(config, "moh", None) is not None


def check_rope(model: PreTrainedModel, final_length: int | None) -> None:
    """ValueError when the rotary frequencies would change with the length of what is decoded."""
    text = model.config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, Mapping)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind is None or ("dynamic" not in kind and kind != "longrope"):
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if original is None or "dynamic" in kind:
            original = min(text.max_position_embeddings, original or text.max_position_embeddings)
        if final_length is None or final_length > original:
            raise ValueError(
                f"heedful.generate cannot decode with {type(model).__name__}: rope_type {kind!r} changes its frequencies past "
                f"{original} tokens, which drafted tokens would trigger early, and prompt + max_new_tokens is "
                f"{'unlimited' if final_length is None else final_length}; stay within {original} tokens or use model.generate"
            )


def check_prompt(input_ids: Any) -> None:
    """ValueError unless these are rows of token ids."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        given = (
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else repr(type(input_ids))
        )
        raise ValueError(
            f"input_ids must be a LongTensor (batch, tokens), as tokenizer(text, return_tensors='pt').input_ids is, got {given}"
        )
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} hold no token: begin with one, the BOS for instance"
        )


def check_call(arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of `heedful.generate` that another way of decoding would need."""
    if arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model is another way of drafting: pass a drafter instead, or use model.generate")
    if arguments.get("synced_gpus"):
        raise ValueError("synced_gpus is not supported by heedful.generate; use model.generate")
    if arguments.get("custom_generate") is not None:
        raise ValueError("heedful.generate is itself a custom_generate; leave custom_generate out")
    _check_cache_implementation(arguments.get("cache_implementation"))
    if arguments.get("token_healing"):
        raise ValueError(
            "token_healing is not supported by heedful.generate: heal the prompt first (model.heal_tokens)"
        )


def check_arguments(config: GenerationConfig, model_kwargs: Mapping[str, Any], fresh_cache: bool) -> None:
    """ValueError for settings of generate, from arguments or defaults, that the engine does not carry out.

    Args:
        config: the prepared generation config.
        model_kwargs: what generate would hand to the forward.
        fresh_cache: whether ``past_key_values`` is the empty cache that generate made itself.
    """
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={config.num_beams}: beam search has no drafting here; use num_beams=1 or model.generate"
        )
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "prompt_lookup_num_tokens belongs to model.generate; pass drafter=PromptLookup(num_tokens=...) instead"
        )
    if getattr(config, "penalty_alpha", None) or getattr(config, "dola_layers", None) is not None:
        raise ValueError("contrastive search and DoLa are other ways of decoding; use model.generate")
    if config.use_cache is False:
        raise ValueError(
            "use_cache=False: a tree is verified against the cache of the text before it; leave use_cache=True"
        )
    if not fresh_cache:
        raise ValueError(
            "past_key_values: the engine keeps its own full-length cache; pass the whole prompt as input_ids"
        )
    _check_cache_implementation(config.cache_implementation)
    for output in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, output, False):
            raise ValueError(f"{output}=True is not supported: a step verifies many tokens at once; use model.generate")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: drafts are made of token ids; pass input_ids")


def _check_cache_implementation(name: str | None) -> None:
    if name not in (None, "dynamic", "static"):
        raise ValueError(f"cache_implementation={name!r} is not supported; use None, 'dynamic' or 'static'")


def check_batch(
    processors: LogitsProcessorList, streamer: object, attention_mask: Tensor | None, batch_size: int
) -> None:
    """ValueError for what cannot be exact, or has no meaning, with this batch."""
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        raise ValueError("right padding: generation continues after the last column; set tokenizer.padding_side='left'")
    if batch_size == 1:
        return
    if streamer is not None:
        raise ValueError(
            f"a streamer takes one sequence, but the batch has {batch_size}; leave streamer out or use batch size 1"
        )
    for processor in processors:
        if type(processor).__name__ in _STATEFUL_PROCESSORS:
            raise ValueError(
                f"{type(processor).__name__} keeps state from token to token, which is exact at batch size 1 only, not "
                f"{batch_size}; generate the prompts one by one or use model.generate"
            )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens below this have an embedding: what drafts may hold."""
    return int(cast(Tensor, model.get_input_embeddings().weight).shape[0])


def model_device(model: PreTrainedModel) -> torch.device:
    """The device of the input embeddings, where token ids go."""
    return cast(Tensor, model.get_input_embeddings().weight).device


def without_cudnn_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU: scaled_dot_product_attention without its cuDNN form, which builds a plan for every new number of keys: in decoding, in
    each step. A user's own choice of kernels stays."""
    kinds = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    chosen = [kind for kind, enabled in kinds.items() if enabled()]
    return sdpa_kernel(chosen) if device.type == "cuda" and chosen else nullcontext()
