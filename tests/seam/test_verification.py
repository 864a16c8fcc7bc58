"""A forward that verifies a tree of tokens acts, row by row, as decoding each of its sequences one token at a time."""

import copy
import threading

import family_checks
import pytest
import tiny_models
import torch
from transformers import DynamicCache

import heedful
from heedful.seam import Verification

PARENTS = [-1, 0, 0, 1, 1, 2, 3]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]
PATHS = [[0, 1, 3, 6], [0, 1, 4], [0, 2, 5]]
PROMPT = 12


class Sharpen(heedful.Edit):
    def logits(self, call, logits):
        return 3 * logits


class Flatten(heedful.Edit):
    def probabilities(self, call, probabilities):
        return probabilities.sqrt()


class Turn(heedful.Edit):
    def queries_keys(self, call, query, key):
        return query.flip(-1), key


class Double(heedful.Edit):
    def outputs(self, call, output):
        return 2 * output


def prefilled(model, given):
    cache = DynamicCache()
    with torch.no_grad():
        model(**given, past_key_values=cache)
    return cache


def decode(model, given, cache, tokens):
    """Logits (B, len, V) of feeding tokens (B, len) one by one."""
    mask, out = given["attention_mask"], []
    for token in tokens.split(1, 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        with torch.no_grad():
            position = mask.sum(1, keepdim=True) - 1
            out.append(model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    return torch.cat(out, 1)


def verify(model, given, cache, tokens, generated, empty=()):
    """Logits (B, n, V) of one forward over the tree whose root is the generated token number `generated`."""
    start, n = cache.get_seq_length(), len(PARENTS)
    prefix = torch.cat([given["attention_mask"], torch.ones(2, start - PROMPT, dtype=torch.long)], 1).bool()
    ancestors = torch.zeros(n, n, dtype=torch.bool)
    for i, parent in enumerate(PARENTS):
        ancestors[i] = ancestors[parent] if parent >= 0 else False
        ancestors[i, i] = True
    seen = torch.cat([prefix[:, None].expand(2, n, -1), ancestors.expand(2, n, n)], 2)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    depths = torch.tensor(DEPTHS)
    steps = (generated + depths).repeat(2, 1)
    for sample, row in empty:
        steps[sample, row] = -1
    verification = Verification(model)
    with verification.rows(steps, prompt_length=PROMPT, lengths=torch.full((2,), start), start=start), torch.no_grad():
        positions = prefix.sum(1, keepdim=True) + depths
        logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return logits, verification


WHERE = torch.zeros(2, 20, dtype=torch.bool)
WHERE[0, [3, 11, 13, 14]] = True
WHERE[1, [9, 12, 16]] = True

PARTS = {
    "last": lambda: [Sharpen(rows="last", heads=[0, 3]), Double(rows="last", layers=[1])],
    "generated": lambda: [Sharpen(rows="generated"), Flatten(rows="generated", heads=[2])],
    "all rows": lambda: [Sharpen(heads=[1]), Flatten(), Double(layers=[2]), Turn(layers=[0])],
    "tokens": lambda: [Sharpen(rows=WHERE), Double(rows=WHERE, heads=[1, 0])],
    "steps": lambda: [Sharpen(steps=[0, 2]), Double(steps=range(1, 4), heads=[2]), Flatten(steps=[3], rows="last")],
    "phases": lambda: [Sharpen(steps="prefill"), Flatten(steps="decode"), Turn(rows="last", steps="decode")],
    "tokens and steps": lambda: [Sharpen(rows=WHERE, steps=[1, 2, 4])],
}


@pytest.mark.parametrize("generated", [0, 2])
@pytest.mark.parametrize("parts", PARTS)
def test_each_row_is_the_decode_step_it_stands_for(parts, generated):
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")
    torch.manual_seed(0)
    before, tree = torch.randint(5, 80, (2, generated)), torch.randint(5, 80, (2, len(PARENTS)))
    plain = verify(model, given, prefilled(model, given), tree, 0)[0]
    changed = False
    with heedful.attach(model, *PARTS[parts]()):
        cache = prefilled(model, given)
        if generated:
            decode(model, given, cache, before)
        found, _ = verify(model, given, copy.deepcopy(cache), tree, generated)
        for path in PATHS:
            cache = prefilled(model, given)
            one_by_one = decode(model, given, cache, torch.cat([before, tree[:, path]], 1))[:, generated:]
            assert torch.allclose(found[:, path], one_by_one, atol=2e-5)
            changed = changed or not torch.allclose(plain[:, path], one_by_one, atol=1e-2)
    assert changed
    again, _ = verify(model, given, prefilled(model, given), tree, 0)
    assert torch.equal(plain, again)


class Look(heedful.Probe):
    def __init__(self, **selectors):
        super().__init__(**selectors)
        self.calls, self.accepted = [], []

    def outputs(self, call, output):
        self.calls.append(call)

    def accept(self, verification, paths):
        self.accepted.append((verification, paths))


def test_what_a_part_is_told():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")
    probes = Look(layers=[1], rows="last"), Look(layers=[1]), Look(layers=[0, 1], steps=[1]), Look(steps="prefill")
    cache = prefilled(model, given)
    with heedful.attach(model, *probes):
        _, verification = verify(model, given, cache, torch.randint(5, 80, (2, 7)), 0, empty=[(0, 6), (1, 1), (1, 3)])
        verification.accept([[0, 1, 3], [0, 2]])
    last, every, step, prefill = probes
    assert [c.phase for c in last.calls + every.calls + step.calls] == ["decode"] * 4
    assert last.calls[0].rows.tolist() == [[0, 1, 2, 3, 4, 5], [0, 2, 4, 5, 6, -1]]
    assert every.calls[0].rows is None
    assert every.calls[0].real_rows().sum(1).tolist() == [6, 5]
    assert step.calls[0].rows.tolist() == [[1, 2], [2, -1]]
    assert prefill.calls == []
    told = every.calls[0].verification
    assert (told.prompt_length, told.start, told.lengths.tolist()) == (12, 12, [12, 12])
    assert all(p.accepted == [(verification, [[0, 1, 3], [0, 2]])] for p in probes)  # once, however many layers


def test_outside_a_verification_nothing_is_left():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    probe = Look(layers=[1])

    def fails():
        verification = Verification(model)
        with verification.rows(torch.zeros(2, 12).long(), prompt_length=0, lengths=torch.zeros(2), start=0):
            # Another thread that runs the same model does not take part.
            thread = threading.Thread(target=family_checks.result, args=(model, given))
            thread.start()
            thread.join()
            family_checks.result(model, given)
            raise KeyboardInterrupt

    with heedful.attach(model, probe):
        with pytest.raises(KeyboardInterrupt):
            fails()
        family_checks.result(model, given)
    assert [c.verification is None for c in probe.calls] == [True, False, True]
    assert probe.calls[-1].phase == "prefill"
