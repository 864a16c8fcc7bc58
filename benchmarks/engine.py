"""The engine on a GPU against transformers' generate and the memory limit: Llama-8B shape, random weights, bf16, batch 1.

    python benchmarks/engine.py [--layers 32] [--tokens 256] [--prompt 128] [--forms graph compiled] [--skip-peers] [--out FILE]

All in one run: reading the weights once, heedful's plain loop (in CUDA graphs, and in graphs of a compiled forward), a verify
step of 64 nodes, `generate` with a static cache and torch.compile, `generate` with a dynamic cache, and an oracle drafter that
replays a known continuation with 1, 2 or 3 right tokens below the root (2, 3, 4 tokens a step). Prefill and compilation are in
none of the rates. Prints a table, writes ``reproductions/results/engine-<device>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import heedful
from heedful.decoding import DeviceDrafter, DeviceStep, Drafter
from heedful.decoding.support import without_cudnn_attention

HERE = Path(__file__).parent


class After(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


class Oracle(Drafter):
    """Knows the continuation: the first ``right`` tokens of its chain are right, all its other nodes are wrong."""

    def __init__(self, text: Tensor, right: int, nodes: int = 64, vocabulary: int = 128_256) -> None:
        self.text, self.right, self.nodes, self.vocabulary = text, right, nodes, vocabulary

    def on_device(self, model: Any, batch_size: int, capacity: int) -> DeviceDrafter:
        return OracleOnDevice(self, capacity)


class OracleOnDevice(DeviceDrafter):
    max_depth = 8

    def __init__(self, oracle: Oracle, capacity: int) -> None:
        self.oracle, self.num_nodes = oracle, oracle.nodes
        depth = min(self.max_depth, oracle.nodes - 1)
        self.max_depth = depth
        self.parents = (*range(-1, depth), *[0] * (oracle.nodes - depth - 1))
        self.text = torch.zeros(capacity + 64, dtype=torch.long, device="cuda")
        self.text[: oracle.text.numel()] = oracle.text
        # What is added to the true token to make a node wrong.
        wrong = torch.arange(oracle.nodes, device="cuda") + 1
        wrong[1 : oracle.right + 1] = 0
        self.wrong = wrong
        self.ahead = torch.tensor([*range(depth + 1), *[1] * (oracle.nodes - depth - 1)], device="cuda")

    def advance(self, step: DeviceStep) -> Tensor:
        tokens = (self.text[step.lengths[:, None] + self.ahead] + self.wrong) % self.oracle.vocabulary
        return torch.cat([step.roots[:, None], tokens[:, 1:]], dim=1)


@torch.no_grad()
def count_up(model: LlamaForCausalLM) -> None:
    """Lets a model of random weights continue token t with t + 1: then no near tie makes the oracle's text depend on the node
    that computes it. The embedding outweighs what the layers add (about 11 at 32 layers), and the head is its shifted copy."""
    embedding = model.model.embed_tokens.weight
    head = embedding.roll(1, 0)
    embedding.mul_(30 / embedding.std())
    model.lm_head.weight.copy_(head)


def seconds(run: Callable[[int], Any], tokens: int, repeats: int = 2) -> float:
    """Seconds of ``tokens`` decoded tokens: a run with one token more, less a run with one."""
    best = []
    for _ in range(repeats):
        times = []
        for number in (1, tokens + 1):
            torch.cuda.synchronize()
            began = perf_counter()
            run(number)
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        best.append(times[1] - times[0])
    return min(best)


def read_once(model: torch.nn.Module) -> tuple[float, float]:
    """Seconds to read all weights that a step reads (without the embedding), and the bandwidth they are reckoned with.

    The bandwidth is that of one reduction over 8 GiB, the fastest plain read there is; no kernel reads each weight for itself.
    """
    size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
    data = torch.zeros(2**31, dtype=torch.float32, device="cuda").view(4096, -1)
    data.normal_()
    out = torch.empty(4096, device="cuda")
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.sum(data, dim=1, out=out)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    bandwidth = data.numel() * 4 / min(times)
    return size / bandwidth, bandwidth


def print_kernels(run: Callable[[], Any], trace: Path) -> None:
    """Time by kernel over a short run; the order of the kernels goes into a trace for chrome://tracing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=90), flush=True)
    profile.export_chrome_trace(str(trace))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--skip-peers", action="store_true", help="without transformers' own generate")
    parser.add_argument("--forms", nargs="+", choices=["graph", "compiled"], default=["graph", "compiled"])
    parser.add_argument("--start", type=Path, help="compile, then wait until this file exists: for a shared device")
    parser.add_argument("--profile", action="store_true", help="print the kernels that a plain and a 64-node step take")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    transformers.logging.set_verbosity_error()
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=arguments.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    count_up(model)
    ids = torch.randint(0, config.vocab_size, (1, arguments.prompt), device="cuda")
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "attention_mask": mask}
    figures: dict[str, Any] = {}
    tokens = arguments.tokens
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    device = torch.cuda.get_device_name()
    results = {
        "figures": figures,
        "setting": {k: v for k, v in vars(arguments).items() if k not in ("out", "start")},
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    kind = next((x.lower() for x in device.split() if x[0] in "AHBL" and x[1:2].isdigit()), "gpu")
    out = arguments.out or HERE.parent / "reproductions" / "results" / f"engine-{kind}.json"

    def note(name: str, value: float, unit: str = "tokens/s") -> None:
        figures[name] = round(value, 4)
        out.write_text(json.dumps(results, indent=2) + "\n")  # after each: a run that is cut off leaves what it has
        print(f"{name:<58}{value:10.2f} {unit}", flush=True)

    def ours(drafter: Drafter | None, number: int, compile: bool) -> Any:
        return heedful.generate(model, ids, drafter, engine="graph", compile=compile, max_new_tokens=number, **options)

    def static(number: int | None = None) -> Any:
        """transformers' compiled generate, its cache for all tokens; stopped after some, the cache is the same."""
        stop = {} if number is None else {"stopping_criteria": StoppingCriteriaList([After(arguments.prompt + number)])}
        return model.generate(ids, max_new_tokens=tokens, cache_implementation="static", **options, **stop)

    # What is compiled and captured first: none of it belongs to the figures that follow.
    forms = {name: name == "compiled" for name in arguments.forms}
    wrong = Oracle(torch.zeros(1, dtype=torch.long, device="cuda"), 0)
    for form, compile in forms.items():
        for drafter, what in ((None, "plain"), (wrong, "64 nodes")):
            held, began = torch.cuda.memory_allocated(), perf_counter()
            stats = ours(drafter, 8, compile).stats
            note(f"{what}, {form}: first call", perf_counter() - began, "s")
            note(f"{what}, {form}: of it capturing", stats.capture_seconds, "s")
            note(f"{what}, {form}: memory of graphs and cache", (torch.cuda.memory_allocated() - held) / 2**20, "MiB")
    if not arguments.skip_peers:
        began = perf_counter()
        static(4)
        note("transformers generate, static cache, compiled: first call", perf_counter() - began, "s")
    while arguments.start is not None and not arguments.start.exists():
        sleep(0.1)

    once, bandwidth = read_once(model)
    torch.cuda.empty_cache()
    limit = 1 / once
    note("bandwidth of a plain read", bandwidth / 1e12, "TB/s")
    note("weights read once", limit)
    known: dict[str, Tensor] = {}
    for form, compile in forms.items():
        took = seconds(lambda n, c=compile: ours(None, n, c), tokens)
        note(f"plain, {form}", tokens / took)
        note(f"plain, {form}: of the read-once rate", tokens / took / limit, "")
        run = ours(wrong, tokens + 64, compile)
        known[form] = run.sequences[0]
        step = run.stats.verify_seconds / run.stats.steps
        note(f"64 nodes, {form}: verify step", 1e3 * step, "ms")
        note(f"64 nodes, {form}: over a plain step", step * tokens / took, "")
        if arguments.profile:
            for drafter, what in ((None, "plain"), (wrong, "64")):
                trace = out.with_name(f"{out.stem}-{what}-{form}-trace.json")
                print_kernels(lambda d=drafter, c=compile: ours(d, 24, c), trace)
    peers: dict[str, float] = {}
    if not arguments.skip_peers:
        static()
        took = seconds(lambda n: static(1 if n == 1 else None), tokens - 1, 1)
        peers["compiled generate"] = (tokens - 1) / took
        note("transformers generate, static cache, compiled", peers["compiled generate"])
        with without_cudnn_attention(ids.device):  # else it builds a plan in every step
            model.generate(ids, max_new_tokens=4, **options)
            peers["generate"] = 64 / seconds(lambda n: model.generate(ids, max_new_tokens=n, **options), 64, 1)
        note("transformers generate", peers["generate"])
    for form, compile in forms.items():
        text = known[form]
        for right in (2, 1, 3):
            oracle = Oracle(text, right)
            result = ours(oracle, tokens + 16, compile)
            assert torch.equal(result.sequences[0], text[: result.sequences.shape[1]]), (
                "the oracle's text is not the model's"
            )
            speed = tokens / seconds(lambda n, o=oracle, c=compile: ours(o, n, c), tokens)
            note(f"oracle of {right + 1}, {form}: tokens a step", result.stats.tokens_per_step, "")
            note(f"oracle of {right + 1}, {form}", speed)
            for peer, rate in peers.items():
                note(f"oracle of {right + 1}, {form}: over {peer}", speed / rate, "x")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
