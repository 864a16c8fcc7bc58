"""Hidden Transfer (arXiv 2404.12022) on the bundled model: refinement in the upper layers against heads on the last state.

The same rows, steps and optimiser for every variant: three Medusa heads; transfers at the embedding, at several depths, and
after the last layer (a linear head without refinement). Compared, on the model's own text and with one and the same tree: how
often each step's first candidate is the model's own token, tokens a step, trainable parameters, rows a step. For the default
layers also how close pseudo states come to the real ones, layer by layer.

    python reproductions/hidden_transfer.py [--steps 100] [--device cuda] [--processes 4] [--quick] [--out FILE]

What is there is recorded after every variant, marked as incomplete until all have run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from _drafting import DATA, held_out_rows, together, training_text
from _record import record
from torch import Tensor
from torch.nn import functional as F

from heedful import zoo
from heedful.decoding import HiddenTransfer, Medusa
from heedful.decoding.medusa import MC_SIM_7B_63
from heedful.decoding.trained import model_logits, rank_accuracies
from heedful.training import train_hidden_transfer, train_medusa
from heedful.training.drafting import own_text

PROMPT, STEPS = 64, 3
TREE = [path for path in MC_SIM_7B_63 if len(path) <= STEPS][:32]
VARIANTS: dict[str, dict[str, Any]] = {
    "Medusa, 3 heads": {},
    "layers 5 6 7": {"transfer_layers": [5, 6, 7]},
    "layers 10 10 10": {"transfer_layers": [10, 10, 10]},
    "layers 0 0 0": {"transfer_layers": [0, 0, 0]},
    "layers 8 8 8": {"transfer_layers": [8, 8, 8]},
    "layers 3 4 5": {"transfer_layers": [3, 4, 5]},
    "layers 5 6 7, source previous": {"transfer_layers": [5, 6, 7], "source": "previous"},
    "layers 5 6 7, labels of the text": {"transfer_layers": [5, 6, 7], "hard_labels": True},
}
MEDUSA, DEFAULT, LAST = "Medusa, 3 heads", "layers 5 6 7", "layers 10 10 10"


@torch.no_grad()
def agreement(drafter: Any, model: Any, rows: Tensor) -> list[float]:
    """How often each step's first candidate is what the model chose, on its own greedy text."""
    found, chosen = [], []
    for batch in rows.split(4):
        if isinstance(drafter, HiddenTransfer):
            pseudo, hidden = drafter.pseudo_states(model, batch)
            found.append(drafter.read_out(pseudo.transpose(1, 2)).topk(1).indices)
        else:
            hidden = model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state
            found.append(drafter.candidates(hidden)[..., :1])
        chosen.append(model_logits(model, hidden).argmax(-1))
    accuracies, _ = rank_accuracies(torch.cat(found), torch.cat(chosen), prompt=PROMPT)
    return [round(step[0], 3) for step in accuracies]


