"""Writes what a reproduction measured to ``reproductions/results/<slug>.json``: the figures, and where and when they were taken."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: Books to train and to judge on, where the shared data is there.
CLASSICS = Path(__file__).parents[2] / "shared" / "data" / "classics"


def needs_books(folder: Path) -> None:
    """Ends the program with the remedy if the books are not in the folder."""
    for name in ("train-0.jsonl.xz", "validation.jsonl.xz"):
        if not (folder / name).exists():
            sys.exit(
                f'{folder / name} is missing: give its folder with --data (books, a JSON object with "text" a line)'
            )


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return git.stdout.strip() or "unknown"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def record(
    slug: str,
    *,
    claim: str,
    figures: dict[str, Any],
    reproduced: bool,
    seconds: float,
    notes: str = "",
    complete: bool = True,
    out: Path | None = None,
) -> Path:
    """Records one run. ``claim``: the paper's claim in one sentence; ``figures``: what was measured, JSON values with
    units in their names; ``reproduced``: whether the claim came out here; ``notes``: why not, or what to know.

    With ``complete=False`` a run in progress leaves what it has, marked as incomplete; the last call replaces it."""
    import torch
    import transformers

    result = {
        "slug": slug,
        "claim": claim,
        "reproduced": reproduced and complete,
        "figures": figures,
        "notes": notes if complete else f"INCOMPLETE, the run was cut off. {notes}",
        "device": _device(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out = out or RESULTS / f"{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(out)  # a kill leaves the last whole file
    if complete:
        print(json.dumps(result, indent=2))
        print(f"recorded in {out}", file=sys.stderr)
    return out
