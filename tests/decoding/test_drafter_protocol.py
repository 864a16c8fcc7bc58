"""What the engine hands to a drafter, and what statistics and interfaces say."""

import gc
import itertools

import numpy as np
import pytest
import torch
from decoding_tools import Chain, Empty, RandomTree, Recorder, StaticTree, padding
from tiny_models import build, inputs
from transformers import Cache, PreTrainedModel, StoppingCriteria, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput

import heedful
from heedful.decoding import (
    DraftTree,
    HiddenTransfer,
    LongSpec,
    Medusa,
    PromptLookup,
    Sequence,
    TokenRecycling,
    custom_generate,
)
from heedful.decoding.tree import topology

GREEDY = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EVERYTHING = {"logits", "hidden_states", "prompt_logits", "prompt_hidden_states", "cache"}


def run(model, given, drafter, requires=EVERYTHING, **options):
    recorder = Recorder(drafter, requires)
    return recorder, heedful.generate(model, drafter=recorder, **given, **(GREEDY | options))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_everything_a_drafter_may_require(batch, chunk):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    skip = padding(given)
    recorder, result = run(model, given, RandomTree(reference, skip), prefill_chunk_size=chunk)
    assert recorder.begun == [(model, batch)]

    ((tokens, outputs),) = recorder.prompts
    assert torch.equal(tokens, given["input_ids"])
    real = given["attention_mask"].bool()
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plain = model(**given, position_ids=positions, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits[real], plain.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.hidden_states[real], plain.hidden_states[-1][real], atol=1e-5, rtol=1e-5)
    assert outputs.cache is not None
    assert (outputs.attention_mask is None) == (batch == 1)

    so_far = [row[skip[i] : 11].tolist() for i, row in enumerate(given["input_ids"])]
    roots = reference[:, 11].tolist()
    steps = zip(recorder.proposed, recorder.updates, recorder.keys, strict=True)
    for (seen_roots, committed), (trees, outputs, paths, new_roots), kept in steps:
        assert seen_roots.tolist() == roots
        assert [c.tolist() for c in committed] == so_far
        for row, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            if tree is None:
                assert path == []
                continue
            assert path[0] == 0
            assert all(int(tree.parents[b]) == a for a, b in itertools.pairwise(path))
            so_far[row] += tree.tokens[path].tolist()
            for node in range(len(tree)):  # row i of the outputs is node i
                line = [node]
                while int(tree.parents[line[0]]) != -1:
                    line.insert(0, int(tree.parents[line[0]]))
                text = so_far[row][: len(so_far[row]) - len(path)] + tree.tokens[line].tolist()
                dense = model(torch.tensor([text]), output_hidden_states=True)
                torch.testing.assert_close(outputs.logits[row, node], dense.logits[0, -1], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(
                    outputs.hidden_states[row, node], dense.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5
                )
            keys = kept[row, :, skip[row] : skip[row] + len(so_far[row])]
            fresh = model(torch.tensor([so_far[row]]), use_cache=True).past_key_values.layers[0].keys[0]
            torch.testing.assert_close(keys, fresh, atol=1e-5, rtol=1e-5)
        roots = new_roots.tolist()
    for row in range(batch):
        assert so_far[row] + [roots[row]] == result.sequences[row, skip[row] :].tolist()


def test_nothing_more_than_required_is_handed_over():
    model = build("llama")
    recorder, _ = run(model, inputs(model, batch=1), StaticTree(None), requires=())
    for _, outputs in recorder.prompts:
        assert outputs.logits is outputs.hidden_states is outputs.cache is None
    for _, outputs, _, _ in recorder.updates:
        assert outputs.logits is outputs.hidden_states is outputs.cache is None
    assert not model.get_decoder()._forward_hooks


def test_hooks_are_gone_after_an_error():
    model = build("llama")

    class Broken(Empty):
        def propose(self, roots, committed):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(model, inputs(model, batch=1), Broken())
    assert not model.get_decoder()._forward_hooks


def test_statistics():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1, length=11)
    reference = model.generate(**given, **GREEDY)
    forwards = []
    handle = model.register_forward_pre_hook(lambda *args: forwards.append(1))
    plain = heedful.generate(model, **given, **GREEDY).stats
    assert plain.steps == len(forwards) - 1 == 17
    assert plain.tokens_per_step == 1.0
    assert plain.new_tokens == [18]
    assert plain.accepted == [[1] * 17]
    assert plain.acceptance_by_depth == []
    forwards.clear()
    stats = heedful.generate(model, drafter=Chain(reference, right=1.0), **given, **GREEDY).stats
    handle.remove()
    # A chain of 5 right drafts: 6 tokens a step, and the last step takes what is left of 17.
    assert stats.accepted == [[6, 6, 5]]
    assert stats.steps == len(forwards) - 1 == 3
    assert stats.tokens_per_step == pytest.approx(17 / 3)
    assert stats.acceptance_by_depth == [1.0] * 5
    for seconds in (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.commit_seconds):
        assert seconds > 0
    assert stats.tokens_per_second == pytest.approx(17 / stats.decode_seconds)
    assert stats.tokens_per_second_with_prefill == pytest.approx(18 / (stats.decode_seconds + stats.prefill_seconds))


