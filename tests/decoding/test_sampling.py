"""Sampled output: the same tokens as generate under the same seed at batch 1, the same distribution always."""

import itertools

import pytest
import torch
from decoding_tools import Chain, RandomTree, StaticTree, padding
from tiny_models import build, inputs
from transformers import LlamaConfig, LlamaForCausalLM

import heedful
from heedful.decoding import Drafter, DraftTree, TokenRecycling

SAMPLING = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"typical_p": 0.9, "epsilon_cutoff": 1e-3},
    ],
)
def test_batch_one_draws_what_generate_draws(options):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    for seed in range(3):
        torch.manual_seed(seed)
        reference = model.generate(**given, **SAMPLING, **options)
        state = torch.get_rng_state()
        for drafter in (None, RandomTree(reference), Chain(reference), TokenRecycling(max_nodes=20)):
            torch.manual_seed(seed)
            result = heedful.generate(model, drafter=drafter, **given, **SAMPLING, **options)
            assert torch.equal(result.sequences, reference)
            assert torch.equal(torch.get_rng_state(), state), "one draw a token, and nothing else drawn"


def test_a_seed_reproduces_a_batch():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=3, padding="left")
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(heedful.generate(model, drafter=StaticTree(None, padding(given)), **given, **SAMPLING).sequences)
    assert torch.equal(*results)


def test_num_return_sequences():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    torch.manual_seed(0)
    result = heedful.generate(model, drafter=RandomTree(None), num_return_sequences=4, **given, **SAMPLING)
    assert result.sequences.shape == (4, given["input_ids"].shape[1] + 20)
    assert len({tuple(row) for row in result.sequences.tolist()}) == 4


class EveryPair(Drafter):
    """Siblings, one of them twice, and one grandchild each: all cases of acceptance within three tokens."""

    def propose(self, roots, committed):
        rest = torch.tensor([1, 2, 1, 0, 3, 2])
        return DraftTree(
            torch.cat([roots[:, None], rest.expand(len(roots), -1)], 1), torch.tensor([-1, 0, 0, 0, 1, 2, 3])
        )


def test_distribution_of_three_tokens_against_enumeration():
    """1e5 draws, total variation below 0.01."""
    vocabulary, rows, rounds = 5, 5000, 20
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_()
        model.lm_head.weight.mul_(1.1)
        triples = torch.tensor(list(itertools.product(range(vocabulary), repeat=3)))
        prompt = torch.tensor([[2, 4]])
        logits = model(torch.cat([prompt.expand(len(triples), -1), triples], 1)).logits[:, 1:4].log_softmax(-1)
        exact = logits.gather(2, triples[..., None]).squeeze(2).sum(1).exp()
    counts = torch.zeros(vocabulary**3)
    taken = 0
    for _ in range(rounds):
        result = heedful.generate(
            model, prompt.expand(rows, -1).contiguous(), EveryPair(), do_sample=True, top_k=0, max_new_tokens=3
        )
        places = vocabulary ** torch.tensor([2, 1, 0])
        counts += torch.bincount((result.sequences[:, 2:] * places).sum(1), minlength=vocabulary**3)
        taken += sum(len(row) for row in result.stats.accepted)
    draws = rows * rounds
    noise = float((exact * (1 - exact) / draws).sqrt().sum()) * 0.4
    distance = float((counts / draws - exact).abs().sum()) / 2
    assert taken < 1.9 * draws, "some steps must have accepted drafts"
    assert noise < 0.006, "the test itself must be able to see 0.01"
    assert distance < 0.01
