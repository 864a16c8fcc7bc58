"""The demo: one method of each kind on the bundled model, with real text, on the CPU. `heedful demo` shows and saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful.decoding import TokenRecycling
from heedful.interp import HeadRemoval, HeadScores, needle_prompts, recall_without_heads, retrieval_scores
from heedful.steering import AttentionCalibration, SinkMap, sink_map

STAGES = ("decoding", "retrieval heads", "removing heads", "HiP attention", "attention sinks")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Continuation:
    """One prompt continued twice, token by token and with drafted trees."""

    name: str
    prompt: str
    text: str
    same: bool
    new_tokens: int
    tokens_per_step: float
    plain_tokens_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class AttentionView:
    """Where one head looks while the model writes the answer: a weight for each token of the prompt."""

    layer: int
    head: int
    weights: list[float]


@dataclass
class Demo:
    """What the demo found. `to_json` has the figures; the report draws the rest."""

    model: str
    continuations: list[Continuation] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    plain_tokens_per_second: float = 0.0
    tokens_per_second: float = 0.0
    scores: HeadScores | None = None
    removal: HeadRemoval | None = None
    removed: int = 0
    tokens: list[str] = field(default_factory=list)
    answer: str = ""
    views: list[AttentionView] = field(default_factory=list)
    hip: dict[str, Any] = field(default_factory=dict)
    hip_picture: list[list[float]] = field(default_factory=list)
    sinks: SinkMap | None = None
    mass_moved: dict[tuple[int, int], float] = field(default_factory=dict)
    loss: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0

    def late_mass(self) -> Tensor:
        """``(L, H)``: the share of a row's attention that rests on late sinks, mean over the rows."""
        assert self.sinks is not None
        length = self.sinks.means.shape[-1]
        seen_by = torch.arange(length, 0, -1) / length  # token j is seen by the rows from j on
        return (self.sinks.means.masked_fill(~self.sinks.late, 0.0) * seen_by).sum(-1)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        assert self.scores is not None
        assert self.removal is not None
        without_random = self.removal.without_random_heads[self.removed]
        steps = len(self.accepted)
        return {
            "model": self.model,
            "lossless": all(continuation.same for continuation in self.continuations),
            "plain_tokens_per_second": self.plain_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "speedup": self.tokens_per_second / self.plain_tokens_per_second,
            "tokens_per_forward": sum(self.accepted) / steps if steps else 1.0,
            "retrieval_heads": [[layer, head, score] for layer, head, score in self.scores.retrieval_heads()],
            "recall": self.removal.recall,
            "recall_without_retrieval_heads": self.removal.without_retrieval_heads[self.removed],
            "recall_without_random_heads": sum(without_random) / len(without_random),
            "hip": {"relative_error": self.hip["relative_error"], "keys_read": self.hip["keys_read"]},
            "calibration": {"mass_moved": [[layer, head, mass] for (layer, head), mass in self.mass_moved.items()]},
            "seconds": self.seconds,
        }


def run_demo(model_name: str = "classics-20m", *, progress: Progress | None = None) -> Demo:
    """Runs the five stages on a bundled model and returns what they found.

    Args:
        model_name: a model of `heedful.zoo`. progress: called with (stage, done, total).
    """
    began = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    model, tokenizer = heedful.zoo.load(model_name)
    text = heedful.zoo.excerpt()
    demo = Demo(model_name)
    with torch.no_grad():
        _decode(demo, model, tokenizer, text, report)
        _find_heads(demo, model, tokenizer, text, report)
        _prune_attention(demo, model, tokenizer, text, report)
        _calibrate_sinks(demo, model, tokenizer, text, report)
    demo.seconds = time.perf_counter() - began
    return demo


