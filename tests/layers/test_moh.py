"""Mixture-of-Head: gates and balance loss as in the paper, and what a converted model keeps."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from decoding_tools import RandomTree, padding
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_two
from tiny_models import build, inputs
from torch.nn import functional

import heedful
from heedful.attention import choose_heads
from heedful.decoding import HiddenTransfer, LongSpec, Medusa, PromptLookup, TokenRecycling
from heedful.layers import MixtureOfHeads, convert_to_moh
from heedful.layers.moh import balance_loss
from heedful.layers.moh.routing import load_balance, norm_routing


def layer_of(dim=24, heads=6, shared=2, top_k=2, seed=0, **options):
    torch.manual_seed(seed)
    return MixtureOfHeads(dim, heads, shared, top_k, **options).double()


def plain_attention(layer, x, kept=None, rotary=None):
    """Multi-head attention with the layer's weights; `kept`: heads that are not zeroed."""
    query, key, value = (
        p(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = functional.scaled_dot_product_attention(query, key, value, is_causal=layer.causal, enable_gqa=True)
    if kept is not None:
        heads = heads * torch.tensor([h in kept for h in range(layer.num_heads)])[:, None, None]
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


def silence(layer):
    for router in (layer.router, layer.shared_router, layer.kind_router):
        if router is not None:
            torch.nn.init.zeros_(router.weight)
    return layer


# ---- the layer with trained routers


@pytest.mark.parametrize("options", [{}, {"causal": True, "num_kv_heads": 2}, {"bias": True, "head_dim": 5}])
def test_silent_routers_with_all_heads_are_multi_head_attention(options):
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    for shared in (0, 1, 2, 6):
        layer = silence(layer_of(shared=shared, top_k=6 - shared, **options))
        assert torch.allclose(layer(x), plain_attention(layer, x), atol=1e-12)


def test_silent_routers_with_fewer_heads_zero_the_last_ones():
    layer = silence(layer_of(shared=1, top_k=3, causal=True))
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    y, (gates, loss) = layer(x, return_routing=True)
    assert torch.allclose(y, plain_attention(layer, x, kept=range(4)), atol=1e-12)  # ties: the lower index
    assert torch.allclose(gates, torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=gates.dtype).expand(2, 9, 6))
    assert float(loss) == pytest.approx(3)  # k at uniform probabilities


@settings(max_examples=30, deadline=None)
@given(shared=st.integers(0, 5), data=st.data(), length=st.integers(1, 7))
def test_gates(shared, data, length):
    k = data.draw(st.integers(1, 6 - shared))
    layer = layer_of(shared=shared, top_k=k, seed=data.draw(st.integers(0, 99)))
    x = torch.randn(2, length, 24, dtype=torch.float64)
    _, (gates, _) = layer(x, return_routing=True)
    kinds = 2 * layer.kind_router(x).softmax(-1) if shared else None
    a1, a2 = (kinds[..., 0], kinds[..., 1]) if shared else (0.0, 1.0)
    if shared:
        assert torch.allclose(gates[..., :shared].sum(-1), a1 * shared, atol=1e-6)
    assert torch.allclose(gates[..., shared:].sum(-1), torch.as_tensor(a2 * k).double().expand(2, length), atol=1e-6)
    assert (gates >= 0).all()
    assert ((gates[..., shared:] > 0).sum(-1) == k).all()
    top = layer.router(x).topk(k).indices.sort().values
    assert torch.equal((gates[..., shared:] > 0).nonzero()[:, 2].view(2, length, k), top)


def test_modules_and_layers_without_routed_heads():
    names = lambda layer: {n for n, _ in layer.named_children()}  # noqa: E731
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names(layer_of()) == projections | {"router", "shared_router", "kind_router"}
    assert names(layer_of(shared=1)) == projections | {"router", "kind_router"}
    assert names(layer_of(shared=0)) == projections | {"router"}
    layer = layer_of(shared=6, top_k=0)
    assert names(layer) == projections | {"shared_router"}
    assert (layer.router, layer.kind_router) == (None, None)
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    _, (gates, loss) = layer(x, return_routing=True)
    assert torch.allclose(gates, 6 * layer.shared_router(x).softmax(-1))
    assert loss == 0
    assert MixtureOfHeads(24, 6, 2, 2).o_proj.bias is None
    assert layer_of(bias=True).k_proj.bias is not None


def test_balance_loss():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(4, 500, 4, generator=generator).softmax(-1)
    assert float(load_balance(p, choose_heads(p, 2))) == pytest.approx(2, abs=0.05)
    fixed = torch.tensor([0.5, 0.5, 0, 0]).expand(4, 500, 4)  # collapsed onto two heads
    assert float(load_balance(fixed, choose_heads(fixed, 2))) == pytest.approx(4)
    mask = torch.arange(500) < torch.tensor([500, 200, 3, 1])[:, None]
    dirty = torch.where(mask[..., None], p, torch.nan)
    real = p[mask][None]
    assert torch.allclose(
        load_balance(dirty, choose_heads(dirty, 2), mask), load_balance(real, choose_heads(real, 2)), atol=1e-5
    )


def test_gradients():
    layer = layer_of(dim=12, heads=4, shared=1, top_k=1, causal=True, num_kv_heads=2)
    x = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, return_routing=True)[0], x)
    assert torch.autograd.gradcheck(lambda x: layer(x, return_routing=True)[1][1], x)
    layer = layer_of(causal=True)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    y, (_gates, loss) = layer(x, return_routing=True)
    for of in (y.square().sum(), loss):
        (grad,) = torch.autograd.grad(of, layer.router.weight, retain_graph=True)
        assert (grad.abs().sum(1) > 0).all()
    last = layer(x[:, :1], return_routing=True)  # of one token: heads it does not have get nothing
    (grad,) = torch.autograd.grad(last[0].sum(), layer.v_proj.weight)
    assert torch.equal(grad.view(6, 4, 24).abs().sum((1, 2)) > 0, last[1][0][0, 0] > 0)


