"""The model is exactly as before, whatever happened inside: exceptions, copies, files, wrappers, training."""

import copy
import gc
import io
import threading
import weakref

import family_checks
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, StaticCache

import heedful


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 3 * logits


@pytest.fixture
def model():
    return tiny_models.build("llama")


@pytest.fixture
def given(model):
    return tiny_models.inputs(model, padding="left")


def is_plain(model, given, plain, before):
    return family_checks.fingerprint(model) == before and torch.equal(family_checks.result(model, given), plain)


def test_attach_acts_when_called_and_with_returns_the_same(model, given):
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)
    attached = heedful.attach(model, Sharpen())
    edited = family_checks.result(model, given)
    assert not torch.allclose(edited, plain, atol=1e-2)
    with attached as same:
        assert same is attached
        assert torch.equal(family_checks.result(model, given), edited)
    assert is_plain(model, given, plain, before)
    attached.detach()  # once more: nothing happens
    with attached:  # entered again: it acts again, until its outermost block ends
        with attached:
            pass
        assert torch.equal(family_checks.result(model, given), edited)
    assert is_plain(model, given, plain, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_detach_in_any_order(model, given, order):
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)
    parts = [Sharpen(layers=[0, 1]), family_checks.Weights(layers=[1]), Sharpen(heads=[1])]
    attached = [heedful.attach(model, part) for part in parts]
    left = dict(enumerate(parts))
    for i in order:
        attached[i].detach()
        del left[i]
        mine = family_checks.result(model, given)
        fresh = tiny_models.build("llama")
        with heedful.attach(fresh, *left.values()):
            assert torch.equal(mine, family_checks.result(fresh, given))
    assert is_plain(model, given, plain, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions(model, given, error):
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)

    class Fails(heedful.Probe):
        def probabilities(self, call, probabilities):
            if call.layer == 1:
                raise error("inside")

    with pytest.raises(error, match="inside"), heedful.attach(model, Sharpen()), heedful.attach(model, Fails()):
        family_checks.result(model, given)
    assert is_plain(model, given, plain, before)


def test_deepcopy_inside_and_after_is_plain(model, given):
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)
    with heedful.attach(model, Sharpen(layers=[0, 2])):
        inside = copy.deepcopy(model)
        edited = family_checks.result(model, given)
        assert not torch.equal(edited, plain)
        assert torch.equal(family_checks.result(inside, given), plain)
        module = copy.deepcopy(model.model.layers[0].self_attn)
        assert type(module.config) is type(model.config)
    after = copy.deepcopy(model)
    assert is_plain(model, given, plain, before)
    for copied in (inside, after):
        assert torch.equal(family_checks.result(copied, given), plain)
        # The same, but for the config's identity, which is the copy's own.
        assert [(f[0], *f[2:]) for f in family_checks.fingerprint(copied)] == [(f[0], *f[2:]) for f in before]
        assert len({id(m.config) for m in copied.modules() if hasattr(m, "config")}) == 1
        with heedful.attach(copied, Sharpen(layers=[0, 2])):
            assert torch.equal(family_checks.result(copied, given), edited)


def test_saved_inside_is_plain(model, given, tmp_path):
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)
    with heedful.attach(model, Sharpen()):
        model.save_pretrained(tmp_path)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert "heedful" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(family_checks.result(loaded, given), plain)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    assert torch.equal(family_checks.result(pickled, given), plain)
    assert all(type(m.config) is type(model.config) for m in pickled.modules() if hasattr(m, "config"))
    assert is_plain(model, given, plain, before)


