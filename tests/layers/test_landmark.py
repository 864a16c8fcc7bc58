"""Landmarks in models: the cache against the grouped softmax of the whole, insertion, generation, packed rows, saving, training."""

import copy

import pytest
import torch
import transformers
from processes import run_on_two
from tiny_models import build

import heedful
from heedful.layers import LandmarkAttention, LandmarkCache, convert_to_landmark, load_landmark
from heedful.layers.landmark.cache import rotate

FAMILIES = {"llama": {}, "qwen3": {}, "mistral": {"sliding_window": 64}, "gemma3_text": {"sliding_window": 64}}


def landmark_model(family="llama", block_size=3, top_k=2, train_length=16, **changes):
    model = build(family, **(FAMILIES.get(family, {}) | changes))
    return convert_to_landmark(model, block_size, top_k=top_k, train_length=train_length)


def ids(rows=2, length=30, seed=0):
    return torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached(layer, x, chunks, **options):
    cache = LandmarkCache(7, **options)
    parts = []
    with torch.no_grad():
        for chunk in x.split(chunks, 1):
            step = cache.begin_slots(x.shape[0], chunk.shape[1], x.device)
            parts.append(layer(chunk, cache=cache, step=step))
            cache.finish()
    return torch.cat(parts, 1), cache


class Rows(heedful.Probe):
    def outputs(self, call, output):
        pass


class Scores(heedful.Edit):
    def logits(self, call, logits):
        return logits


# --- the cache -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [3, 10, 7, 1, 29], [8] * 6 + [2]])
def test_enough_blocks_are_all_blocks(chunks):
    """k at least the cached blocks, true positions: the whole's grouped softmax, for every chunking."""
    torch.manual_seed(0)
    layer = LandmarkAttention(32, 4, num_kv_heads=2).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    want = layer(x, torch.arange(50) % 8 == 7)
    for options in ({}, {"retrieval": "per_layer"}, {"retrieval": "per_chunk", "offload": True}, {"positions": "true"}):
        got, _ = cached(layer, x, chunks, top_k=10, **options)
        assert torch.allclose(got, want, atol=1e-10)


def test_autocast_with_a_cache():
    """Also where a model hands over queries and keys wider than values."""
    torch.manual_seed(0)
    layer, x = LandmarkAttention(32, 4, num_kv_heads=2), torch.randn(1, 60, 32)
    model, text = landmark_model(), ids(1, 40)
    with torch.no_grad():
        want, logits = cached(layer, x, 13, top_k=9)[0], model(text).logits
        with torch.autocast("cpu", torch.bfloat16):
            got, cache = cached(layer, x, 13, top_k=9)
            low = model(text, past_key_values=LandmarkCache(3, 50)).logits
    assert got.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert (got - want).norm() < 0.02 * want.norm()
    assert (low - logits).norm() < 0.05 * logits.norm()


