"""How drafters are trained: packed rows of text, one loss, on any number of processes.

Recipes (`train_medusa`, `train_hidden_transfer`, `train_longspec`) have the signature ``(model, tokenizer, data, out, *, steps,
batch_size, length, lr, seed, ...)`` and end in `train_drafter`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.decoding.trained import TrainedDrafter
from heedful.training.loop import Loop, accelerator_for, schedule
from heedful.training.rows import PackedRows, rows_of


class _Objective(nn.Module):
    """What DistributedDataParallel wraps: the drafter's parameters, and the model's where they are trained too."""

    def __init__(self, drafter: TrainedDrafter, model: PreTrainedModel, joint: bool) -> None:
        super().__init__()
        self.drafter = drafter
        self.joint = model if joint else None
        self.frozen = (model,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.drafter.loss(self.frozen[0], input_ids, labels)


def train_drafter(
    drafter: TrainedDrafter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 512,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    joint_groups: list[dict[str, Any]] | None = None,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
    finish: Callable[[], None] | None = None,
) -> Path:
    """Trains a drafter on text and writes a folder that its ``from_pretrained`` loads.

    Under ``accelerate launch`` the rows of each batch are shared among the processes: the losses are those of one process. A
    run that was killed goes on from its last checkpoint when called again with the same arguments.

    Example:
        >>> import heedful
        >>> from heedful.decoding import Medusa
        >>> from heedful.training import train_drafter
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> drafter = Medusa.for_model(model, num_heads=3)
        >>> train_drafter(drafter, model, tokenizer, "text.txt", "runs/heads", steps=300)  # doctest: +SKIP

    Args:
        drafter: what is trained, by its `loss`; in float32 (a GPU computes in bfloat16 by autocast).
        model: the target; frozen, unless ``joint_groups``.
        tokenizer: the target's.
        data: a file for `read_pieces`, or its `PackedRows` (whose length and seed do not matter).
        out: result folder; ``out/training`` holds the checkpoint and ``log.jsonl``.
        steps: optimiser steps. batch_size: rows of a step, over all processes. length: tokens of a row.
        lr, betas, weight_decay, warmup, clip: of AdamW; warm-up as a share of the steps, then a cosine to zero.
        joint_groups: parameter groups of the model that are trained as well (Medusa-2).
        checkpoint_every: steps between checkpoints. resume: go on from one if it is there.
        progress: a bar on stderr. stop_after: leave, with a checkpoint, after that step.
        finish: called when all steps are done and before the drafter is written, to calibrate it for instance; a run that is
            killed in it goes on from the last step.

    Returns:
        ``out``.

    Raises:
        ValueError: no text, rows longer than the text, ``batch_size`` not a multiple of the processes, or a checkpoint of a
            run with other arguments.
    """
    accelerator = accelerator_for(steps, batch_size)
    out = Path(out)
    rows = rows_of(data, tokenizer, length, seed)
    if not joint_groups:
        model.requires_grad_(False)
    on_device = model.device.type != "cpu"
    if on_device:  # each process has its own device
        model.to(accelerator.device)  # type: ignore[arg-type]
    device = model.device
    lower = device.type == "cuda" or model.dtype != torch.float32  # a model in bfloat16 meets a drafter in float32
    drafter.to(device=device, dtype=torch.float32).train()
    groups: list[dict[str, Any]] = [{"params": [p for p in drafter.parameters() if p.requires_grad], "lr": lr}]
    groups += joint_groups or []
    optimiser: Any = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    objective: Any = _Objective(drafter, model, bool(joint_groups))
    objective, optimiser = accelerator.prepare(objective, optimiser, device_placement=[on_device] * 2)
    mark = {
        "steps": steps, "batch_size": batch_size, "length": length, "seed": seed, "lr": lr, "drafter": type(drafter).__name__,
    }  # fmt: skip
    loop = Loop(
        accelerator, out, optimiser, mark, steps=steps, batch_size=batch_size, rate=lambda step: schedule(step, steps, warmup),
        seed=seed, clip=clip, checkpoint_every=checkpoint_every, resume=resume, progress=progress, stop_after=stop_after,
    )  # fmt: skip
    taken = loop.done
    for step in loop:
        batch, labels = (x.to(device) for x in rows.with_labels(step, loop.places))
        drafter.trained_share = loop.share
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            loss, figures = objective(batch, labels)
        loop.backward(loss)
        loop.take({"loss": loss, **figures}, batch_size * length)
    if not loop.complete:
        return out
    drafter.eval()
    if finish is not None:
        if taken < steps:
            loop.save()
        finish()
    loop.finish(drafter.float())
    return out


def is_main_process() -> bool:
    """Whether this process is the one that writes results (under ``accelerate launch`` there are several)."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@torch.no_grad()
def own_text(model: PreTrainedModel, rows: Tensor, new_tokens: int = 64, prompt: int = 64) -> Tensor:
    """The model's own greedy continuations ``(N, prompt + new_tokens)`` of the first ``prompt`` tokens of each row: what drafters
    are calibrated on."""
    return cast(Any, model).generate(
        rows[:, :prompt].to(model.device), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=model.config.pad_token_id or 0,
    )  # fmt: skip