def decoding_prompts(tokenizer: Any, text: str) -> list[tuple[str, str]]:
    """Four kinds of prompt, in which more or less of what follows is determined."""
    paragraphs = [paragraph for paragraph in text.split("\n\n") if 600 < len(paragraph) < 1500]
    quoted = paragraphs[3]
    names = (
        "Ada Byron",
        "Tom Larch",
        "Ruth Vane",
        "Ned Marlow",
        "Ivy Castle",
        "Sam Orchard",
        "Eve Harker",
        "Hal Penrose",
    )
    pairs = [f"{name}: {(index + 3) * 7919 % 90000 + 10000}" for index, name in enumerate(names)]
    question = (
        "Question: A baker makes 24 loaves in the morning and 18 in the afternoon. She sells 30 of them. "
        "How many loaves are left?\nAnswer:"
    )
    return [
        ("a passage quoted again", f"{quoted}\n\n{paragraphs[5]}\n\n{quoted[:120]}"),
        ("a list asked again", "Register\n\n" + "\n".join(pairs) + "\n\nAgain:\n" + pairs[2] + "\n" + pairs[5][:8]),
        ("a sum", question),
        ("prose", paragraphs[8]),
    ]


def _decode(demo: Demo, model: Any, tokenizer: Any, text: str, report: Progress) -> None:
    drafter = TokenRecycling()
    prompts = decoding_prompts(tokenizer, text)
    warm = tokenizer(prompts[-1][1], return_tensors="pt").input_ids
    heedful.generate(model, warm, TokenRecycling(), max_new_tokens=8, do_sample=False)  # times the tree sizes, once
    seconds = {"plain": 0.0, "drafted": 0.0}
    tokens = 0
    for number, (name, prompt) in enumerate(prompts):
        report(STAGES[0], number, len(prompts))
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        plain = heedful.generate(model, ids, max_new_tokens=96, do_sample=False)
        drafted = heedful.generate(model, ids, drafter, max_new_tokens=96, do_sample=False)
        seconds["plain"] += plain.stats.decode_seconds
        seconds["drafted"] += drafted.stats.decode_seconds
        tokens += sum(drafted.stats.new_tokens) - 1
        demo.accepted += drafted.stats.accepted[0]
        new = drafted.sequences[0, ids.shape[1] :]
        demo.continuations.append(
            Continuation(
                name=name,
                prompt=prompt[-240:],
                text=tokenizer.decode(new, skip_special_tokens=True),
                same=torch.equal(plain.sequences, drafted.sequences),
                new_tokens=len(new),
                tokens_per_step=drafted.stats.tokens_per_step,
                plain_tokens_per_second=plain.stats.tokens_per_second,
                tokens_per_second=drafted.stats.tokens_per_second,
            )
        )
    demo.plain_tokens_per_second = tokens / seconds["plain"]
    demo.tokens_per_second = tokens / seconds["drafted"]
    report(STAGES[0], len(prompts), len(prompts))


