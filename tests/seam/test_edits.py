"""What an edit does, against attention written out by hand: selection, stages, order, re-hiding, and refusals."""

import family_checks
import hypothesis.strategies as st
import pytest
import tiny_models
import torch
from hypothesis import given as draw
from hypothesis import settings

import heedful
from heedful.seam import PartError


def run(model, given, *parts, **kwargs):
    with heedful.attach(model, *parts, **kwargs) as attached:
        out = family_checks.result(model, given)
    return out, attached


class Layer(heedful.Kernel):
    """An oracle: eager attention of a Llama-like layer with functions put in at each stage, for all heads and rows."""

    honours_mask = True

    def __init__(self, logits=None, probabilities=None, outputs=None, **selectors):
        super().__init__(**selectors)
        self.logits, self.probabilities, self.outputs = logits, probabilities, outputs

    def __call__(self, call):
        key = call.key.repeat_interleave(call.groups, 1)
        value = call.value.repeat_interleave(call.groups, 1)
        queries, keys = call.query.shape[2], key.shape[2]
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if call.original_mask is not None:
            visible = call.original_mask
        visible = visible.expand(call.query.shape[0], call.query.shape[1], queries, keys)
        scores = call.query @ key.transpose(2, 3) * call.scaling
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.logits:
            scores = self.logits(scores).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        if self.probabilities:
            weights = self.probabilities(weights).masked_fill(~visible, 0.0)
        out = weights @ value
        plain = call.original()
        out = self.outputs(out) if self.outputs else out
        return torch.where(visible.any(-1, keepdim=True), out, plain)


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 1.5 * logits


class Flatten(heedful.Edit):
    def probabilities(self, call, probabilities):
        return probabilities**0.5


class Double(heedful.Edit):
    def outputs(self, call, output):
        return 2 * output


def only(function, heads, rows):
    """`function` on some heads and rows of a (B, H, T, ...) tensor."""

    def edit(x):
        chosen = torch.zeros(x.shape[:3], dtype=torch.bool)
        for b, r in enumerate(rows):
            for h in heads:
                chosen[b, h, r] = True
        return torch.where(chosen[..., None], function(x), x)

    return edit


ALL = [list(range(12))] * 2
ROWS = {
    None: {None: ALL, "left": ALL, "right": ALL},
    "last": {None: [[11], [11]], "left": [[11], [11]], "right": [[7], [11]]},
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("rows", [None, "last"])
@pytest.mark.parametrize("heads", [None, [2, 0], [3]])
def test_each_stage_against_the_oracle(heads, rows, padding):
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding=padding)
    where = (heads or [0, 1, 2, 3], ROWS[rows][padding])
    for edit, stage, function in (
        (Sharpen, "logits", lambda x: 1.5 * x),
        (Flatten, "probabilities", lambda x: x**0.5),
        (Double, "outputs", lambda x: 2 * x),
    ):
        mine, _ = run(model, given, edit(layers=[1], heads=heads, rows=rows))
        theirs, _ = run(model, given, Layer(**{stage: only(function, *where)}, layers=[1]))
        assert (
            family_checks.largest_difference(family_checks.real(given, mine), family_checks.real(given, theirs)) < 2e-5
        )
        plain = family_checks.result(model, given)
        assert (
            family_checks.largest_difference(family_checks.real(given, mine), family_checks.real(given, plain)) > 1e-3
        )


def test_boolean_masks_of_tokens_choose_rows_and_pad_samples():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [2, 5, 9]] = True
    mask[1, 11] = True

    class Shapes(heedful.Probe):
        def probabilities(self, call, probabilities):
            self.rows, self.shape = call.rows, tuple(probabilities.shape)

    shapes = Shapes(layers=[0], heads=[3, 1], rows=mask)
    mine, _ = run(model, given, Sharpen(layers=[1], heads=[1, 3], rows=mask), shapes)
    theirs, _ = run(model, given, Layer(logits=only(lambda x: 1.5 * x, [1, 3], [[2, 5, 9], [11]]), layers=[1]))
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert shapes.rows.tolist() == [[2, 5, 9], [11, -1, -1]]
    assert shapes.shape == (2, 2, 3, 12)
    one = torch.zeros(12, dtype=torch.bool)
    one[4] = True
    same, _ = run(model, given, Sharpen(layers=[1], rows=one))
    theirs, _ = run(model, given, Layer(logits=only(lambda x: 1.5 * x, range(4), [[4], [4]]), layers=[1]))
    assert torch.allclose(same, theirs, atol=2e-5)
    nothing, attached = run(model, given, Sharpen(rows=torch.zeros(12, dtype=torch.bool)))
    assert torch.equal(nothing, family_checks.result(model, given))
    assert {line["calls"] for line in attached.report()} == {0}


