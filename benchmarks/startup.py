"""Import time of `import heedful` and `heedful --help`, as a ratio to `python -c pass` in the same run. Medians of 15."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import heedful": [sys.executable, "-c", "import heedful"],
    "heedful --help": [sys.executable, "-m", "heedful.cli", "--help"],
}
LIMITS = {"import heedful": 0.3, "heedful --help": 0.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):  # interleaved, so that other load on the machine hits all alike
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
            times[name].append(time.perf_counter() - began)
    base = statistics.median(times["python -c pass"])
    print(f"{'command':<16} {'median s':>9} {'min s':>7} {'ratio':>6} {'limit s':>8}")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:<16} {median:>9.3f} {min(values):>7.3f} {median / base:>6.1f} {LIMITS.get(name, float('nan')):>8.1f}"
        )


if __name__ == "__main__":
    main()
