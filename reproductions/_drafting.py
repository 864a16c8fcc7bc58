"""What the reproductions of trained drafters share: text to train on and held-out prompts, the model's own text, decoding."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import heedful
from heedful import zoo
from heedful.decoding import Drafter
from heedful.training.zoo_drafters import with_own_text

DATA = Path(__file__).parents[2] / "shared" / "data"


def training_text(work: Path, data: Path, device: str, own_rows: int, characters: int) -> Path:
    """A ``.jsonl`` file: books of the shared data (without them half of the zoo's excerpt), and the model's own greedy text."""
    books = data / "classics" / "train-0.jsonl.xz"
    work.mkdir(parents=True, exist_ok=True)
    file = work / "books.jsonl"
    if books.exists():
        taken, lines = 0, []
        with lzma.open(books, "rt", encoding="utf-8") as source:
            for line in source:
                if taken > characters:
                    break
                lines.append(line)
                taken += len(line)
        file.write_text("".join(lines), encoding="utf-8")
    else:
        text = zoo.excerpt()
        file.write_text(json.dumps({"text": text[: len(text) // 2]}) + "\n", encoding="utf-8")
    return with_own_text(file, work / "text.jsonl", device, own_rows) if own_rows else file


def held_out_rows(tokenizer: Any, number: int, length: int) -> Tensor:
    """Rows ``(number, length)`` of the second half of the zoo's excerpt, which nothing was trained on; BOS first."""
    text = zoo.excerpt()
    stream = torch.tensor(tokenizer(text[len(text) // 2 :], add_special_tokens=False, verbose=False)["input_ids"])
    starts = [i * (len(stream) - length) // max(1, number - 1) for i in range(number)]
    first = torch.tensor([tokenizer.bos_token_id])
    return torch.stack([torch.cat([first, stream[start : start + length - 1]]) for start in starts])


def together(model: Any, rows: Tensor, drafter: Drafter | None, plain: Tensor | None, **options: Any) -> dict[str, Any]:
    """Greedy decoding of all prompts ``(B, T)`` at once: tokens a step, the outputs, and how many differ from ``plain``."""
    result = heedful.generate(model, cast(Any, rows.to(model.device)), drafter, do_sample=False, **options)
    entries = [emitted for row in result.stats.accepted for emitted in row]
    sequences, differing = result.sequences.cpu(), 0
    if plain is not None:
        width = max(plain.shape[1], sequences.shape[1])
        a, b = (F.pad(x, (0, width - x.shape[1]), value=-1) for x in (plain, sequences))
        differing = int((a != b).any(1).sum())
    return {"tokens_per_step": sum(entries) / len(entries), "outputs_that_differ": differing, "sequences": sequences}


def race(model: Any, rows: Tensor, drafter: Drafter, **options: Any) -> dict[str, Any]:
    """Greedy decoding of prompt by prompt against the same loop without a drafter: tokens a step, speed, outputs that differ.

    The loop without a drafter runs on the same prompt right before, so that whatever else the machine does hits both alike.
    """
    entries: list[int] = []
    seconds, steps, differing = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0
    prompts = list(rows.to(model.device).split(1))
    if model.device.type == "cuda":
        heedful.decoding.release_graphs(model)  # captured for another tree, perhaps
        for contestant in (None, drafter):
            heedful.generate(model, cast(Any, prompts[0]), contestant, do_sample=False, **options)
    for prompt in prompts:
        sequences = []
        for drafting in (False, True):
            result = heedful.generate(
                model, cast(Any, prompt), drafter if drafting else None, do_sample=False, **options
            )
            seconds[drafting] += result.stats.decode_seconds
            steps[drafting] += result.stats.steps
            sequences.append(result.sequences)
        entries += result.stats.accepted[0]
        differing += not torch.equal(*sequences)
    return {
        "tokens_per_step": sum(entries) / len(entries),
        "tokens_per_second": round(sum(entries) / seconds[True], 1),
        "milliseconds_per_step": round(1e3 * seconds[True] / steps[True], 3),
        "step_overhead": round(seconds[True] / steps[True] / (seconds[False] / steps[False]), 2),
        "speedup": round(seconds[False] / seconds[True], 2),
        "outputs_that_differ": differing,
    }
