"""Greedy output is token for token model.generate's, in float64, whatever the drafter, cache, attention or batch."""

import pytest
import torch
import transformers
from decoding_tools import DRAFTERS, Chain, RandomTree, StaticTree, padding
from packaging import version
from tiny_models import build, inputs, names

import heedful
from heedful.decoding import HiddenTransfer, LongSpec, Medusa, PromptLookup, TokenRecycling

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


TRAINED = {
    "medusa": lambda model: Medusa.for_model(model),
    "hidden transfer": lambda model: HiddenTransfer.for_model(model),
    "longspec": lambda model: LongSpec.for_model(model, window=8, tree_shape=(4, 6), initializer_range=0.3),
}


def make(name, reference, skip, model):
    if name in TRAINED:
        return TRAINED[name](model)
    if name == "token recycling":
        return TokenRecycling(max_nodes=12, update_from_prompt=True)
    if name == "prompt lookup":
        return PromptLookup()
    drafter = DRAFTERS[name](reference)
    drafter.skip = skip
    return drafter


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("drafter", [None, *DRAFTERS, "token recycling", "prompt lookup", *TRAINED])
def test_every_drafter_cache_attention_and_batch(drafter, attn, cache, batch):
    model = build("llama", attn=attn, dtype=torch.float64)
    # transformers' eager attention gives NaN for padding rows in float64: its softmax is float32.
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 and attn == "sdpa" else None)
    reference = model.generate(**given, **GREEDY)
    if drafter == "hidden transfer" and cache == "static":
        pytest.skip("refused: a static cache has no room for pseudo rows")
    made = None if drafter is None else make(drafter, reference, padding(given), model)
    result = heedful.generate(model, drafter=made, cache_implementation=cache, **given, **GREEDY)
    assert torch.equal(result.sequences, reference)
    if drafter in ("chain", "static tree", "random tree"):
        assert result.stats.tokens_per_step > 1.3, "the oracle's drafts must be accepted"


@pytest.mark.parametrize("name", [n for n in names("decoder", "vision-language") if n != "qwen3_next"])
def test_model_families(name):
    model = build(name, dtype=torch.float64)
    pad = None if model.config._attn_implementation == "eager" else "left"
    given = inputs(model, batch=3, length=13, padding=pad)
    reference = model.generate(**given, **GREEDY)
    drafter = RandomTree(reference, padding(given))
    result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
    assert torch.equal(result.sequences, reference)
    assert result.stats.tokens_per_step > 1.2


def tiny(config, **changes):
    """A random causal language model of an AutoConfig type that tiny_models does not have."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config, **(shape | changes))
    )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}),
        ("gemma3n_text", {"num_kv_shared_layers": 2, "sliding_window": 8, "vocab_size_per_layer_input": 96,
                          "hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
                          "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
        ("gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}),
        ("mistral", {"sliding_window": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_windows_shared_layers_and_learned_positions(config, changes, cache):
    if (
        cache == "static"
        and config == "llama4_text"
        and version.parse(transformers.__version__) < version.parse("5.20")
    ):
        pytest.skip("older transformers cannot build the chunked mask of a static cache")
    model = tiny(config, **changes)
    given = {"input_ids": torch.randint(5, 90, (3, 13), generator=torch.Generator().manual_seed(2))}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, :3] = 0
    reference = model.generate(**given, **GREEDY)
    result = heedful.generate(
        model, drafter=RandomTree(reference, padding(given)), cache_implementation=cache, **given, **GREEDY
    )
    assert torch.equal(result.sequences, reference)
    assert result.stats.tokens_per_step > 1.2


def test_prompt_of_one_token_and_token_zero():
    """Token 0 everywhere: nothing may take it for padding."""
    model = build("llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[0] *= 8
    ids = torch.zeros((1, 1), dtype=torch.long)
    options = GREEDY | {"attention_mask": torch.ones_like(ids)}
    reference = model.generate(ids, **options)
    assert (reference == 0).sum() > 2
    for drafter in (RandomTree(reference, vocabulary=2), TokenRecycling(max_nodes=80), PromptLookup()):
        assert torch.equal(heedful.generate(model, ids, drafter, **options).sequences, reference)


def test_a_wrong_draft_changes_speed_only():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    reference = model.generate(**given, **GREEDY)
    result = heedful.generate(model, drafter=RandomTree(None, seed=7), **given, **GREEDY)
    assert torch.equal(result.sequences, reference)
    assert result.stats.tokens_per_step < 1.5


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_prefill(chunk):
    model = build("mistral", dtype=torch.float64)
    given = inputs(model, batch=3, length=13, padding="left")
    reference = model.generate(**given, **GREEDY)
    drafter = StaticTree(reference, padding(given))
    result = heedful.generate(model, drafter=drafter, prefill_chunk_size=chunk, **given, **GREEDY)
    assert torch.equal(result.sequences, reference)


def test_learned_positions_end_where_generate_ends():
    """GPT-2 indexes its position table: no drafted node may lie past it, though generate is free to fill it."""
    model = build("gpt2", dtype=torch.float64)
    ids = torch.randint(5, 90, (1, model.config.n_positions - 6))
    options = {"max_length": model.config.n_positions, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    reference = model.generate(ids, **options)
    result = heedful.generate(model, ids, StaticTree(None), **options)
    assert torch.equal(result.sequences, reference)
    assert result.sequences.shape[1] == model.config.n_positions
    past = {**options, "max_length": model.config.n_positions + 40, "eos_token_id": reference[0, -3:].tolist()}
    expected = model.generate(ids, **past)
    assert expected.shape[1] <= model.config.n_positions
    assert torch.equal(heedful.generate(model, ids, StaticTree(None), **past).sequences, expected)


def test_largest_trees_and_a_static_cache_with_little_room():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    reference = model.generate(**given, **GREEDY)

    class Large(RandomTree):
        most = 300

    result = heedful.generate(model, drafter=Large(reference), cache_implementation="static", **given, **GREEDY)
    assert torch.equal(result.sequences, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_forks_at_near_ties_only(dtype):
    model = build("llama", dtype=dtype)
    for seed in range(4):
        given = inputs(model, batch=1, seed=seed)
        reference = model.generate(**given, **GREEDY)
        got = heedful.generate(model, drafter=Chain(reference), **given, **GREEDY).sequences
        forks = (got != reference)[0].nonzero()
        if len(forks):  # where they part, the model's two best logits are as good as equal
            at = int(forks[0])
            top = model(reference[:, :at]).logits[0, -1].float().topk(2).values
            assert top[0] - top[1] < (1e-4 if dtype == torch.float32 else 0.3)
