"""Mistakes are refused by attach itself, name the layer and the remedy, and leave the model untouched."""

import family_checks
import pytest
import tiny_models
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import heedful
from heedful.seam import PartError, Verification


class Plain(heedful.Kernel):
    def __call__(self, call):
        return call.original()


class Honest(Plain):
    honours_mask = True


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 1.5 * logits


class Double(heedful.Edit):
    def outputs(self, call, output):
        return 2 * output


@pytest.fixture
def model():
    return tiny_models.build("llama")


def refuses(model, message, *parts, error=ValueError, **kwargs):
    before = family_checks.fingerprint(model)
    with pytest.raises(error, match=message):
        heedful.attach(model, *parts, **kwargs)
    assert family_checks.fingerprint(model) == before


def test_two_kernels_on_one_layer(model):
    message = r"layer 1: two kernels \(Plain, Honest\).*different layers=, or detach"
    refuses(model, message, Plain(layers=[0, 1]), Honest(layers=[1, 2]))
    with heedful.attach(model, Plain(layers=[1])):
        refuses(model, message, Honest())
        heedful.attach(model, Honest(layers=[0, 2])).detach()
    heedful.attach(model, Plain(layers=[0]), Honest(layers=[1])).detach()


@pytest.mark.parametrize("part", [Sharpen, family_checks.Weights])
def test_weights_of_a_kernel_without_probabilities(model, part):
    message = rf"layer 2: {part.__name__} works on logits or probabilities, but the kernel Plain has none.*layers="
    refuses(model, message, Plain(layers=[2]), part())
    with heedful.attach(model, part(layers=[2])):
        refuses(model, message, Plain())
    heedful.attach(model, Plain(), Double()).detach()


@pytest.mark.parametrize("layers", [[3], [0, 17], [-1]])
def test_layer_out_of_range(model, layers):
    message = rf"layer {layers[-1]} has no attention to attach to.*\[0, 1, 2\]"
    refuses(model, message, Double(layers=layers))
    refuses(model, message, Double(), layers=layers)
    refuses(model, message, Double(heads={layers[-1]: [0]}))


@pytest.mark.parametrize("heads", [[4], [0, -1], [99]])
def test_head_out_of_range(model, heads):
    refuses(model, rf"layer 1: Double asks for the heads \[{heads[-1]}\].*0 to 3", Double(layers=[1], heads=heads))


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"heads": [0, 0]}, "names a head twice"),
        ({"heads": []}, "at least one head"),
        ({"heads": 2}, "must be a list"),
        ({"layers": 2}, "must be a list"),
        ({"rows": "first"}, "'last', 'generated' or a boolean mask"),
        ({"rows": torch.tensor([1, 2])}, "must be a boolean mask"),
        ({"rows": torch.zeros(1, 1, 1, dtype=torch.bool)}, "must be a boolean mask"),
        ({"steps": "first"}, "'prefill', 'decode', a range or a list"),
        ({"steps": 3}, "'prefill', 'decode', a range or a list"),
    ],
)
def test_selectors_that_mean_nothing(model, selectors, message):
    refuses(model, message, Double(**selectors))


def test_what_is_no_part(model):
    refuses(model, "is not a part", lambda call: None, error=TypeError)
    refuses(model, "is not a part", Sharpen, error=TypeError)


def test_no_attention_interface():
    refuses(torch.nn.Linear(2, 2), "nothing can be attached", Double())


def test_several_stacks_without_a_decoder():
    both = torch.nn.ModuleDict({"a": tiny_models.build("bert"), "b": tiny_models.build("vit")})
    refuses(both, r"several stacks of layers.*a\.encoder.*b\..*pass the sub-module", Double())
    with heedful.attach(both["b"], Double()) as attached:
        assert attached.layers == [0, 1, 2]


def test_a_mask_for_other_samples(model):
    part = Double(layers=[1], rows=torch.ones(3, 12, dtype=torch.bool))
    with heedful.attach(model, part), pytest.raises(PartError, match=r"layer 1.*mask for 3 samples.*call has 2"):
        family_checks.result(model, tiny_models.inputs(model))


def test_kernel_with_a_wrong_shape(model):
    class Wrong(heedful.Kernel):
        def __call__(self, call):
            return call.original().transpose(1, 2)

    with heedful.attach(model, Wrong(layers=[2])), pytest.raises(PartError, match=r"layer 2: Wrong must return.*shape"):
        family_checks.result(model, tiny_models.inputs(model))


def test_the_name_never_removes_the_causal_mask(model):
    assert "heedful" in AttentionInterface().valid_keys()
    assert "heedful" in AttentionMaskInterface().valid_keys()
    model.set_attn_implementation("heedful")
    with pytest.raises(RuntimeError, match="not chosen by name"):
        family_checks.result(model, tiny_models.inputs(model))
    refuses(model, "layer 0: the model's attention implementation is 'heedful'.*set_attn_implementation", Double())


def test_gpt2_upcasting_is_refused():
    model = tiny_models.build("gpt2", attn="eager", reorder_and_upcast_attn=True)
    refuses(model, "layer 0: GPT2Attention chooses its algorithm by the name", Double())


def test_keywords_that_the_dense_path_does_not_know(model):
    given = {**tiny_models.inputs(model), "indices": torch.zeros(1)}
    plain = family_checks.result(model, given)
    with heedful.attach(model, Sharpen(layers=[1])), pytest.raises(PartError, match=r"layer 1.*`indices`.*outputs"):
        family_checks.result(model, given)
    with heedful.attach(model, family_checks.Identity("outputs")):
        assert torch.equal(family_checks.result(model, given), plain)


def test_a_subclass_that_forgets_super_init_acts_everywhere(model):
    class Forgetful(heedful.Edit):
        def __init__(self, factor):
            self.factor = factor

        def outputs(self, call, output):
            return self.factor * output

    with heedful.attach(model, Forgetful(2.0)) as attached:
        assert attached.layers == [0, 1, 2]


def test_a_kernel_must_be_callable():
    with pytest.raises(TypeError, match="abstract"):
        type("Nothing", (heedful.Kernel,), {})()


def test_verification_refuses_kernels_that_ignore_masks(model):
    with heedful.attach(model, Plain(layers=[2])), pytest.raises(ValueError, match="layer 2: the kernel Plain cannot"):
        Verification(model)
    with heedful.attach(model, Honest(layers=[2])):
        assert Verification(model).attached
    assert not Verification(model).attached
