"""AttentionCalibration on real model classes: exact, restored, and the same with caches, padding, beams and drafts."""

import pytest
import tiny_models
import torch
from transformers import DynamicCache, StaticCache

import heedful
from heedful.steering import AttentionCalibration, HeadSet, calibrate_probabilities

RULE = {"alpha": 1.3, "beta": 0.3}  # so low that short texts have sinks


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def mistral():
    return tiny_models.build("mistral", dtype=torch.float64)  # a window of 6


def ids(length=14, batch=1, seed=1):
    return torch.randint(5, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, *parts, **inputs):
    with torch.no_grad(), heedful.attach(model, *parts):
        return model(**inputs).logits


class MatrixForm(heedful.Edit):
    """An oracle written from the paper's equations: causal, unpadded, with the whole matrix; keeps sums and counts."""

    def __init__(self, sinks="running", **selectors):
        super().__init__(**selectors)
        self.sinks, self.sums, self.moved = sinks, {}, {}

    def probabilities(self, call, probabilities):
        rows, keys = probabilities.shape[-2:]
        if rows == keys:
            self.sums[call.layer] = torch.zeros(1)
        if rows > 1 or self.sinks == "running":
            old = self.sums[call.layer]
            new = probabilities.sum(-2)
            self.sums[call.layer] = torch.nn.functional.pad(old, (0, keys - old.shape[-1])) + new
        sums = self.sums[call.layer]
        length = sums.shape[-1]
        sinks = sums / torch.arange(length, 0, -1) > RULE["alpha"] / length
        sinks[..., 0] = False
        sinks = torch.nn.functional.pad(sinks, (0, keys - length))[:, :, None]
        calibrated, freed = calibrate_probabilities(probabilities, sinks, RULE["beta"])
        self.moved[call.layer] = freed.mean((0, 2))
        return calibrated


# ---- exactness


def test_equals_the_matrix_form_and_reports_the_mass(llama):
    oracle, part = MatrixForm(), AttentionCalibration(**RULE)
    expected = logits(llama, oracle, input_ids=ids(30))
    with torch.no_grad(), heedful.attach(llama, part) as attached:
        got = llama(input_ids=ids(30)).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)  # the oracle's probabilities are fp32
    assert (got - logits(llama, input_ids=ids(30))).abs().max() > 0.05
    for (layer, head), mass in part.mass_moved.items():
        assert mass == pytest.approx(float(oracle.moved[layer][head]), abs=1e-6)
    assert len(part.mass_moved) == 12
    assert {line["layer"]: line["mass_moved"] for line in attached.report()}[1][2] == part.mass_moved[1, 2] > 0.01
    part.reset()
    assert part.mass_moved == {}


FAMILIES = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "olmo2",
    "deepseek_v3",
    "qwen3_next",
]
FAMILIES += ["cohere2", "granite", "bert", "t5", "llava", "qwen3_vl"]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_agree_on_every_family(family, padding):
    model = tiny_models.build(family)
    given = tiny_models.inputs(model, padding=padding)
    part = AttentionCalibration(**RULE)
    with torch.no_grad():
        plain = model(**given)[0]
        with heedful.attach(model, part):
            grouped = model(**given)[0]
        with heedful.attach(model, AttentionCalibration(form="weights", **RULE)):
            weights = model(**given)[0]
        assert torch.equal(model(**given)[0], plain)
    real = torch.ones_like(plain[..., 0], dtype=torch.bool)
    if family != "t5":
        real &= given["attention_mask"].bool()
    torch.testing.assert_close(grouped[real], weights[real], atol=2e-4, rtol=1e-4)
    assert max(part.mass_moved.values()) > 0.01


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_to_do_changes_no_bit(implementation):
    model = tiny_models.build("llama", attn=implementation)
    given = {"input_ids": ids(20, 2)}
    plain = logits(model, **given)
    for part in (
        AttentionCalibration(alpha=1.3, beta=1.0),
        AttentionCalibration(heads=[]),
        AttentionCalibration(heads=torch.zeros(3, 4, dtype=torch.bool)),
        AttentionCalibration(threshold=0.999999),
        AttentionCalibration(alpha=20.0, beta=0.0),  # T <= alpha
        AttentionCalibration(steps="decode", **RULE),
    ):
        assert torch.equal(logits(model, part, **given), plain)
    assert not torch.equal(logits(model, AttentionCalibration(**RULE), **given), plain)


