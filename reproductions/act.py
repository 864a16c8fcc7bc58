"""ACT (arXiv 2406.15765): attention moved away from late sinks, in heads found on held-out data, helps a frozen model.

Part 1, exactness: the form without weights against the paper's equation on the matrix, and cached steps against one
pass. Part 2, head search on a small model trained here on keyed documents ("DOC tag key value filler filler filler" six
times, two of them with the asked key; the answer is the value of the one tagged GOOD), stopped early, because a model
that is always right has nothing to gain: accuracy on the calibration set and on fresh examples, for no head, the kept
heads, all heads and as many heads drawn at random.
Part 3, on the bundled language model: where its sinks are, the mass that calibration moves, and a head search on one of
the paper's own tasks (SST-2, zero-shot), where the data is there.

    python reproductions/act.py            # a few minutes on one idle CPU core
    python reproductions/act.py --quick    # under a minute: part 2 stops before the model has learned the task
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from _record import record
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import heedful
from heedful.steering import AttentionCalibration, HeadSet, SinkMap, mean_score, search_heads, sink_map

# ---- part 1


def exactness() -> dict[str, float]:
    """Largest differences on a random Llama-shaped model (2 layers, 8 query and 4 key heads, 300 tokens)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    figures = {}
    for dtype in (torch.float32, torch.float64):
        model = LlamaForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            for weights in (p for p in model.parameters() if p.dim() == 2):
                weights.normal_(0, 2.0 * weights.shape[1] ** -0.5)
            tokens = torch.randint(64, (2, 300))
            logits = {}
            for form in ("grouped", "weights"):
                with heedful.attach(model, AttentionCalibration(form=form, layers=[0])):
                    logits[form] = model(tokens).logits
            name = str(dtype).removeprefix("torch.")
            difference = (logits["grouped"] - logits["weights"]).norm() / logits["weights"].norm()
            figures[f"grouped_against_weights_{name}_relative"] = float(difference)
            figures[f"changed_by_calibration_{name}_relative"] = float(
                (logits["grouped"] - model(tokens).logits).norm() / logits["grouped"].norm()
            )
            cache, rule = DynamicCache(), {"layers": [1]}
            with heedful.attach(model, AttentionCalibration(**rule)):
                model(tokens[:, :280], past_key_values=cache)
                for i in range(280, 300):
                    step = model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1]
            with heedful.attach(model, AttentionCalibration(**rule)):
                whole = model(tokens).logits[:, -1]
            figures[f"20_cached_steps_against_one_pass_{name}_relative"] = float((step - whole).norm() / whole.norm())
    return figures


# ---- part 2

WIDTH = 96
BOS, DOC, GOOD, BAD, QUERY, KEYS, VALUES, FILLERS, VOCABULARY = 0, 1, 2, 3, 4, 8, 24, 40, 48


def keyed_documents(count: int, documents: int, queries: int, generator: torch.Generator) -> Tensor:
    """Rows ``(count, T)``: BOS, the documents in random order, then ``QUERY key value`` for each query.

    The first two documents have the same key, one tagged GOOD and one BAD; ``queries=1`` asks for that key.
    """

    def some(n: int) -> Tensor:
        return torch.rand(count, 16, generator=generator).argsort(1)[:, :n]

    keys, values = KEYS + some(documents - 1), VALUES + some(documents)
    keys = torch.cat([keys[:, :1], keys], 1)
    tags = torch.randint(GOOD, BAD + 1, (count, documents), generator=generator)
    tags[:, 0], tags[:, 1] = GOOD, BAD
    fillers = torch.randint(FILLERS, VOCABULARY, (count, documents, 3), generator=generator)
    text = torch.cat([torch.full((count, documents, 1), DOC), torch.stack([tags, keys, values], -1), fillers], -1)
    order = torch.rand(count, documents, generator=generator).argsort(1)
    text = text.gather(1, order[..., None].expand_as(text)).flatten(1)
    asked = torch.zeros(count, 1, dtype=torch.long)
    if queries > 1:
        asked = torch.randint(documents - 1, (count, queries), generator=generator)
    asked = asked + (asked > 0)  # the second document is the one tagged BAD
    question = torch.stack([torch.full_like(asked, QUERY), keys.gather(1, asked), values.gather(1, asked)], -1)
    return torch.cat([torch.full((count, 1), BOS), text, question.flatten(1)], 1)


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    rows = keyed_documents(count, 6, 1, torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row[:-1], "answer": row[-1]} for row in rows]


