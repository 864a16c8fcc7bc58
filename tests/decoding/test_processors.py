"""generate's logits processors, those with a history and those that index by row included."""

import pytest
import torch
from decoding_tools import Chain, RandomTree, padding
from tiny_models import build, inputs
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig

import heedful
from heedful.decoding import TokenRecycling

GREEDY = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def only_some(row, ids):
    """Allowed tokens that depend on the row and on the last token."""
    return [(int(ids[-1]) * 7 + row * 3 + i * 5) % 96 for i in range(20)]


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[5], [7, 8], [20, 21]]},
    "min_length": {"min_new_tokens": 10, "eos_token_id": 33},
    "forced_eos": {"forced_eos_token_id": 9},
    "suppress": {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [40, 41]},
    "sequence_bias": {"sequence_bias": [[[12], 3.0], [[13, 14], 5.0]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": only_some},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 33},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_with_a_history(name, batch):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    options = GREEDY | PROCESSORS[name]
    reference = model.generate(**given, **options)
    free = model.generate(**given, **GREEDY)
    for drafter in (
        None,
        RandomTree(reference, padding(given)),
        Chain(free, padding(given)),
        TokenRecycling(max_nodes=9),
    ):
        assert torch.equal(heedful.generate(model, drafter=drafter, **given, **options).sequences, reference)


@pytest.mark.parametrize("name", ["guidance", "watermark"])
def test_processors_with_state(name):
    model = build("llama", dtype=torch.float64)
    if name == "guidance":
        options = {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[1, 5, 9]])}
    else:
        config = SynthIDTextWatermarkingConfig(keys=[11, 22, 33, 44], ngram_len=3)
        options = {"watermarking_config": config, "do_sample": True, "top_k": 0}
    given = inputs(model, batch=1, length=11)
    torch.manual_seed(0)
    reference = model.generate(**given, **(GREEDY | options))
    torch.manual_seed(0)
    assert torch.equal(
        heedful.generate(model, drafter=RandomTree(reference), **given, **(GREEDY | options)).sequences, reference
    )
    if name == "guidance":
        options["negative_prompt_ids"] = options["negative_prompt_ids"].repeat(2, 1)
    with pytest.raises(ValueError, match="batch size 1"):
        heedful.generate(model, **inputs(model, batch=2, length=11), **(GREEDY | options))


class Watch(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.dtype))
        return scores


def test_one_call_a_token_in_float32_with_the_sequence_so_far():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    reference = Watch()
    free = model.generate(**given, **GREEDY, logits_processor=LogitsProcessorList([reference]))
    watch = Watch()
    heedful.generate(model, drafter=Chain(free), **given, **GREEDY, logits_processor=LogitsProcessorList([watch]))
    assert len(watch.calls) == len(reference.calls)
    for (ids, dtype), (expected, expected_dtype) in zip(watch.calls, reference.calls, strict=True):
        assert torch.equal(ids, expected)
        assert dtype == expected_dtype == torch.float32
