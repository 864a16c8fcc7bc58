"""What cuDNN's attention saves over flash attention in a prefill, and what its plan for a new length costs: causal, bf16, one layer.

    python benchmarks/cudnn_plans.py [--out FILE]

Of four lengths near each other that have not occurred before: the first call (with the plan), the shortest of three more, and the
shortest of three calls of flash attention; the medians. Writes ``reproductions/results/cudnn-plans-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median_low
from time import perf_counter

import torch
from attention import setting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def milliseconds(inputs: list[Tensor], backend: SDPBackend) -> float:
    torch.cuda.synchronize()
    began = perf_counter()
    with sdpa_kernel(backend):
        scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.cuda.synchronize()
    return (perf_counter() - began) * 1e3


def measure(heads: int, kv_heads: int, dim: int, base: int) -> dict[str, float]:
    first, again, flash = [], [], []
    for i in range(4):
        length = base + 17 * i + 1
        shapes = [(1, count, length, dim) for count in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        milliseconds(inputs, SDPBackend.FLASH_ATTENTION)
        flash.append(min(milliseconds(inputs, SDPBackend.FLASH_ATTENTION) for _ in range(3)))
        first.append(milliseconds(inputs, SDPBackend.CUDNN_ATTENTION))
        again.append(min(milliseconds(inputs, SDPBackend.CUDNN_ATTENTION) for _ in range(3)))
    found = {"cudnn_first_ms": first, "cudnn_again_ms": again, "flash_ms": flash}
    row = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "length": base}
    return row | {name: round(median_low(values), 3) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows = []
    for heads in ((32, 8, 128), (6, 2, 64)):
        for base in (256, 1024, 2048, 4096, 8192, 16384, 32768):
            rows.append(measure(*heads, base))
            print(rows[-1], flush=True)
    name = f"cudnn-plans-{torch.cuda.get_device_name().split()[-1].lower()}.json"
    out = arguments.out or Path(__file__).parents[1] / "reproductions" / "results" / name
    out.write_text(json.dumps(setting() | {"cudnn": torch.backends.cudnn.version(), "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
