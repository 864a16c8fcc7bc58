"""One forward over a tree gives every node the logits of a dense forward over its own path, and a commit leaves the
cache of a fresh prefill."""

import pytest
import torch
from tiny_models import build, inputs

from heedful.decoding.cache import TreeCache
from heedful.decoding.engine import STATIC_ROOM
from heedful.decoding.masks import MaskBuilder
from heedful.decoding.tree import VerifiedTree, topology

PARENTS = (-1, 0, 0, 1, 0, 4, 4, 6, 6, 8)
PATHS = [[0, 4, 6, 8, 9], [0, 2], [0, 1, 3]]


def path_to(node):
    path = [node]
    while PARENTS[path[0]] != -1:
        path.insert(0, PARENTS[path[0]])
    return path


def verified(model, batch, static):
    """Logits of the tree at every row of a batch after its prompt, and the cache."""
    cache = TreeCache(model, batch["input_ids"].shape[1] + STATIC_ROOM if static else None)
    given = {"attention_mask": batch["attention_mask"]}
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    rows, length = batch["input_ids"].shape
    model(batch["input_ids"], past_key_values=cache, use_cache=True, position_ids=positions, **given)
    shape = topology(PARENTS)
    tokens = torch.randint(0, 90, (rows, shape.size), generator=torch.Generator().manual_seed(3))
    masks = MaskBuilder(
        model.config.get_text_config(),
        batch["attention_mask"] if (batch["attention_mask"] == 0).any() else None,
        model.dtype,
        model.device,
        cache.capacity,
    )
    trees = [VerifiedTree(row, shape) for row in tokens.tolist()]
    logits = model(
        tokens,
        attention_mask=masks.build(trees, [length] * rows, length, shape.size),
        position_ids=positions[:, -1:] + 1 + shape.depth_tensor,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return tokens, logits, cache


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_tree_logits_and_committed_cache(name, attn, static):
    model = build(name, attn=attn, dtype=torch.float64)
    # transformers' eager attention gives NaN for padding rows in float64: its softmax is float32.
    batch = inputs(model, batch=3, length=13, padding="left" if attn == "sdpa" else None)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens, logits, cache = verified(model, batch, static)
    for node in range(len(PARENTS)):
        path = path_to(node)
        whole = torch.cat([ids, tokens[:, path]], dim=1)
        whole_mask = torch.cat([mask, mask.new_ones(3, len(path))], dim=1)
        dense = model(whole, attention_mask=whole_mask, position_ids=(whole_mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(logits[:, node], dense[:, -1], atol=1e-5, rtol=1e-5)

    # Row b keeps PATHS[b]; shorter paths repeat their first move, as the engine does.
    length, longest = ids.shape[1], max(map(len, PATHS))
    sources = torch.tensor([[length + node for node in p] + [length] * (longest - len(p)) for p in PATHS])
    targets = torch.tensor([[length + i for i in range(len(p))] + [length] * (longest - len(p)) for p in PATHS])
    cache.commit(sources, targets, length + longest)
    for row, path in enumerate(PATHS):
        whole = torch.cat([ids[row : row + 1], tokens[row : row + 1, path]], dim=1)
        whole_mask = torch.cat([mask[row : row + 1], mask.new_ones(1, len(path))], dim=1)
        fresh = TreeCache(model)
        model(
            whole,
            attention_mask=whole_mask,
            position_ids=(whole_mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=fresh,
            use_cache=True,
        )
        for kept, expected in zip(cache.layers, fresh.layers, strict=True):
            end = length + len(path)
            real = whole_mask[0].bool()
            for got, want in ((kept.keys, expected.keys), (kept.values, expected.values)):
                torch.testing.assert_close(got[row, :, :end][:, real], want[0][:, real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_cache_grows_in_place_and_forgets_rejected_rows():
    model = build("llama")
    cache, ids = TreeCache(model), torch.randint(0, 90, (1, 40))
    model(ids, past_key_values=cache, use_cache=True)
    room = cache.layers[0]._room
    for _ in range(20):
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        cache.commit(None, None, 40)
    assert cache.layers[0]._room is room
    assert cache.get_seq_length() == 40