def test_causal_padded_and_independent_rows():
    x = torch.randn(3, 8, 24, dtype=torch.float64)
    for causal in (False, True):
        layer = layer_of(causal=causal, num_kv_heads=3)
        y = layer(x)
        assert torch.allclose(layer(x[1:2]), y[1:2], atol=1e-12)
        if causal:
            assert torch.allclose(layer(x[:, :5]), y[:, :5], atol=1e-12)
        padded = torch.full((3, 11, 24), torch.nan, dtype=torch.float64)
        mask = torch.zeros(3, 11, dtype=torch.bool)
        for row, first in enumerate((0, 3, 1)):  # padding left and right of the text
            padded[row, first : first + 8], mask[row, first : first + 8] = x[row], True
        got, (_gates, loss) = layer(padded, return_routing=True, attention_mask=mask)
        assert torch.allclose(got[mask], y.flatten(0, 1), atol=1e-12)
        assert torch.allclose(loss, layer(x, return_routing=True)[1][1], atol=1e-12)


def test_rotary_embeddings_turn_queries_and_keys():
    layer = silence(layer_of(shared=6, top_k=0, causal=True))
    config = transformers.LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=6, head_dim=4)
    model = transformers.models.llama.modeling_llama
    attention = model.LlamaAttention(config, 0).double()
    attention.load_state_dict({n: p for n, p in layer.state_dict().items() if "router" not in n})
    x, positions = torch.randn(2, 7, 24, dtype=torch.float64), torch.arange(7)[None]
    rotary = model.LlamaRotaryEmbedding(config)(x, positions)
    config._attn_implementation = "sdpa"
    assert torch.allclose(layer(x, rotary=rotary), attention(x, rotary, None)[0], atol=1e-12)


