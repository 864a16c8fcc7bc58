"""What cannot be exact is refused by a ValueError that names the class or argument, before the first forward."""

import pytest
import torch
import transformers
from decoding_tools import Empty
from tiny_models import build, inputs
from transformers import DynamicCache, GenerationConfig

import heedful
from heedful.decoding import Drafter, DraftTree, custom_generate

IDS = torch.tensor([[5, 6, 7, 8]])


class Forwards:
    """Counts a model's forwards."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *args):
        self.count += 1


def tiny(config, cls="AutoModelForCausalLM", **shape):
    torch.manual_seed(0)
    return (
        getattr(transformers, cls).from_config(transformers.AutoConfig.for_model(config, vocab_size=96, **shape)).eval()
    )


MODELS = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
    "gpt_neo": {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "is_decoder": True,
             "is_encoder_decoder": False},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = tiny(name, **MODELS[name])
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=type(model).__name__):
        heedful.generate(model, IDS, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match=type(model).__name__):
        model.generate(IDS, max_new_tokens=4, do_sample=False, custom_generate=custom_generate(Empty()))
    assert forwards.count == 0


@pytest.mark.parametrize(("name", "reason"), [("qwen3_next", "Qwen3NextForCausalLM"), ("t5", "encoder-decoder")])
def test_hybrid_and_encoder_decoder(name, reason):
    model = build(name)
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=reason):
        heedful.generate(model, IDS, max_new_tokens=4)
    assert forwards.count == 0


def test_attention_implementation():
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*set_attn_implementation"):
        heedful.generate(model, IDS, max_new_tokens=4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_length(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        max_position_embeddings=16 if kind == "dynamic" else 64, rope_parameters=rope,
    ).double()  # fmt: skip
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=f"{kind}.*16"):
        heedful.generate(model, IDS, max_new_tokens=13, **options)
    assert forwards.count == 0
    within = heedful.generate(model, IDS, Empty(), max_new_tokens=12, **options).sequences
    assert torch.equal(within, model.generate(IDS, max_new_tokens=12, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        *(({name: True, "return_dict_in_generate": True}, name)
          for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")),
        ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=3)}, "num_beams"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "right padding"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"custom_generate": "somebody/something"}, "custom_generate"),
        ({"acceptance": "likely"}, "acceptance"),
    ],
)  # fmt: skip
def test_arguments(options, named):
    model = build("llama")
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=named):
        heedful.generate(model, IDS, **({"max_new_tokens": 4, "do_sample": False} | options))
    assert forwards.count == 0


def test_assistant_model_and_embeddings():
    model = build("llama")
    forwards = Forwards(model)
    with pytest.raises(ValueError, match="assistant_model"):
        heedful.generate(model, IDS, max_new_tokens=4, assistant_model=build("llama"))
    with pytest.raises(ValueError, match="inputs_embeds"):
        heedful.generate(model, IDS, max_new_tokens=4, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(TypeError, match="drafter"):
        heedful.generate(model, IDS, "token-recycling", max_new_tokens=4)
    assert forwards.count == 0


def test_default_settings_of_the_model_count_too():
    model = build("llama")
    model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams"):
        heedful.generate(model, IDS, max_new_tokens=4)


def test_right_padding_and_streamer_in_a_batch():
    model = build("llama")
    forwards = Forwards(model)
    with pytest.raises(ValueError, match="right padding"):
        heedful.generate(model, **inputs(model, padding="right"), max_new_tokens=4)
    streamer = transformers.TextStreamer(None)
    with pytest.raises(ValueError, match="streamer"):
        heedful.generate(model, **inputs(model), streamer=streamer, max_new_tokens=4)
    assert forwards.count == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([5, 6]), "shape .2,."),
        ([[5, 6]], "list"),
        (torch.tensor([[5.0]]), "float32"),
        (torch.zeros(1, 0, dtype=torch.long), "hold no token"),
    ],
)
def test_what_is_no_prompt(given, message):
    with pytest.raises(ValueError, match=message):
        heedful.generate(build("llama"), given, max_new_tokens=4)
    with pytest.raises(TypeError, match="model of transformers"):
        heedful.generate("classics-20m", torch.tensor([[5]]))


class Wrong(Drafter):
    def __init__(self, proposal):
        self.proposal = proposal

    def propose(self, roots, committed):
        return self.proposal(roots)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (lambda r: [DraftTree(r + 1, torch.tensor([-1]))], "root"),
        (lambda r: [DraftTree(torch.cat([r, r]), torch.tensor([-1, 1]))], "parent"),
        (lambda r: [DraftTree(torch.cat([r, r * 0 + 96]), torch.tensor([-1, 0]))], "vocabulary"),
        (lambda r: [DraftTree(torch.cat([r, r * 0 - 1]), torch.tensor([-1, 0]))], "vocabulary"),
        (lambda r: [None, None], "2 trees for 1 rows"),
        (lambda r: DraftTree(r, torch.tensor([-1])), "one draft tree for all rows"),
    ],
)
def test_wrong_trees(proposal, message):
    model = build("llama")
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=message):
        heedful.generate(model, IDS, Wrong(proposal), max_new_tokens=4, do_sample=False)
    assert forwards.count == 1, "the prompt, but no tree"


def test_unknown_requirement():
    drafter = Empty()
    drafter.requires = frozenset({"attentions"})
    with pytest.raises(ValueError, match="attentions"):
        heedful.generate(build("llama"), IDS, drafter, max_new_tokens=4)