def test_acceptance_by_depth_counts_trees_of_that_depth():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1, length=11)
    reference = model.generate(**given, **GREEDY)

    class Half(Chain):
        """Two right drafts and one wrong one."""

        def propose(self, roots, committed):
            truth = self.future(0, committed[0])[:2]
            wrong = (truth[-1] + 1) % 90 if truth else 0
            return [DraftTree.chain(torch.tensor([int(roots[0]), *truth, wrong]))]

    stats = heedful.generate(model, drafter=Half(reference), **given, **GREEDY).stats
    assert stats.acceptance_by_depth[:2] == [1.0, 1.0]
    assert stats.acceptance_by_depth[2] == 0.0


class Streamed(TextStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_every_token():
    model = build("llama")
    ids = inputs(model, batch=1)["input_ids"]
    expected, streamer = Streamed(), Streamed()
    reference = model.generate(ids, streamer=expected, **GREEDY)
    heedful.generate(model, ids, Chain(reference), streamer=streamer, **GREEDY)
    assert [piece.tolist() for piece in streamer.pieces] == [piece.tolist() for piece in expected.pieces]
    assert streamer.ended


def test_custom_generate_inside_transformers():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    reference = model.generate(**given, **GREEDY)
    streamer = Streamed()
    run = custom_generate(Chain(reference), streamer=streamer)
    assert torch.equal(model.generate(**given, **GREEDY, custom_generate=run), reference)
    assert run.stats.tokens_per_step > 1.5
    assert streamer.ended
    output = model.generate(**given, **GREEDY, custom_generate=run, return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, reference)
    assert torch.equal(heedful.generate(model, **given, **GREEDY, return_dict_in_generate=True).sequences, reference)


DRAFTERS = {
    "garbage": lambda model: Chain(None),
    "token recycling": lambda model: TokenRecycling(max_nodes=6),
    "sequence": lambda model: Sequence(PromptLookup(), TokenRecycling(max_nodes=6)),
    "medusa": lambda model: Medusa.for_model(model, tree=[[0], [1]]),
    "hidden transfer": lambda model: HiddenTransfer.for_model(model, tree=[[0], [1]]),
    "longspec": lambda model: LongSpec.for_model(model, window=16, tree_shape=(2,)),
}


def bytes_held(thing, seen):
    """Bytes of the tensors and arrays that a drafter holds, without the model and its cache, and a word for each list entry."""
    if id(thing) in seen or isinstance(thing, (PreTrainedModel, Cache)):
        return 0
    seen.add(id(thing))
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(bytes_held(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return 8 * len(thing) + sum(bytes_held(value, seen) for value in thing)
    return bytes_held(vars(thing), seen) if "heedful" in type(thing).__module__ else 0


@pytest.mark.parametrize("name", DRAFTERS)
def test_memory_does_not_grow_over_a_thousand_steps(name):
    """Tensors alive, and bytes that the drafter holds, after 100 steps and after 1,000."""
    model = build("llama", max_position_embeddings=4096, num_hidden_layers=1)
    drafter, steps, found = DRAFTERS[name](model), [], []

    def watched(roots, committed):
        steps.append(None)
        if len(steps) in (100, 1000):
            topology.cache_clear()  # shapes of trees, 256 at most
            gc.collect()
            tensors = sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)
            found.append((tensors, bytes_held(drafter, set())))
        return type(drafter).propose(drafter, roots, committed)

    drafter.propose = watched
    torch.manual_seed(0)  # hot sampling: few drafts come true, so that there are as many steps as tokens, nearly
    options = {"do_sample": True, "temperature": 4.0, "max_new_tokens": 3000, "stopping_criteria": [Thousand(steps)]}
    heedful.generate(model, drafter=drafter, **inputs(model, batch=1), **(GREEDY | options))
    (early, early_bytes), (late, late_bytes) = found
    assert late <= early + 5
    assert late_bytes <= early_bytes + 64


class Thousand(StoppingCriteria):
    """Ends when 1,000 steps have been drafted."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), len(self.steps) >= 1000)


def test_peft_wrapped_model():
    peft = pytest.importorskip("peft")
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    reference = wrapped.generate(**given, **GREEDY)
    assert torch.equal(heedful.generate(wrapped, drafter=RandomTree(reference), **given, **GREEDY).sequences, reference)
