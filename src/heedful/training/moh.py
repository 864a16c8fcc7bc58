"""Continued training of a pretrained model as Mixture-of-Head (arXiv 2410.11842): the heads learn to do with fewer of them.

The loss is that of the next token, the balance loss over heads, and, where asked, the divergence from the model before its
conversion (which keeps what a small or narrow text would wash out). The choice of heads has its gradient straight through.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.layers.moh import balance_loss, convert_to_moh
from heedful.training.loop import Loop, accelerator_for, schedule
from heedful.training.rows import PackedRows, read_documents

CHUNK = 4096  # tokens whose logits are in float32 at a time


def _token_losses(logits: Tensor, before: Tensor | None, targets: Tensor) -> Tensor:
    """Sums over tokens: the cross-entropy, and the divergence from the logits `before` (0 without them)."""
    ours = logits.float().log_softmax(-1)
    next_token = nn.functional.nll_loss(ours, targets, reduction="sum")
    if before is None:
        return torch.stack([next_token, next_token.new_zeros(())])
    theirs = before.float().log_softmax(-1)
    return torch.stack([next_token, nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")])


class _Objective(nn.Module):
    """What DistributedDataParallel wraps: the loss of a batch of rows, and its parts."""

    def __init__(self, model: PreTrainedModel, balance: float, distillation: float) -> None:
        super().__init__()
        self.model, self.balance, self.distillation = model, balance, distillation
        teacher = None
        if distillation:
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            convert_to_moh(teacher, active_ratio=1.0, shared_ratio=1.0)  # all heads: the model before its conversion
        self.teacher = (teacher,)  # no sub-module: it is not trained, shared or saved

    def forward(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        output = cast(Any, self.model)(input_ids=inputs, use_cache=False, output_attentions=True)
        before = None
        if self.distillation:
            with torch.no_grad():
                before = cast(Any, self.teacher[0])(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        sums = torch.zeros(2, device=rows.device)
        # In pieces that are computed again in the backward pass: logits in float32 are the largest tensors of a small model.
        for piece in torch.arange(len(targets), device=rows.device).split(CHUNK):
            now, then = output.logits.flatten(0, 1)[piece], None if before is None else before[piece]
            sums = sums + checkpoint(_token_losses, now, then, targets[piece], use_reentrant=False)
        next_token, divergence = sums / len(targets)
        spread = balance_loss(output.attentions)
        loss = next_token + self.balance * spread
        parts = {"next_token": next_token.detach(), "balance": spread.detach()}
        if self.distillation:
            loss = loss + self.distillation * divergence
            parts["divergence"] = divergence.detach()
        return loss, parts


def train_moh(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Sequence[Tensor],
    out: str | Path,
    *,
    active_ratio: float = 0.75,
    shared_ratio: float = 0.5,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 1024,
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    clip: float = 1.0,
    balance: float = 0.01,
    distillation: float = 0.0,
    seed: int = 0,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Converts a pretrained model to Mixture-of-Head attention, trains it on text, and writes a folder that `from_pretrained` loads.

    Under `accelerate launch` the rows of each batch are shared among the processes. A run that was killed goes on from its
    last checkpoint when called again with the same arguments.

    Example:
        import heedful
        from heedful.training import train_moh

        model, tokenizer = heedful.zoo.load("classics-20m")
        train_moh(model, tokenizer, "books.jsonl", "runs/moh", steps=600, distillation=10.0)

    Args:
        model: A transformers causal language model, converted here (`heedful.layers.convert_to_moh`) and trained in float32; a GPU
            computes in bfloat16 by autocast.
        tokenizer: Its tokenizer; saved beside it.
        data: A .txt or .jsonl file (`heedful.training.rows.read_documents`), or batches by step: a sequence whose item
            `step` is int64 `(batch, length + 1)`, such as `heedful.training.corpus.Rows`.
        out: Result folder; `out/training` holds the checkpoint and `log.jsonl`.
        active_ratio, shared_ratio: Shares of the query heads that each token has, and that all tokens have.
        steps: Optimiser steps. batch_size: rows of a step, over all processes. length: tokens of a row. (Of batches by step, the
            last two are theirs.)
        lr, weight_decay, warmup, clip: Of AdamW; warm-up as a share of the steps, then half a cosine to zero.
        balance: Weight of the balance loss (over the rows of one process). distillation: weight of the divergence from the
            model before its conversion; 10 recovers a small model sooner than 1.
        seed: Of the rows.
        checkpoint_every: Steps between checkpoints. resume: go on from one if it is there.
        progress: A bar on stderr. stop_after: leave, with a checkpoint, after that step.

    Returns:
        `out`.

    Raises:
        ValueError: If there is no text, rows are longer than it, the batch is not a multiple of the processes, nothing is
            routed, or a checkpoint is of a run with other arguments.

    Cost:
        That of training the model with all heads (the straight-through gradient needs them), a third more with distillation.

    When not to use:
        To save time at inference on short inputs: nothing is saved there (`convert_to_moh` says what is, and where).

    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin, Zhu, Yuan, Yan, arXiv 2410.11842.
    """
    accelerator = accelerator_for(steps, batch_size)
    convert_to_moh(model, active_ratio, shared_ratio)
    if round(active_ratio * model.config.num_attention_heads) == model.config.num_attention_heads:
        raise ValueError(f"active_ratio={active_ratio} keeps every head: there is nothing to train")
    rows = PackedRows(read_documents(data), tokenizer, length + 1, seed) if isinstance(data, str | Path) else data
    if not isinstance(rows, PackedRows) and len(rows) < steps:
        raise ValueError(f"data has batches for {len(rows)} steps, fewer than steps={steps}")

    out = Path(out)
    on_cpu = model.device.type == "cpu"
    model.to(torch.float32).requires_grad_(True)  # type: ignore[arg-type]
    model.to("cpu" if on_cpu else accelerator.device).train()  # type: ignore[arg-type]
    objective: Any = _Objective(model, balance, distillation)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser: Any = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    objective, optimiser = accelerator.prepare(objective, optimiser, device_placement=[not on_cpu] * 2)

    mark = {
        "steps": steps, "batch_size": batch_size, "length": length, "seed": seed, "moh": str(model.config.moh), "lr": lr,
        "weight_decay": weight_decay, "warmup": warmup, "clip": clip, "balance": balance, "distillation": distillation,
    }  # fmt: skip
    loop = Loop(
        accelerator, out, optimiser, mark, steps=steps, batch_size=batch_size, rate=lambda step: schedule(step, steps, warmup),
        seed=seed, clip=clip, checkpoint_every=checkpoint_every, resume=resume, progress=progress, stop_after=stop_after,
    )  # fmt: skip
    for step in loop:
        if isinstance(rows, PackedRows):
            batch = rows.batch(step, loop.places)
        else:
            batch = rows[step][accelerator.process_index :: accelerator.num_processes]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=not on_cpu):
            loss, parts = objective(batch.to(model.device))
        loop.backward(loss)
        loop.take({"loss": loss, **parts}, accelerator.num_processes * batch[:, 1:].numel())
    if not loop.complete:
        return out
    model.eval()
    loop.finish(model, tokenizer)
    return out