def test_other_rows_and_heads_keep_every_bit():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    seen = {}

    class Look(heedful.Probe):
        def __init__(self, name, **selectors):
            super().__init__(**selectors)
            self.name = name

        def outputs(self, call, output):
            seen[self.name] = output.clone()

    run(model, given, Look("before", layers=[1]))
    run(model, given, Sharpen(layers=[1], heads=[2], rows="last"), Look("after", layers=[1]))
    same = seen["before"] == seen["after"]
    assert not same[:, 2, 11].all()
    same[:, 2, 11] = True
    assert same.all()


class Named(heedful.Edit):
    """Adds to the logits of one key and notes who acted."""

    log: list

    def __init__(self, name, log, shift=0.0, **selectors):
        super().__init__(**selectors)
        self.name, self.log, self.shift = name, log, shift

    def queries_keys(self, call, query, key):
        self.log.append((self.name, "queries_keys"))
        return query, key

    def logits(self, call, logits):
        self.log.append((self.name, "logits"))
        return 2 * logits + self.shift

    def probabilities(self, call, probabilities):
        self.log.append((self.name, "probabilities"))
        return probabilities

    def outputs(self, call, output):
        self.log.append((self.name, "outputs"))
        return output


def test_order_is_stage_then_outer_then_given():
    model = tiny_models.build("llama")
    given, log = tiny_models.inputs(model), []
    with heedful.attach(model, Named("a", log), Named("b", log), layers=[0]):
        run(model, given, Named("c", log, layers=[0]))
    assert log == [(n, s) for s in family_checks.STAGES for n in "abc"]


def test_edits_of_one_stage_do_not_commute_and_keep_their_order():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)

    class Clip(heedful.Edit):
        def logits(self, call, logits):
            return logits.clamp(max=0.5)

    mine, _ = run(model, given, Sharpen(layers=[0]), Clip(layers=[0]))
    theirs, _ = run(model, given, Layer(logits=lambda x: (1.5 * x).clamp(max=0.5), layers=[0]))
    other, _ = run(model, given, Clip(layers=[0]), Sharpen(layers=[0]))
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert not torch.allclose(mine, other, atol=1e-3)


def test_the_same_part_in_two_attaches_acts_twice_and_leaves_in_any_order():
    model = tiny_models.build("llama")
    given, part = tiny_models.inputs(model), Sharpen(layers=[0])
    plain = family_checks.result(model, given)
    once, _ = run(model, given, part)
    before = family_checks.fingerprint(model)
    outer, inner = heedful.attach(model, part), heedful.attach(model, part)
    twice = family_checks.result(model, given)
    theirs, _ = run(tiny_models.build("llama"), given, Layer(logits=lambda x: 2.25 * x, layers=[0]))
    assert torch.allclose(twice, theirs, atol=2e-5)
    outer.detach()
    assert torch.equal(family_checks.result(model, given), once)
    outer.detach()
    inner.detach()
    assert torch.equal(family_checks.result(model, given), plain)
    assert family_checks.fingerprint(model) == before


def test_edits_of_overlapping_rows_and_heads_meet_in_one_softmax():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[3, 11]] = True
    probe = family_checks.Weights(layers=[1], heads=[2, 1])
    mine, _ = run(
        model,
        given,
        Sharpen(layers=[1], heads=[0, 1], rows="last"),
        Sharpen(layers=[1], heads=[1, 2], rows=mask),
        Flatten(layers=[1], heads=[1]),
        probe,
    )

    def logits(x):
        x = only(lambda y: 1.5 * y, [0, 1], [[11]] * 2)(x)
        return only(lambda y: 1.5 * y, [1, 2], [[3, 11]] * 2)(x)

    flatten = only(lambda y: y**0.5, [1], ALL)
    theirs, _ = run(model, given, Layer(logits=logits, probabilities=flatten, layers=[1]))
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert probe.seen[1][0].shape == (2, 2, 12, 12)


