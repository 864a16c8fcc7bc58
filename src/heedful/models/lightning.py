"""A causal language model of lightning attention, in transformers' form: Llama's block with another attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from heedful.attention.documents import document_starts
from heedful.layers.lightning import LightningAttention, LightningCacheLayer

__all__ = ["LightningConfig", "LightningForCausalLM", "LightningModel"]


class LightningConfig(PreTrainedConfig):
    """The sizes of a `LightningForCausalLM`.

    Example:
        >>> from heedful.models import LightningConfig, LightningForCausalLM
        >>> model = LightningForCausalLM(LightningConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
        >>> model.generate(max_new_tokens=4, do_sample=False, bos_token_id=0).shape
        torch.Size([1, 5])

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Heads of keys and values; None for as many.
        head_dim: Width of a head; None for `hidden_size // num_attention_heads`.
        use_output_gate: Of the attention layer, as `LightningAttention` has it.
        gate_rank: As there.
        attention_norm: "layer", "rms" or "simple_rms", as there.
        rms_norm_eps: Epsilon of all norms.
        initializer_range: Standard deviation of new weights.
        tie_word_embeddings: Whether the output matrix is the embedding.
        use_cache: Whether to return the states by default.

    Cost:
        None.

    When not to use:
        For MiniMax checkpoints: transformers has `MiniMaxConfig`.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658.
    """

    model_type = "heedful_lightning"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    use_output_gate: bool = True
    gate_rank: int | None = None
    attention_norm: str = "layer"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class LightningMLP(nn.Module):
    """`(silu(x W_gate) * x W_up) W_down`."""

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LightningDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: LightningConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LightningAttention(
            config.hidden_size, config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, layer=layer, num_layers=config.num_hidden_layers,
            use_output_gate=config.use_output_gate, gate_rank=config.gate_rank, norm=config.attention_norm,
            norm_eps=config.rms_norm_eps,
        )  # fmt: skip
        self.mlp = LightningMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class LightningPreTrainedModel(PreTrainedModel):
    config_class = LightningConfig
    config: LightningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightningDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LightningAttention):
            module.reset_decay()


class LightningModel(LightningPreTrainedModel):
    """Embedding, lightning layers and a norm.

    Example:
        >>> import torch
        >>> from heedful.models import LightningConfig, LightningModel
        >>> model = LightningModel(LightningConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).last_hidden_state.shape
        torch.Size([1, 10, 64])

    Args:
        config: `LightningConfig`.

    Cost:
        Linear in the length. The past is one state a layer and head.

    When not to use:
        As a drop-in for trained softmax weights.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658.
    """

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LightningDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoders. `attention_mask`: `(B, past + T)`, not zero for real tokens. Packed documents: position_ids
        that restart, or transformers' `cu_seq_lens_q`. Other keywords of transformers' callers are not needed here."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        x = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        batch, length = x.shape[:2]
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask must be (B, T), the padding mask, got shape {tuple(attention_mask.shape)}: there are "
                    f"no scores that a mask of pairs could hide"
                )
            attention_mask = attention_mask[:, -length:].bool()
        documents = cu_seq_lens_q
        numbered = documents is None and position_ids is not None and length > 1
        if numbered and attention_mask is not None and not use_cache and bool(attention_mask.all()):
            attention_mask = None  # some collators of packed rows give a mask of ones
        if numbered and attention_mask is None and position_ids is not None:
            documents = _documents(position_ids.expand(batch, length))
        if documents is not None:
            if use_cache or past_key_values is not None:
                raise ValueError("packed documents leave a state each: give use_cache=False and no past_key_values")
            use_cache = False
            x = x.reshape(1, batch * length, x.shape[-1])
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a block that runs twice must not move its state twice
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        caches: list[Any] = [None] * len(self.layers)
        if use_cache:
            if past_key_values is None:
                past_key_values = Cache(layers=[LightningCacheLayer() for _ in self.layers])
            caches = list(past_key_values.layers)
            if len(caches) != len(self.layers) or not all(isinstance(cache, LightningCacheLayer) for cache in caches):
                raise ValueError(
                    "past_key_values must be a Cache of one LightningCacheLayer a layer: leave it out, and the model makes it"
                )
        states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        for layer, cache in zip(self.layers, caches, strict=True):
            states = None if states is None else (*states, x.view(batch, length, x.shape[-1]))
            x = layer(x, attention_mask=attention_mask, cu_seqlens=documents, cache=cache)
        x = self.norm(x).view(batch, length, x.shape[-1])
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else (*states, x),
        )


def _documents(position_ids: Tensor) -> Tensor | None:
    """`cu_seqlens` of the flattened rows, if a position restarts within a row. Waits for the device."""
    first = document_starts(position_ids).flatten().nonzero().squeeze(1)
    if first.shape[0] == position_ids.shape[0]:
        return None
    return nn.functional.pad(first, (0, 1), value=position_ids.numel())


class LightningForCausalLM(LightningPreTrainedModel, GenerationMixin):
    """`LightningModel` with a language model's head. `generate`, `Trainer`, `save_pretrained` and the Auto classes know it
    once `heedful.models` has been imported.

    Example:
        >>> import torch
        >>> from heedful.models import LightningConfig, LightningForCausalLM
        >>> model = LightningForCausalLM(LightningConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2)).eval()
        >>> model.generate(torch.randint(256, (1, 12)), max_new_tokens=5, do_sample=False).shape
        torch.Size([1, 17])

    Args:
        config: `LightningConfig`.

    Raises:
        ValueError: On masks that are not padding masks, foreign caches, and packed documents with a cache.

    Cost:
        Training is linear in the length. A generated token takes the same time and memory however long the past is.

    When not to use:
        For tasks that need exact recall from far back: all of the past is in `H * D * D` numbers a layer. Nor for
        speculative decoding: the state cannot be taken back.

    Paper:
        "Lightning Attention-2", arXiv 2401.04658.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    _is_stateful = True

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        self.model = LightningModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The model makes its own cache in the first forward."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' causal language models; see `LightningModel.forward`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


AutoConfig.register("heedful_lightning", LightningConfig)
AutoModel.register(LightningConfig, LightningModel)
AutoModelForCausalLM.register(LightningConfig, LightningForCausalLM)
