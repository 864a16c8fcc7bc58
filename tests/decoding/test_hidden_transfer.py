"""Hidden Transfer: pseudo rows that nothing else sees (the card's list)."""

import pytest
import torch
from tiny_models import build, inputs
from transformers import DynamicCache

import heedful
from heedful.decoding import Drafter, HiddenTransfer, PromptLookup, Sequence, hidden_transfer
from heedful.decoding.cache import TreeCache
from heedful.decoding.masks import MaskBuilder
from heedful.decoding.tree import VerifiedTree, topology

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "qwen3")


def scrambled(model, **options):
    torch.manual_seed(3)
    drafter = HiddenTransfer.for_model(model, **options)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    drafter.bind(model)
    return drafter


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_output_does_not_depend_on_the_maps(name, batch):
    model = build(name, dtype=torch.float64)
    last = model.config.num_hidden_layers
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    for options in ({}, {"transfer_layers": [0, 1, last]}, {"source": "previous", "transfer_layers": [1, 1, last]}):
        result = heedful.generate(model, drafter=scrambled(model, **options), **given, **GREEDY)
        assert torch.equal(result.sequences, reference)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "smollm3", "cohere2"])
def test_real_rows_never_see_pseudo_rows_and_training_is_inference(name):
    model = build(name, dtype=torch.float64)
    drafter = scrambled(model, transfer_layers=[0, 1, model.config.num_hidden_layers - 1])
    ids = inputs(model, batch=2, length=9)["input_ids"]
    trained, _ = drafter.pseudo_states(model, ids)
    place = {"position_ids": torch.full((2, 1), 6)}
    plain_cache, joined_cache = DynamicCache(), DynamicCache()
    for cache in (plain_cache, joined_cache):
        model(ids[:, :6], past_key_values=cache)
    plain = model(ids[:, 6:7], past_key_values=plain_cache, **place).logits
    with drafter.joining(model):
        joined = model(ids[:, 6:7], past_key_values=joined_cache, **place).logits
    assert torch.allclose(plain, joined, atol=1e-12)
    for a, b in zip(plain_cache.layers, joined_cache.layers, strict=True):
        assert torch.allclose(a.keys, b.keys[:, :, : a.keys.shape[2]], atol=1e-12)
    assert torch.allclose(drafter._pseudo[:, :, 0], trained[:, :, 6], atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("source", ["anchor", "previous"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_node_of_a_tree_spawns_what_its_path_alone_would(name, source):
    model = build(name, dtype=torch.float64)
    last = model.config.num_hidden_layers
    drafter = scrambled(model, transfer_layers=[0, 1, last], source=source)
    ids = inputs(model, batch=1, length=9)["input_ids"]
    tree = VerifiedTree([11, 12, 13, 14, 15, 16], topology((-1, 0, 0, 1, 2, 4)))
    cache = TreeCache(model, None)
    model(ids, past_key_values=cache, use_cache=True)
    masks = MaskBuilder(model.config, None, torch.float64, ids.device, None)
    with drafter.joining(model):
        model(
            torch.tensor([tree.tokens]), past_key_values=cache, use_cache=True,
            attention_mask=masks.build([tree], [9], 9, 6), position_ids=9 + tree.shape.depth_tensor[None],
        )  # fmt: skip
    found = drafter._pseudo
    for node in range(6):
        path = [node]
        while path[0]:
            path.insert(0, tree.shape.parents[path[0]])
        line = torch.cat([ids, torch.tensor([[tree.tokens[n] for n in path]])], dim=1)
        expected, _ = drafter.pseudo_states(model, line)
        assert torch.allclose(found[0, :, node], expected[0, :, -1], atol=1e-5)


@torch.no_grad()
def test_blocks_of_anchors_change_nothing(monkeypatch):
    model = build("mistral", dtype=torch.float64)
    drafter = scrambled(model, transfer_layers=[0, 1, 1])
    ids = inputs(model, batch=2, length=23)["input_ids"]
    whole, _ = drafter.pseudo_states(model, ids)
    monkeypatch.setattr(hidden_transfer, "_BLOCK", 5)
    assert torch.allclose(drafter.pseudo_states(model, ids)[0], whole, atol=1e-12)
    with torch.enable_grad():  # recomputed in the backward pass
        drafter.loss(model.requires_grad_(False), ids)[0].backward()
    in_blocks = [p.grad.clone() for p in drafter.parameters()]
    monkeypatch.setattr(hidden_transfer, "_BLOCK", 128)
    drafter.zero_grad()
    with torch.enable_grad():
        drafter.loss(model, ids)[0].backward()
    assert all(torch.allclose(a, p.grad, atol=1e-10) for a, p in zip(in_blocks, drafter.parameters(), strict=True))


@torch.no_grad()
def test_a_pseudo_state_reads_its_past_and_earlier_steps_only():
    model = build("llama", dtype=torch.float64)
    drafter = scrambled(model, transfer_layers=[1, 1, 2])
    ids = inputs(model, batch=1, length=12)["input_ids"]
    before, _ = drafter.pseudo_states(model, ids)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 90
    after, _ = drafter.pseudo_states(model, changed)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])
    drafter.maps[2].weight.mul_(-3)
    assert torch.equal(drafter.pseudo_states(model, ids)[0][:, :2], before[:, :2])


@torch.no_grad()
def test_identity_after_the_last_layer_gives_the_models_own_logits():
    model = build("llama", dtype=torch.float64)
    last = model.config.num_hidden_layers
    drafter = HiddenTransfer.for_model(model, transfer_layers=[last] * 3)
    drafter.bind(model)
    ids = inputs(model, batch=2, length=9)["input_ids"]
    pseudo, _ = drafter.pseudo_states(model, ids)
    logits = model(ids).logits
    for step in range(3):
        assert torch.allclose(drafter.read_out(pseudo[:, step]), logits, atol=1e-12)


def test_gradient_reaches_the_maps_alone():
    model = build("llama").requires_grad_(False)
    drafter = HiddenTransfer.for_model(model)
    loss, figures = drafter.loss(model, inputs(model, batch=2, length=16)["input_ids"])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert all(p.grad is None for p in model.parameters())
    hidden = model.config.hidden_size
    assert sum(p.numel() for p in drafter.parameters()) == 3 * hidden * (hidden + 1)
    assert set(figures) >= {"step_1_agreement", "step_3_loss"}


def test_no_steps_are_plain_decoding_and_the_cache_is_that_of_a_prefill():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    result = heedful.generate(model, drafter=HiddenTransfer.for_model(model, num_transfer_steps=0), **given, **GREEDY)
    assert result.stats.tokens_per_step == 1.0

    class Watch(HiddenTransfer):
        requires = frozenset({"cache"})

        def update(self, trees, outputs, paths, new_roots):
            self.widths.append((outputs.cache.layers[-1].keys.shape[2], len(paths[0])))
            super().update(trees, outputs, paths, new_roots)

    drafter = Watch.for_model(model)
    drafter.widths, drafter.requires = [], frozenset({"cache"})
    heedful.generate(model, drafter=drafter, **given, **GREEDY)
    width = given["input_ids"].shape[1]
    for after, accepted in drafter.widths:
        width += accepted
        assert after == width


def test_a_cycle_is_learnt_to_the_last_token():
    torch.manual_seed(0)
    model = build("llama", vocab_size=12)
    cycle = torch.arange(3, 12).repeat(6)[None]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(cycle, labels=cycle).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)
    drafter = HiddenTransfer.for_model(model, tree=[[0], [0, 0], [0, 0, 0]])
    optimiser = torch.optim.Adam(drafter.parameters(), 1e-2)
    for _ in range(200):
        loss, figures = drafter.loss(model, cycle)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(float(figures[f"step_{k}_agreement"]) > 0.95 for k in (1, 2, 3))
    result = heedful.generate(model, cycle[:, :12], drafter, **GREEDY | {"max_new_tokens": 42})
    assert result.stats.accepted[0][0] == 1  # the first step spawns the first draft
    assert result.stats.accepted[0][1:] == [4] * 10