class KeyAndQuery(heedful.Edit):
    def queries_keys(self, call, query, key):
        self.shapes = tuple(query.shape), tuple(key.shape)
        return 2 * query, 0.5 * key


def test_a_changed_key_is_whole_and_a_changed_query_is_selected():
    model = tiny_models.build("llama")
    given, part = tiny_models.inputs(model), KeyAndQuery(layers=[1], heads=[3, 0], rows="last")
    mine, _ = run(model, given, part)
    assert part.shapes == ((2, 2, 1, 8), (2, 2, 12, 8))
    # The keys of all heads and rows are halved; the chosen queries are doubled, which makes up for it.
    half, _ = run(model, given, Layer(logits=lambda x: torch.where(
        torch.zeros_like(x, dtype=torch.bool).index_fill_(1, torch.tensor([0, 3]), True)
        & (torch.arange(12)[:, None] == 11), x, 0.5 * x), layers=[1]))  # fmt: skip
    assert torch.allclose(mine, half, atol=2e-5)


def test_the_cache_keeps_its_own_keys():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    with torch.no_grad():
        plain = model(**given, use_cache=True).past_key_values
        with heedful.attach(model, KeyAndQuery(layers=[0])):
            edited = model(**given, use_cache=True).past_key_values
    assert torch.equal(plain.layers[0].keys, edited.layers[0].keys)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_no_edit_can_unhide_a_key(attn):
    model = tiny_models.build("mistral", attn=attn)
    given = tiny_models.inputs(model, padding="left")
    probe = family_checks.Weights()

    class Everything(heedful.Edit):
        def logits(self, call, logits):
            assert torch.equal(logits == -torch.inf, ~call.visible().expand_as(logits))
            return torch.zeros_like(logits)

    class Spread(heedful.Edit):
        def probabilities(self, call, probabilities):
            return torch.full_like(probabilities, 0.25)

    run(model, given, Everything(), Spread(), probe)
    for weights in probe.seen.values():
        for b, first in ((0, 4), (1, 0)):
            for row in range(12):
                for key in range(12):
                    seen = first <= key <= row and key > row - 6
                    assert (weights[0][b, :, row, key] == (0.25 if seen else 0.0)).all(), (b, row, key)


def test_edits_may_work_in_place_on_weights_and_outputs():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)

    class InPlace(heedful.Edit):
        def logits(self, call, logits):
            return logits.mul_(1.5)

        def outputs(self, call, output):
            return output.mul_(2)

    mine, attached = run(model, given, InPlace(layers=[1], heads=[1]))
    theirs, _ = run(model, given, Sharpen(layers=[1], heads=[1]), Double(layers=[1], heads=[1]))
    assert torch.equal(mine, theirs)
    assert attached.report()[0]["mass_moved"][1] > 0.01


def returning(stage, value):
    def method(self, call, *tensors):
        return value(*tensors)

    return type("Bad", (heedful.Edit,), {stage: method})


@pytest.mark.parametrize("stage", ["logits", "probabilities", "outputs"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: None, "returned NoneType"),
        (lambda x: x[:, :, :, :-1], "returned shape"),
        (lambda x: x * torch.nan, "not finite"),
        (lambda x: torch.full_like(x, torch.inf), "not finite"),
        (lambda x: torch.full_like(x, -torch.inf), "not finite"),
    ],
)
def test_unusable_results_are_errors_with_the_layer(stage, value, message):
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    plain, before = family_checks.result(model, given), family_checks.fingerprint(model)
    for selectors in ({}, {"rows": "last", "heads": [1]}):
        with pytest.raises(PartError, match=f"layer 2: Bad.{stage}.*{message}"):
            run(model, given, returning(stage, value)(layers=[2], **selectors))
        assert family_checks.fingerprint(model) == before
        assert torch.equal(family_checks.result(model, given), plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda q, k: q, "must return the pair"),
        (lambda q, k: (q, None), "returned NoneType"),
        (lambda q, k: (q[:, :, :1], k), "returned shape"),
        (lambda q, k: (q, k * torch.nan), "not finite"),
        (lambda q, k: (q / 0, k), "not finite"),
        (lambda q, k: (q, k.mul_(2)), "in place"),
        (lambda q, k: (q.mul_(2), k), "in place"),
    ],
)
def test_unusable_queries_and_keys_are_errors(value, message):
    model = tiny_models.build("llama")
    with pytest.raises(PartError, match=f"layer 1: Bad.queries_keys.*{message}"):
        run(model, tiny_models.inputs(model), returning("queries_keys", value)(layers=[1]))