def test_empty_and_wrong_inputs():
    layer = layer_of()
    assert layer(torch.zeros(0, 5, 24).double()).shape == (0, 5, 24)
    y, (gates, loss) = layer(torch.zeros(2, 0, 24).double(), return_routing=True)
    assert (y.shape, gates.shape, loss.item()) == ((2, 0, 24), (2, 0, 6), 0)
    for wrong in (
        {"num_shared_heads": 7}, {"top_k_heads": 0}, {"top_k_heads": 5}, {"num_shared_heads": 6}, {"dim": 25},
        {"num_kv_heads": 4}, {"num_shared_heads": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            MixtureOfHeads(**({"dim": 24, "num_heads": 6, "num_shared_heads": 2, "top_k_heads": 2} | wrong))
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.zeros(2, 5, 23))
    with pytest.raises(ValueError, match="attention_mask must be"):
        layer(torch.zeros(2, 5, 24).double(), attention_mask=torch.ones(2, 5))


def test_nothing_is_kept_and_precision_of_the_routers():
    layer = MixtureOfHeads(24, 6, 2, 2)
    before = set(vars(layer))
    x = torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, (gates, loss) = layer(x, return_routing=True)
    assert set(vars(layer)) == before
    assert (y.dtype, gates.dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(gates, layer(x, return_routing=True)[1][0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    again = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    grads = [torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (again, layer(x))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- routing by norms


def test_norm_routing():
    query = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    chosen, p = norm_routing(query, 3, 5)
    assert chosen[..., :3].all()
    assert (chosen.sum(-1) == 5).all()
    top = query[:, 3:].norm(dim=-1).transpose(1, 2).topk(2).indices.sort().values
    assert torch.equal(chosen[..., 3:].nonzero()[:, 2].view(2, 5, 2), top)
    norms = query[:, 3:].norm(dim=-1).transpose(1, 2)
    assert torch.allclose(p, (norms / norms.std(-1, keepdim=True)).softmax(-1))
    angle = torch.rand(5, 2, dtype=torch.float64)
    a, b = query.chunk(2, -1)
    rotated = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    for same in (rotated, query * (torch.rand(2, 1, 5, 1) + 0.1)):
        assert torch.equal(norm_routing(same, 3, 5)[0], chosen)
        assert torch.allclose(norm_routing(same, 3, 5)[1], p)


def test_equal_norms_and_zero_queries_are_safe():
    query = torch.zeros(1, 6, 3, 4, requires_grad=True)
    chosen, p = norm_routing(query, 2, 4)
    assert torch.equal(chosen, torch.tensor([1, 1, 1, 1, 0, 0]).bool().expand(1, 3, 6))
    assert torch.allclose(p, torch.full_like(p, 0.25))
    (grad,) = torch.autograd.grad(p[..., 0].sum(), query)
    assert grad.isfinite().all()
    one = torch.randn(1, 3, 2, 4)
    assert norm_routing(one, 2, 2)[0].sum(-1).eq(2).all()  # one routed head, nobody has it
    assert norm_routing(one, 0, 1)[0].sum(-1).eq(1).all()


# ---- conversion

TINY = {
    "llama": lambda: build("llama"),
    "qwen3": lambda: build("qwen3"),
    "mistral": lambda: build("mistral", sliding_window=4),
    "gemma3": lambda: gemma3(),
}


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=TINY)
def model(request):
    model = TINY[request.param]()
    for name, parameter in model.named_parameters():
        if "q_norm" in name:  # as trained models have it: else all norms would be equal
            with torch.no_grad():
                parameter.copy_(torch.rand_like(parameter) * 2)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


def seen_by_o_proj(model):
    """Inputs of every o_proj, by hooks."""
    inputs = []
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


@torch.no_grad()
def test_all_heads_change_no_bit(model, ids):
    modules = [id(m) for m in model.modules()]
    logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model(ids, attention_mask=mask).logits
    assert convert_to_moh(model, active_ratio=1.0) is model
    assert [id(m) for m in model.modules()] == modules
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


@torch.no_grad()
def test_o_proj_sees_zeros_for_heads_that_were_not_chosen(model, ids):
    dense = seen_by_o_proj(model)
    model(ids)
    before, heads = dense[0].clone(), model.config.num_attention_heads
    dense.clear()
    routing = convert_to_moh(model, 0.75, 0.5)(ids, output_attentions=True).attentions
    first = dense[0].unflatten(-1, (heads, -1))
    zero = (first == 0).all(-1)
    assert not zero[..., :2].any()
    assert ((~zero).sum(-1) == 3).all()
    assert torch.equal(~zero[..., 2:], routing[0][..., 1] == 1)
    kept = ~zero[..., None]
    assert torch.equal(first, before.unflatten(-1, (heads, -1)) * kept)  # the same bits elsewhere


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "routed"])
def test_cache_padding_and_documents(model, ids, attention):
    if attention != "eager":  # whose mask is too small a number for a softmax in float32, of float64 models
        model.double()
    tolerance = 1e-4 if attention == "eager" else 1e-8
    convert_to_moh(model, 0.75, 0.25, attention=attention)
    logits = model(ids).logits
    cached = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:], past_key_values=cached.past_key_values).logits
    assert torch.allclose(rest, logits[:, 6:], atol=tolerance)
    padded = torch.cat([torch.full((2, 4), 2), ids], 1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 11)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert torch.allclose(got, logits, atol=tolerance)
    packed = torch.cat([ids[:1], ids[1:, :7]], 1)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None]
    got = model(packed, position_ids=positions, use_cache=False).logits
    assert torch.allclose(got[:, :11], logits[:1], atol=tolerance)
    assert torch.allclose(got[:, 11:], logits[1:, :7], atol=tolerance)
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    for at in range(11, 16):
        assert torch.equal(model(tokens[:, :at]).logits[:, -1].argmax(-1), tokens[:, at])
    if attention == "routed" and model.config.model_type == "llama":
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_survives_saving_twice_and_copying(model, ids, tmp_path):
    convert_to_moh(model, 0.5, 0.25)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded(ids).logits, logits)
    loaded.save_pretrained(tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "b")
    assert torch.equal(again(ids).logits, logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, logits)
    assert again.config.moh == {"active_ratio": 0.5, "shared_ratio": 0.25, "attention": "sdpa"}
    assert not torch.equal(convert_to_moh(again, 0.75, 0.25)(ids).logits, logits)


