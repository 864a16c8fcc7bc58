"""Trains the drafters that ship with the zoo's model, and measures them.

    python -m heedful.training.zoo_drafters --data text.jsonl --out runs [--only medusa] [--device cuda]

A third of the text is the model's own: greedy continuations of the data, since that is what drafters have to guess.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import heedful
from heedful.decoding import HiddenTransfer, LongSpec, Medusa, TrainedDrafter
from heedful.training.drafting import own_text
from heedful.training.hidden_transfer import train_hidden_transfer
from heedful.training.longspec import train_longspec
from heedful.training.medusa import train_medusa
from heedful.training.rows import PackedRows, read_documents

#: Steps, rows, tokens a row, rate: what the shipped drafters were trained with, under a minute each on one H200.
RECIPES: dict[str, dict[str, Any]] = {
    "medusa": {"steps": 1050, "batch_size": 32, "length": 512, "lr": 1e-3, "weighting": "equal"},
    "hidden-transfer": {"steps": 297, "batch_size": 12, "length": 256, "lr": 2e-3},
    "longspec": {"steps": 1000, "batch_size": 32, "length": 1024, "lr": 1e-3, "tree_shape": (4, 8, 8, 8)},
}
_TRAINERS: dict[str, Any] = {
    "medusa": train_medusa,
    "hidden-transfer": train_hidden_transfer,
    "longspec": train_longspec,
}
_CLASSES: dict[str, type[TrainedDrafter]] = {
    "medusa": Medusa,
    "hidden-transfer": HiddenTransfer,
    "longspec": LongSpec,
}


def with_own_text(data: Path, out: Path, device: str, rows: int, new_tokens: int = 256) -> Path:
    """``data`` and the model's greedy continuations of ``rows`` places in it, as one ``.jsonl`` file."""
    model, tokenizer = heedful.zoo.load(
        "classics-20m", device=device, dtype=torch.bfloat16 if device == "cuda" else None
    )
    documents = read_documents(data)
    prompts = PackedRows(documents, tokenizer, 64, 11).batch(0, range(rows))
    own = torch.cat([own_text(model, batch, new_tokens).cpu() for batch in prompts.split(2048)])
    texts = [*documents, *tokenizer.batch_decode(own, skip_special_tokens=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n", encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a .txt or .jsonl file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipes' steps")
    parser.add_argument("--own-rows", type=int, default=3072, help="continuations of the model to train on; 0: none")
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.own_rows:
        data = with_own_text(data, arguments.out / "text.jsonl", arguments.device, arguments.own_rows)
    for name in arguments.only:
        began = time.perf_counter()
        model, tokenizer = heedful.zoo.load("classics-20m", device=arguments.device)
        recipe = dict(RECIPES[name])
        recipe["steps"] = max(1, round(arguments.share * int(recipe["steps"])))
        out = arguments.out / f"classics-20m-{name}"
        _TRAINERS[name](model, tokenizer, data, out, progress=False, **recipe)
        trained = time.perf_counter() - began
        drafter = _CLASSES[name].from_pretrained(out)
        rows = PackedRows(read_documents(data), tokenizer, 64, 7).batch(0, range(8))
        text = own_text(model, rows)[:, :64]
        steps: list[int] = []
        for row in text:
            result = heedful.generate(model, row[None], drafter, max_new_tokens=64, do_sample=False)
            steps += [n for entries in result.stats.accepted for n in entries]
        drafter.bfloat16().save_pretrained(out)
        last = json.loads((out / "training" / "log.jsonl").read_text().splitlines()[-1])
        print(  # noqa: T201
            f"{name}: {trained:.0f} s, {sum(steps) / len(steps):.2f} tokens a step, "
            + ", ".join(
                f"{key} {value:.3f}"
                for key, value in last.items()
                if "accuracy" in key or "agreement" in key or key == "loss"
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
