"""HiPAttention on a GPU: decode steps in a CUDA graph, refreshes and bounded positions included, and its kernels."""

import pytest
import torch
from tiny_models import BOS, build
from transformers import StaticCache

import heedful
from heedful import HiPAttention, attach, register_attention

pytestmark = pytest.mark.gpu

SIZES = {"top_k": 32, "block_size_q": 16, "sliding_window": 32, "num_sink_tokens": 4}
CAPACITY, PROMPT, PADDING = 256, 140, 16


def prompt(seed, batch=2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([3 + torch.randint(0, 86, (PROMPT,), generator=g) for _ in range(batch)])
    ids[:, 0] = BOS
    return ids.cuda()


class Decoder:
    """Greedy decoding over a static cache, step by step or by replaying one captured step."""

    def __init__(self, model, batch=2):
        self.model, self.batch = model, batch
        self.cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        self.position = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        self.hidden, self.seen = False, True
        if model.config._attn_implementation == "eager":
            self.hidden, self.seen = torch.finfo(model.dtype).min, 0.0
        kind = torch.bool if self.seen is True else model.dtype
        self.mask = torch.full((batch, 1, 1, CAPACITY), self.hidden, dtype=kind, device="cuda")
        self.graph = None

    def prefill(self, ids):
        self.cache.reset()
        real = torch.ones_like(ids)
        real[1, :PADDING] = 0
        position = (real.cumsum(1) - 1).clamp(min=0)
        logits = self.model(ids, attention_mask=real, position_ids=position, past_key_values=self.cache).logits
        self.mask.fill_(self.hidden)
        self.mask[:, 0, 0, :PROMPT] = torch.where(real.bool(), self.seen, self.hidden)
        self.position.copy_(position[:, -1:])
        self.length = PROMPT
        return self._next(logits)

    def _next(self, logits):
        logits = logits[:, -1].clone()
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.mask[:, :, :, self.length] = self.seen
        self.length += 1
        return logits

    def _forward(self):
        return self.model(
            self.token, attention_mask=self.mask, position_ids=self.position, past_key_values=self.cache
        ).logits

    def step(self):
        return self._next(self._forward())

    def capture(self):
        self.graph = torch.cuda.CUDAGraph()
        before = [layer.cumulative_length.clone() for layer in self.cache.layers]
        with torch.cuda.graph(self.graph):
            self.out = self._forward()
        assert all(torch.equal(a, layer.cumulative_length) for a, layer in zip(before, self.cache.layers, strict=True))

    def replay(self):
        self.graph.replay()
        return self._next(self.out)


@torch.no_grad()
@pytest.mark.parametrize("trained_length", [None, 96])
@pytest.mark.parametrize(
    ("family", "dtype", "method"),
    [
        ("llama", torch.float32, "center"),
        ("llama", torch.float32, "oracle"),
        ("llama", torch.bfloat16, "center"),
        ("qwen3", torch.bfloat16, "oracle"),
        ("gpt_oss", torch.bfloat16, "center"),  # its experts cannot be captured in float32
    ],
)
def test_a_captured_step_is_the_eager_one_and_serves_later_sequences(family, dtype, method, trained_length):
    changes = {"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {"head_dim": 32}
    attn = "eager" if family == "gpt_oss" else None
    model = build(family, attn=attn, dtype=dtype, **changes).cuda()
    given = {**SIZES, "mask_refresh_interval": 4, "trained_length": trained_length, "decode_sample_method": method}
    steps, expected = 12, []
    eager = HiPAttention(**given)
    with attach(model, eager):
        for seed in (0, 1):
            decoder = Decoder(model)
            expected.append([decoder.prefill(prompt(seed)), *(decoder.step() for _ in range(steps))])
    part = HiPAttention(**given)
    with attach(model, part) as attached:
        decoder = Decoder(model)
        found = [decoder.prefill(prompt(0)), decoder.step()]
        decoder.capture()
        found += [decoder.replay() for _ in range(steps - 1)]
        again = [decoder.prefill(prompt(1)), *(decoder.replay() for _ in range(steps))]
    for mine, theirs in ((found, expected[0]), (again, expected[1])):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=1e-4, rtol=1e-4)
    for layer, line in enumerate(attached.report()):
        one = eager.summary(layer)
        assert line["refreshes"] == one["refreshes"] == 2 * 3  # tokens 0, 4 and 8 of each sequence
        assert line["keys_read"] == one["keys_read"]
        assert line["keys_visible"] == one["keys_visible"]


@torch.no_grad()
def test_under_capture_a_mask_that_does_not_fit_gives_nan_and_the_first_step_must_be_eager():
    model = build("llama", head_dim=32).cuda()
    with attach(model, HiPAttention(**SIZES, mask_refresh_interval=4)):
        decoder = Decoder(model)
        decoder.prefill(prompt(0))
        with pytest.raises(ValueError, match="after one such step outside the graph"):
            decoder.capture()
        torch.cuda.synchronize()
        decoder = Decoder(model)
        decoder.prefill(prompt(0))
        decoder.step()
        decoder.capture()
        assert torch.isfinite(decoder.replay()).all()
        decoder.mask[0, 0, 0, 50] = False
        logits = decoder.replay()
    assert logits[0].isnan().all()
    assert torch.isfinite(logits[1]).all()


@torch.no_grad()
@pytest.mark.parametrize("how", ["attach", "by name"])
def test_generate_with_a_static_cache_compiles_around_it(how):
    model = build("llama", head_dim=32).cuda()
    ids = prompt(3)
    given = {**SIZES, "mask_refresh_interval": 4}
    options = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    with attach(model, HiPAttention(**given)):
        expected = model.generate(ids, **options)
    part = HiPAttention(**given)
    if how == "attach":
        with attach(model, part):
            found = model.generate(ids, cache_implementation="static", **options)
    else:
        register_attention("test-hip-gpu", part)
        model.set_attn_implementation("test-hip-gpu")
        found = model.generate(ids, cache_implementation="static", **options)
    torch._dynamo.reset()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert part.summary(0)["refreshes"] == 2


@torch.no_grad()
@pytest.mark.parametrize("trained_length", [None, 1024])
def test_the_bundled_model_reads_alike_with_the_kernels_and_the_reference(trained_length):
    model, tokenizer = heedful.zoo.load("classics-20m")
    model = model.cuda()
    ids = tokenizer(heedful.zoo.excerpt()[:20000], return_tensors="pt").input_ids[:, :3072].cuda()
    found = {}
    for impl in ("triton", "reference"):
        part = HiPAttention(top_k=256, sliding_window=128, impl=impl, trained_length=trained_length)
        with attach(model, part):
            found[impl] = model(ids).logits.float().log_softmax(-1)
            cost = part.summary(3)
        assert 0.1 < cost["share_of_keys_read"] < 0.6
        assert 0.5 < cost["mass_kept"] < 1
    divergence = (found["reference"].exp() * (found["reference"] - found["triton"])).sum(-1).mean()
    assert divergence < 2e-3