class _WeightsOf(heedful.Probe):
    """Keeps the attention weights of the chosen heads and rows, the mean over the rows: ``weights[layer] (heads, Tk)``."""

    def __init__(self, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.weights: dict[int, Tensor] = {}

    def probabilities(self, call: heedful.AttentionCall, probabilities: Tensor) -> None:
        self.weights[call.layer] = probabilities[0].mean(1).cpu()


def _find_heads(demo: Demo, model: Any, tokenizer: Any, text: str, report: Progress) -> None:
    # Teacher forcing reads all answer rows in one forward a prompt; for numbers it gives the scores of greedy decoding.
    demo.scores = retrieval_scores(
        model, tokenizer, text, lengths=(512,), instances=4, variant="teacher-forced",
        progress=lambda done, total: report(STAGES[1], done, total),
    )  # fmt: skip
    demo.removed = min(3, max(1, len(demo.scores.retrieval_heads())))
    demo.removal = recall_without_heads(
        model, tokenizer, demo.scores, text, lengths=(512,), instances=4, counts=(demo.removed,), draws=3, variant="teacher-forced",
        progress=lambda done, total: report(STAGES[2], done, total),
    )  # fmt: skip

    prompt = needle_prompts(tokenizer, text, lengths=(256,), depths=(0.5,), instances=1, seed=7)[0]
    answer = prompt.answer_ids
    ids = torch.cat([prompt.input_ids, answer[:-1]])
    writes = torch.zeros(len(ids), dtype=torch.bool)
    writes[len(prompt.input_ids) - 1 :] = True  # the row that predicts a token is the one before it
    demo.tokens = [tokenizer.decode([token]) for token in prompt.input_ids.tolist()]
    demo.answer = tokenizer.decode(answer)
    for layer, head, _ in demo.scores.top(4):
        probe = _WeightsOf(layers=[layer], heads=[head], rows=writes)
        with heedful.attach(model, probe):
            model(input_ids=ids[None])
        weights = probe.weights[layer][0, : len(demo.tokens)]
        demo.views.append(AttentionView(layer, head, weights.tolist()))


def _prune_attention(demo: Demo, model: Any, tokenizer: Any, text: str, report: Progress) -> None:
    ids = tokenizer(text[:40_000], return_tensors="pt", verbose=False).input_ids[:, :3072]
    report(STAGES[3], 0, 2)
    dense = model(input_ids=ids).logits[0]
    report(STAGES[3], 1, 2)
    settings: dict[str, Any] = {"top_k": 256, "sliding_window": 128, "num_sink_tokens": 16}
    with heedful.attach(model, heedful.HiPAttention(**settings)) as attached:
        sparse = model(input_ids=ids).logits[0]
        lines = attached.report()
    read, visible = (sum(line[key] for line in lines) for key in ("keys_read", "keys_visible"))
    demo.hip = {
        **settings,
        "tokens": ids.shape[1],
        "relative_error": float((sparse - dense).norm() / dense.norm()),
        "keys_read": read / visible,
        "same_next_token": float((sparse.argmax(-1) == dense.argmax(-1)).float().mean()),
        "by_layer": [(line["layer"], line["share_of_keys_read"]) for line in lines],
    }
    layer = demo.scores.top(1)[0][0] if demo.scores is not None else 0
    demo.hip_picture = _read_keys(
        model, ids, layer, demo.scores.top(1)[0][1] if demo.scores is not None else 0, settings
    )
    report(STAGES[3], 2, 2)


class _Choice(heedful.Probe):
    """Which keys HiP would read for one head of one layer, pooled to 64 x 64 cells: the share of pairs that are read."""

    def __init__(self, settings: dict[str, Any], head: int, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.settings, self.head = settings, head
        self.cells = torch.zeros(64, 64)

    def queries_keys(self, call: heedful.AttentionCall, query: Tensor, key: Tensor) -> None:
        group = query.shape[1] // key.shape[1]
        kv = self.head // group
        one = query[:, self.head : self.head + 1], key[:, kv : kv + 1], call.value[:, kv : kv + 1]
        _, mask = heedful.attention.hip_attention(*one, **self.settings, scale=call.scaling, return_mask=True)
        dense = mask.dense()[0, 0]
        size = dense.shape[0] // 64
        self.cells = dense[: 64 * size, : 64 * size].float().view(64, size, 64, size).mean((1, 3))


def _read_keys(model: Any, ids: Tensor, layer: int, head: int, settings: dict[str, Any]) -> list[list[float]]:
    probe = _Choice(settings, head, layers=[layer])
    with heedful.attach(model, probe):
        model.model(input_ids=ids)
    return [[float(cell) for cell in row] for row in probe.cells]


def _calibrate_sinks(demo: Demo, model: Any, tokenizer: Any, text: str, report: Progress) -> None:
    ids = tokenizer(text[3000:9000], return_tensors="pt").input_ids[:, :768]
    report(STAGES[4], 0, 3)
    sinks = sink_map(model, ids, tokenizer=tokenizer)
    assert isinstance(sinks, SinkMap)  # one sequence, one map
    demo.sinks = sinks
    report(STAGES[4], 1, 3)
    before = model(input_ids=ids, labels=ids).loss
    strength: dict[tuple[int, int], float] = {}
    for sink in sinks.sinks():
        strength[sink.layer, sink.head] = strength.get((sink.layer, sink.head), 0.0) + sink.mean
    heads = _searched(sorted(strength, key=lambda pair: -strength[pair]), sinks.means.shape[0])[:8]
    calibration = AttentionCalibration(heads=heads)
    with heedful.attach(model, calibration):
        after = model(input_ids=ids, labels=ids).loss
    report(STAGES[4], 2, 3)
    demo.mass_moved = dict(sorted(calibration.mass_moved.items(), key=lambda item: -item[1]))
    demo.loss = (float(before), float(after))
    report(STAGES[4], 3, 3)


def _searched(heads: Sequence[tuple[int, int]], layers: int) -> list[tuple[int, int]]:
    """The paper looks for heads to calibrate in all layers but the first two and the last."""
    return [(layer, head) for layer, head in heads if 2 <= layer < layers - 1]
