"""Measures a zoo language model and writes its card: bits per byte, needle recall, attention sinks, retrieval heads.

    python benchmarks/zoo.py --data ../shared/data            (a GPU: minutes; two CPU cores: about an hour)
    python benchmarks/zoo.py --data ../shared/data --limit-bytes 30000 --count 30     (a quick look, not recorded)

Results go to ``results.json`` and ``README.md`` in the model's folder, unless the run was a limited one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch

import heedful
from heedful.training import evaluate
from heedful.training.corpus import read_books

CARD = Path(__file__).parent / "zoo_card.md"


def measure(name: str, data: Path, device: str, count: int, limit_bytes: int | None, lengths: list[int]) -> dict:
    """All figures of the card."""
    model, tokenizer = heedful.zoo.load(name, device=device)
    books = [book["text"] for book in read_books(data / "classics" / "validation.jsonl.xz")]
    began = time.perf_counter()
    figures = evaluate(model, tokenizer, books, lengths=lengths, count=count, limit_bytes=limit_bytes, batch_size=4)
    sinks = heedful.steering.sink_map(model, tokenizer(books[0][:6000], return_tensors="pt").input_ids[:, :1024])
    scores = heedful.interp.retrieval_scores(model, tokenizer, lengths=(1024,), variant="teacher-forced", batch_size=4)
    return {
        **figures,
        "first_token_attention": [[round(value, 3) for value in row] for row in sinks.first_token.tolist()],
        "retrieval_scores": [[round(value, 3) for value in row] for row in scores.scores.tolist()],
        "retrieval_pass_rate": scores.pass_rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prompts_a_recall_figure": count,
        "bytes_a_book": limit_bytes,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - began),
    }


def table(rows: list[list[float]]) -> str:
    """A layer x head table; values below 0.05 are left out."""
    head = "| layer | " + " | ".join(f"head {head}" for head in range(len(rows[0]))) + " |"
    lines = [head, "|---" * (len(rows[0]) + 1) + "|"]
    for layer, row in enumerate(rows):
        lines.append(f"| {layer} | " + " | ".join(f"{value:.2f}" if value >= 0.05 else "" for value in row) + " |")
    return "\n".join(lines)


def card(results: dict) -> str:
    """The model card: the text beside this script with the measured figures put in."""
    lengths = sorted(int(key.removeprefix("recall_")) for key in results if key.removeprefix("recall_").isdigit())
    recall = ["| tokens | statement's own words | other words |", "|---|---|---|"]
    recall += [f"| {n} | {results[f'recall_{n}']:.1%} | {results[f'recall_paraphrased_{n}']:.1%} |" for n in lengths]
    text = CARD.read_text()
    for key, value in {
        "bits_per_byte": f"{results['bits_per_byte']:.3f}",
        "recall": "\n".join(recall),
        "sinks": table(results["first_token_attention"]),
        "retrieval": table(results["retrieval_scores"]),
        "prompts": str(results["prompts_a_recall_figure"]),
        "measured": f"{results['device']}, {results['date']}",
        "long_steps": str(results.get("long_steps", "some")),
        "bytes_note": results.get("bits_per_byte_note", "All of the twelve books."),
    }.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="classics-20m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=200, help="prompts for each recall figure")
    parser.add_argument("--limit-bytes", type=int, help="of each book")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--card-only", action="store_true", help="write the card from results.json")
    parser.add_argument("--save", action="store_true", help="record a limited run too")
    arguments = parser.parse_args()
    folder = heedful.zoo.path(arguments.model)
    if arguments.card_only:
        results = json.loads((folder / "results.json").read_text())
    else:
        if not (arguments.data / "classics" / "validation.jsonl.xz").exists():
            sys.exit(f"no held-out books in {arguments.data}: give the data folder with --data")
        results = measure(
            arguments.model, arguments.data, arguments.device, arguments.count, arguments.limit_bytes, arguments.lengths
        )
        print(json.dumps({key: value for key, value in results.items() if not isinstance(value, list)}, indent=2))
        if arguments.limit_bytes is not None and not arguments.save:
            return
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "README.md").write_text(card(results))


if __name__ == "__main__":
    main()
