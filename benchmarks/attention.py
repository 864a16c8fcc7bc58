"""Speed, memory and error of the attention operators beside their peers, in one run, on one GPU.

    python benchmarks/attention.py [--only hip lightning ...] [--quick] [--out FOLDER]

Each file of ``benchmarks/operators`` measures one operator: `measure(bench)`. Prints tables; writes
``attention-<operator>-<device>.json`` and a plot of it to ``--out`` (default ``reproductions/results``). bf16, times are medians
in milliseconds, errors are relative to the operator's definition in higher precision.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


class Bench:
    """Times and records. `quick`: few repeats and short inputs, to try a benchmark out."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rows: list[dict[str, Any]] = []

    def time(self, run: Callable[[], Any], *, graph: bool = False) -> float:
        """Milliseconds of a call, the median; `graph`: of replays of its CUDA graph (for calls below 0.1 ms)."""
        import triton

        if graph:
            return float(triton.testing.do_bench_cudagraph(run, rep=50 if self.quick else 200, return_mode="median"))
        warmup, rep = (10, 30) if self.quick else (25, 200)
        return float(triton.testing.do_bench(run, warmup=warmup, rep=rep, return_mode="median"))

    def peak(self, run: Callable[[], Any]) -> float:
        """MiB that a call takes at its peak, beside what was there before (its outputs are part of it)."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    @staticmethod
    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        """|got - want| / |want|."""
        return float((got.double() - want.double()).norm() / want.double().norm())

    def row(
        self,
        case: str,
        contestant: str,
        *,
        ms: float,
        error: float | None = None,
        peak: float | None = None,
        length: int | None = None,
        **more: Any,
    ) -> None:
        """Records one figure. `case`: what is computed ("prefill 32k"); `contestant`: by whom; `length`: T, for the plot."""
        row = {
            "case": case,
            "contestant": contestant,
            "ms": ms,
            "error": error,
            "peak_mib": peak,
            "length": length,
            **more,
        }
        self.rows.append(row)
        extra = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        print(
            f"{case:<28} {contestant:<34} {ms:>10.4f} ms  error {'-' if error is None else format(error, '.2e'):>8}  "
            f"peak {'-' if peak is None else format(peak, '.0f'):>7} MiB  {extra}",
            flush=True,
        )


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time against length, a line for each contestant and kind of case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["length"]:
            lines.setdefault(f"{row['case'].split()[0]}: {row['contestant']}", []).append((row["length"], row["ms"]))
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=title)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def setting() -> dict[str, Any]:
    import transformers
    import triton

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    names = sorted(path.stem for path in (HERE / "operators").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "reproductions" / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = next(
        (x.lower() for x in torch.cuda.get_device_name().split() if x[0] in "AHBL" and x[1:2].isdigit()), "gpu"
    )
    failed = []
    for name in arguments.only:
        print(f"\n# {name}, {torch.cuda.get_device_name()}", flush=True)
        spec = importlib.util.spec_from_file_location(name, HERE / "operators" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        bench = Bench(arguments.quick)
        try:
            module.measure(bench)
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failed.append(name)
        path = arguments.out / f"attention-{name}-{device}.json"
        path.write_text(json.dumps({"operator": name, **setting(), "rows": bench.rows}, indent=1) + "\n")
        plot(bench.rows, f"{name}, {torch.cuda.get_device_name()}, bf16", path.with_suffix(".png"))
        torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