def test_in_a_sequence_with_sampling_and_saved(tmp_path):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    drafter = scrambled(model)
    drafter.save_pretrained(tmp_path)
    loaded = HiddenTransfer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b.double()) for a, b in zip(drafter.parameters(), loaded.parameters(), strict=True))
    options = GREEDY | {"do_sample": True, "temperature": 0.8}
    torch.manual_seed(1)
    reference = model.generate(**given, **options)
    torch.manual_seed(1)
    sequence = Sequence(PromptLookup(), loaded)
    assert sequence.joins_forward
    assert torch.equal(heedful.generate(model, drafter=sequence, **given, **options).sequences, reference)


def test_refusals():
    model = build("llama")
    given = inputs(model, batch=1)
    with pytest.raises(ValueError, match="static cache"):
        heedful.generate(
            model, drafter=HiddenTransfer.for_model(model), cache_implementation="static", **given, **GREEDY
        )

    class Watch(heedful.Probe):
        def outputs(self, call, output):
            pass

    with heedful.attach(model, Watch()), pytest.raises(ValueError, match="attached parts"):
        heedful.generate(model, drafter=HiddenTransfer.for_model(model), **given, **GREEDY)
    with pytest.raises(ValueError, match="use Medusa instead"):
        HiddenTransfer.for_model(build("gpt2"))
    latent = build("deepseek_v3")
    cache = DynamicCache()
    latent(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    if cache.layers[0].keys.shape[1] == 1:  # not in older versions of transformers
        with pytest.raises(ValueError, match="compressed; use Medusa instead"):
            HiddenTransfer.for_model(latent).loss(latent, torch.tensor([[5, 6, 7, 8, 9]]))
    with pytest.raises(ValueError, match="never fall"):
        HiddenTransfer(hidden_size=8, num_hidden_layers=4, transfer_layers=[2, 1, 3])
    with pytest.raises(ValueError, match="'anchor' or 'previous'"):
        HiddenTransfer(hidden_size=8, num_hidden_layers=4, source="both")
    assert not Drafter.joins_forward
