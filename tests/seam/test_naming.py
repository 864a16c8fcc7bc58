"""heedful.register_attention: a kernel chosen by name does what attach does, and leaves nothing behind."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from tiny_models import BOS, build
from transformers import AttentionInterface, AttentionMaskInterface

import heedful
from heedful import HiPAttention, attach, register_attention
from heedful.seam import Verification

SMALL = {"top_k": 12, "block_size_q": 8, "sliding_window": 8, "num_sink_tokens": 2}


@pytest.fixture(autouse=True)
def no_names_left():
    names = [set(x._global_mapping) for x in (AttentionInterface, AttentionMaskInterface)]
    yield
    for interface, before in zip((AttentionInterface, AttentionMaskInterface), names, strict=True):
        for name in set(interface._global_mapping) - before:
            del interface._global_mapping[name]
    heedful.seam.naming._registered.clear()


class Recorder(heedful.Kernel):
    """The model's own attention; keeps what each call told."""

    honours_mask = True

    def __init__(self, factor=1.0, **selectors):
        super().__init__(**selectors)
        self.factor, self.seen = factor, []

    def __call__(self, call):
        memory = call.memory
        memory["calls"] = memory.get("calls", 0) + 1
        rotary = None if call.rotary is None else tuple(x.clone() for x in call.rotary)
        self.seen.append(
            (call.layer, call.phase, int(call.past), call.positions, rotary, call.cache is None, memory["calls"])
        )
        return self.factor * call.original()


def same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (*a[:3], *a[5:]) == (*b[:3], *b[5:])
        for x, y in zip((a[3], *(a[4] or ())), (b[3], *(b[4] or ())), strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


def tokens(batch=2, length=48, seed=0):
    ids = torch.randint(5, 80, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def padded(batch=2, length=48):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :13] = 0
    return {"input_ids": tokens(batch, length) * mask, "attention_mask": mask}


def generated(model, inputs, **options):
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **options
    )


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "base"),
    [("llama", "sdpa"), ("gpt2", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_by_name_and_attached_are_the_same(family, base, cache):
    model, inputs = build(family, attn=base), padded()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    part, recorder = HiPAttention(**SMALL, mask_refresh_interval=3), Recorder()
    with attach(model, recorder):
        generated(model, inputs, **options)
    with attach(model, part) as attached:
        expected = generated(model, inputs, **options)
    by_name = build(family, attn=base)
    hip = register_attention("test-hip", HiPAttention(**SMALL, mask_refresh_interval=3), base=base)
    by_name.set_attn_implementation("test-hip")
    found = generated(by_name, inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert hip.report() == attached.report()
    again = register_attention("test-recorder", Recorder(), base=base)
    by_name.set_attn_implementation("test-recorder")
    generated(by_name, inputs, **options)
    same(again.part.seen, recorder.seen)


@torch.no_grad()
def test_from_pretrained_takes_the_name_and_a_saved_model_forgets_it(tmp_path):
    ids = tokens()
    plain = build("llama")
    expected = plain(ids).logits
    plain.save_pretrained(tmp_path / "plain")
    register_attention("test-double", Recorder(2.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="test-double")
    doubled = model(ids).logits
    with attach(plain, Recorder(2.0)):
        assert torch.equal(doubled, plain(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, expected)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("_heedful_named" in m.__dict__ for m in model.modules())


@torch.no_grad()
def test_two_models_with_different_parts_do_not_meet():
    ids, one, two = tokens(), build("llama"), build("llama", seed=1)
    expected = []
    for model, factor in ((one, 2.0), (two, 3.0)):
        with attach(model, Recorder(factor)):
            expected.append(model(ids).logits)
    first, second = register_attention("test-2", Recorder(2.0)), register_attention("test-3", Recorder(3.0))
    one.set_attn_implementation("test-2")
    two.set_attn_implementation("test-3")
    for _ in range(2):
        for model, logits in zip((one, two), expected, strict=True):
            assert torch.equal(model(ids).logits, logits)
    assert [line["calls"] for line in first.report()] == [line["calls"] for line in second.report()] == [2, 2, 2]
    one.set_attn_implementation("test-3")
    with attach(two, Recorder(3.0)):
        pass
    assert not torch.equal(one(ids).logits, expected[0])
    register_attention("test-3", Recorder(1.0))  # the same name anew
    two.set_attn_implementation("sdpa")
    plain = two(ids).logits
    two.set_attn_implementation("test-3")
    assert torch.equal(two(ids).logits, plain)


@torch.no_grad()
def test_memory_follows_the_cache_and_copies_begin_anew():
    model = build("llama")
    named = register_attention("test-memory", Recorder())
    model.set_attn_implementation("test-memory")
    generated(model, {"input_ids": tokens()})
    assert [seen[-1] for seen in named.part.seen if seen[0] == 1] == list(range(1, 9))
    twin = copy.deepcopy(model)
    named.part.seen.clear()
    generated(twin, {"input_ids": tokens()})
    assert [seen[-1] for seen in named.part.seen if seen[0] == 1] == list(range(1, 9))
    assert len(named.report()) == 6
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None
    assert len(named.report()) == 3


@torch.no_grad()
def test_selectors_and_attach_on_top():
    model, ids = build("llama"), tokens()
    with attach(model, Recorder(2.0, layers=[1], heads=[2])):
        expected = model(ids).logits
    named = register_attention("test-layer", Recorder(2.0, layers=[1], heads=[2]))
    model.set_attn_implementation("test-layer")

    class Halve(heedful.Edit):
        def outputs(self, call, output):
            return output / 2

    with attach(model, Halve(layers=[1], heads=[2])):  # the first calls of the named one are inside
        model.set_attn_implementation("test-layer")
        halved = model(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert [line["layer"] for line in named.report()] == [1]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(halved, model(ids).logits)


def test_training_runs_through_it():
    model, ids = build("llama").train(), tokens()
    with attach(model, HiPAttention(**SMALL)):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    register_attention("test-train", HiPAttention(**SMALL))
    model.set_attn_implementation("test-train")
    model.gradient_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@torch.no_grad()
def test_wrong_use_is_refused():
    with pytest.raises(TypeError, match="is not a"):
        register_attention("test-x", heedful.Probe())
    with pytest.raises(ValueError, match="base must be"):
        register_attention("test-x", Recorder(), base="flash_attention_2")
    for name in ("sdpa", "eager", "heedful", "paged|x", "", None):
        with pytest.raises(ValueError, match="choose another"):
            register_attention(name, Recorder())
    register_attention("test-x", HiPAttention(**SMALL))
    for family, what in (("gemma2", "softcap"), ("gpt_oss", "s_aux")):
        model = build(family)
        model.set_attn_implementation("test-x")
        with pytest.raises(ValueError, match=f"`{what}`.*base='eager'"):
            model(tokens())
    model = build("bert")
    model.set_attn_implementation("test-x")
    with pytest.raises(ValueError, match="layer 0: HiPAttention is causal"):
        model(tokens())
    model = build("llama")
    model.set_attn_implementation("test-x")
    with pytest.raises(ValueError, match="cannot honour the mask of drafted tokens"):
        Verification(model)


@torch.no_grad()
def test_compiled_models():
    model, part = build("llama", num_hidden_layers=1), HiPAttention(**SMALL)
    with attach(model, part):
        expected = model(tokens()).logits
    register_attention("test-x", part)
    model.set_attn_implementation("test-x")
    with pytest.raises(Exception, match="Run the model once before"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(tokens()).logits, expected)
    torch._dynamo.reset()