class Outputs(heedful.Probe):
    def outputs(self, call, output):
        self.seen = output.clone()


def test_only_the_asked_heads_change(llama):
    given, last = {"input_ids": ids(20, 2)}, 2
    probe = Outputs(layers=[last])
    logits(llama, probe, **given)
    plain = probe.seen
    logits(llama, AttentionCalibration(heads=[(last, 1), (last, 3)], **RULE), probe, **given)
    changed = (probe.seen != plain).any(-1).any(-1).any(0)
    assert changed.tolist() == [False, True, False, True]


def test_selectors_of_heads_are_the_same(llama):
    given = {"input_ids": ids(20, 2)}
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = True
    pairs = [(1, 2), (2, 0)]
    found = HeadSet("m", "t", (3, 4), 0.5, {(1, 2): 0.6, (2, 0): 0.7, (0, 0): 0.5}, 10, **RULE)
    expected = logits(llama, AttentionCalibration(heads=pairs, **RULE), **given)
    for heads in (mask, found, iter(pairs), torch.tensor(pairs).tolist()):
        assert torch.equal(logits(llama, AttentionCalibration(heads=heads, **RULE), **given), expected)
    assert torch.equal(logits(llama, found.calibration(), **given), expected)
    only = logits(llama, AttentionCalibration(layers=[2], heads=[0], **RULE), **given)
    assert torch.equal(logits(llama, AttentionCalibration(layers=[2], heads=pairs, **RULE), **given), only)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_padding_changes_nothing(family, side):
    dtype = torch.float32 if family == "gemma2" else torch.float64  # its eager attention overflows on float64 masks
    model = tiny_models.build(family, dtype=dtype)
    short, long = ids(9, seed=3), ids(17, seed=4)
    padded, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
    place = slice(0, 9) if side == "right" else slice(8, 17)
    padded[0, place], padded[1] = short[0], long[0]
    mask[0, place] = mask[1] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, AttentionCalibration(**RULE), input_ids=padded, attention_mask=mask, position_ids=positions)
    for row, alone, where in ((0, short, place), (1, long, slice(None))):
        expected = logits(model, AttentionCalibration(**RULE), input_ids=alone)
        assert (expected - logits(model, input_ids=alone)).abs().max() > 1e-3
        torch.testing.assert_close(got[row, where], expected[0], atol=1e-9 if dtype == torch.float64 else 1e-4, rtol=0)