def test_state_acts_in_every_thread_and_is_not_mixed_up(model, given):
    plain = model.generate(**given, max_new_tokens=8, do_sample=False)
    with heedful.attach(model, Sharpen(steps=range(1, 4)), family_checks.Identity("probabilities", rows="last")):
        alone = model.generate(**given, max_new_tokens=8, do_sample=False)
        found = [None] * 4

        def work(i):
            torch.set_num_threads(1)
            found[i] = model.generate(**given, max_new_tokens=8, do_sample=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not torch.equal(alone, plain)
    assert all(torch.equal(f, alone) for f in found)


def test_set_attn_implementation_inside(given):
    model = tiny_models.build("llama", attn="sdpa")
    plain = family_checks.result(model, given)
    with heedful.attach(model, Sharpen(heads=[0])):
        sdpa = family_checks.result(model, given)
        model.set_attn_implementation("eager")
        eager = family_checks.result(model, given)
    real = given["attention_mask"].bool()
    assert torch.allclose(sdpa[real], eager[real], atol=1e-4)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
    model.set_attn_implementation("sdpa")
    assert torch.equal(family_checks.result(model, given), plain)


def test_nothing_is_kept_alive(model, given):
    part = family_checks.Weights()
    gone = weakref.ref(part)
    with heedful.attach(model, part):
        family_checks.result(model, given)
    del part
    gc.collect()
    assert gone() is None


# ---- training


def gradients(model, given, *parts, checkpointing=None):
    model.zero_grad()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    before = family_checks.fingerprint(model)  # transformers leaves a hook of its own when it checkpoints
    with heedful.attach(model, *parts):
        out = model(**given, labels=given["input_ids"], use_cache=False)
        out.loss.backward()
    assert family_checks.fingerprint(model) == before
    if checkpointing is not None:
        model.gradient_checkpointing_disable()
    model.eval()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def close(a, b, atol=1e-5):
    return all(torch.allclose(a[n], b[n], atol=atol) for n in a)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("stage", family_checks.STAGES)
@pytest.mark.parametrize("selectors", [{}, {"rows": "last", "heads": [1, 0]}])
def test_gradients_of_an_identity_edit(name, stage, selectors):
    model = tiny_models.build(name)
    given = tiny_models.inputs(model, padding="left")
    identity = family_checks.Identity(stage, **selectors)
    assert close(gradients(model, given), gradients(model, given, identity))


def test_gradients_of_an_edit(model, given):
    """Scaling the logits of all heads = scaling the attention's own factor."""
    mine = gradients(model, given, Sharpen())
    other = tiny_models.build("llama")
    for layer in other.model.layers:
        layer.self_attn.scaling *= 3
    theirs = gradients(other, given)
    assert close(mine, theirs, atol=2e-5)
    assert not close(mine, gradients(model, given), atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, given, reentrant):
    plain = family_checks.result(model, given)
    mine = gradients(model, given, Sharpen(heads=[0, 1]))
    probe = family_checks.Weights(layers=[1])
    checkpointed = gradients(model, given, Sharpen(heads=[0, 1]), probe, checkpointing=reentrant)
    assert close(mine, checkpointed)
    assert len(probe.seen[1]) == 2  # the forward and the recomputation
    assert torch.equal(family_checks.result(model, given), plain)


# ---- wrappers


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_peft(model, given, kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = (
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        if kind == "lora"
        else peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    wrapped = peft.get_peft_model(model, config).eval()
    plain, before = family_checks.result(wrapped, given), family_checks.fingerprint(wrapped)
    text = wrapped.generate(**given, max_new_tokens=5, do_sample=False)
    probe = family_checks.Weights(rows="last")
    with heedful.attach(wrapped, probe, family_checks.Identity("logits", rows="last")) as attached:
        assert torch.allclose(family_checks.result(wrapped, given), plain, atol=1e-5)
        assert torch.equal(wrapped.generate(**given, max_new_tokens=5, do_sample=False), text)
        assert attached.layers == [0, 1, 2]
        with heedful.attach(wrapped, Sharpen()):
            assert not torch.allclose(family_checks.result(wrapped, given), plain, atol=1e-2)
    assert probe.seen[0][0].shape[-1] == (12 if kind == "lora" else 15)
    assert is_plain(wrapped, given, plain, before)


def test_accelerate_offload(model, given, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = family_checks.result(model, given)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = family_checks.fingerprint(model)
    with heedful.attach(model, Sharpen()):
        edited = family_checks.result(model, given)
    assert not torch.allclose(edited, plain, atol=1e-2)
    assert is_plain(model, given, plain, before)


class Seen(heedful.Probe):
    """A probe without data-dependent Python."""

    def probabilities(self, call, probabilities):
        self.weights = probabilities


@pytest.mark.parametrize(("padding", "selectors"), [("left", {}), (None, {"heads": [2, 0], "rows": "last"})])
def test_torch_compile_fullgraph(padding, selectors):
    model = tiny_models.build("llama", num_hidden_layers=1)
    given = tiny_models.inputs(model, padding=padding)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain, before = family_checks.result(compiled, given), family_checks.fingerprint(model)
    probe = Seen(**selectors)
    with heedful.attach(model, Sharpen(**selectors), probe):
        reference, weights = family_checks.result(model, given), probe.weights
    with heedful.attach(compiled, Sharpen(**selectors), probe):
        for _ in range(2):
            probe.weights = None
            assert torch.allclose(family_checks.result(compiled, given), reference, atol=1e-5)
            assert torch.allclose(probe.weights, weights, atol=1e-5)
    assert torch.equal(family_checks.result(compiled, given), plain)
    assert family_checks.fingerprint(model) == before


def test_torch_compile_decoding():
    """A compiled forward with a static cache: one graph for the prompt, one for the decode steps."""
    model = tiny_models.build("llama", num_hidden_layers=1)
    given = tiny_models.inputs(model, padding="left")

    def logits(forward):
        cache, out = StaticCache(config=model.config, max_cache_len=16), []
        mask = given["attention_mask"]
        with torch.no_grad():
            out.append(forward(**given, past_key_values=cache, use_cache=True).logits[:, -1])
            for token in (7, 8, 9):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                ids = torch.full((2, 1), token)
                step = forward(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                out.append(step.logits[:, -1])
        return torch.stack(out)

    torch._dynamo.reset()
    before, plain = family_checks.fingerprint(model), logits(model)
    with heedful.attach(model, Sharpen(rows="generated", heads=[1])):
        reference = logits(model)
        compiled = logits(torch.compile(model, backend="eager", fullgraph=True))
    assert torch.allclose(compiled, reference, atol=1e-5)
    assert torch.equal(compiled[0], plain[0])
    assert not torch.allclose(compiled[1:], plain[1:], atol=1e-2)
    assert family_checks.fingerprint(model) == before
