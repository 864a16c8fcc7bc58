"""Recall refinement: a few hundred small steps after pretraining that make recall independent of the wording.

    python -m heedful.training.refine --model runs/classics-20m --data ../shared/data --out runs/classics-20m-refined

The loss has two parts: cross-entropy on the values that are asked for, with wordings of `heedful.training.wordings`; and on
every other token the Kullback-Leibler divergence from the model as it was, so that what it knows of prose stays.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from heedful.training.corpus import Corpus
from heedful.training.recall import sentence_starts
from heedful.training.wordings import draw_facts


def refinement_document(rng: np.random.Generator, corpus: Corpus, length: int) -> tuple[list[int], list[bool]]:
    """Prose of about ``length`` tokens with facts in it, questions at the end. Returns ids and which of them are asked values."""

    def encode(text: str) -> list[int]:
        return corpus.tokenizer.encode(text, add_special_tokens=False).ids

    facts = draw_facts(rng, corpus.words)
    start = int(rng.integers(len(corpus.books) - length))
    prose = np.asarray(corpus.books[start : start + length])
    starts = sentence_starts(prose, corpus.ends_sentence, corpus.begins_word)
    ids: list[int] = []
    last = 0
    for place, fact in zip(np.sort(rng.choice(starts, size=len(facts))), facts, strict=True):
        ids += prose[last:place].tolist() + encode(" " + fact["statement"])
        last = int(place)
    ids += prose[last:].tolist()
    asked = [False] * len(ids)
    for index in rng.permutation(len(facts))[:3]:
        question = encode(("\n\n", "\n", " ")[int(rng.integers(3))] + facts[index]["question"])
        value = encode(" " + facts[index]["value"])
        close = encode((".", "\n", ".\n")[int(rng.integers(3))])
        ids += question + value + close
        asked += [False] * len(question) + [True] * len(value) + [False] * len(close)
    return ids, asked


def refine(
    model: str | Path, data: str | Path, out: str | Path, *, steps: int = 500, seconds: float = math.inf, documents: int = 12,
    lengths: tuple[int, int] = (60, 900), lr: float = 2e-4,
    keep: float = 1.0, seed: int = 1, work: str | Path | None = None, device: str = "cpu", save_every: int = 100,
) -> Path:  # fmt: skip
    """Refines a pretrained folder and writes another one.

    Args:
        model: folder written by `pretrain`. data: as for `pretrain`; its encoded form is kept in ``work``.
        out: result folder, written every ``save_every`` steps. steps: optimiser steps; ``seconds`` ends the run earlier.
        documents: a batch of the shortest kind; longer ones are fewer. lengths: of their prose, in tokens; a batch has one. lr: AdamW's highest rate (warm-up, then cosine).
        keep: weight of the divergence from the model as it was.
    """
    out = Path(out)
    corpus = Corpus.prepare(data, work or out / "work")
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    student.to(device)  # type: ignore[arg-type]
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.model.embed_tokens.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    began = time.perf_counter()
    for step in range(steps):
        elapsed = time.perf_counter() - began
        ratio = max(step / steps, elapsed / seconds)
        if ratio >= 1:
            break
        rng = np.random.default_rng([seed, step])
        length = int(np.exp(rng.uniform(*np.log(lengths))))
        batch = [refinement_document(rng, corpus, length) for _ in range(max(1, documents * 200 // max(200, length)))]
        width = max(len(ids) for ids, _ in batch) + 1
        rows = torch.full((len(batch), width), tokenizer.eos_token_id)
        rows[:, 0] = tokenizer.bos_token_id
        asked, real = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        for row, (ids, marks) in enumerate(batch):
            rows[row, 1 : len(ids) + 1] = torch.tensor(ids)
            asked[row, 1 : len(ids) + 1] = torch.tensor(marks)
            real[row, 1 : len(ids) + 1] = True
        rows, asked, real = (tensor.to(device) for tensor in (rows, asked, real))
        loss, recall_loss, divergence = _losses(student, teacher, rows, asked[:, 1:], real[:, 1:], keep)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * ratio))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 0:
            print(f"step {step}  values {recall_loss:.3f}  divergence {divergence:.4f}  {elapsed:.0f} s", flush=True)  # noqa: T201
        if (step + 1) % save_every == 0:
            _save(student, tokenizer, out)
    _save(student, tokenizer, out)
    return out


def _losses(
    student: nn.Module, teacher: nn.Module, rows: Tensor, asked: Tensor, real: Tensor, keep: float
) -> tuple[Tensor, float, float]:
    logits = student(input_ids=rows[:, :-1], use_cache=False).logits
    values = nn.functional.cross_entropy(logits[asked], rows[:, 1:][asked])
    others = real & ~asked
    with torch.no_grad():
        before = teacher(input_ids=rows[:, :-1], use_cache=False).logits[others].log_softmax(-1)
    divergence = nn.functional.kl_div(logits[others].log_softmax(-1), before, log_target=True, reduction="batchmean")
    return values + keep * divergence, float(values), float(divergence)


def _save(model: nn.Module, tokenizer: object, out: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(out, max_shard_size="12MB")  # type: ignore[operator]
    tokenizer.save_pretrained(out)  # type: ignore[attr-defined]


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--work")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs=2, default=(60, 900))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    refine(
        arguments.model, arguments.data, arguments.out, work=arguments.work, steps=arguments.steps, seconds=arguments.seconds,
        lr=arguments.lr, keep=arguments.keep, documents=arguments.documents,
        lengths=tuple(arguments.lengths), device=arguments.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
