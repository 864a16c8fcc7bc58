"""Writes the method pages from the catalog, the docstrings and the recorded reproductions, and the tables of decoding.md. `make docs` runs it.

python docs/generate.py [--check]     --check: change nothing, fail if a page is out of date
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

from heedful import catalog, zoo

ROOT = Path(__file__).parent
RESULTS = ROOT.parent / "reproductions" / "results"
SECTIONS = ("Example", "Cost", "When not to use", "Paper")


def sections(docstring: str) -> dict[str, str]:
    """A Google-style docstring as {heading: text}, the part before the first heading under ''."""
    found: dict[str, str] = {}
    heading, lines = "", []
    for line in [*inspect.cleandoc(docstring).splitlines(), "End:"]:
        match = re.fullmatch(r"([A-Z][A-Za-z ]+):", line)
        if match:
            found[heading] = inspect.cleandoc("\n".join(lines)).strip()
            heading, lines = match[1], []
        else:
            lines.append(line)
    return found


def resolve(entry_point: str) -> object:
    """``module:name`` as the object."""
    module, name = entry_point.split(":")
    return getattr(importlib.import_module(module), name)


def example(text: str) -> str:
    """A doctest as a plain code block."""
    lines = [
        line[4:] if line.startswith((">>> ", "... ")) else line.removeprefix(">>>").removeprefix("...")
        for line in text.splitlines()
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def figures(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested figures as (name, value) rows; long lists are left to the JSON file."""
    if isinstance(value, dict):
        return [
            row for key, inner in value.items() for row in figures(inner, f"{prefix} / {key}" if prefix else str(key))
        ]
    if isinstance(value, float):
        return [(prefix, f"{value:.4g}")]
    if isinstance(value, list) and (len(value) > 12 or any(isinstance(item, (dict, list)) for item in value)):
        return []
    return [(prefix, json.dumps(value) if isinstance(value, list) else str(value))]


def page(method: catalog.Method) -> str:
    """The page of one method."""
    parts = sections(resolve(method.entry_point).__doc__ or "")
    missing = [name for name in SECTIONS if name not in parts]
    if missing:
        raise SystemExit(f"{method.entry_point}: the docstring lacks the section(s) {', '.join(missing)}")
    lines = [
        f"# {method.slug}", "", f"*{method.title}*  ", f"{method.authors}, arXiv {method.arxiv}", "", parts[""], "", "## Example", "", example(parts["Example"]),
        "", "## What it costs", "", parts["Cost"], "", "## When not to use it", "", parts["When not to use"], "",
    ]  # fmt: skip
    result = RESULTS / f"{method.slug}.json"
    if result.exists():
        record = json.loads(result.read_text())
        lines += [
            "## Reproduction", "", f"**Claim.** {record['claim']}", "", f"**{'Reproduced' if record['reproduced'] else 'Not reproduced'}** "
            f"on {record['device']}, {record['date']}, commit {record['commit']}, {record['seconds']:.0f} s "
            f"(`heedful reproduce {method.slug}`).", "", record["notes"], "", "| figure | value |", "|---|---|",
            *[f"| {name} | {value} |" for name, value in figures(record["figures"])][:40], "",
        ]  # fmt: skip
    lines += ["## Reference", ""]
    for entry in (method.entry_point, *method.also):
        lines += [f"::: {entry.replace(':', '.')}", ""]
    return "\n".join(lines)


def index() -> str:
    """The overview of all methods."""
    lines = ["# Methods", "", "| method | kind | what it does | paper |", "|---|---|---|---|"]
    lines += [
        f"| [{m.slug}]({m.slug}.md) | {m.kind} | {m.does} | {m.title}, arXiv {m.arxiv} |" for m in catalog.methods()
    ]
    return "\n".join(lines) + "\n"


