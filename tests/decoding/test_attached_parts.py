"""Attached parts act on every token, drafted or not: the tokens are model.generate's under the same attach."""

import pytest
import torch
from decoding_tools import RandomTree, padding
from tiny_models import build, inputs

import heedful
from heedful.decoding import PromptLookup, TokenRecycling

GREEDY = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 2.5 * logits


class Silence(heedful.Edit):
    def outputs(self, call, output):
        return 0.1 * output


class Tilt(heedful.Edit):
    """Depends on the keys' number and order: hidden ones must stay hidden, a row must see its own sequence only."""

    def probabilities(self, call, probabilities):
        return probabilities.square() / probabilities.square().sum(-1, keepdim=True).clamp(min=1e-9)


PARTS = {
    "logits of the last row": lambda: Sharpen(rows="last"),
    "heads": lambda: Silence(heads=[0, 3], layers=[1]),
    "generated rows": lambda: Tilt(rows="generated", heads=[1, 2]),
    "steps": lambda: Silence(steps=range(3, 9)),
    "decode": lambda: Sharpen(steps="decode"),
    "prompt": lambda: Sharpen(steps="prefill"),
    "all": lambda: Tilt(),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_edits(part, batch):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    plain = model.generate(**given, **GREEDY)
    with heedful.attach(model, PARTS[part]()):
        reference = model.generate(**given, **GREEDY)
        for drafter in (None, RandomTree(reference, padding(given)), TokenRecycling(max_nodes=9), PromptLookup()):
            result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
            assert torch.equal(result.sequences, reference)
    assert not torch.equal(reference, plain), "the edit must matter"
    assert torch.equal(heedful.generate(model, **given, **GREEDY).sequences, plain)


def test_static_cache():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    with heedful.attach(model, Sharpen(rows="last", heads=[1])):
        reference = model.generate(**given, **GREEDY)
        drafter = RandomTree(reference)
        result = heedful.generate(model, drafter=drafter, cache_implementation="static", **given, **GREEDY)
    assert torch.equal(result.sequences, reference)


class Dense(heedful.Kernel):
    honours_mask = True

    def __call__(self, call):
        return call.original()


class Blind(heedful.Kernel):
    """Takes no mask."""

    def __call__(self, call):
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
        causal = call.query.shape[2] > 1
        return torch.nn.functional.scaled_dot_product_attention(call.query, key, value, is_causal=causal)


def test_a_kernel_that_cannot_honour_the_mask_is_refused_unless_nothing_is_drafted():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    forwards = []
    handle = model.register_forward_pre_hook(lambda *args: forwards.append(1))
    with heedful.attach(model, Blind(layers=[1])):
        with pytest.raises(ValueError, match="layer 1"):
            heedful.generate(model, drafter=PromptLookup(), **given, **GREEDY)
        assert not forwards
        handle.remove()
        reference = model.generate(**given, **GREEDY)
        assert torch.equal(heedful.generate(model, **given, **GREEDY).sequences, reference)
