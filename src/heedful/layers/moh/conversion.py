"""Continued training of a pretrained model as MoH: no routers, the norms of the model's own queries choose.

A converted model differs in one thing: transformers asks its config which attention function to call, and the config says
"moh". That function calls the one the model had before, and takes out the heads that were not chosen. The numbers stand
in the config too, so they are saved and loaded with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from heedful.attention import by_document, routed_attention
from heedful.attention.documents import document_starts
from heedful.layers.moh.routing import load_balance, norm_routing

NAME = "moh"
SKIPPING = "routed"
Model = TypeVar("Model", bound=PreTrainedModel)


def convert_to_moh(
    model: Model, active_ratio: float = 0.75, shared_ratio: float = 0.5, *, attention: str | None = None
) -> Model:
    """Turns a pretrained model's attention into Mixture-of-Head attention, without a new parameter; changes and returns it.

    Of H query heads the first `round(shared_ratio * H)` work for every token; of the others those whose query vectors have
    the largest norms, `round(active_ratio * H)` in all. The gates are 0 or 1, so that what pretraining made of the heads
    stays; `o_proj` sees zeros for the others. The model needs some continued training to get its quality back:
    `heedful.training.train_moh`.

    In training mode the choice has a gradient, straight through: that of the probabilities (softmax of a token's norms
    over their deviation). With `output_attentions=True` the model's `attentions` are the routing, a tensor
    `(B, T, E, 2)` a layer: probability and choice (0 or 1) of each routed head; `balance_loss` takes them.

    Saved and loaded as ever: the config holds the conversion (`config.moh`). Load it after `import heedful.layers.moh`;
    elsewhere transformers refuses the attention by its name, "moh". (transformers takes the name out of a config as it loads:
    a loaded model that never ran is converted again before it is saved again.)

    A head's query is what its attention call gets: in models that norm queries (Qwen3, Gemma3) the normed one, whose length
    the norm's weights make.

    Example:
        >>> import heedful
        >>> from heedful.layers import convert_to_moh
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> model = convert_to_moh(model, active_ratio=0.67)
        >>> model.config.moh["active_ratio"]
        0.67

    Args:
        model: A transformers model whose attention goes through transformers' interface (Llama, Qwen, Mistral, Gemma, ViT
            and most others), on its "sdpa" or "eager" implementation. Converting again sets other ratios.
        active_ratio: Share of the query heads that each token has, rounded (a half to the even number: of 6 heads, 0.75 makes
            4). 1 leaves every bit as it is.
        shared_ratio: Share of the query heads that all tokens have; at most `active_ratio`.
        attention: What computes the heads: "sdpa" or "eager", all of them, then zeros; "routed", only the chosen ones
            (`heedful.attention.routed_attention`: on a GPU skips scores and the product with the values). None: what the model
            has. "routed" takes padding, windows and packed rows, no softcap, no sink logits, no static cache.

    Returns:
        `model`.

    Raises:
        ValueError: If a ratio does not fit, or the model cannot be converted.

    Cost:
        The norms of the queries and one product with the output. With "sdpa" and "eager" no time is saved. With "routed"
        the query projection (the router needs it) and the output projection stay.

    When not to use:
        Without continued training, which must follow. For generation: one token's keys and values are read all the same.
        (`heedful.generate` takes it with "sdpa" and "eager", in its eager engine; it refuses "routed".) Under `heedful.attach`
        with a Kernel, or an Edit of logits or probabilities, which would compute all heads: refused.

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin, Zhu, Yuan, Yan, arXiv 2410.11842 (section on
        continue-tuning).
    """
    if not 0 < active_ratio <= 1:
        raise ValueError(f"active_ratio must be above 0 and at most 1, got {active_ratio}")
    if not 0 <= shared_ratio <= active_ratio:
        raise ValueError(f"shared_ratio must be 0 to active_ratio={active_ratio}, got {shared_ratio}")
    config = model.config
    if getattr(config, "sub_configs", None):
        raise ValueError(
            f"{type(model).__name__} is made of several models with a config each: convert the one you mean, such as its language model"
        )
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"{type(model).__name__}'s config has no num_attention_heads, one for all layers")
    if counts(heads, active_ratio, shared_ratio)[1] < 1:
        raise ValueError(f"active_ratio={active_ratio} of {heads} heads leaves none: give at least {1 / heads:.3g}")
    present = config._attn_implementation or "eager"
    if attention is None:
        attention = config.moh["attention"] if present == NAME else present
    if attention not in ("sdpa", "eager", SKIPPING):
        raise ValueError(
            f"the attention implementation {attention!r} cannot be converted: pass attention='sdpa', 'eager' or 'routed'"
        )
    if attention == SKIPPING and getattr(config, "attn_logit_softcapping", None):
        raise ValueError("attention='routed' has no softcap: pass attention='eager'")
    config.moh = {"active_ratio": active_ratio, "shared_ratio": shared_ratio, "attention": attention}
    if present != NAME:
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            del config.moh
            raise ValueError(
                f"{type(model).__name__} has no attention that goes through transformers' AttentionInterface"
            )
    config.attn_implementation = NAME  # saved, and read when loaded
    return model


def counts(heads: int, active_ratio: float, shared_ratio: float) -> tuple[int, int]:
    """How many heads are shared, and how many are active in all."""
    shared, active = round(shared_ratio * heads), round(active_ratio * heads)
    return min(shared, active), active


def balance_loss(routing: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """The mean balance loss of a converted model's layers; its minimum is the number of routed heads a token has.

    Example:
        >>> import heedful, torch
        >>> from heedful.layers.moh import balance_loss, convert_to_moh
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer("Call me Ishmael.", return_tensors="pt").input_ids
        >>> output = convert_to_moh(model).train()(ids, labels=ids, output_attentions=True)
        >>> loss = output.loss + 0.01 * balance_loss(output.attentions)

    Args:
        routing: The model output's `attentions`, called with `output_attentions=True`.
        attention_mask: `(B, T)`, as the model got it; padding counts for nothing.

    Raises:
        ValueError: If the tensors are not a routing.
    """
    routing = [r for r in routing if r is not None]
    if not routing or any(r.ndim != 4 or r.shape[-1] != 2 for r in routing):
        raise ValueError(
            "routing must be the `attentions` of a model converted by convert_to_moh with active_ratio below 1, called with output_attentions=True"
        )
    losses = [load_balance(r[..., 0], r[..., 1].detach() > 0, attention_mask) for r in routing]
    return torch.stack(losses).mean()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for "moh": `(B, T, H, D)`, and the routing if attentions are asked for."""
    config: Any = module.config
    settings = _settings(config)
    asked = keywords.pop("output_attentions", None)
    heads = query.shape[1]
    shared, active = counts(heads, settings["active_ratio"], settings["shared_ratio"])
    everyone = active == heads
    chosen = probabilities = None
    if not everyone:
        chosen, probabilities = norm_routing(query, shared, active)
    if settings["attention"] == SKIPPING:
        # In training all heads are computed: the straight-through gradient of a gate is what its head would have added.
        skipped = None if module.training else chosen
        output = _routed(module, query, key, value, skipped, attention_mask, **keywords).transpose(1, 2)
    else:
        function = _original(module, settings["attention"])
        output, _ = function(module, query, key, value, attention_mask, **keywords)
    if chosen is None or probabilities is None:
        return output, None
    if module.training:
        gates = torch.cat([chosen[..., :shared], chosen[..., shared:] + (probabilities - probabilities.detach())], -1)
        output = output * gates[..., None].to(output.dtype)
    else:
        output = output.masked_fill(~chosen[..., None], 0)
    return output, torch.stack([probabilities, chosen[..., shared:].to(probabilities.dtype)], -1) if asked else None