def test_a_converted_folder_is_refused_where_nobody_knows_moh(tmp_path):
    convert_to_moh(build("llama"), 0.5, 0.25).save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert 'attn_implementation="moh"` is not supported' in run.stderr


def test_training(model, ids):
    """Straight through: the forward's bits are those of the hard choice, its gradient reaches the scores of all routed heads."""
    convert_to_moh(model, 0.75, 0.25)
    with torch.no_grad():
        hard = model(ids).logits
    model.train()
    output = model(ids, labels=ids, output_attentions=True, use_cache=False)
    assert torch.allclose(output.logits, hard, atol=1e-6)
    loss = balance_loss(output.attentions)
    assert 1.0 <= float(loss) <= 3.0
    (output.loss + 0.01 * loss).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.isfinite().all() for g in grads.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(ids, labels=ids, output_attentions=True, use_cache=False)
    (output.loss + 0.01 * balance_loss(output.attentions)).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], atol=1e-6), name


def test_straight_through_gradient_of_a_gate():
    """d loss / d probability of a head is what its output would have added, chosen or not."""
    from heedful.layers.moh import conversion

    module = build("llama").model.layers[0].self_attn.train()
    module.config.moh = {"active_ratio": 0.5, "shared_ratio": 0.25, "attention": "sdpa"}
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 5, 8, dtype=torch.float64) for n in (4, 2, 2))
    caught = {}

    def keep(query, shared, active):
        chosen, p = norm_routing(query, shared, active)
        caught["p"] = p.requires_grad_()
        return chosen, caught["p"]

    original, conversion.norm_routing = conversion.norm_routing, keep
    try:
        output, _ = conversion._attention(module, query, key, value, None, scaling=0.3, dropout=0.0)
    finally:
        conversion.norm_routing = original
    weight = torch.randn_like(output)
    (grad,) = torch.autograd.grad((output * weight).sum(), caught["p"])
    every = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)
    assert torch.allclose(grad, (every.transpose(1, 2) * weight).sum(-1)[..., 1:])


def test_compiles_and_attaches(ids):
    model = convert_to_moh(build("llama"), 0.5, 0.25)
    with torch.no_grad():
        logits = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(ids, use_cache=False).logits, logits, atol=1e-6)

        class Halve(heedful.Edit):
            def outputs(self, call, output):
                return output / 2

        with heedful.attach(model, Halve()):
            assert not torch.allclose(model(ids).logits, logits)
        assert torch.equal(model(ids).logits, logits)


GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def decodes_as_plainly(model, padded, drafters):
    given = inputs(model, batch=3, length=11, padding="left" if padded else None)
    dense = model.generate(**given, **GREEDY)
    convert_to_moh(model, 0.5, 0.25)
    reference = model.generate(**given, **GREEDY)
    assert not torch.equal(reference, dense)  # the choice of heads matters
    oracle = heedful.generate(model, drafter=RandomTree(reference, padding(given)), **given, **GREEDY)
    assert torch.equal(oracle.sequences, reference)
    assert oracle.stats.tokens_per_step > 1.2  # drafted rows choose the heads that they have as the last rows
    for make in drafters:
        for cache in (None, "static"):
            drafter = make(model)
            if not (cache == "static" and drafter.joins_forward):
                result = heedful.generate(model, drafter=drafter, cache_implementation=cache, **given, **GREEDY)
                assert torch.equal(result.sequences, reference)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_drafter_gives_the_tokens_of_plain_decoding(attention):
    trained = (Medusa.for_model, HiddenTransfer.for_model, LongSpec.for_model)
    model = build("llama", attn=attention, dtype=torch.float64)
    # transformers' eager attention gives NaN for padding rows in float64
    decodes_as_plainly(model, attention == "sdpa", (lambda _: PromptLookup(), lambda _: TokenRecycling(), *trained))


def test_drafts_are_verified_in_every_family(model):
    decodes_as_plainly(model.double(), True, ())


def test_generate_refuses_what_takes_no_tree(ids):
    model = convert_to_moh(build("llama"), 0.5, 0.25, attention="routed")
    with pytest.raises(ValueError, match=r"'routed' attention take no tree mask; call .*convert_to_moh again"):
        heedful.generate(model, ids, drafter=PromptLookup(), max_new_tokens=4)


def test_what_computes_all_heads_is_refused_under_attach(ids):
    """A kernel in place of the attention, or edited weights, would lose the choice of heads; a probe reads."""
    model = convert_to_moh(build("llama"), 0.5, 0.25)

    class Sharper(heedful.Edit):
        def logits(self, call, logits):
            return logits * 2

    class Read(heedful.Probe):
        def probabilities(self, call, probabilities):
            self.shape = probabilities.shape

    with torch.no_grad():
        for part in (Sharper(), heedful.kernels.H2OAttention()):
            with heedful.attach(model, part), pytest.raises(RuntimeError, match=r"layer 0.*convert_to_moh"):
                model(ids)
        logits, read = model(ids).logits, Read()
        with heedful.attach(model, read):
            assert torch.equal(model(ids).logits, logits)
        assert read.shape[-1] == ids.shape[1]


def test_conversion_refuses_what_it_cannot_do(ids):
    model = build("llama")
    for ratios in ((0.0, 0.0), (1.5, 0.5), (0.5, 0.75), (0.1, 0.0)):
        with pytest.raises(ValueError, match="ratio"):
            convert_to_moh(model, *ratios)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="cannot be converted"):
        convert_to_moh(model, attention="flash_attention_2")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' cannot be converted"):
        convert_to_moh(model)
    with pytest.raises(ValueError, match="several models"):
        convert_to_moh(build("gemma3"))
    with pytest.raises(ValueError, match=r"routed.*softcap"):
        convert_to_moh(build("gemma2"), attention="routed")
    softcapped = convert_to_moh(build("gemma2", attn="eager"), 0.5, 0.25)
    assert softcapped(ids).logits.isfinite().all()
    sinks = build("gpt_oss")
    logits = sinks(ids).logits
    assert torch.equal(convert_to_moh(sinks, 1.0)(ids).logits, logits)
    with pytest.raises(ValueError, match=r"routed.*has no s_aux"):
        convert_to_moh(sinks, 0.5, 0.25, attention="routed")(ids)
    with pytest.raises(ValueError, match="routing must be"):
        balance_loss([torch.zeros(1, 4, 5, 5)])


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DistributedDataParallel over gloo, the layer and a converted model, a row of the batch each."""
    answers = run_on_two(
        """
        import copy
        from tiny_models import build
        from heedful.layers import MixtureOfHeads, convert_to_moh
        torch.manual_seed(0)
        ids = torch.randint(3, 90, (2, 11))
        x = torch.randn(2, 11, 24)
        layer = MixtureOfHeads(24, 6, 2, 2, causal=True)
        model = convert_to_moh(build("llama"), 0.75, 0.25).train()
        for one, run, rows in ((layer, lambda m, x: m(x).square().mean(), x), (model, lambda m, i: m(i, labels=i).loss, ids)):
            alone = copy.deepcopy(one)
            run(alone, rows).backward()
            shared = torch.nn.parallel.DistributedDataParallel(one)
            run(shared, rows[rank : rank + 1]).backward()
            for a, b in zip(alone.parameters(), one.parameters()):
                torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
        print("same")
        """,
        tmp_path,
    )
    assert answers == ["same\n"] * 2
