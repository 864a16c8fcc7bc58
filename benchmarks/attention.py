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
import re
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
    """Time against length: a panel for each kind of case (the case without its length), a colour for each contestant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["length"]:
            kind = re.sub(r"[, ]*(T[= ]?)?\b\d+k?$", "", row["case"])
            panels.setdefault(kind, {}).setdefault(row["contestant"], []).append((row["length"], row["ms"]))
    panels = {kind: lines for kind, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    if not panels:
        return
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 2, strict=False))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, grid = plt.subplots(down, across, figsize=(4.2 * across + 0.6, 3.1 * down + 0.8), squeeze=False)
    for axes, (kind, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            ours = name.startswith(("heedful", "HiP", "skipped"))
            axes.plot(
                *zip(*sorted(points), strict=True), marker="o", ms=4, lw=2.2 if ours else 1.2, color=colours[name]
            )
        lengths = sorted({length for points in lines.values() for length, _ in points})
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=kind, xlabel="tokens", ylabel="milliseconds")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [plt.Line2D([], [], color=colours[name], marker="o", ms=4, label=name) for name in names]
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.2 * -(-len(names) // 3) / figure.get_figheight() + 0.01, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=min(3, len(names)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
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
        sys.modules[name] = module  # where torch.compile looks up the module of its functions
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
