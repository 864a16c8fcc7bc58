"""Decoding speed of heedful (plain loop and every drafter) against transformers (generate, prompt lookup) on the bundled model: 60 Spec-Bench questions and 60 continuations of held-out books, in one run, same dtype, outputs compared.

    python benchmarks/decode.py [--device cuda] [--data ../shared/data] [--time-limit 170] [--books 60] [--per-category 10]
    python benchmarks/decode.py --model runs/large    # a model of large_model.py, with its drafters

Every 20 seconds what is there is written, marked as incomplete. Prints a markdown table and writes ``reproductions/results/decode-<device>.json``, and the picture beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import platform
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch
import transformers

from heedful import zoo
from heedful.decoding import Drafter, HiddenTransfer, LongSpec, Medusa, PromptLookup, Sequence, TokenRecycling
from heedful.decoding.bench import BASELINE, PLAIN, DecodeBenchmark, Question, bench_decode, interleaved, read_questions

HERE = Path(__file__).parent
PROMPT_CHARACTERS = 1200  # of a book: about 300 tokens


def book_continuations(path: Path, number: int) -> list[Question]:
    """Passages at evenly spaced places of the held-out books, from one book after another."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rounds = -(-number // len(texts))
    places = [(text, (i + 1) * len(text) // (rounds + 1)) for i in range(rounds) for text in texts]
    return [Question("books", text[at : at + PROMPT_CHARACTERS].strip()) for text, at in places[:number]]


def questions(data: Path, per_category: int, books: int) -> list[Question]:
    spec_bench, classics = data / "spec_bench" / "question.jsonl", data / "classics" / "validation.jsonl.xz"
    for file in (spec_bench, classics):
        if not file.exists():
            sys.exit(
                f"{file} is missing: this benchmark reads Spec-Bench and held-out books from the shared data folder; pass --data"
            )
    groups: list[list[Question]] = []
    if per_category:
        asked = read_questions(spec_bench, per_category)
        groups += [[q for q in asked if q.category == c] for c in dict.fromkeys(q.category for q in asked)]
    if books:  # as many passages as there are questions in all: spread them over the run
        passages = book_continuations(classics, books)
        groups += [passages[i :: max(1, len(groups))] for i in range(max(1, len(groups)))]
    if not groups:
        sys.exit("nothing to do: both --per-category and --books are 0")
    return interleaved(groups)


TRAINED = {"medusa": Medusa, "hidden-transfer": HiddenTransfer, "longspec": LongSpec}


def drafters(model: Path | None) -> dict[str, Drafter]:
    """Those without weights, and those trained for the model: the zoo's, or in its folder."""
    folders = {slug: zoo.path(f"classics-20m-{slug}") if model is None else model / slug for slug in TRAINED}
    return {
        "prompt-lookup": PromptLookup(),
        "token-recycling": TokenRecycling(),
        "token-recycling, cold": TokenRecycling(),
        "sequence": Sequence(PromptLookup(), TokenRecycling()),
        **{
            slug: TRAINED[slug].from_pretrained(folder)
            for slug, folder in folders.items()
            if (folder / "config.json").exists()
        },
    }


def summary(result: DecodeBenchmark) -> str:
    ours = result.speedup("heedful, token-recycling")
    lines = [
        f"Token Recycling: {ours:.2f}x transformers' generate (wanted: at least 1.5x on a CPU), "
        f"{result.speedup('heedful, token-recycling', 'transformers prompt lookup'):.2f}x its prompt lookup (wanted: never below 1), "
        f"{result.speedup('heedful, token-recycling', PLAIN):.2f}x heedful's plain loop.",
    ]
    for name in result.answers:
        forks = [answer for answer in result.answers[name] if not answer.identical]
        if forks:
            lines.append(
                f"{name}: {len(forks)} outputs differ from {BASELINE}; the tokens' logits lie at most "
                f"{max(answer.fork_gap or 0.0 for answer in forks):.2g} apart where they part."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / ".." / "shared" / "data", help="the shared data folder"
    )
    parser.add_argument("--model", type=Path, help="a folder with a model and its drafters; default: the zoo's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--per-category", type=int, default=10, help="Spec-Bench questions of each of the 6 categories")
    parser.add_argument("--books", type=int, default=60, help="continuations of held-out books")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--time-limit", type=float, help="seconds after which no further question is begun")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="default: reproductions/results/decode-<device>.json")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()

    began = perf_counter()
    asked = questions(arguments.data, arguments.per_category, arguments.books)
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.model is None:
        model, tokenizer = zoo.load("classics-20m", dtype=getattr(torch, dtype), device=arguments.device)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype))
        model = model.to(arguments.device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    device = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
    device += "" if arguments.model is None else f"-{arguments.model.name}"
    out = arguments.out or HERE.parent / "reproductions" / "results" / f"decode-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    provenance = {
        "model": "classics-20m" if arguments.model is None else arguments.model.name,
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }

    def write(result: DecodeBenchmark) -> None:
        figures = result.to_json()
        figures["setting"] |= provenance
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        partial.replace(out)

    written = perf_counter()

    def write_now_and_then(result: DecodeBenchmark) -> None:
        nonlocal written
        if perf_counter() - written > 20:
            write(result)
            written = perf_counter()

    def say(done: int, total: int) -> None:
        print(f"{done}/{total} questions, {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    result = bench_decode(
        model,
        tokenizer,
        asked,
        drafters(arguments.model),
        max_new_tokens=arguments.max_new_tokens,
        cold=["token-recycling, cold"],
        time_limit=arguments.time_limit,
        progress=say,
        partial_result=write_now_and_then,
    )
    write(result)
    print(f"{result.setting['device']}, {dtype}, {result.setting['questions']} questions\n")
    print(result.table())
    print()
    print(summary(result))
    result.plot().savefig(out.with_suffix(".png"), dpi=110)
    print(f"\nwritten to {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