def test_rows_and_steps_choose_what_is_edited_and_not_what_is_counted(llama):
    given = {"input_ids": ids(20, 2), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    given["attention_mask"][0, 15:] = 0
    plain, whole = logits(llama, **given), logits(llama, AttentionCalibration(layers=[2], **RULE), **given)
    last = logits(llama, AttentionCalibration(layers=[2], rows="last", **RULE), **given)
    torch.testing.assert_close(last[0, 14], whole[0, 14])
    torch.testing.assert_close(last[1, 19], whole[1, 19])
    assert torch.equal(last[0, :14], plain[0, :14])
    assert torch.equal(last[1, :19], plain[1, :19])
    some = torch.zeros(20, dtype=torch.bool)
    some[[3, 12]] = True
    masked = logits(llama, AttentionCalibration(layers=[2], rows=some, **RULE), **given)
    torch.testing.assert_close(masked[:, some], whole[:, some])
    assert torch.equal(masked[:, ~some], plain[:, ~some])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_fp32(dtype):
    model = tiny_models.build("llama")
    expected = logits(model, AttentionCalibration(threshold=0.12, layers=[2]), input_ids=ids(40, 2))
    got = logits(model.to(dtype), AttentionCalibration(threshold=0.12, layers=[2]), input_ids=ids(40, 2))
    assert got.dtype == dtype
    assert (got - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)
    values = 100 * torch.ones(1, 1, 60_000, dtype=dtype)  # a sum that fp16 cannot hold
    assert values.float().sum().isfinite()


def test_gradients_flow_through_the_model_and_agree_with_the_weights():
    model = tiny_models.build("llama", dtype=torch.float64).train()
    gradients = []
    for form in ("grouped", "weights"):
        model.zero_grad()
        with heedful.attach(model, AttentionCalibration(form=form, **RULE)):
            model(input_ids=ids(16, 2), labels=ids(16, 2)).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    model.zero_grad()
    model(input_ids=ids(16, 2), labels=ids(16, 2)).loss.backward()
    assert (model.model.layers[0].self_attn.q_proj.weight.grad - gradients[0]).norm() > 1e-3 * gradients[0].norm()


# ---- caches


@pytest.mark.parametrize("sinks", ["running", "prefill"])
def test_decode_equals_the_oracle_in_every_layer(llama, sinks):
    tokens = ids(26)
    results = []
    for part in (AttentionCalibration(sinks=sinks, **RULE), MatrixForm(sinks)):
        cache = DynamicCache()
        with torch.no_grad(), heedful.attach(llama, part):
            steps = [llama(input_ids=tokens[:, :14], past_key_values=cache).logits]
            steps += [llama(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(14, 26)]
        results.append(torch.cat(steps, 1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunks", [(14,), (1,), (5, 9), (9, 3, 2)])
def test_cached_steps_equal_one_uncached_pass(request, family, static, chunks):
    """In the last layer, whose keys no calibration has touched, so that every row of the past is the same."""
    model = request.getfixturevalue(family)
    tokens, part = ids(22), AttentionCalibration(layers=[2], **RULE)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    steps, got, end = [*chunks, *[1] * (22 - sum(chunks))], {}, 0
    with torch.no_grad(), heedful.attach(model, part):
        for size in steps:
            end += size
            got[end] = model(input_ids=tokens[:, end - size : end], past_key_values=cache).logits[:, -1]
    for end, last in got.items():
        expected = logits(model, AttentionCalibration(layers=[2], **RULE), input_ids=tokens[:, :end], use_cache=False)
        torch.testing.assert_close(last, expected[:, -1], atol=1e-9, rtol=0)
    assert max(part.mass_moved.values()) > 0.01


def test_a_cache_object_may_be_used_for_a_second_text(llama):
    cache, part = StaticCache(config=llama.config, max_cache_len=40), AttentionCalibration(layers=[2], **RULE)
    with torch.no_grad(), heedful.attach(llama, part):
        first = llama(input_ids=ids(20, seed=5), past_key_values=cache).logits
        cache.reset()
        llama(input_ids=ids(11, seed=6), past_key_values=cache)
        cache.reset()
        assert torch.equal(llama(input_ids=ids(20, seed=5), past_key_values=cache).logits, first)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sinks", ["running", "prefill"])
def test_generate_with_beams_and_padding_equals_generate_without_cache(llama, beams, sinks):
    tokens, mask = ids(12, 2), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    rule = {"layers": [2], "sinks": sinks, **RULE}
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "pad_token_id": 0, "attention_mask": mask}
    with heedful.attach(llama, AttentionCalibration(**rule)):
        cached = llama.generate(tokens, **settings)
    if sinks == "prefill":  # without a cache there is no prefill, so the weight form stands in
        with heedful.attach(llama, AttentionCalibration(form="weights", **rule)):
            other = llama.generate(tokens, **settings)
    else:
        with heedful.attach(llama, AttentionCalibration(**rule)):
            other = llama.generate(tokens, use_cache=False, **settings)
    plain = llama.generate(tokens, **settings)
    assert torch.equal(cached.sequences, other.sequences)
    for a, b in zip(cached.scores, other.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (cached.scores[1] - plain.scores[1]).abs().max() > 1e-3


def test_beams_really_reorder_and_the_statistics_follow(llama, monkeypatch):
    from heedful.steering._columns import RunningColumns

    moved = []
    follow = RunningColumns.follow

    def watch(self, call):
        before = self.total
        follow(self, call)
        moved.append(self.total is not before)

    monkeypatch.setattr(RunningColumns, "follow", watch)
    with heedful.attach(llama, AttentionCalibration(layers=[2], **RULE)):
        llama.generate(ids(12), num_beams=4, max_new_tokens=12, do_sample=False)
    assert any(moved)


def test_generated_rows_alone(llama):
    """rows="generated" leaves the prompt alone and still counts its rows."""
    tokens, rule = ids(15), {"layers": [2], **RULE}
    cache = DynamicCache()
    with torch.no_grad(), heedful.attach(llama, AttentionCalibration(rows="generated", **rule)):
        prompt = llama(input_ids=tokens[:, :14], past_key_values=cache).logits
        step = llama(input_ids=tokens[:, 14:], past_key_values=cache).logits
    assert torch.equal(prompt, logits(llama, input_ids=tokens[:, :14]))
    expected = logits(llama, AttentionCalibration(**rule), input_ids=tokens)[:, -1:]
    torch.testing.assert_close(step, expected, atol=1e-9, rtol=0)
    assert (step - logits(llama, input_ids=tokens)[:, -1:]).abs().max() > 1e-4
    cache = DynamicCache()
    with torch.no_grad(), heedful.attach(llama, AttentionCalibration(steps=[3], **rule)):
        llama(input_ids=tokens[:, :11], past_key_values=cache)
        steps = [llama(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(11, 15)]
    torch.testing.assert_close(steps[3], expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(steps[2], logits(llama, input_ids=tokens[:, :14])[:, -1:], atol=1e-9, rtol=0)


# ---- heedful.generate


class Guess(heedful.decoding.Drafter):
    """Drafts trees of the true continuation and of noise, so that paths of every length are accepted."""

    def __init__(self, truth):
        self.truth, self.calls = truth, 0

    def propose(self, roots, committed):
        trees = []
        for row, (root, before) in enumerate(zip(roots.tolist(), committed, strict=True)):
            self.calls += 1
            here = len(before) + self.truth.shape[1] - self.lengths[row]
            true = self.truth[row, here + 1 : here + 1 + self.calls % 4].tolist()
            noise = [7 + self.calls % 50, 9]
            tokens, parents = [root, noise[0], noise[1]], [-1, 0, 1]
            parent = 0
            for token in true:
                tokens.append(token)
                parents.append(parent)
                parent = len(tokens) - 1
            trees.append(heedful.decoding.DraftTree(torch.tensor(tokens), torch.tensor(parents)))
        return trees


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sinks", ["running", "prefill"])
@pytest.mark.parametrize("padded", [False, True])
def test_drafted_tokens_are_calibrated_as_in_generate(llama, sinks, static, padded):
    tokens, mask = ids(12, 2, seed=8), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = int(not padded)
    part = AttentionCalibration(sinks=sinks, **RULE)
    settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    with heedful.attach(llama, AttentionCalibration(sinks=sinks, **RULE)):
        truth = llama.generate(tokens, **settings)
    drafter = Guess(truth)
    drafter.lengths = [truth.shape[1] - (5 if padded and row == 0 else 0) for row in range(2)]
    if static:
        settings["cache_implementation"] = "static"
    with heedful.attach(llama, part):
        got = heedful.generate(llama, tokens, drafter, **settings)
    assert torch.equal(got.sequences, truth)
    assert {1, 2, 3} <= {n for row in got.stats.accepted for n in row}
    assert not torch.equal(truth, llama.generate(tokens, **settings | {"cache_implementation": None}))
    assert not part._pending
    with heedful.attach(llama, part):
        assert torch.equal(heedful.generate(llama, tokens, **settings).sequences, truth)


# ---- refusals


def test_arguments_are_checked():
    for wrong in (
        {"beta": 1.5},
        {"beta": -0.1},
        {"alpha": 0},
        {"threshold": -1.0},
        {"exempt_first": -1},
        {"sinks": "all"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AttentionCalibration(**wrong)
    with pytest.raises(ValueError, match="form"):
        AttentionCalibration(form="dense")
    with pytest.raises(ValueError, match="reads the weights of all rows"):
        AttentionCalibration(form="weights", rows="last")
    with pytest.raises(ValueError, match="boolean mask"):
        AttentionCalibration(heads=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="pairs"):
        AttentionCalibration(heads=[(1, 2, 3)])


def test_models_whose_rows_do_not_sum_to_one_are_refused(llama):
    model = tiny_models.build("gpt_oss")
    with pytest.raises(ValueError, match=r"layer 0: .* learned sink"):
        logits(model, AttentionCalibration(), input_ids=ids())
    noisy = tiny_models.build("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout"):
        logits(noisy, AttentionCalibration(), input_ids=ids())


def test_a_cropped_cache_is_refused(llama):
    text = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    with (
        pytest.raises(RuntimeError, match=r"layer 0: the cache was cropped from \d+ to \d+ tokens"),
        heedful.attach(llama, AttentionCalibration(**RULE)),
    ):
        llama.generate(text, prompt_lookup_num_tokens=4, max_new_tokens=20, do_sample=False)
    cache = DynamicCache()
    with torch.no_grad():
        llama(input_ids=ids(9), past_key_values=cache)
        with (
            pytest.raises(RuntimeError, match="filled without it"),
            heedful.attach(llama, AttentionCalibration(**RULE)),
        ):
            llama(input_ids=ids(1), past_key_values=cache)
    cache = DynamicCache()
    attached = heedful.attach(llama, AttentionCalibration(**RULE))
    with torch.no_grad():
        llama(input_ids=ids(9), past_key_values=cache)
        attached.detach()
        llama(input_ids=ids(1), past_key_values=cache)
        with attached, pytest.raises(RuntimeError, match="has seen 9 of 10"):
            llama(input_ids=ids(1), past_key_values=cache)


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 1.5 * logits


class Halve(heedful.Edit):
    def outputs(self, call, output):
        return 0.5 * output


def test_edits_that_would_be_undone_are_refused_and_the_weight_form_composes(llama):
    given = {"input_ids": ids(20)}
    with pytest.raises(ValueError, match=r'Sharpen .* use form="weights"'):
        logits(llama, Sharpen(), AttentionCalibration(**RULE), **given)
    with pytest.raises(ValueError, match="attach AttentionCalibration first"):
        logits(llama, Halve(heads=[1]), AttentionCalibration(**RULE), **given)
    part = AttentionCalibration(**RULE)
    with pytest.raises(ValueError, match=r"first \(and once\)"):
        logits(llama, part, part, **given)
    logits(llama, Halve(heads=[1]), AttentionCalibration(heads=[0, 2], **RULE), **given)
    after = logits(llama, AttentionCalibration(**RULE), Halve(), **given)
    assert torch.equal(after, logits(llama, AttentionCalibration(**RULE), Halve(), **given))
    composed = logits(llama, Sharpen(), AttentionCalibration(form="weights", **RULE), **given)
    torch.testing.assert_close(composed, logits(llama, Sharpen(), MatrixForm(), **given), atol=1e-5, rtol=0)
    twice = AttentionCalibration(form="weights", **RULE)
    logits(llama, twice, twice, **given)


class Kernel(heedful.Kernel):
    def __call__(self, call):
        return call.original()


def test_a_kernel_without_softmax_is_refused(llama):
    with pytest.raises(ValueError, match="kernel Kernel has none"):
        logits(llama, Kernel(), AttentionCalibration(**RULE), input_ids=ids(20))
