"""The engine and the drafters on a CUDA device: the tokens of model.generate there."""

import pytest
import torch
from decoding_tools import RandomTree, padding
from tiny_models import build, inputs

import heedful
from heedful.decoding import PromptLookup, TokenRecycling, sizing

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def on_gpu(name="llama", batch=1, dtype=torch.float64, **options):
    model = build(name, dtype=dtype, **options).cuda()
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    return model, {key: value.cuda() for key, value in given.items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_greedy(name, cache, batch):
    model, given = on_gpu(name, batch)
    reference = model.generate(**given, **GREEDY)
    drafters = (
        None,
        RandomTree(reference.cpu(), padding(given)),
        TokenRecycling(max_nodes=20, update_from_prompt=True),
        PromptLookup(),
    )
    for drafter in drafters:
        result = heedful.generate(model, drafter=drafter, cache_implementation=cache, **given, **GREEDY)
        assert result.sequences.device == reference.device
        assert torch.equal(result.sequences, reference)


def test_sampling_draws_what_generate_draws():
    model, given = on_gpu()
    options = GREEDY | {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2}
    torch.manual_seed(3)
    reference = model.generate(**given, **options)
    torch.manual_seed(3)
    assert torch.equal(
        heedful.generate(model, drafter=RandomTree(reference.cpu()), **given, **options).sequences, reference
    )


def test_processors_and_criteria_see_the_sequence():
    model, given = on_gpu(batch=3)
    options = GREEDY | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    seen = []

    def criterion(ids, scores, **kwargs):
        seen.append(ids.clone())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    reference = model.generate(**given, **options)
    drafter = RandomTree(reference.cpu(), padding(given))
    result = heedful.generate(model, drafter=drafter, stopping_criteria=[criterion], **given, **options)
    assert torch.equal(result.sequences, reference)
    assert all(ids.is_cuda for ids in seen)


def test_auto_sizes_are_timed_on_the_device():
    model, given = on_gpu(dtype=torch.bfloat16)
    heedful.generate(model, drafter=TokenRecycling(), **given, **GREEDY)
    (key,) = sizing._measured[model]
    assert key[0].type == "cuda"


def test_bfloat16_forks_at_near_ties_only():
    model, given = on_gpu(dtype=torch.bfloat16)
    reference = model.generate(**given, **GREEDY)
    got = heedful.generate(model, drafter=RandomTree(reference.cpu()), **given, **GREEDY).sequences
    forks = (got != reference)[0].nonzero()
    if len(forks):
        logits = model(reference[:, : int(forks[0])]).logits[0, -1].float()
        assert logits.topk(2).values.diff().abs() < 0.3