def by_hand(layer, x, chunks, k, stingy):
    """Retrieval per head and token, in loops, from the card's text: keys are rotated at the positions of each query's view."""
    size, heads, dim = 8, layer.num_heads, layer.head_dim
    q, k_, v = (
        proj(x)[0].unflatten(1, (-1, dim)).transpose(0, 1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k_, v = (t.repeat_interleave(heads // layer.num_kv_heads, 0) for t in (k_, v))
    turn = lambda t, at: rotate(t, torch.as_tensor(at), layer.inv_freq)  # noqa: E731
    out, first = torch.zeros_like(q), 0
    for chunk in chunks:
        n = first // size
        base = n if n <= k or not stingy else k + 1
        for i in range(first, first + chunk):
            for h in range(heads):
                query = turn(q[h, i], base * size + i - n * size)
                score = lambda j, at: float(query @ turn(k_[h, j], at) * dim**-0.5)  # noqa: B023, E731
                place = [b if n <= k or not stingy else max(0, b - (n - k) + 1) for b in range(n)]
                marks = [score(b * size + size - 1, place[b] * size + size - 1) for b in range(n)]
                picked = sorted(sorted(range(n), key=lambda b: -marks[b])[:k])
                groups, logits, values = [], [], []
                for j, b in enumerate(picked):
                    at = (b if n <= k or not stingy else j + (b >= n - k)) * size
                    inner = torch.tensor([score(b * size + o, at + o) for o in range(size - 1)], dtype=x.dtype)
                    groups.append(
                        (score(b * size + size - 1, at + size - 1), inner, range(b * size, b * size + size - 1))
                    )
                local = n * size
                for b in range(n, i // size):
                    inner = torch.tensor(
                        [score(b * size + o, (base + b - n) * size + o) for o in range(size - 1)], dtype=x.dtype
                    )
                    mark = score(b * size + size - 1, (base + b - n) * size + size - 1)
                    groups.append((mark, inner, range(b * size, b * size + size - 1)))
                    local = (b + 1) * size
                local = max(local, i // size * size)
                for j in range(local, i + 1):
                    if j % size != size - 1:
                        logits.append(score(j, base * size + j - n * size))
                        values.append(v[h, j])
                for mark, inner, where in groups:
                    logits.append(mark)
                    values.append(inner.softmax(0) @ v[h, list(where)])
                if logits:
                    out[h, i] = torch.tensor(logits, dtype=x.dtype).softmax(0) @ torch.stack(values)
        first += chunk
    return layer.o_proj(out.transpose(0, 1).flatten(1))[None]


@pytest.mark.parametrize("stingy", [True, False])
def test_retrieval_by_hand(stingy):
    torch.manual_seed(1)
    layer = LandmarkAttention(16, 2).double()
    x = torch.randn(1, 60, 16, dtype=torch.float64)
    chunks = [11, 1, 20, 8, 20]
    got, _ = cached(layer, x, chunks, top_k=2, positions="stingy" if stingy else "true")
    with torch.no_grad():
        assert torch.allclose(got, by_hand(layer, x, chunks, 2, stingy), atol=1e-9)


def test_one_set_for_a_step_or_a_chunk_and_portions(monkeypatch):
    torch.manual_seed(0)
    layer = LandmarkAttention(32, 4).double()
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    chosen = {}
    for retrieval in ("per_head", "per_layer", "per_chunk"):
        _, cache = cached(layer, x, [80, 10], top_k=3, retrieval=retrieval, keep_retrieved=True)
        chosen[retrieval] = cache.layers[0].retrieved
    assert chosen["per_head"].shape == (2, 4, 10, 3)
    assert (chosen["per_head"].diff(dim=-1) > 0).all()
    assert (chosen["per_layer"] == chosen["per_layer"][:, :1]).all()
    assert chosen["per_chunk"].shape == (2, 4, 1, 3)
    whole, _ = cached(layer, x, [40, 50], top_k=3)
    from heedful.layers.landmark import cache as module

    monkeypatch.setattr(module, "_GATHERED", 1)
    assert torch.allclose(cached(layer, x, [40, 50], top_k=3)[0], whole, atol=1e-12)


def test_distances_stay_within_training():
    """With stingy positions a key far back gives the same scores however far back it is."""
    torch.manual_seed(0)
    layer = LandmarkAttention(16, 2).double()
    needle, noise = torch.randn(2, 1, 8, 16, dtype=torch.float64)
    query = torch.randn(1, 1, 16, dtype=torch.float64)
    results = []
    for blocks in (6, 40):
        x = torch.cat([needle, *[0 * noise] * (blocks - 1), query], 1)
        results.append(cached(layer, x, [8] * blocks + [1], top_k=2)[0][:, -1])
    assert torch.allclose(*results, atol=1e-9)


def test_rotary_frequencies_stay_float32():
    layer = LandmarkAttention(32, 2, rope_theta=500.0)
    want = 500.0 ** -(torch.arange(8) / 8)
    for moved in (copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).double()):
        assert torch.equal(moved.inv_freq, want)
    with torch.device("meta"):
        empty = LandmarkAttention(32, 2, rope_theta=500.0)
    assert torch.equal(empty.to_empty(device="cpu").inv_freq, want)


def test_cache_is_refused_what_it_cannot():
    for options in ({"block_size": 0}, {"top_k": 0}, {"retrieval": "best"}, {"positions": "far"}):
        with pytest.raises(ValueError):
            LandmarkCache(**options)
    layer, x = LandmarkAttention(16, 2), torch.randn(1, 5, 16)
    cache = LandmarkCache(7)
    with pytest.raises(ValueError, match="gradients"):
        layer(x, cache=cache, step=cache.begin_slots(1, 5, x.device))
    with pytest.raises(ValueError, match="is_landmark"):
        layer(x)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(3)
    _, cache = cached(layer, x, 5)
    with pytest.raises(ValueError, match="1 sequences and the call has 2"):
        cache.begin_slots(2, 5, x.device)
    with pytest.raises(ValueError, match="from the caller"):
        landmark_model(block_size=7, train_length=40)(ids(1, 5), past_key_values=cache)


# --- models ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Chunked prefill, one token at a time, left padding and packed rows against the whole's grouped softmax; generation."""
    model = landmark_model(family)
    x = ids()
    with torch.no_grad():
        want = model(x).logits
        prefill = model(x, past_key_values=LandmarkCache(3, 50)).logits
        assert torch.allclose(prefill, want, atol=2e-5)
        cache = LandmarkCache(3, 50)
        steps = [model(x[:, i : i + 1], past_key_values=cache).logits for i in range(30)]
        assert torch.allclose(torch.cat(steps, 1), want, atol=2e-5)
        assert cache.get_seq_length() == 30
        padded = torch.zeros(2, 36, dtype=torch.long)
        padded[0, 6:], padded[1, 1:] = x[0], torch.cat([x[1], x[1, :5]])
        mask = (torch.arange(36) >= torch.tensor([[6], [1]])).long()
        whole = model(padded, attention_mask=mask).logits
        assert torch.allclose(whole[0, 6:], want[0], atol=2e-5)
        assert torch.allclose(whole[1, 1:31], want[1], atol=2e-5)
        cache = LandmarkCache(3, 50)
        parts = [model(padded[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits]
        for i in range(20, 36):
            parts.append(model(padded[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits)
        assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=2e-5)
        positions = torch.cat([torch.arange(11), torch.arange(19)]).expand(2, -1)
        packed = model(x, position_ids=positions).logits
        assert torch.allclose(packed, torch.cat([model(x[:, :11]).logits, model(x[:, 11:]).logits], 1), atol=2e-5)
    out = model.generate(x, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert out.shape == (2, 39)
    assert not (out == model.config.landmark["token_id"]).any()
    alone = model.generate(
        padded[:, :20], attention_mask=mask[:, :20], max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    single = model.generate(padded[:1, 6:20], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(alone[0, 20:], single[0, 14:])


def test_landmarks_are_where_they_should_be():
    model = landmark_model()
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = ids(1, 7)
    model(x)
    token = model.config.landmark["token_id"]
    a, b, c, d, e, f, g = x[0].tolist()
    assert seen[0][0].tolist() == [a, b, c, token, d, e, f, token, g]
    model.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    assert [s.shape[1] for s in seen[1:]] == [
        4,
        4,
        1,
        1,
        2,
        1,
    ]  # chunks of a block; a landmark goes with the token before it


def test_positions_stay_within_training_from_turn_to_turn(monkeypatch):
    """A text that goes on behind an unfinished block, in several chunks; a row's chunks do not depend on the other's."""
    model, highest, x = landmark_model(train_length=24), [], ids(2, 70)
    begin = LandmarkCache.begin

    def watch(*args):
        step = begin(*args)
        highest.append(int(step.positions.max()))
        return step

    monkeypatch.setattr(LandmarkCache, "begin", watch)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :4] = 0
    cache, alone = LandmarkCache(3, 2), LandmarkCache(3, 2)
    with torch.no_grad():
        for a, b in ((0, 17), (17, 70)):
            got = model(x[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            want = model(x[1:, max(4, a) : b], past_key_values=alone).logits
            assert torch.allclose(got[1:, max(4, a) - a :], want, atol=2e-5)
    assert max(highest) == 23


def test_beam_search_and_errors_of_generation():
    model = landmark_model()
    beams = model.generate(ids(), num_beams=3, max_new_tokens=5, min_new_tokens=5)
    assert beams.shape == (2, 35)
    with pytest.raises(ValueError, match="LandmarkCache"):
        model.generate(ids(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="block_size"):
        model(ids(), past_key_values=LandmarkCache(5))
    with pytest.raises(ValueError, match="padding mask"):
        model(ids(), attention_mask=torch.ones(2, 1, 30, 30))
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids(), position_ids=torch.arange(30)[None] % 15, use_cache=True)
    with pytest.raises(ValueError, match=r"landmark model .* use model\.generate"):
        heedful.generate(model, ids(), max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="knows no landmarks"):
        model(ids())
    model.set_attn_implementation("heedful_landmark")
    with heedful.attach(model, Rows(layers=[1])) as attached:  # parts see text and landmarks
        model(ids())
    assert attached.report()[0]["rows"] == 2 * 40
    for part in (heedful.HiPAttention(), Scores()):  # made for one softmax over all keys
        with pytest.raises((ValueError, RuntimeError), match="landmark"), heedful.attach(model, part):
            model(ids())


def test_saved_and_loaded(tmp_path):
    model = landmark_model()
    x = ids()
    want, text = model(x, labels=x), model.generate(x, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path)
    again = load_landmark(tmp_path)
    assert again.config.landmark == model.config.landmark
    got = again(x, labels=x)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(again.generate(x, max_new_tokens=5, do_sample=False), text)
    assert torch.equal(copy.deepcopy(model)(x).logits, want.logits)
    build("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no landmark model"):
        load_landmark(tmp_path / "plain")


@pytest.mark.parametrize("tied", [True, False])
def test_new_row_is_the_mean(tied):
    model = build("llama", tie_word_embeddings=tied)
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    model = convert_to_landmark(model, 3, top_k=2, train_length=16)
    for old, layer in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(layer.weight[:-1], old)
        assert torch.allclose(layer.weight[-1], old.mean(0), atol=1e-6)
    x = ids()
    logits = model(x, labels=x)
    want = torch.nn.functional.cross_entropy(logits.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert torch.allclose(logits.loss, want, atol=1e-6)
    kept = convert_to_landmark(build("llama"), 3, landmark_token_id=90, top_k=2, train_length=16)
    assert kept.get_input_embeddings().weight.shape[0] == 96


def test_models_that_cannot_are_refused_by_name():
    for family, why in {
        "gemma2": "softcap", "gpt_oss": "sink", "gpt2": "rotary", "bert": "ForCausalLM", "gemma3": "stacks", "phi3": "q_proj",
        "t5": "stacks", "cohere": "halves",
    }.items():  # fmt: skip
        try:
            model = build(family)
        except KeyError:
            continue
        with pytest.raises(ValueError, match=why):
            convert_to_landmark(model, 3, top_k=2, train_length=16)
    with pytest.raises(ValueError, match="already"):
        convert_to_landmark(landmark_model(), 3)
    with pytest.raises(ValueError, match="sliding window"):
        convert_to_landmark(build("mistral"), 3, top_k=2, train_length=16)
    with pytest.raises(ValueError, match="has no room"):
        convert_to_landmark(build("llama"), 3, top_k=2, train_length=12)
    with pytest.raises(ValueError, match="landmark_token_id"):
        convert_to_landmark(build("llama"), 3, top_k=2, train_length=16, landmark_token_id=1000)


def test_checkpointing_gives_the_same_gradients_and_all_weights_learn():
    model = landmark_model().train()
    x = ids()
    model(x, labels=x).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert want["model.embed_tokens.weight"][model.config.landmark["token_id"]].abs().max() > 0
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(x, labels=x).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, want[name], atol=1e-6), name


def test_embeddings_and_hidden_states():
    model = landmark_model()
    x = ids()
    out = model(x, output_hidden_states=True)
    embeds = model.get_input_embeddings()(x)
    assert torch.allclose(model(inputs_embeds=embeds).logits, out.logits, atol=1e-5)
    assert all(h.shape[1] == 30 for h in out.hidden_states)
    with torch.no_grad():
        long = model(x, use_cache=True, output_hidden_states=True)
    assert all(h.shape[1] == 30 for h in long.hidden_states)


def test_lora_trains_the_new_row(tmp_path):
    peft = pytest.importorskip("peft")
    model = landmark_model()
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, config)
    x = ids()
    tuned(input_ids=x, labels=x).loss.backward()
    grads = [p.grad for n, p in tuned.named_parameters() if "embed_tokens.modules_to_save" in n]
    assert grads[0][model.config.landmark["token_id"]].abs().max() > 0
    merged = tuned.merge_and_unload()
    assert merged.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 33)


def test_trainer_works_unchanged(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ids(8, 20)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=landmark_model(), args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_two_processes_give_the_gradients_of_one(tmp_path):
    answers = run_on_two(
        """
        from tiny_models import build
        from heedful.layers import convert_to_landmark
        model = convert_to_landmark(build("llama"), 3, top_k=2, train_length=16)
        x = torch.randint(3, 80, (4, 20), generator=torch.Generator().manual_seed(0))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        mine = x[2 * rank : 2 * rank + 2]
        wrapped(input_ids=mine, labels=mine, use_cache=False).loss.backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        for a, p in zip(got, model.parameters()):
            torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=0)
        print("same")
        """,
        tmp_path,
    )
    assert answers == ["same\n"] * 2