@torch.no_grad()
def similarity(drafter: HiddenTransfer, model: Any, rows: Tensor) -> dict[str, list[float]]:
    """Mean cosine between the pseudo state of each step and the real state of its token, entering each layer (and at the end)."""
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.get_decoder().layers):

        def note(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            seen.setdefault(index, []).append(args[0] if args else kwargs["hidden_states"])

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    ends: list[Tensor] = []
    handles.append(model.get_decoder().norm.register_forward_pre_hook(lambda module, args: ends.append(args[0])))
    try:
        last, _ = drafter.pseudo_states(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    curves: dict[str, list[float]] = {f"step {step}": [] for step in range(1, STEPS + 1)}
    length = rows.shape[1]
    for index in [*sorted(seen), len(seen)]:
        real, *pseudo = [ends[0]] if index == len(seen) else seen[index]
        states = last if index == len(seen) else (pseudo[0].unflatten(1, (-1, length)) if pseudo else None)
        for step in range(states.shape[1] if states is not None else 0):
            ahead = step + 1
            cosine = F.cosine_similarity(states[:, step, : length - ahead], real[:, ahead:], dim=-1)
            curves[f"step {ahead}"].append(round(float(cosine.mean()), 3))
    return curves


def reference(device: str, number: int, tokens: int) -> dict[str, Any]:
    """What all variants are measured on: the model's own text, prompts, and what it says to them without a draft."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = zoo.load("classics-20m", device=device)
    rows = held_out_rows(tokenizer, 2 * number, PROMPT)
    settings = {"max_new_tokens": tokens, "pad_token_id": tokenizer.pad_token_id, "engine": "eager"}
    return {
        "own": own_text(model, rows[::2], 128, PROMPT).cpu(),
        "prompts": rows[1::2],
        "plain": together(model, rows[1::2], None, None, **settings)["sequences"],
        "settings": settings,
    }


def run(name: str, device: str, steps: int, text: Path, work: Path) -> dict[str, Any]:
    """Trains and measures one variant."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = torch.load(work / "reference.pt", weights_only=True)
    model, tokenizer = zoo.load("classics-20m", device=device)
    options = dict(VARIANTS[name])
    size = {"batch_size": 32, "length": 256} if device != "cpu" else {"batch_size": 4, "length": 96}
    common: dict[str, Any] = {"steps": steps, "lr": 2e-3, "calibration_rows": 0, "progress": False, **size}
    out = work / name.replace(" ", "-")
    began = time.perf_counter()
    if name == MEDUSA:
        train_medusa(model, tokenizer, text, out, num_heads=STEPS, weighting="equal", **common)
    else:
        train_hidden_transfer(model, tokenizer, text, out, num_transfer_steps=STEPS, **common, **options)
    seconds = time.perf_counter() - began
    drafter = (Medusa if name == MEDUSA else HiddenTransfer).from_pretrained(out, max_nodes=len(TREE))
    drafter.set_tree(TREE)
    drafter.bind(model)
    own = given["own"].to(device)
    found = together(model, given["prompts"], drafter, given["plain"], **given["settings"])
    nodes, live = len(drafter.tree), 0 if name == MEDUSA else STEPS
    figures = {
        "agreement_by_step": agreement(drafter, model, own),
        "tokens_per_step": round(found["tokens_per_step"], 3),
        "trainable_parameters": sum(p.numel() for p in drafter.parameters()),
        "rows_of_a_verification": {"lower layers": nodes, "upper layers": nodes * (1 + live)},
        "outputs_that_differ": found["outputs_that_differ"],
        "seconds_of_training": round(seconds, 1),
    }
    if name == DEFAULT:
        figures["cosine_of_pseudo_and_real_states_by_layer"] = similarity(drafter, model, own[:8])
    print(name, figures, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four variants, 20 steps, few continuations")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, help="variants trained side by side. Default: 4 on a GPU, else 1")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    on_cpu = arguments.device == "cpu"
    steps, number, tokens = (20, 4, 40) if arguments.quick else (arguments.steps, 8 if on_cpu else 32, 64)
    names = [MEDUSA, "layers 0 0 0", DEFAULT, LAST] if arguments.quick else arguments.variants
    processes = arguments.processes or (1 if on_cpu else 4)
    figures: dict[str, Any] = {"training_steps": steps, "nodes_of_the_tree": len(TREE), "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = training_text(
            work, arguments.data, arguments.device, 0 if arguments.quick else 16 if on_cpu else 256, 1_000_000
        )
        torch.save(reference(arguments.device, number, tokens), work / "reference.pt")
        print(f"text and reference: {time.perf_counter() - began:.0f} s", flush=True)
        given = (arguments.device, steps, text, work)

        def note(name: str, found: dict[str, Any]) -> None:
            figures["variants"][name] = found
            conclude(figures, began, arguments.out, len(figures["variants"]) == len(names))

        if processes == 1:
            for name in names:
                note(name, run(name, *given))
            return
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(run, name, *given): name for name in names}
            for future in as_completed(waiting):
                note(waiting[future], future.result())


def conclude(figures: dict[str, Any], began: float, out: Path | None, complete: bool) -> None:
    """Records what is there: the claims as far as their variants have run."""
    results = figures["variants"]
    by_step = {name: result["agreement_by_step"] for name, result in results.items()}
    refined = [name for name in results if name.startswith("layers") and name != LAST]
    claims = {"the same text": all(result["outputs_that_differ"] == 0 for result in results.values())}
    if refined:
        best = figures["best_layers"] = max(refined, key=lambda name: sum(by_step[name][1:]))
        claims["accuracy falls with the step"] = by_step[best] == sorted(by_step[best], reverse=True)
        if MEDUSA in results:
            claims["from step 2 on, refined pseudo states beat heads on the last state"] = all(
                by_step[best][step] > by_step[MEDUSA][step] for step in (1, 2)
            )
            claims["at least as many tokens a step as Medusa with the same tree"] = (
                results[best]["tokens_per_step"] >= results[MEDUSA]["tokens_per_step"]
            )
        if LAST in results:
            claims["and beat linear heads with the same loss after the last layer"] = all(
                by_step[best][step] > by_step[LAST][step] for step in (1, 2)
            )
        if "layers 0 0 0" in refined and len(refined) > 1:
            claims["transferring at the embedding is worse than in the middle"] = best != "layers 0 0 0" and (
                sum(by_step["layers 0 0 0"]) < sum(by_step[best])
            )
    if DEFAULT in results:
        cosines = results[DEFAULT]["cosine_of_pseudo_and_real_states_by_layer"]
        claims["pseudo states come closer to the real ones layer by layer"] = all(
            curve[-1] > curve[0] for curve in cosines.values()
        )
    figures["claims"] = claims
    record(
        "hidden-transfer",
        claim="Pseudo hidden states that are made in the middle of the network and refined by its upper layers guess further tokens "
        "better than heads on the last hidden state do, with few parameters; the output stays the same.",
        figures=figures,
        reproduced=len(claims) == 7 and all(claims.values()),
        seconds=time.perf_counter() - began,
        notes="; ".join(f"{'held' if held else 'DID NOT HOLD'}: {claim}" for claim, held in claims.items()),
        complete=complete,
        out=out,
    )


if __name__ == "__main__":
    main()