def test_infinite_values_in_padding_do_not_matter():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")

    class Poison(heedful.Edit):
        def outputs(self, call, output):
            blind = ~call.sees_any().expand(output.shape[:3])
            return output.masked_fill(blind[..., None], torch.nan)

    mine, _ = run(model, given, Poison())
    assert torch.equal(mine, family_checks.result(model, given))


@pytest.mark.parametrize("stage", family_checks.STAGES)
def test_a_probe_that_writes_is_an_error(stage):
    def method(self, call, *tensors):
        tensors[-1].zero_()

    model = tiny_models.build("llama")
    part = type("Vandal", (heedful.Probe,), {stage: method})(layers=[0])
    with pytest.raises(PartError, match=f"layer 0: Vandal.{stage} changed its tensor in place"):
        run(model, tiny_models.inputs(model), part)


def test_probabilities_are_not_renormalised():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)

    class Halve(heedful.Edit):
        def probabilities(self, call, probabilities):
            return probabilities / 2

    mine, attached = run(model, given, Halve(layers=[1]))
    theirs, _ = run(model, given, returning("outputs", lambda x: x / 2)(layers=[1]))
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert attached.report()[0]["mass_moved"][0] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_fp32_whatever_the_model(dtype):
    model = tiny_models.build("llama", dtype=dtype)
    seen = []

    class Types(heedful.Edit):
        def logits(self, call, logits):
            seen.append(logits.dtype)
            return logits.double()

        def probabilities(self, call, probabilities):
            seen.append(probabilities.dtype)
            return probabilities

        def outputs(self, call, output):
            seen.append(output.dtype)
            return output

    given = tiny_models.inputs(model)
    out, _ = run(model, given, Types(layers=[0]))
    assert seen == [torch.float32, torch.float32, dtype]
    assert out.dtype == dtype
    assert torch.allclose(out, family_checks.result(model, given), atol=0.3 if dtype == torch.bfloat16 else 1e-5)


def test_eager_attentions_are_the_edited_ones():
    model = tiny_models.build("llama", attn="eager")
    given = tiny_models.inputs(model)
    with heedful.attach(model, Flatten(layers=[1], heads=[2], rows="last")), torch.no_grad():
        edited = model(**given, output_attentions=True).attentions
    with torch.no_grad():
        plain = model(**given, output_attentions=True).attentions
    assert torch.allclose(edited[1][:, 2, 11], plain[1][:, 2, 11] ** 0.5, atol=1e-5)
    assert torch.equal(edited[1][:, :, :11], plain[1][:, :, :11])


def test_dropout_in_training():
    model = tiny_models.build("llama", attention_dropout=0.9).train()
    given = tiny_models.inputs(model)
    torch.manual_seed(0)
    edited, _ = run(model, given, family_checks.Identity("probabilities", layers=[0]))
    torch.manual_seed(0)
    again, _ = run(model, given, family_checks.Identity("probabilities", layers=[0]))
    torch.manual_seed(1)
    other, _ = run(model, given, family_checks.Identity("probabilities", layers=[0]))
    assert torch.equal(edited, again)
    assert not torch.allclose(edited, other, atol=1e-2)


def test_kernel_with_selectors_and_outputs_edit():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mine, _ = run(
        model, given, Layer(logits=lambda x: 1.5 * x, layers=[1], heads=[1, 2], rows="last"), Double(layers=[1])
    )
    theirs, _ = run(model, given, Sharpen(layers=[1], heads=[1, 2], rows="last"), Double(layers=[1]))
    assert torch.allclose(mine, theirs, atol=2e-5)


