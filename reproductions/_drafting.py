"""What the reproductions of trained drafters share: text to train on and held-out prompts, the model's own text, decoding."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    stream = torch.tensor(tokenizer(text[len(text) // 2 :], add_special_tokens=False)["input_ids"])
    starts = [i * (len(stream) - length) // max(1, number - 1) for i in range(number)]
    first = torch.tensor([tokenizer.bos_token_id])
    return torch.stack([torch.cat([first, stream[start : start + length - 1]]) for start in starts])


def decode(
    model: Any, prompts: Iterable[Tensor], drafter: Drafter | None, plain: Sequence[Tensor] | None, **options: Any
) -> dict[str, Any]:
    """Greedy decoding of each prompt ``(1, T)``: tokens a step, speed, and outputs that differ from ``plain``.

    The loop without a drafter runs on the same prompt right before, so that whatever else the machine does hits both alike.
    """
    entries: list[int] = []
    seconds, sequences = {True: 0.0, False: 0.0}, []
    steps = {True: 0, False: 0}
    prompts = [prompt.to(model.device) for prompt in prompts]
    if model.device.type == "cuda" and options.get("engine") != "eager":
        heedful.decoding.release_graphs(model)  # captured for another tree, perhaps
        for contestant in (None, drafter):
            heedful.generate(model, prompts[0], contestant, do_sample=False, **options)
    for prompt in prompts:
        for drafting in (False, True):
            result = heedful.generate(model, prompt, drafter if drafting else None, do_sample=False, **options)
            seconds[drafting] += result.stats.decode_seconds
            steps[drafting] += result.stats.steps
        entries += result.stats.accepted[0]
        sequences.append(result.sequences.cpu())
    differing = 0 if plain is None else sum(not torch.equal(a, b) for a, b in zip(sequences, plain, strict=True))
    return {
        "tokens_per_step": sum(entries) / len(entries),
        "tokens_per_second": round(sum(entries) / seconds[True], 1),
        "milliseconds_per_step": round(1e3 * seconds[True] / steps[True], 3),
        "step_overhead": round(seconds[True] / steps[True] / (seconds[False] / steps[False]), 2),
        "speedup": round(seconds[False] / seconds[True], 2),
        "outputs_that_differ": differing,
        "sequences": sequences,
    }