def _settings(config: Any) -> dict[str, Any]:
    settings = getattr(config, "moh", None)
    if settings is None:
        raise ValueError(
            "the attention implementation 'moh' is not chosen by name: call heedful.layers.convert_to_moh(model)"
        )
    if not torch.compiler.is_compiling() and "attn_implementation" not in config.__dict__:
        config.attn_implementation = NAME  # taken out when the config was loaded; it has to be saved again
    return settings


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    functions = inspect.unwrap(type(module).forward).__globals__  # each family has an eager function of its own
    return functions["eager_attention_forward"]


def _routed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None, attention_mask: Tensor | None, **keywords: Any
) -> Tensor:  # fmt: skip
    for name in ("softcap", "s_aux", "position_bias"):
        if keywords.get(name) is not None:
            raise ValueError(f"attention='routed' has no {name}: convert with attention='eager'")
    if module.training and keywords.get("dropout"):
        raise ValueError("attention='routed' has no dropout: set attention_dropout=0 or convert with attention='sdpa'")
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    options: dict[str, Any] = {
        "causal": causal,
        "window": keywords.get("sliding_window") if causal else None,
        "scale": keywords.get("scaling"),
    }
    positions, length = keywords.get("position_ids"), query.shape[2]
    if (
        attention_mask is None and causal and length == key.shape[2] > 1
        and isinstance(positions, Tensor) and positions.shape[-1] == length and not torch.compiler.is_compiling()
    ):  # fmt: skip
        positions = positions.reshape(-1, length).expand(query.shape[0], length)
        if bool(document_starts(positions)[:, 1:].any()):
            if chosen is None:
                return by_document(lambda *tensors, attention_mask: routed_attention(*tensors, attention_mask=attention_mask, **options), positions, query, key, value)  # fmt: skip
            return by_document(
                lambda q, k, v, c, attention_mask: routed_attention(q, k, v, c[..., 0].transpose(1, 2), attention_mask=attention_mask, **options),
                positions, query, key, value, chosen.transpose(1, 2)[..., None],
            )  # fmt: skip
    return routed_attention(query, key, value, chosen, attention_mask=attention_mask, **options)


def _mask(*, config: Any, **keywords: Any) -> Any:
    """The mask that the original implementation wants; for "routed" the padding alone, bool `(B, Tk)` or None."""
    name = _settings(config)["attention"]
    if name != SKIPPING:
        return ALL_MASK_ATTENTION_FUNCTIONS[name](config=config, **keywords)
    keys, offset = keywords["kv_length"], keywords.get("kv_offset", 0)
    if not isinstance(keywords["q_offset"], int) or keywords["q_offset"] + keywords["q_length"] != offset + keys:
        raise ValueError(
            "attention='routed' needs a cache that grows with the text (DynamicCache): convert with attention='sdpa'"
        )
    padding = keywords.get("attention_mask")
    if padding is None:
        return None
    padding = padding[:, offset : offset + keys].bool()
    return padding


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
