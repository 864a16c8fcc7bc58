"""sink_map: column means equal to those of eager attention matrices, per sample and query head."""

import pytest
import tiny_models
import torch

from heedful.steering import sink_map


class Words:
    def decode(self, ids):
        return f"<{ids[0]}>"


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_equals_the_means_of_eager_attention(family, padding):
    given = tiny_models.inputs(tiny_models.build(family), length=20, padding=padding)
    eager = tiny_models.build(family, attn="eager")
    with torch.no_grad():
        attentions = torch.stack(eager(**given, output_attentions=True).attentions, 1)  # (B, L, H, T, T)
    maps = sink_map(tiny_models.build(family), given, tokenizer=Words(), alpha=2.0)
    assert len(maps) == 2
    for sample, found in enumerate(maps):
        real = given["attention_mask"][sample].bool()
        weights = attentions[sample][..., real, :][..., real]
        length = int(real.sum())
        window = 6 if family == "mistral" else length
        seen = torch.arange(length, 0, -1).clamp(max=window)
        if family == "gemma2":
            counts = (weights > 0).sum(-2)  # its layers have different windows
        else:
            counts = seen
        assert found.means.shape == (*weights.shape[:2], length)
        torch.testing.assert_close(found.means, weights.sum(-2) / counts, atol=1e-5, rtol=0)
        assert found.tokens == [f"<{n}>" for n in given["input_ids"][sample][real].tolist()]
        if family != "gemma2":
            torch.testing.assert_close(found.thresholds, torch.full((len(found.means),), 2.0 / window))


def test_late_sinks_are_listed_and_the_first_token_is_not():
    model = tiny_models.build("llama")
    found = sink_map(model, torch.randint(5, 80, (25,), generator=torch.Generator().manual_seed(3)), alpha=2.0)
    sinks = found.sinks()
    assert len(sinks) == int(found.late.sum()) > 3
    assert all(sink.position > 0 and sink.mean > 2.0 / 25 for sink in sinks)
    assert [sink.mean for sink in sinks] == sorted((sink.mean for sink in sinks), reverse=True)
    assert sum(count for _, count in found.by_token()) == len(sinks)
    assert torch.equal(found.first_token, found.means[..., 0])
    assert not sink_map(model, torch.tensor([[5, 6, 7]]), alpha=3.0).sinks()


def test_layers_without_attention_are_nan():
    found = sink_map(tiny_models.build("qwen3_next"), torch.arange(5, 25))
    assert found.means[:3].isnan().all()
    assert found.means[3].isfinite().all()
    assert not found.late[:3].any()


def test_models_with_learned_sinks_are_refused():
    with pytest.raises(ValueError, match="learned sink"):
        sink_map(tiny_models.build("gpt_oss"), torch.arange(5, 25))