def benchmarks() -> str:
    """The recorded runs of ``benchmarks/attention.py``: one table an operator and device."""
    lines = [
        "# Speed of the operators", "",
        "Recorded runs of `python benchmarks/attention.py`: bf16, the peers in the same run, milliseconds are medians; the error is relative to the "
        "operator's definition in higher precision, the memory is what a call takes at its peak beside its inputs.", "",
    ]  # fmt: skip
    for path in sorted(RESULTS.glob("attention-*.json")):
        record = json.loads(path.read_text())
        if not record["rows"]:
            continue
        more = sorted(
            {key for row in record["rows"] for key in row} - {"case", "contestant", "ms", "error", "peak_mib", "length"}
        )
        lines += [
            f"## {record['operator']}, {record['device']}",
            "",
            f"{record['date']}, commit {record['commit']}, torch {record['versions']['torch']}, Triton {record['versions']['triton']}."
            + (f" {record['notes']}" if record.get("notes") else ""),
            "",
        ]
        if path.with_suffix(".png").exists():
            shutil.copyfile(path.with_suffix(".png"), ROOT / "benchmarks" / f"{path.stem}.png")
            lines += [f"![Time against length](benchmarks/{path.stem}.png)", ""]
        lines += [
            f"| case | contestant | ms | error | peak MiB | {' | '.join(more)}{' |' if more else ''}",
            "|" + "---|" * (5 + len(more)),
        ]
        for row in record["rows"]:
            cells = [
                row["case"],
                row["contestant"],
                f"{row['ms']:.4g}",
                cell(row["error"], ".1e"),
                cell(row["peak_mib"], ".0f"),
            ]
            lines.append("| " + " | ".join([*cells, *(cell(row.get(key), ".3g") for key in more)]) + " |")
        lines.append("")
    return "\n".join(lines)


def cell(value: object, form: str) -> str:
    """A table cell: floats in this form, nothing for None."""
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else str(value)


def decoding_table(path: Path) -> str:
    """A recorded run of ``benchmarks/decode.py``."""
    record = json.loads(path.read_text())
    setting, contestants = record["setting"], record["contestants"]
    kinds = list(next(iter(contestants.values()))["by_category"])
    heads = ["", "tokens/s", "x generate", "x plain loop", "tokens a step", "draft / verify / commit, ms a step"]
    heads += ["forks in 1,000 tokens", *(kind.replace("_", " ") for kind in kinds)]
    lines = [
        f"**{setting['model']}** ({setting['parameters'] / 1e6:.0f} M parameters), {setting['device']}, {setting['dtype']}, "
        f"{setting['questions']} questions of {setting['max_new_tokens']} tokens, {setting['date']}, commit {setting['commit']} "
        f"(`reproductions/results/{path.name}`):", "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]  # fmt: skip
    plain = contestants["heedful, plain loop"]["tokens_per_second"]
    for name, found in contestants.items():
        step = found.get("milliseconds_per_step")
        parts = "" if step is None else " / ".join(f"{step[part]:.2f}" for part in ("draft", "verify", "commit"))
        speed, tokens = found["tokens_per_second"], found.get("tokens_per_step", 1.0)
        cells = [name, f"{speed:.0f}", f"{found['speedup']:.2f}", f"{speed / plain:.2f}", f"{tokens:.2f}", parts]
        cells += [f"{found['fork_rate_per_1000_tokens']:.2f}"]
        cells += [f"{found['by_category'][kind]['speedup']:.2f}" for kind in kinds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decoding() -> str:
    """decoding.md with the tables of what is recorded."""
    text = (ROOT / "decoding.md").read_text()
    begin, end = "<!-- tables: written by generate.py -->", "<!-- end of tables -->"
    tables = [decoding_table(RESULTS / f"decode-{name}.json") for name in ("h200", "h200-large", "cpu")]
    return "\n\n".join([text[: text.index(begin)] + begin, *tables, text[text.index(end) :]])


def model_card() -> str:
    """The bundled model's own card, without its metadata block."""
    text = (zoo.path("classics-20m") / "README.md").read_text()
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = {"methods/index": index()} | {f"methods/{method.slug}": page(method) for method in catalog.methods()}
    pages["zoo"] = model_card()
    (ROOT / "benchmarks").mkdir(exist_ok=True)
    pages["benchmarks"] = benchmarks()
    pages["decoding"] = decoding()
    stale = []
    for name, text in pages.items():
        path = ROOT / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            stale.append(str(path))
            if not check:
                path.write_text(text)
    if check and stale:
        sys.exit(f"out of date, run `python docs/generate.py`: {', '.join(stale)}")
    print(f"{len(pages)} pages, {len(stale)} {'changed' if not check else 'stale'}")


if __name__ == "__main__":
    main()
