"""Trains a wide language model for some minutes, and drafters for it: what `decode.py --model FOLDER` measures.

A model of 19 M parameters is launch-bound on a large GPU: its step is the time of its kernels' starts. This one is wide and
shallow (8 layers of 2,048, 0.4 B parameters), so that reading the weights takes a good part of a step.

    python benchmarks/large_model.py --out runs/large [--data ../shared/data] [--seconds 100] [--share 1.0]

On an H100 about 100 seconds beside ``--seconds``. Writes a folder that ``from_pretrained`` loads, with what was done so far in
``large_model.json`` (its ``complete`` says whether all of it was) and the drafters in ``medusa``, ``hidden-transfer`` and ``longspec``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heedful import zoo
from heedful.training import train_hidden_transfer, train_longspec, train_medusa
from heedful.training.drafting import own_text
from heedful.training.muon import Muon
from heedful.training.pretrain import build_model
from heedful.training.rows import PackedRows

SHAPE = {"hidden": 2048, "layers": 8, "heads": 16, "kv_heads": 4, "intermediate": 5632}
LENGTH, ROWS, ACCUMULATED = 1024, 12, 3


def texts(data: Path, characters: int) -> list[str]:
    """Whole books, until there are so many characters."""
    file = data / "classics" / "train-0.jsonl.xz"
    if not file.exists():
        sys.exit(f"{file} is missing: pass the shared data folder as --data")
    books: list[str] = []
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            if sum(map(len, books)) >= characters:
                break
            books.append(json.loads(line)["text"])
    return books


def train_model(model: Any, stream: np.ndarray, seconds: float, device: str) -> float:
    """Muon and AdamW, rows of 1,024 tokens, for a given time; the rate falls linearly over the last half. Returns the loss."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        (Muon(matrices, lr=0.02, weight_decay=0.05), 0.02),
        (torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda"), 3e-3),
    ]
    rng, began, step = np.random.default_rng(0), time.perf_counter(), 0
    loss: Tensor = torch.zeros(())
    while (passed := (time.perf_counter() - began) / seconds) < 1:
        factor = min(1.0, (step + 1) / 30) * min(1.0, 2 * (1 - passed) + 0.02)
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        for _ in range(ACCUMULATED):
            starts = rng.integers(len(stream) - LENGTH - 1, size=ROWS)
            rows = torch.from_numpy(np.stack([stream[s : s + LENGTH + 1] for s in starts])).long().to(device)
            with torch.autocast(device, torch.bfloat16):
                hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
                logits = model.lm_head(hidden)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            (loss / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0:
            speed = step * ACCUMULATED * ROWS * LENGTH / (time.perf_counter() - began)
            print(f"step {step}, loss {float(loss.detach()):.3f}, {speed / 1e3:.0f}k tokens/s", flush=True)
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--characters", type=int, default=24_000_000, help="of the books, about four to a token")
    parser.add_argument("--seconds", type=float, default=100.0, help="of the model's training")
    parser.add_argument("--share", type=float, default=1.0, help="of the drafters' steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    began = time.perf_counter()
    _, tokenizer = zoo.load("classics-20m")
    documents = texts(arguments.data, arguments.characters)
    stream = PackedRows(documents, tokenizer, LENGTH, 0).stream  # encoded on all cores
    done: dict[str, Any] = {"complete": False, "tokens_of_text": len(stream), "drafters": {}}

    def note(what: str) -> None:
        done["seconds"] = round(time.perf_counter() - began, 1)
        arguments.out.mkdir(parents=True, exist_ok=True)
        part = arguments.out / "large_model.part"
        part.write_text(json.dumps(done, indent=2) + "\n")
        part.replace(arguments.out / "large_model.json")  # a kill leaves the old one or the new one
        print(f"{what}, {done['seconds']:.0f} s", flush=True)

    note(f"{len(stream) / 1e6:.1f} M tokens")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model: Any = build_model(tokenizer.vocab_size, **SHAPE).to(arguments.device).train()
    loss = train_model(model, stream, arguments.seconds, arguments.device)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    done |= {"parameters": sum(p.numel() for p in model.parameters()), "loss_nats": round(loss, 3)}
    done["seconds_of_training"] = arguments.seconds
    note(f"{done['parameters'] / 1e6:.0f} M parameters, loss {loss:.3f}")

    rng = np.random.default_rng(1)
    starts = rng.integers(len(stream) - 64, size=512)
    prompts = torch.from_numpy(np.stack([stream[s : s + 64] for s in starts])).long()
    own = torch.cat([own_text(model, rows, 192, 64).cpu() for rows in prompts.split(256)])
    file = arguments.out / "text.jsonl"
    mixed = [*tokenizer.batch_decode(own), *(document[:20_000] for document in documents[:100])]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed), encoding="utf-8")
    encoded = PackedRows(mixed, tokenizer, LENGTH, 0)
    note("the model's own text")
    recipes: dict[str, tuple[Any, dict[str, Any]]] = {
        "medusa": (train_medusa, {"steps": 400, "batch_size": 32, "length": 256, "lr": 1e-3, "weighting": "equal"}),
        "longspec": (train_longspec, {"steps": 500, "batch_size": 32, "length": 512, "lr": 1e-3, "tree_shape": (4, 8, 8, 8)}),
        "hidden-transfer": (train_hidden_transfer, {"steps": 150, "batch_size": 16, "length": 256, "lr": 1e-3}),
    }  # fmt: skip
    for name, (train, options) in recipes.items():
        options["steps"] = max(1, round(arguments.share * options["steps"]))
        train(model, tokenizer, encoded, arguments.out / name, progress=False, **options)
        last = (arguments.out / name / "training" / "log.jsonl").read_text().splitlines()[-1]
        done["drafters"][name] = json.loads(last)
        done["complete"] = len(done["drafters"]) == len(recipes)
        note(f"{name} {last}")


if __name__ == "__main__":
    main()