def test_a_kernel_with_probabilities_takes_weight_edits():
    class Dense(Layer):
        has_probabilities = True

    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mine, _ = run(model, given, Dense(layers=[1]), Sharpen(layers=[1]))
    theirs, _ = run(model, given, Sharpen(layers=[1]))
    assert torch.allclose(mine, theirs, atol=2e-5)


def test_selectors_are_read_when_attach_is_called():
    model = tiny_models.build("llama")
    given, part = tiny_models.inputs(model), Sharpen(layers=[1], heads=[0])
    with heedful.attach(model, part):
        part.heads, part.layers, part.rows = [1, 2], [0, 2], "last"
        mine = family_checks.result(model, given)
    theirs, _ = run(model, given, Sharpen(layers=[1], heads=[0]))
    assert torch.equal(mine, theirs)


def test_heads_by_layer_and_layers_of_attach():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mine, attached = run(model, given, Sharpen(heads={0: [1], 2: [3, 0]}))
    theirs, _ = run(model, given, Sharpen(layers=[0], heads=[1]), Sharpen(layers=[2], heads=[3, 0]))
    assert torch.equal(mine, theirs)
    assert attached.layers == [0, 2]
    mine, attached = run(model, given, Sharpen(heads={0: [1], 2: [3, 0]}), Double(layers=[1]), layers=[0])
    theirs, _ = run(model, given, Sharpen(layers=[0], heads=[1]))
    assert torch.equal(mine, theirs)
    assert [(line["part"], line["layer"]) for line in attached.report()] == [("Double", None), ("Sharpen", 0)]


def test_report_counts_what_happened():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")
    _, attached = run(model, given, Sharpen(layers=[1], heads=[2, 0]), Double(layers=[2], rows="last"))
    sharpen, double = attached.report()
    assert (sharpen["part"], sharpen["layer"], sharpen["calls"], sharpen["heads"]) == ("Sharpen", 1, 1, [0, 2])
    assert sharpen["rows"] == 8 + 12
    assert double["rows"] == 2
    assert double["heads"] == [0, 1, 2, 3]
    assert "mass_moved" not in double
    probe = family_checks.Weights(layers=[1], heads=[2, 0])
    run(model, given, probe)
    run(model, given, Sharpen(layers=[1], heads=[2, 0]), probe)
    before, after = probe.seen[1]
    moved = (before - after).abs().sum((-1, -2)).sum(0) / 2 / 20
    assert sharpen["mass_moved"] == {
        2: pytest.approx(float(moved[0]), rel=1e-4),
        0: pytest.approx(float(moved[1]), rel=1e-4),
    }


def test_max_bytes_names_the_remedy():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    size = 4 * 2 * 4 * 12 * 12
    run(model, given, Sharpen(), max_bytes=size)
    with pytest.raises(PartError, match=r"layer 0: Sharpen.*fewer rows= or heads="):
        run(model, given, Sharpen(), max_bytes=size - 1)
    run(model, given, Sharpen(rows="last"), Double(), max_bytes=size - 1)


@settings(max_examples=12, deadline=None)
@draw(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    padding=st.integers(0, 4),
    stage=st.sampled_from(["logits", "probabilities", "outputs"]),
)
def test_identity_and_shapes_on_any_shape(batch, length, heads, padding, stage):
    model = tiny_models.build("mistral")
    ids = torch.randint(5, 80, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, : min(padding, length - 1)] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    rows = torch.rand(batch, length) < 0.5
    part = family_checks.Identity(stage, heads=heads, rows=rows)
    probe = family_checks.Weights(heads=heads, rows=rows)
    out, _ = run(model, given, part, probe)
    assert torch.allclose(out[mask.bool()], family_checks.result(model, given)[mask.bool()], atol=1e-5)
    size = int(rows.sum(1).max())
    for weights in probe.seen.get(0, []):
        assert weights.shape == (batch, len(heads), size, length)
    assert bool(probe.seen) == (size > 0)