def right(logits: Tensor, example: dict[str, Any]) -> float:
    return float(logits[-1].argmax() == example["answer"])


def repeated_segment(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows ``(count, T)`` of BOS and a random segment twice, and the labels of what can be known."""
    length = int(torch.randint(8, 28, (), generator=generator))
    segment = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    rows = torch.cat([torch.full((count, 1), BOS), segment, segment], 1)
    labels = rows.clone()
    labels[:, : length + 2] = -100
    return rows, labels


def train(stop_at: float, budget_s: float) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Trains until the accuracy on 300 held-out examples reaches ``stop_at``, or for ``budget_s`` seconds of CPU time.

    The level rises when its loss is low: first repeated segments, by which a model learns to look a token up, then
    two to six documents. On six documents alone nothing is learned in this time.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = LlamaForCausalLM(config)
    inside = [p for p in model.model.layers.parameters() if p.dim() == 2]
    outside = [p for p in model.parameters() if all(p is not other for other in inside)]
    optimizers = [
        torch.optim.Muon(inside, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(outside, lr=5e-3, weight_decay=0.0),
    ]
    generator, held_out = torch.Generator().manual_seed(1), examples(300, seed=2)
    began, step, accuracy, level, mean_loss = time.process_time(), 0, 0.0, 1, 4.0
    while (spent := time.process_time() - began) < budget_s and accuracy < stop_at:
        documents = level
        if level > 2 and torch.rand((), generator=generator) < 0.25:
            documents = int(torch.randint(1, level, (), generator=generator))
        if documents == 1:
            rows, labels = repeated_segment(32, generator)
        else:
            rows = keyed_documents(32, documents, 8, generator)
            labels = torch.full_like(rows, -100)
            labels[:, 7 * documents + 3 :: 3] = rows[:, 7 * documents + 3 :: 3]  # the answers
        loss = model(input_ids=rows, labels=labels).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if documents == level:
            mean_loss = 0.9 * mean_loss + 0.1 * loss.item()
        if level < 6 and mean_loss < (0.6 if level == 1 else 0.3):
            level, mean_loss = level + 1, 1.5
        if step % (25 if level < 3 else 5) == 0:
            accuracy = mean_score(model.eval(), held_out, right, batch_size=100)
            model.train()
            print(
                f"step {step}: loss {loss.item():.3f}, accuracy {accuracy:.3f}, {spent:.0f} s of CPU time", flush=True
            )
    return model.eval(), {"steps": step, "cpu_seconds": round(spent, 1)}


def compare(
    model: Any, found: HeadSet, fresh: list[dict[str, Any]], scorer: Any, batch_size: int, kept: int | None = None
) -> dict[str, Any]:
    """Scores on fresh examples: nothing calibrated, the (best) kept heads, all candidates, and as many heads at random."""
    candidates, heads = sorted(found.scores), found.heads[:kept]
    drawn = random.Random(0).sample(candidates, len(heads))
    figures: dict[str, Any] = {"heads_searched": len(candidates), "heads_kept": len(found), "heads": heads}
    for name, chosen in {"baseline": [], "kept": heads, "all": candidates, "random": drawn}.items():
        with heedful.attach(model, found.calibration(heads=chosen)):
            figures[f"fresh_{name}"] = round(mean_score(model, fresh, scorer, batch_size=batch_size), 4)
    baseline = figures["fresh_baseline"]
    figures["fresh_standard_error"] = round(math.sqrt(baseline * (1 - baseline) / len(fresh)), 4)
    figures["calibration_baseline"] = round(found.baseline, 4)
    figures["calibration_best_single_head"] = round(max(found.scores.values()), 4)
    figures["calibration_examples"], figures["fresh_examples"] = found.examples, len(fresh)
    return figures


# ---- part 3

PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was"
    " the season of Darkness, it was the spring of hope, it was the winter of despair, we had everything before "
    "us, we had nothing before us, we were all going direct to Heaven, we were all going direct the other way – "
    "in short, the period was so far like the present period, that some of its noisiest authorities insisted on "
    "its being received, for good or for evil, in the superlative degree of comparison only.\n\n"
    "There were a king with a large jaw and a queen with a plain face, on the throne of England; there were a "
    "king with a large jaw and a queen with a fair face, on the throne of France. In both countries it was "
    "clearer than crystal to the lords of the State preserves of loaves and fishes, that things in general were "
    "settled for ever."
)


def sinks_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Where the sinks of the bundled model are on a page of prose, and what calibrating every head moves."""
    inputs = tokenizer(PROSE, return_tensors="pt")
    figures: dict[str, Any] = {"tokens": inputs.input_ids.shape[1]}
    for name, rule in {"alpha_5": {"alpha": 5.0}, "threshold_0.1": {"threshold": 0.1}}.items():
        found = sink_map(model, inputs, tokenizer=tokenizer, **rule)
        assert isinstance(found, SinkMap)
        part = AttentionCalibration(**rule)
        with torch.no_grad(), heedful.attach(model, part):
            model(**inputs)
        sinks = found.sinks()
        late_tenth = sum(sink.position >= 0.9 * len(found.tokens) for sink in sinks)
        moved = part.mass_moved
        figures[name] = {
            "late_sinks_per_head": round(len(sinks) / len(moved), 2),
            "heads_with_a_late_sink": int(found.late.any(-1).sum()),
            "share_of_late_sinks_in_the_last_tenth": round(late_tenth / max(1, len(sinks)), 3),
            "most_frequent_sink_tokens": found.by_token()[:8],
            "mass_moved_mean": round(sum(moved.values()) / len(moved), 4),
            "mass_moved_most": [
                [*head, round(mass, 3)] for head, mass in sorted(moved.items(), key=lambda x: -x[1])[:5]
            ],
        }
    first = found.first_token
    figures["heads_giving_the_first_token_over_20_percent"] = [
        [layer, head, round(float(first[layer, head]), 3)] for layer, head in (first > 0.2).nonzero().tolist()
    ]
    return figures


def sentiment(model: Any, tokenizer: Any, folder: Path, quick: bool) -> dict[str, Any]:
    """Head search on SST-2, zero-shot: " good" against " bad" after "It was very", with the bias that halves other
    examples.
    """
    labels = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" bad", " good")]

    def read(name: str, count: int) -> list[dict[str, Any]]:
        lines = (folder / name).read_text(encoding="latin-1").splitlines()
        random.Random(0).shuffle(lines)
        return [
            {"input_ids": tokenizer(f"{line[2:]} It was very").input_ids, "sign": 2 * int(line[0]) - 1}
            for line in lines[:count]
        ]

    margins: list[float] = []
    sizes = (32, 16, 64) if quick else (200, 80, 400)
    train_set = read("stsa.binary.train", sizes[0] + sizes[1])
    mean_score(
        model, train_set[: sizes[0]], lambda x, _: margins.append(float(x[-1, labels[1]] - x[-1, labels[0]])) or 0.0
    )
    bias = sorted(margins)[len(margins) // 2]

    def margin(logits: Tensor, example: dict[str, Any]) -> float:
        return example["sign"] * (float(logits[-1, labels[1]] - logits[-1, labels[0]]) - bias)

    def likelihood(logits: Tensor, example: dict[str, Any]) -> float:
        return -math.log1p(math.exp(-margin(logits, example)))

    def correct(logits: Tensor, example: dict[str, Any]) -> float:
        return float(margin(logits, example) > 0)

    layers = range(2, 4) if quick else range(2, model.config.num_hidden_layers - 1)
    heads = [(layer, head) for layer in layers for head in range(model.config.num_attention_heads)]
    fresh = read("stsa.binary.test", sizes[2])
    # Searched by likelihood, which tells small gains from noise sooner than accuracy does; judged by accuracy.
    examples = train_set[sizes[0] :]
    found = search_heads(model, examples, likelihood, heads=heads, task="SST-2 zero-shot", batch_size=32)
    return {
        "gain_of_the_best_head_nats": round(max(found.scores.values()) - found.baseline, 4),
        "all_kept": compare(model, found, fresh, correct, batch_size=32),
        "best_eight": compare(model, found, fresh, correct, batch_size=32, kept=8),
    }


def notes(figures: dict[str, Any]) -> str:
    """What came out, in words; the paper's models, 7 billion parameters and more, are not run here."""
    documents, rules = figures["keyed_documents"], figures["classics_20m_sinks"]
    lines = [
        "Keyed documents, fresh examples: {fresh_baseline} uncalibrated, {fresh_kept} with the {heads_kept} kept heads, "
        "{fresh_random} with as many at random, {fresh_all} with all {heads_searched} (standard error "
        "{fresh_standard_error}); the best single head went from {calibration_baseline} to "
        "{calibration_best_single_head} on the calibration set.".format(**documents)
    ]
    if "classics_20m_sst2" in figures:
        lines.append(
            "SST-2: {fresh_baseline} uncalibrated, {fresh_kept} with the kept heads, {fresh_random} at random, {fresh_all} "
            "with all (standard error {fresh_standard_error}).".format(**figures["classics_20m_sst2"]["all_kept"])
        )
    lines.append(
        "A kept head is a gain on the calibration set by construction; a difference on fresh examples below two standard "
        "errors is noise. The rule calls tokens near the end sinks, since few rows see them: "
        f"{rules['alpha_5']['share_of_late_sinks_in_the_last_tenth']:.0%} of the late sinks of the bundled model lie in the "
        f"last tenth of the text with alpha / T, {rules['threshold_0.1']['share_of_late_sinks_in_the_last_tenth']:.0%} with "
        "the code's constant 0.1."
    )
    return " ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute instead of five")
    parser.add_argument("--out", type=Path, help="where to record (default: reproductions/results/act.json)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "text_classification",
        help="folder with stsa.binary.train and stsa.binary.test; without it the search on SST-2 is left out",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    figures: dict[str, Any] = {"exactness": exactness()}

    model, figures["training"] = train(stop_at=0.7, budget_s=12 if arguments.quick else 240)
    calibration, fresh = (
        examples(100 if arguments.quick else 900, seed=3),
        examples(200 if arguments.quick else 3000, seed=4),
    )
    middle = [(layer, head) for layer in (1, 2) for head in range(8)]
    found = search_heads(model, calibration, right, heads=middle, task="keyed documents", batch_size=100)
    documents = compare(model, found, fresh, right, batch_size=100)
    with heedful.attach(model, found.calibration()):
        documents["calibration_kept"] = round(mean_score(model, calibration, right, batch_size=100), 4)
    figures["keyed_documents"] = documents

    model, tokenizer = heedful.zoo.load("classics-20m")
    figures["classics_20m_sinks"] = sinks_of(model, tokenizer)
    if arguments.data.is_dir():
        figures["classics_20m_sst2"] = sentiment(model, tokenizer, arguments.data, arguments.quick)

    gain = documents["fresh_kept"] - documents["fresh_baseline"]
    exact = max(value for name, value in figures["exactness"].items() if "against" in name) < 1e-4
    reproduced = exact and gain > 2 * documents["fresh_standard_error"]
    record(
        "act",
        claim="Calibrating the attention of a few heads, found on held-out data, raises the accuracy of a frozen model.",
        figures=figures,
        reproduced=reproduced,
        seconds=time.time() - began,
        notes=notes(figures),
        out=arguments.out,
    )


if __name__ == "__main__":
    main()
