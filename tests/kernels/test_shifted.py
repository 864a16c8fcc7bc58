"""ShiftedSparseAttention in real (tiny, random) models: grouped while they are trained, their own attention in eval mode."""

import pytest
import torch
from processes import run_on_two
from tiny_models import build, inputs

import heedful
from heedful.kernels import ShiftedSparseAttention

FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2", "olmo2"]
SMALL = {"group_size": 5, "num_sink_tokens": 2}


class Definition(heedful.Edit):
    """Dense attention that hides what the method does not see: from the definition, position by position."""

    def __init__(self, size, shift_ratio=0.25, num_sink_tokens=2):
        super().__init__()
        self.size, self.shift_ratio, self.num_sink_tokens = size, shift_ratio, num_sink_tokens

    def logits(self, call, logits):
        real = call.real_keys()
        heads = call.query.shape[1]
        hidden = torch.ones(len(real), heads, *logits.shape[2:], dtype=torch.bool)
        for row, tokens in enumerate(real):
            slots = tokens.nonzero().flatten()
            position = torch.arange(len(slots))
            for head in range(heads):
                shifted = head >= heads - int(self.shift_ratio * heads + 0.5) and len(slots) > self.size
                group = (position + self.size - (self.size // 2 if shifted else 0)) // self.size
                seen = (group[:, None] == group[None]) | (position < self.num_sink_tokens)
                hidden[row, head, slots[:, None], slots] = ~seen
        return logits.masked_fill(hidden, -1e9)


def gradients(model, *parts, **given):
    model.zero_grad()
    with heedful.attach(model, *parts):
        output = model(**given, use_cache=False)
        labels = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(labels)).bool()
        log = output.logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None])[..., 0]
        loss = -(log * (mask[:, 1:] & mask[:, :-1])).sum()
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_by_the_definition(family, padding):
    changes = {"sliding_window": 64} if family == "mistral" else {}
    if family == "gemma3_text":
        changes = {"layer_types": ["full_attention"] * 3}
    model = build(family, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given = inputs(model, length=17, padding=padding)
    model.train()
    found = gradients(model, ShiftedSparseAttention(**SMALL), **given)
    expected = gradients(model, Definition(5), **given)
    plain = gradients(model, **given)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    assert abs(found[0] - plain[0]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_eval_is_the_models_own_and_generates_with_its_cache(family):
    model = build(family)
    given = inputs(model, padding="left")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected, tokens = model(**given).logits, model.generate(**given, **options)
    with heedful.attach(model, ShiftedSparseAttention(**SMALL)) as attached:
        assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model.generate(**given, **options), tokens)
        assert all(line["grouped_calls"] == 0 and line["dense_calls"] > 0 for line in attached.report())
        model.train()
        assert not torch.allclose(model(**given).logits, expected, atol=1e-3) or family == "mistral"
        model.eval()
        assert torch.equal(model(**given).logits, expected)


def test_layers_with_a_shorter_window_keep_it():
    model = build("gemma3_text").train()  # windows of 6 in layers 0 and 2
    with heedful.attach(model, ShiftedSparseAttention(**SMALL)) as attached:
        model(**inputs(model, length=12), use_cache=False)
    assert [line["grouped_calls"] for line in attached.report()] == [0, 1, 0]


def test_one_group_is_dense_attention():
    model = build("llama").train()
    given = inputs(model, length=20, padding="left")
    real = given["attention_mask"].bool()
    expected = model(**given).logits
    for part in (ShiftedSparseAttention(group_size=20), ShiftedSparseAttention(group_size_ratio=1.0)):
        with heedful.attach(model, part):
            torch.testing.assert_close(model(**given).logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_packed_documents_are_as_if_alone(family, attn):
    model = build(family, attn=attn).train()
    ids = inputs(model, batch=1, length=30)["input_ids"]
    lengths = [13, 4, 13]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with heedful.attach(model, ShiftedSparseAttention(**SMALL)):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_are_written_in_place_are_read_again(mode):
    model = build("llama").train()
    ids = inputs(model, batch=1, length=30)["input_ids"]
    with mode():
        positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
        with heedful.attach(model, ShiftedSparseAttention(**SMALL)):
            model(input_ids=ids, position_ids=positions, use_cache=False)
            positions.copy_(torch.cat([torch.arange(20), torch.arange(10)])[None])
            again = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with heedful.attach(model, ShiftedSparseAttention(**SMALL)):
            fresh = model(input_ids=ids, position_ids=positions.clone(), use_cache=False).logits
    torch.testing.assert_close(again, fresh)


def test_what_it_cannot_compute_is_refused_by_name():
    for family, message in (("gemma2", "softcap"), ("gpt_oss", "sink logits")):
        model = build(family, layer_types=["full_attention"] * 3).train()
        with heedful.attach(model, ShiftedSparseAttention()), pytest.raises(ValueError, match=message):
            model(**inputs(model))
    model = build("llama", attention_dropout=0.1).train()
    with heedful.attach(model, ShiftedSparseAttention()), pytest.raises(ValueError, match="dropout"):
        model(**inputs(model))
    model = build("llama").train()
    ids = inputs(model)["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    with heedful.attach(model, ShiftedSparseAttention()), pytest.raises(ValueError, match="whole rows"):
        model(ids, past_key_values=cache)
    prefix = torch.ones(12, 12, dtype=torch.bool).tril() | (torch.arange(12) < 4)
    with heedful.attach(model, ShiftedSparseAttention()), pytest.raises(ValueError, match="honours causal masks"):
        model(ids, attention_mask=prefix[None, None], use_cache=False)
    bert = build("bert").train()
    with heedful.attach(bert, ShiftedSparseAttention()), pytest.raises(ValueError, match="causal"):
        bert(**inputs(bert))
    for wrong in ({"group_size": 0}, {"group_size_ratio": 0.0}, {"shift_ratio": 2}, {"boundary": "roll"}):
        with pytest.raises(ValueError):
            ShiftedSparseAttention(**wrong)


def test_gradient_checkpointing_and_autocast():
    model = build("llama").train()
    given = inputs(model, length=20, padding="left")
    expected = gradients(model, ShiftedSparseAttention(**SMALL), **given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, ShiftedSparseAttention(**SMALL), **given)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(model, ShiftedSparseAttention(**SMALL), **given)
    assert all(p.dtype == torch.float32 for p in half[1])
    torch.testing.assert_close(half[0].float(), expected[0], atol=0.0, rtol=0.05)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    answers = run_on_two(
        """
        import heedful
        from tiny_models import build, inputs
        from heedful.kernels import ShiftedSparseAttention
        model = build("llama").train()
        given = inputs(model, batch=4, length=16)
        part = lambda: ShiftedSparseAttention(group_size=5)
        with heedful.attach(model, part()):
            model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        own = {k: v[2 * rank : 2 * rank + 2] for k, v in given.items()}
        with heedful.attach(wrapped, part()):
            wrapped(**own, labels=own["input_ids"], use_cache=False).loss.backward()
        for p, want in zip(model.parameters(), expected):
            torch.testing.assert_close(p.grad, want, atol=1e-5, rtol=1e-4)
        print("same")
        """,
        tmp_path,
    )
    assert answers == ["same\n"] * 2


def test_by_name_as_an_attention_implementation():
    model = build("qwen3")
    given = inputs(model, length=17, padding="left")
    expected = model(**given).logits
    by_part = gradients(model.train(), ShiftedSparseAttention(**SMALL), **given)
    heedful.register_attention("sf_attention", ShiftedSparseAttention(**SMALL))
    model.set_attn_implementation("sf_attention")
    by_name = gradients(model, **given)
    for a, b in zip(by_part[1], by_name[1], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.eval()(**given).logits, expected)
    model.set_attn_implementation("sdpa")
