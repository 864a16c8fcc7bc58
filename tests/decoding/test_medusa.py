"""Medusa: heads, trees, calibration, published checkpoints (the card's list)."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, build, inputs

import heedful
from heedful.decoding import HiddenTransfer, Medusa, hidden_transfer, medusa
from heedful.decoding.medusa import MC_SIM_7B_63
from heedful.decoding.trained import (
    RankTree,
    best_tree,
    expected_length,
    model_logits,
    path_chances,
    rank_accuracies,
)

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def scrambled(model, **options):
    torch.manual_seed(3)
    drafter = Medusa.for_model(model, **options)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


@pytest.mark.parametrize("share", [True, False])
def test_untrained_heads_are_the_models_own_head(share):
    model = build("llama", dtype=torch.float64)
    drafter = Medusa.for_model(model, num_heads=3, share_lm_head=share, num_layers=2).double()
    hidden = model.get_decoder()(**inputs(model, batch=2)).last_hidden_state
    logits = drafter(hidden, model.lm_head if share else None)
    assert torch.allclose(logits, model.lm_head(hidden)[:, :, None].expand_as(logits), atol=1e-12)
    blocks = {id(block) for head in drafter.blocks for block in head}
    assert len(blocks) == 6  # distinct


def phi():
    config = transformers.PhiConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]


@pytest.mark.parametrize("name", [*DECODERS, phi])
def test_logits_of_given_states_are_the_models_own(name):
    """With the bias, the scale and the cap of the family; the decoder stays as it was."""
    model = build(name) if isinstance(name, str) else name()
    decoder, ids = model.get_decoder(), torch.randint(3, 80, (2, 9))
    before = decoder.forward
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = decoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model_logits(model, hidden), expected)
        assert decoder.forward == before
        decoder.forward = mapped = lambda *args, **kwargs: before(*args, **kwargs)  # as accelerate's device maps do
        torch.testing.assert_close(model_logits(model, hidden), expected)
        assert decoder.forward is mapped
        del decoder.forward
    _, figures = Medusa.for_model(model, num_heads=1).loss(model, ids)
    untrained = torch.nn.functional.cross_entropy(expected[:, :-2].transpose(1, 2), ids[:, 2:])
    assert float(figures["head_1_loss"]) == pytest.approx(float(untrained), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "qwen3", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_output_does_not_depend_on_the_heads(name, batch):
    model = build(name, dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    for options in ({}, {"num_heads": 2, "tree": [[0], [1], [0, 0]]}, {"tree": []}, {"share_lm_head": False}):
        result = heedful.generate(model, drafter=scrambled(model, **options), **given, **GREEDY)
        assert torch.equal(result.sequences, reference)


def test_prompt_of_one_token_and_a_frequent_token_zero():
    model = build("llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[0] *= 30  # token 0 wins again and again, as fill of a path must never match it
    ids = torch.tensor([[5]])
    reference = model.generate(ids, **GREEDY)
    assert (reference == 0).sum() >= 2
    assert torch.equal(heedful.generate(model, ids, Medusa.for_model(model), **GREEDY).sequences, reference)


def test_a_vocabulary_smaller_than_the_trees_ranks():
    model = build("llama", vocab_size=7, dtype=torch.float64)
    ids = torch.tensor([[5, 6, 3, 2]])
    drafter = Medusa.for_model(model, max_nodes=63)
    result = heedful.generate(model, ids, drafter, **GREEDY)
    assert torch.equal(result.sequences, model.generate(ids, **GREEDY))
    tokens = drafter.drafted.fill(torch.tensor([5]), torch.arange(4 * 7).view(1, 4, 7))
    expected = [5, *(7 * (len(path) - 1) + min(path[-1], 6) for path in drafter.drafted.paths)]
    assert tokens[0].tolist() == expected


def test_the_default_tree():
    assert len(MC_SIM_7B_63) == 63
    assert [sum(len(path) == depth for path in MC_SIM_7B_63) for depth in (1, 2, 3, 4)] == [10, 28, 23, 2]
    model = build("llama")
    assert Medusa.for_model(model, num_heads=2).tree.depth == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [([[0, 0]], "needs its parent"), ([[0], [0, 0], [0, 0, 0]], "depth 3"), ([[10]], "outside"), ([[-1]], "outside")],
)
def test_trees_that_cannot_be(tree, message):
    with pytest.raises(ValueError, match=message):
        Medusa(hidden_size=8, vocab_size=20, num_heads=2, tree=tree)


def test_tree_search():
    accuracies = [[0.6, 0.2, 0.1], [0.4, 0.3, 0.0], [0.5, 0.1, 0.1]]
    trees = [best_tree(accuracies, nodes) for nodes in range(20)]
    for smaller, larger in itertools.pairwise(trees):
        assert larger[: len(smaller)] == smaller
        assert expected_length(larger, accuracies) >= expected_length(smaller, accuracies)
    assert trees[3] == [(0,), (0, 0), (1,)]
    RankTree(trees[-1], 3, 3)


def test_a_cycle_is_learnt_to_the_last_token():
    """Deterministic text: every head is always right, and a step gives depth + 1 tokens."""
    torch.manual_seed(0)
    model = build("llama", vocab_size=12)
    cycle = torch.arange(3, 12).repeat(8)[None]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(cycle, labels=cycle).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    before = {name: p.clone() for name, p in model.named_parameters()}
    drafter = Medusa.for_model(model, num_heads=3, tree=[[0], [0, 0], [0, 0, 0]])
    optimiser = torch.optim.Adam(drafter.parameters(), 1e-2)
    model.requires_grad_(False)
    for _ in range(150):
        loss, figures = drafter.loss(model, cycle)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(float(figures[f"head_{k}_accuracy"]) == 1.0 for k in (1, 2, 3))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    result = heedful.generate(model, cycle[:, :10], drafter, **GREEDY | {"max_new_tokens": 41})
    assert result.stats.accepted[0] == [4] * 10
    found = drafter.calibrate(model, cycle, max_nodes=3)
    assert found["expected"] == pytest.approx(4.0)
    assert found["empirical"] == pytest.approx(4.0)


def test_labels_that_are_left_out_give_no_gradient():
    model = build("llama")
    drafter = Medusa.for_model(model)
    hidden, ids = torch.randn(1, 9, model.config.hidden_size), torch.randint(0, 90, (1, 9))
    labels = torch.full_like(ids, -100)
    labels[0, 4] = ids[0, 4]
    drafter.head_loss(model, hidden, ids, labels)[0].backward()
    touched = [bool(block[0].linear.weight.grad.abs().sum() > 0) for block in drafter.blocks]
    assert touched == [True, True, True, False]  # t + k + 1 == 4 has no t for the fourth head


def test_tokens_a_step_is_one_and_the_nodes_acceptance():
    model = build("llama", dtype=torch.float64)

    class Counting(Medusa):
        def update(self, trees, outputs, paths, new_roots):
            self.steps += 1
            for node in paths[0][1:]:
                self.accepted[node] += 1
            super().update(trees, outputs, paths, new_roots)

    drafter = Counting.for_model(model)  # untrained heads repeat the model's own next token: some of that comes true
    drafter.steps, drafter.accepted = 0, [0] * len(drafter.tree)
    entries = []
    for seed in range(4):
        stats = heedful.generate(model, drafter=drafter, **inputs(model, batch=1, seed=seed), **GREEDY).stats
        entries += stats.accepted[0]
    assert sum(drafter.accepted) > 0
    assert sum(count > 0 for count in drafter.accepted) > 1
    frequencies = sum(count / drafter.steps for count in drafter.accepted)
    assert sum(entries) / len(entries) == pytest.approx(1 + frequencies, abs=1e-12)


def test_a_row_drafts_alone_as_in_a_batch():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=3, length=11, padding="left")
    drafter = scrambled(model)
    together = heedful.generate(model, drafter=drafter, **given, **GREEDY).stats.accepted
    for row in range(3):
        skip = int((given["attention_mask"][row] == 0).sum())
        alone = heedful.generate(model, given["input_ids"][row : row + 1, skip:], drafter, **GREEDY).stats.accepted
        assert alone[0] == together[row]


@pytest.mark.parametrize("kind", [Medusa, HiddenTransfer])
def test_the_tree_is_as_large_as_pays_on_the_device(kind, monkeypatch):
    model = build("llama", dtype=torch.float64)
    accuracies = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.1, 0.1]]
    paths = best_tree(accuracies, 20)
    options = {"num_heads": 3} if kind is Medusa else {"num_transfer_steps": 3, "transfer_layers": [1, 1, 1]}
    sizes = []
    for slope in (0.0, 0.03, 10.0):  # rows for nothing, at 3 % of a forward, at ten forwards each

        def costs(model, batch_size, rows, slope=slope):
            return 1 + slope * np.arange(rows)

        for module in (medusa, hidden_transfer):
            monkeypatch.setattr(module, "forward_costs", costs)
            monkeypatch.setattr(module, "seconds_of", lambda run, device: 0.0)
        drafter = kind.for_model(model, tree=paths, accuracies=accuracies, **options)
        given = inputs(model, batch=1)
        result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, model.generate(**given, **GREEDY))
        sizes.append(len(drafter.drafted.paths))
        chances = dict(zip(drafter.tree.paths, path_chances(drafter.tree.paths, accuracies), strict=True))
        kept = {chances[path] for path in drafter.drafted.paths}
        left = {chances[path] for path in set(drafter.tree.paths) - set(drafter.drafted.paths)}
        assert not kept or not left or min(kept) >= max(left)
    assert sizes[0] == 20 > sizes[1] > sizes[2] == 0
    assert result.stats.tokens_per_step == 1.0  # plain decoding where no node pays
    fixed = kind.for_model(model, tree=paths, accuracies=accuracies, max_nodes=4, **options)
    heedful.generate(model, drafter=fixed, **given, **GREEDY)
    assert fixed.drafted.paths == sorted(paths[:4])
    with pytest.raises(ValueError, match="max_nodes"):
        kind.for_model(model, max_nodes="many")


def test_save_and_load(tmp_path):
    model = build("llama")
    drafter = scrambled(model, num_heads=2)
    drafter.set_tree([[0], [1], [0, 0]])
    drafter.save_pretrained(tmp_path)
    loaded = Medusa.from_pretrained(tmp_path)
    assert loaded.tree.paths == [(0,), (0, 0), (1,)]
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="made for hidden_size"):
        Medusa(hidden_size=16, vocab_size=90).bind(model)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_published_checkpoints(tmp_path, kind):
    from safetensors.torch import save_file

    model = build("llama")
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    state = {}
    for head in range(3):
        state |= {f"{head}.0.linear.weight": torch.randn(hidden, hidden), f"{head}.0.linear.bias": torch.randn(hidden)}
        state[f"{head}.1.weight"] = torch.randn(vocabulary, hidden)
    file = tmp_path / f"medusa_lm_head.{kind}"
    torch.save(state, file) if kind == "pt" else save_file(state, file)
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    drafter = Medusa.from_checkpoint(tmp_path, model)  # the published config of five heads says two
    assert (drafter.num_heads, drafter.num_layers, drafter.share_lm_head) == (3, 1, False)
    assert torch.equal(drafter.outputs[2].weight, state["2.1.weight"])
    with pytest.raises(ValueError, match="holds no medusa_lm_head"):
        Medusa.from_checkpoint(tmp_path / "none", model)
    with pytest.raises(ValueError, match="needs"):
        Medusa.from_checkpoint(file, build("llama", hidden_size=48))


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    file = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.zeros(2, 2), "extra": Harmful()}, file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        Medusa.from_checkpoint(file, build("llama"))
    for wrong in (b"", b"no file of torch"):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="holds more than tensors, or none"):
            Medusa.from_checkpoint(file, build("llama"))
    for other in ({}, torch.zeros(2), {"lm_head.weight": torch.zeros(2)}, {"0.0.weight": torch.zeros(2)}):
        torch.save(other, file)
        with pytest.raises(ValueError, match="holds no Medusa heads"):
            Medusa.from_checkpoint(file, build("llama"))


@torch.no_grad()
def test_accuracies_of_the_models_own_tokens_alone():
    """Behind a prompt that the model would not have written, what is drafted inside it says nothing."""
    candidates = torch.zeros(2, 12, 2, 1, dtype=torch.long)
    choices = torch.zeros(2, 12, dtype=torch.long)
    choices[:, :5] = 7  # inside the prompt the model goes on otherwise
    whole, _ = rank_accuracies(candidates, choices)
    behind, hits = rank_accuracies(candidates, choices, prompt=6)
    assert whole[0][0] < 1.0
    assert behind == [[1.0], [1.0]]
    assert hits.shape[1] == 12 - 2 - 5
    with pytest.raises(ValueError, match="nothing to measure"):
        rank_accuracies(candidates, choices, prompt=12)


def test_the_zoos_heads():
    model, tokenizer = heedful.zoo.load("classics-20m")
    drafter = Medusa.from_pretrained(heedful.zoo.path("classics-20m-medusa"), max_nodes=63)
    assert len(drafter.tree.paths) == 63
    assert drafter.accuracies is not None
    ids = tokenizer("The colour of the door is amber. The colour of", return_tensors="pt").input_ids
    plain = heedful.generate(model, ids, None, max_new_tokens=32, do_sample=False)
    result = heedful.generate(model, ids, drafter, max_new_tokens=32, do_sample=False)
    assert torch.equal(plain.sequences, result.sequences)
    assert result.stats.tokens_per_step > 1.2


def test_typical_acceptance_keeps_nothing_or_everything_at_its_extremes():
    model = build("llama", dtype=torch.float64)
    drafter = Medusa.for_model(model, tree=[[0], [1], [0, 0], [0, 0, 0]])
    for batch in (1, 3):
        given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
        typical = GREEDY | {"acceptance": "typical", "max_new_tokens": 21}
        nothing = heedful.generate(
            model, drafter=drafter, posterior_threshold=1.0, posterior_alpha=1e9, **given, **typical
        )
        assert nothing.stats.tokens_per_step == 1.0
        assert torch.equal(nothing.sequences, model.generate(**given, **GREEDY | {"max_new_tokens": 21}))
        all_ = heedful.generate(model, drafter=drafter, posterior_threshold=0.0, **given, **typical)
        assert all_.stats.accepted[0] == [4] * 5
    assert heedful.generate(model, drafter=drafter, **given, **typical).stats.tokens_per_step >= 1.0
    with pytest.raises(ValueError, match="RepetitionPenalty"):
        heedful.generate(model, drafter=drafter, repetition_penalty=1.2, **given, **typical)
    with pytest.raises(ValueError, match="eager engine"):
        heedful.generate(model, drafter=drafter, engine="graph", **given, **typical)
    with pytest.raises(ValueError, match="posterior_alpha must not be negative"):
        heedful.generate(model, drafter=drafter, posterior_alpha=-1.0, **given, **typical)
    with pytest.raises(ValueError, match="posterior_threshold belongs to acceptance='typical'"):
        heedful.generate(model, drafter=drafter, posterior_threshold=0.09, **given, **GREEDY)
    with pytest.raises(ValueError, match="'exact' or 'typical'"):
        heedful.generate(model, drafter=drafter, **given, **typical | {"acceptance": "likely"})
