"""Tiny random models of the transformers families that heedful's tests run on: no download, a few thousand weights.

`build("llama")` gives a model in eval mode with seeded weights; `inputs(model)` a batch that it takes. FAMILIES lists
all by kind: "decoder" (text, generates), "vision-language", "encoder-decoder", "encoder", "vision", "two-tower", and
"none" (no attention that can be attached to).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 96
IMAGE_TOKEN = 90
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Family:
    name: str
    kind: str
    model_class: str
    make: Callable[[], Any]
    care: str = ""  # what a user has to know before attaching
    note: str = ""  # what is special about its attention


class Letters:
    """A tokenizer of 80 symbols, as far as training on a file needs one."""

    eos_token_id, bos_token_id, pad_token_id = 1, 0, 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 80 for c in text]}

    def save_pretrained(self, folder: Any) -> None:
        pass


FAMILIES: dict[str, Family] = {}


def family(
    kind: str, model_class: str, care: str = "", note: str = ""
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function that returns the config of a tiny model; its name is the family's."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        name = make.__name__
        FAMILIES[name] = Family(name, kind, model_class, make, care, note)
        return make

    return register


def names(*kinds: str) -> list[str]:
    """The families of the given kinds that the installed transformers has (all that can be attached to by default)."""
    return [
        f.name
        for f in FAMILIES.values()
        if (f.kind in kinds if kinds else f.kind != "none") and hasattr(transformers, f.model_class)
    ]


def build(
    name: str, *, attn: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A tiny random model in eval mode.

    Args:
        name: A family.
        attn: Attention implementation; None for the family's own default.
        dtype: Of the weights.
        seed: Of the weights.
        **changes: Fields of the (text) config to set otherwise.
    """
    kind = FAMILIES[name]
    config = kind.make()
    for key, value in changes.items():
        setattr(config.get_text_config() if kind.kind == "vision-language" else config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cls = getattr(transformers, kind.model_class)
        if hasattr(cls, "_from_config"):
            model = cls._from_config(config, **({} if attn is None else {"attn_implementation": attn}))
        else:
            model = cls(config)
        _spread(model)
    if hasattr(model, "set_experts_implementation") and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model.to(dtype).eval()


def _spread(model: Any) -> None:
    """Larger random weights than the usual 0.02, so that attention is far from uniform and errors show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0.0, min(0.5, 1.2 * p.shape[-1] ** -0.5) if "embed" not in name else 0.35)
            elif "sinks" in name:
                p.normal_()


def inputs(
    model: Any, *, batch: int = 2, length: int = 12, padding: str | None = None, seed: int = 1
) -> dict[str, Any]:
    """A batch for `model.forward`: token ids (with one image where the model takes images), pixels, decoder ids.

    Args:
        model: A model from `build`.
        batch: Samples.
        length: Tokens.
        padding: None, "left" or "right": sample 0 has 4 padding tokens there.
        seed: Of the contents.
    """
    g = torch.Generator().manual_seed(seed)
    name = model.config.model_type
    dtype = next(model.parameters()).dtype
    kind = next((f.kind for f in FAMILIES.values() if f.model_class == type(model).__name__), "decoder")
    ids = torch.randint(5, 80, (batch, length), generator=g)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding is not None:
        mask[0, : 4 if padding == "left" else None] = 0
        if padding == "right":
            mask[0] = 1
            mask[0, -4:] = 0
        ids[mask == 0] = PAD
    if kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=g).to(dtype)}
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "two-tower":
        given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=g).to(dtype)
    if kind == "encoder-decoder":
        given["decoder_input_ids"] = torch.randint(5, 80, (batch, 7), generator=g)
    if kind == "vision-language":
        qwen = name.startswith("qwen")
        count = 4
        first = 5 if padding == "left" else 2
        if qwen:
            ids[:, first - 1], ids[:, first + count] = 91, 92  # vision start and end
            given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
            width = 3 * 2 * 4 * 4
            given["pixel_values"] = torch.randn(batch * 16, width, generator=g).to(dtype)
            given["mm_token_type_ids"] = torch.zeros_like(ids)
            given["mm_token_type_ids"][:, first : first + count] = 1
        else:
            given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=g).to(dtype)
        if name == "gemma3":
            given["token_type_ids"] = torch.zeros_like(ids)
            given["token_type_ids"][:, first : first + count] = 1
        ids[:, first : first + count] = IMAGE_TOKEN
    return given


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        **more,
    }


def _windows(*kinds: str) -> dict[str, Any]:
    return {"sliding_window": 6, "layer_types": [f"{k}_attention" for k in kinds]}


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


# ---- decoders


@family("decoder", "LlamaForCausalLM")
def llama() -> Any:
    return transformers.LlamaConfig(**_text())


@family("decoder", "MistralForCausalLM", note="sliding window")
def mistral() -> Any:
    return transformers.MistralConfig(**_text(sliding_window=6))


@family("decoder", "MixtralForCausalLM")
def mixtral() -> Any:
    return transformers.MixtralConfig(**_text(num_local_experts=4, num_experts_per_tok=2))


@family("decoder", "Qwen2ForCausalLM")
def qwen2() -> Any:
    return transformers.Qwen2Config(**_text())


@family("decoder", "Qwen3ForCausalLM")
def qwen3() -> Any:
    return transformers.Qwen3Config(**_text(head_dim=8))


@family("decoder", "Qwen3MoeForCausalLM")
def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(**_text(head_dim=8, num_experts=4, **_EXPERTS))


@family("decoder", "Gemma2ForCausalLM", "logit softcap and sliding window; eager by default")
def gemma2() -> Any:
    return transformers.Gemma2Config(
        **_text(
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=3.0,
            attn_implementation="eager",  # older versions choose SDPA, which drops the softcap
            **_windows("sliding", "full", "sliding"),
        )
    )


@family("decoder", "Gemma3ForCausalLM", note="sliding window")
def gemma3_text() -> Any:
    return transformers.Gemma3TextConfig(
        **_text(head_dim=8, query_pre_attn_scalar=8, **_windows("sliding", "full", "sliding"))
    )


@family("decoder", "Phi3ForCausalLM")
def phi3() -> Any:
    return transformers.Phi3Config(**_text())


@family("decoder", "Olmo2ForCausalLM")
def olmo2() -> Any:
    return transformers.Olmo2Config(**_text())


@family("decoder", "GPTNeoXForCausalLM")
def gpt_neox() -> Any:
    fields = _text()
    fields.pop("num_key_value_heads")
    return transformers.GPTNeoXConfig(**fields)


@family("decoder", "GPT2LMHeadModel")
def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=BOS, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip


@family("decoder", "Cohere2ForCausalLM", note="sliding window, layers without rotation")
def cohere2() -> Any:
    return transformers.Cohere2Config(**_text(**_windows("sliding", "sliding", "full")))


@family("decoder", "GraniteForCausalLM")
def granite() -> Any:
    return transformers.GraniteConfig(**_text(attention_multiplier=0.2))


@family("decoder", "GptOssForCausalLM", "learned sinks: probabilities sum to less than 1; eager by default")
def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **_text(
            head_dim=8, num_local_experts=4, num_experts_per_tok=2, **_windows("sliding", "full", "sliding"),
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )  # fmt: skip


@family("decoder", "Starcoder2ForCausalLM")
def starcoder2() -> Any:
    return transformers.Starcoder2Config(**_text())


@family("decoder", "DeepseekV3ForCausalLM", note="latent attention: key and value widths differ")
def deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **_text(
            num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, **_EXPERTS,
        )
    )  # fmt: skip


@family("decoder", "Qwen3NextForCausalLM", "hybrid: only some layers have softmax attention")
def qwen3_next() -> Any:
    return transformers.Qwen3NextConfig(
        **_text(
            num_hidden_layers=4, head_dim=8, num_experts=4, shared_expert_intermediate_size=16, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, **_EXPERTS,
        )
    )  # fmt: skip


@family("decoder", "SmolLM3ForCausalLM", note="layers without rotation")
def smollm3() -> Any:
    return transformers.SmolLM3Config(**_text(no_rope_layers=[1, 1, 0]))


@family("decoder", "Exaone4ForCausalLM", note="sliding window")
def exaone4() -> Any:
    return transformers.Exaone4Config(**_text(head_dim=8, **_windows("sliding", "sliding", "full")))


@family("decoder", "Ernie4_5ForCausalLM")
def ernie4_5() -> Any:
    return transformers.Ernie4_5Config(**_text(head_dim=8))


@family("decoder", "Glm4ForCausalLM")
def glm4() -> Any:
    return transformers.Glm4Config(**_text(head_dim=8))


@family("decoder", "SeedOssForCausalLM")
def seed_oss() -> Any:
    return transformers.SeedOssConfig(**_text(head_dim=8))


# ---- vision and language


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        **more,
    }


@family("vision-language", "LlavaForConditionalGeneration", "parts act on the text stack; pass the tower for vision")
def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_text()),
        vision_config=transformers.CLIPVisionConfig(**_vision(projection_dim=24)),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


@family("vision-language", "Gemma3ForConditionalGeneration", "image tokens see each other; pass the tower for vision")
def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=gemma3_text(),
        vision_config=transformers.SiglipVisionConfig(**_vision(vision_use_head=False)),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=91,
        eoi_token_index=92,
    )


@family("vision-language", "Qwen2_5_VLForConditionalGeneration", "the vision tower calls attention window by window")
def qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}),
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 16, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN, vision_start_token_id=91, vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip


@family("vision-language", "Qwen3VLForConditionalGeneration", "the vision tower calls attention image by image")
def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config=_text(
            head_dim=8,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
        ),
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE_TOKEN, vision_start_token_id=91, vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip


# ---- encoder-decoders


@family(
    "encoder-decoder",
    "T5ForConditionalGeneration",
    "position bias; cross-attention with cross=True; encoder by sub-module",
)
def t5() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=PAD, decoder_start_token_id=PAD, eos_token_id=None,
    )  # fmt: skip


@family(
    "encoder-decoder", "BartForConditionalGeneration", "decoder; cross-attention with cross=True; encoder by sub-module"
)
def bart() -> Any:
    return transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, decoder_start_token_id=BOS, forced_eos_token_id=None,
    )  # fmt: skip


# ---- encoders and vision


def _encoder() -> dict[str, Any]:
    fields = _text()
    fields.pop("num_key_value_heads")
    return {**fields, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@family("encoder", "BertModel")
def bert() -> Any:
    return transformers.BertConfig(**_encoder())


@family("encoder", "RobertaModel")
def roberta() -> Any:
    return transformers.RobertaConfig(**_encoder())


@family("encoder", "AlbertModel", "one attention module, called once a layer: all are layer 0")
def albert() -> Any:
    return transformers.AlbertConfig(**_encoder(), embedding_size=16)


@family("vision", "ViTModel")
def vit() -> Any:
    return transformers.ViTConfig(**_vision(num_hidden_layers=3))


@family("vision", "Dinov2Model")
def dinov2() -> Any:
    fields = _vision(num_hidden_layers=3)
    fields.pop("intermediate_size")
    return transformers.Dinov2Config(**fields)


@family("two-tower", "CLIPModel", "parts act on the text tower; pass model.vision_model for vision")
def clip() -> Any:
    text = _text(projection_dim=24, max_position_embeddings=32)
    text.pop("num_key_value_heads")
    return transformers.CLIPConfig(text_config={**text, "eos_token_id": EOS}, vision_config=_vision(projection_dim=24))


@family("two-tower", "SiglipModel", "parts act on the text tower; pass model.vision_model for vision")
def siglip() -> Any:
    text = _text(max_position_embeddings=32, projection_size=24)
    text.pop("num_key_value_heads")
    return transformers.SiglipConfig(text_config={**text, "eos_token_id": EOS}, vision_config=_vision())


# ---- no attention to attach to


@family("none", "BloomForCausalLM", "own attention code (ALiBi)")
def bloom() -> Any:
    return transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD)


@family("none", "FalconForCausalLM", "own attention code")
def falcon() -> Any:
    return transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=PAD
    )


@family("none", "MambaForCausalLM", "no attention at all")
def mamba() -> Any:
    return transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=PAD
    )
