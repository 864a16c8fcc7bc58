"""Steering on the bundled language model, which has the sinks that random models lack."""

import doctest

import pytest
import torch

import heedful
from heedful.steering import AttentionCalibration, search_heads, sink_map

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "


@pytest.fixture(scope="module")
def zoo():
    return heedful.zoo.load("classics-20m")


def test_the_first_token_is_a_sink_and_late_ones_are_named(zoo):
    model, tokenizer = zoo
    found = sink_map(model, tokenizer(TEXT, return_tensors="pt"), tokenizer=tokenizer)
    assert int((found.first_token > 0.2).sum()) >= 4
    assert found.tokens[1].strip() == "It"
    assert {sink.token for sink in found.sinks()} <= set(found.tokens[1:])


def test_calibration_moves_mass_and_generation_goes_on(zoo):
    model, tokenizer = zoo
    inputs = tokenizer(TEXT, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    part = AttentionCalibration(layers=range(2, 9), beta=0.0)
    with heedful.attach(model, part):
        edited = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        drafted = heedful.generate(model, inputs.input_ids, heedful.decoding.PromptLookup(), max_new_tokens=12)
    assert max(part.mass_moved.values()) > 0.05
    assert all(0 <= mass <= 1 for mass in part.mass_moved.values())
    assert torch.equal(drafted.sequences, edited)
    assert not torch.equal(plain, edited)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), plain)


@pytest.mark.parametrize("entry", [AttentionCalibration, search_heads, sink_map])
def test_docstring_examples_run(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in doctest.DocTestFinder().find(entry, entry.__name__, globs={}):
        if example.name == entry.__name__:
            code = "".join(line.source for line in example.examples)
            assert code
            exec(compile(code, entry.__name__, "exec"), {})
