"""Lightning Attention-2 (arXiv 2401.04658): linear in time, no worse a language model, and at home at lengths never trained on.

Two language models of one size, one with softmax attention and rotary positions (Llama), one with lightning attention, see the
same batches of 512-token rows of old books for the same number of steps. Then the loss on held-out books, in rows of the
trained length and of eight times that; and the time of a generated token behind short and long pasts. The slope of the
operator's time over the length comes from `benchmarks/attention.py --only lightning`, where that has been run.

    python reproductions/lightning2.py --data FOLDER             # 2 minutes on one GPU
    python reproductions/lightning2.py --data FOLDER --quick     # a few steps, to try it out

FOLDER holds `train-0.jsonl.xz` and `validation.jsonl.xz`, books as `{title, author, year, text}` a line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import CLASSICS, RESULTS, needs_books, record
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import heedful
from heedful.models import LightningConfig, LightningForCausalLM
from heedful.training.corpus import encode_stream, read_books

LENGTH, LONG, BATCH = 512, 4096, 64
WIDTH, LAYERS, HEADS = 384, 6, 6


def tokens(path: Path, tokenizer: Any, most: int) -> Tensor:
    """The first `most` tokens of the books of a file, in one row."""
    texts, characters = [], 0
    for book in read_books(path):
        texts.append(book["text"])
        characters += len(book["text"])
        if characters > 6 * most:
            break
    return torch.from_numpy(encode_stream(tokenizer.backend_tokenizer, texts)[:most].astype(np.int64))


def build(kind: str, vocabulary: int) -> PreTrainedModel:
    sizes = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 1024, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "lightning":
        return LightningForCausalLM(LightningConfig(**sizes))
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=LONG, **sizes))


def loss_of(model: PreTrainedModel, rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train(model: PreTrainedModel, text: Tensor, steps: int, lr: float, batch: int) -> float:
    """Seconds. AdamW, warm-up, then a half cosine; the batches depend on the step only."""
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    generator = torch.Generator().manual_seed(1)
    started = time.perf_counter()
    for step in range(steps):
        at = torch.randint(len(text) - LENGTH - 1, (batch, 1), generator=generator)
        rows = text[at + torch.arange(LENGTH + 1)].to(device)
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


@torch.no_grad()
def held_out(model: PreTrainedModel, text: Tensor, length: int) -> float:
    """Mean loss a token over rows of `length`."""
    model.eval()
    device = next(model.parameters()).device
    rows = text[: (len(text) - 1) // length * length].view(-1, length)
    rows = torch.cat([rows, text[length : len(rows) * length + 1 : length, None]], 1)
    size = max(1, 32768 // length)
    losses = [loss_of(model, part.to(device)).item() * len(part) for part in rows.split(size)]
    return sum(losses) / len(rows)


@torch.no_grad()
def decode_milliseconds(model: PreTrainedModel, past: int, steps: int = 40) -> float:
    """The shortest time of a generated token behind `past` tokens, batch 1."""
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (1, past), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        times = []
        for _ in range(steps):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return 1000 * min(times)


def slopes() -> dict[str, float]:
    """Exponents of time in length from 8k tokens on, out of the benchmark's file."""
    figures = {}
    for path in sorted(RESULTS.glob("attention-lightning-*.json")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in json.loads(path.read_text())["rows"]:
            if row["length"] and row["length"] >= 8192 and "tokens" not in row["case"]:
                lines.setdefault(f"{row['case'].split()[0]}, {row['contestant']}", []).append(
                    (row["length"], row["ms"])
                )
        for name, points in lines.items():
            if len(points) > 1:
                x, y = np.log(np.array(points, dtype=float)).T
                figures[f"{path.stem.removeprefix('attention-lightning-')}: {name}"] = round(
                    float(np.polyfit(x, y, 1)[0]), 2
                )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CLASSICS, help="folder with the books")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write the result instead of reproductions/results")
    arguments = parser.parse_args()
    needs_books(arguments.data)
    steps, batch = (2, 1) if arguments.quick else (arguments.steps, BATCH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    _, tokenizer = heedful.zoo.load("classics-20m")
    text = tokens(arguments.data / "train-0.jsonl.xz", tokenizer, 50_000 if arguments.quick else 8_000_000)
    validation = tokens(arguments.data / "validation.jsonl.xz", tokenizer, 8_200 if arguments.quick else 300_000)
    print(f"{len(text)} tokens, {time.perf_counter() - started:.0f} s", flush=True)

    models: dict[str, Any] = {}
    for kind in ("softmax", "lightning"):
        model = build(kind, len(tokenizer)).to(device)
        seconds = train(model, text, steps, arguments.lr, batch)
        model.eval()
        models[kind] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss_at_512": round(held_out(model, validation, LENGTH), 4),
            "loss_at_4096": round(held_out(model, validation, LONG), 4),
            "training_seconds": round(seconds, 1),
            "decode_ms_a_token": {
                f"behind {past} tokens": round(decode_milliseconds(model, past), 3)
                for past in ((64, 128) if arguments.quick else (1024, 65536))
            },
        }
        print(kind, models[kind], flush=True)
        del model
    lightning, softmax = models["lightning"], models["softmax"]
    first, *_, last = lightning["decode_ms_a_token"].values()
    held = {
        "lightning's loss within 5 % of softmax's, or below": lightning["loss_at_512"] <= 1.05 * softmax["loss_at_512"],
        "lightning at 4096 within 2 % of its own loss at 512, or below": lightning["loss_at_4096"]
        <= 1.02 * lightning["loss_at_512"],
        "softmax gets worse at 4096 than at 512": softmax["loss_at_4096"] > softmax["loss_at_512"],
        "a token behind the longest past takes no more than 1.1 times one behind the shortest": last <= 1.1 * first,
    }
    record(
        "lightning2",
        claim="Lightning attention trains to the loss of softmax attention at equal steps, keeps it at 8 times the trained "
        "length, and generates in constant time a token.",
        figures={
            "steps": steps,
            "tokens_a_step": batch * LENGTH,
            **models,
            "accepted": held,
            "slope_of_time": slopes(),
        },
        reproduced=all(held.values()),
        seconds=time.perf_counter() - started,
        notes=f"{LAYERS} layers of width {WIDTH}, {steps} steps of AdamW at lr {arguments.lr}, old books, a BPE of "
        f"{len(tokenizer)} tokens: far smaller and shorter than the paper's 400M models. Softmax has rotary positions.",
        out=arguments.out,
    )


if __name__ == "__main__":
    main()
