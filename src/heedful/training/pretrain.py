"""Pretraining of the zoo's language model: Llama architecture, Muon and AdamW, from random weights to a standard folder.

    python -m heedful.training.pretrain --data ../shared/data --out runs/classics-20m

Half the batches are short rows, where attention is cheap; the rest are rows of the whole context, where long-range recall is learnt.
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heedful.training.corpus import BOS, EOS, PAD, Corpus, Rows
from heedful.training.muon import Muon

SHARES = (0.77, 0.03, 0.20)  # of book, maths and recall rows


def build_model(
    vocabulary_size: int = 8192,
    *,
    hidden: int = 384,
    layers: int = 10,
    heads: int = 6,
    kv_heads: int = 2,
    intermediate: int = 1024,
    context: int = 4096,
) -> LlamaForCausalLM:
    """The model of ``classics-20m`` with random weights: 18.9 M parameters with the defaults, embeddings tied."""
    config = LlamaConfig(
        vocab_size=vocabulary_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    residual = (2 * layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(parameter, std=scale * parameter.size(1) ** -0.5)
    return model


def learning_rate(step: int, steps: int, warmup: int = 50, constant: float = 0.4, final: float = 0.01) -> float:
    """Factor on the rate: linear warm-up, constant until ``constant`` of the run, then linear down to ``final``."""
    if step < warmup:
        return (step + 1) / warmup
    begin = constant * steps
    return 1.0 if step < begin else 1.0 - (1.0 - final) * (step - begin) / max(1.0, steps - begin)


def pretrain(
    data: str | Path, out: str | Path, *, steps: int = 6000, tokens_per_step: int = 98_304, short: int = 1024, context: int = 4096,
    short_share: float = 0.5, lr: float = 0.02, weight_decay: float = 0.05, adam_lr: float = 3e-3, seed: int = 0,
    model: LlamaForCausalLM | None = None, vocabulary_size: int = 8192, checkpoint_every: int = 500, workers: int | None = None,
    device: str | None = None, compile: bool = True, stop_after: int | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Trains a causal language model on ``data`` and writes a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    A run that was killed goes on from its last checkpoint when called again with the same arguments, with the same
    batches and the same loss curve.

    Args:
        data: folder with ``classics/train-*.jsonl.xz`` and ``gsm8k/train.jsonl``.
        out: result folder; ``out/work`` holds tokens, checkpoint and ``log.jsonl`` (step, loss, rate, tokens/s).
        steps: optimiser steps. tokens_per_step: of each batch, whatever its row length.
        short, context, short_share: rows have ``short`` tokens for the first ``short_share`` of the steps, then ``context``.
        lr, weight_decay: Muon, for all matrices. adam_lr: AdamW, for embeddings and norms.
        model: to train; default ``build_model()``. stop_after: leave (with a checkpoint) after that step, to test resuming.
        workers: processes that make batches; default all cores but two. compile: ``torch.compile`` model and loss.

    Returns:
        ``out``.
    """
    out = Path(out)
    work = out / "work"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = max(0, (os.cpu_count() or 1) - 2) if workers is None else workers
    corpus = Corpus.prepare(data, work, vocabulary_size)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = model or build_model(vocabulary_size, context=context)
    model.to(device).train()  # type: ignore[arg-type]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda"),
    ]
    base_rates = [lr, adam_lr]

    def loss_of(rows: Tensor) -> Tensor:
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if compile else loss_of
    done = 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["steps"] != steps or state["seed"] != seed:
            raise ValueError(
                f"{checkpoint} is of a run with steps={state['steps']}, seed={state['seed']}: give another `out`"
            )
        model.load_state_dict(state["model"])
        for optimiser, optimiser_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(optimiser_state)
        done = state["step"]

    def save_checkpoint(step: int) -> None:
        state = {
            "step": step,
            "steps": steps,
            "seed": seed,
            "model": model.state_dict(),
            "optimisers": [o.state_dict() for o in optimisers],
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(
            checkpoint
        )  # a kill leaves the old one or the new one, never half of one

    log = (work / "log.jsonl").open("a")
    switch = round(short_share * steps)
    books_before = 0
    started = time.perf_counter()
    last_loss = torch.zeros((), device=device)
    for first, last, length in ((0, switch, short), (switch, steps, context)):
        dataset = Rows(
            corpus, rows=max(1, tokens_per_step // length), length=length, shares=SHARES, first_step=first, steps=last - first,
            seed=seed, books_before=books_before,
        )  # fmt: skip
        begin = max(done, first)
        if begin < last:
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(dataset, range(begin - first, last - first)), batch_size=None, num_workers=workers,
                prefetch_factor=4 if workers else None, pin_memory=device == "cuda",
            )  # fmt: skip
            mark, mark_time = begin, time.perf_counter()
            for step, rows in enumerate(loader, begin):
                factor = learning_rate(step, steps)
                for optimiser, rate in zip(optimisers, base_rates, strict=True):
                    for group in optimiser.param_groups:
                        group["lr"] = rate * factor
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss = step_loss(rows.to(device, non_blocking=True))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                last_loss = loss.detach()
                finished = step + 1
                if finished % 50 == 0 or finished in (1, last) or stop_after == finished:
                    value = float(last_loss)
                    now = time.perf_counter()
                    speed = (finished - mark) * dataset.rows * length / (now - mark_time)
                    mark, mark_time = finished, now
                    entry: dict[str, Any] = {
                        "step": finished,
                        "loss": value,
                        "rate": factor,
                        "tokens_per_second": round(speed),
                        "seconds": round(now - started, 1),
                    }
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    if progress:
                        print(  # noqa: T201
                            f"step {finished}/{steps}  row {length}  loss {value:.4f}  rate {factor:.3f}  {speed / 1e3:.0f}k tokens/s",
                            flush=True,
                        )
                    if not np.isfinite(value):
                        raise RuntimeError(f"the loss is {value} at step {finished}: lower lr or adam_lr")
                if finished % checkpoint_every == 0 or stop_after == finished:
                    save_checkpoint(finished)
                if stop_after == finished:
                    return out
        books_before += (
            dataset.book_rows * (last - first) * length // context
        )  # so that the longer rows go on where the short ones ended
    save_folder(model, corpus, out)
    save_checkpoint(steps)
    return out


def save_folder(model: LlamaForCausalLM, corpus: Corpus, out: Path) -> None:
    """Model (bf16 safetensors in shards) and tokenizer (adds BOS by itself), as ``from_pretrained`` wants them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip
    half = copy.deepcopy(model)
    half.to(torch.bfloat16)  # type: ignore[arg-type]
    half.save_pretrained(out, max_shard_size="12MB")
    tokenizer.save_pretrained(out)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short-share", type=float, default=0.5)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    arguments = parser.parse_args()
    pretrain(
        arguments.data, arguments.out, steps=arguments.steps, seed=arguments.seed, short_share=arguments.short_share,
        stop_after=arguments.stop_after, checkpoint_every=arguments.checkpoint_every,
    )  # fmt: skip


if __name__ == "__main__":
    main()
