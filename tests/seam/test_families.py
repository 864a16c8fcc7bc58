"""Every promise of attach, on tiny models of all families, with and without padding."""

from pathlib import Path

import family_checks
import pytest
import tiny_models
import torch

import heedful
from heedful.seam.discovery import site_of


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", tiny_models.names())
def test_family(name, padding):
    family = tiny_models.FAMILIES[name]
    if family.kind == "vision" and padding:
        pytest.skip("images are not padded")
    figures = family_checks.check(name, padding)
    assert figures["layers"]


def test_enough_families():
    assert len({tiny_models.FAMILIES[n].model_class for n in tiny_models.names()}) >= 24


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("llava", "model.vision_tower"),
        ("gemma3", "model.vision_tower"),
        ("qwen2_5_vl", "model.visual"),
        ("qwen3_vl", "model.visual"),
        ("clip", "vision_model"),
        ("siglip", "vision_model"),
        ("clip", "text_model"),
        ("t5", "encoder"),
        ("bart", "model.encoder"),
    ],
)
def test_tower(name, tower):
    figures = family_checks.check(name, tower=tower)
    assert figures["layers"] == [0, 1, 2] if tower == "text_model" else [0, 1]


def test_only_the_decoder_of_several_stacks_is_touched():
    model = tiny_models.build("llava")
    probe = family_checks.Weights()
    with heedful.attach(model, probe) as attached:
        inside = [n for n, m in model.named_modules() if site_of(m) is not None]
        assert attached.layers == [0, 1, 2]
    assert len(inside) == 3
    assert all("language_model" in n for n in inside)


@pytest.mark.parametrize("name", tiny_models.names("none"))
def test_families_without_the_interface_are_refused(name):
    model = tiny_models.build(name)
    before = family_checks.fingerprint(model)
    with pytest.raises(ValueError, match=r"AttentionInterface.*nothing can be attached"):
        heedful.attach(model, family_checks.Weights())
    assert family_checks.fingerprint(model) == before


def test_hybrid_lists_the_layers_that_have_attention():
    model = tiny_models.build("qwen3_next")
    with pytest.raises(ValueError, match=r"layer 0 has no attention.*\[3\]"):
        heedful.attach(model, family_checks.Weights(layers=[0]))
    with heedful.attach(model, family_checks.Weights()) as attached:
        assert attached.layers == [3]


def test_parts_on_other_layers_leave_earlier_layers_bit_identical():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")

    class Zero(heedful.Edit):
        def outputs(self, call, output):
            return torch.zeros_like(output)

    with torch.no_grad():
        plain = model(**given, output_hidden_states=True)
        with heedful.attach(model, Zero(layers=[1])):
            edited = model(**given, output_hidden_states=True)
    for i in (0, 1):  # the input of layers 0 and 1
        assert torch.equal(plain.hidden_states[i], edited.hidden_states[i])
    assert not torch.allclose(plain.hidden_states[2], edited.hidden_states[2], atol=1e-2)


def test_shared_layer_is_called_once_a_pass():
    model = tiny_models.build("albert")
    probe = family_checks.Weights()
    with heedful.attach(model, probe) as attached:
        family_checks.result(model, tiny_models.inputs(model))
    assert attached.layers == [0]
    assert len(probe.seen[0]) == 3


def test_cross_attention_only_on_request():
    model = tiny_models.build("t5")
    given = tiny_models.inputs(model)
    own, both, by_attach = family_checks.Weights(), family_checks.Weights(cross=True), family_checks.Weights()
    with heedful.attach(model, own, both), heedful.attach(model, by_attach, cross=True):
        out = family_checks.result(model, given)
    assert torch.equal(out, family_checks.result(model, given))
    assert [c.cross for c in own.calls] == [False, False]
    assert [c.cross for c in both.calls] == [c.cross for c in by_attach.calls] == [False, True, False, True]
    assert [tuple(w.shape[2:]) for w in both.seen[0]] == [(7, 7), (7, 12)]


def test_sinks_take_their_share():
    model = tiny_models.build("gpt_oss")
    probe = family_checks.Weights()
    with heedful.attach(model, probe):
        family_checks.result(model, tiny_models.inputs(model))
    sums = torch.cat([w.sum(-1).flatten() for ws in probe.seen.values() for w in ws])
    assert float(sums.mean()) < 0.95
    assert float(sums.min()) > 0.0
    assert float(sums.max()) <= 1.0


def test_softcap_is_in_the_logits():
    model = tiny_models.build("gemma2")

    class Largest(heedful.Probe):
        seen = 0.0

        def logits(self, call, logits):
            assert call.softcap == 3.0
            self.seen = max(self.seen, float(logits[logits > -torch.inf].abs().max()))

    probe = Largest()
    with heedful.attach(model, probe):
        family_checks.result(model, tiny_models.inputs(model))
    assert 0.5 < probe.seen <= 3.0


def test_positions_and_rotary():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")

    class Places(heedful.Probe):
        def outputs(self, call, output):
            self.positions, self.rotary = call.positions, call.rotary

    probe = Places(layers=[0])
    position_ids = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with heedful.attach(model, probe), torch.no_grad():
        model(**given, position_ids=position_ids)
    assert torch.equal(probe.positions, position_ids)
    cos, _ = probe.rotary
    assert cos.shape[1:] == (12, 8)
    learned = Places(layers=[0])
    gpt2 = tiny_models.build("gpt2")
    with heedful.attach(gpt2, learned):
        family_checks.result(gpt2, tiny_models.inputs(gpt2))
    assert learned.rotary is None


def test_a_softcap_that_sdpa_ignores_is_not_in_the_logits():
    """What counts is what the model computes: older transformers run Gemma 2 under SDPA without its softcap."""
    try:
        model = tiny_models.build("gemma2", attn="sdpa")
    except ValueError:
        pytest.skip("this transformers refuses SDPA for Gemma 2")
    given = tiny_models.inputs(model)
    plain = family_checks.result(model, given)
    with heedful.attach(model, family_checks.Identity("logits")):
        assert torch.allclose(family_checks.result(model, given), plain, atol=1e-5)


def test_the_table_of_the_docs_lists_these_families():
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    listed = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert listed == list(tiny_models.FAMILIES)
    assert "does not hold" not in table
