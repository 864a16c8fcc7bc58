"""Fine-tuning a model with rotary positions into a landmark model: short rows, next-token loss on the text, Accelerate.

After it, the context at inference has no limit, although no row was longer than `length`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.layers.landmark import convert_to_landmark
from heedful.layers.landmark.convert import is_landmark_model
from heedful.training.loop import Loop, accelerator_for, schedule
from heedful.training.rows import PackedRows, read_pieces


class RowSource(Protocol):
    """Rows of a step, for the given places in the batch: ids `(n, T)`, or `(ids, weights)`, the weight of each token in the loss."""

    def batch(self, step: int, places: Iterable[int]) -> Tensor | tuple[Tensor, Tensor]: ...


class _TextRows:
    """Rows of a file; what it says is not to be learnt weighs nothing."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def batch(self, step: int, places: Iterable[int]) -> tuple[Tensor, Tensor]:
        ids, labels = self.rows.with_labels(step, places)
        return ids, (labels != -100).float()


class _Objective(nn.Module):
    """What DistributedDataParallel wraps: the model and its loss."""

    def __init__(self, model: PreTrainedModel, eos: int | None) -> None:
        super().__init__()
        self.model = model
        self.eos = eos

    def forward(self, input_ids: Tensor, weights: Tensor | None) -> Tensor:
        logits = self.model(input_ids=input_ids, position_ids=self.positions(input_ids), use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
        )
        if weights is None:
            return losses.mean()
        share = weights[:, 1:].flatten()
        return (losses * share).sum() / share.sum().clamp(min=1e-9)

    def positions(self, input_ids: Tensor) -> Tensor:
        """Positions that restart behind an EOS: blocks and attention do not cross documents."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if self.eos is None:
            return at
        begins = torch.zeros_like(input_ids, dtype=torch.bool)
        begins[:, 1:] = input_ids[:, :-1] == self.eos
        return at - torch.where(begins, at, 0).cummax(1).values


def train_landmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | RowSource,
    out: str | Path,
    *,
    block_size: int = 63,
    landmark_token_id: int | None = None,
    top_k: int = 4,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 512,
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    warmup: float = 0.03,
    clip: float = 1.0,
    seed: int = 0,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Turns a model into a landmark model (if it is none yet), trains it on short rows, and writes a folder.

    Under `accelerate launch` the rows of each batch are shared among the processes. A run that was killed goes on from its
    last checkpoint when called again with the same arguments.

    Example:
        >>> import heedful
        >>> from heedful.training import train_landmark
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> train_landmark(model.float(), tokenizer, "books.txt", "landmark-model", length=1024)  # doctest: +SKIP
        >>> model = heedful.layers.load_landmark("landmark-model")  # doctest: +SKIP

    Args:
        model: What `heedful.layers.convert_to_landmark` takes, or gave; in float32 (a GPU computes in bfloat16 by autocast).
        tokenizer: The model's.
        data: A `.txt` or `.jsonl` file (`heedful.training.rows.read_pieces`), or anything with
            `batch(step, places)`: ids `(n, T)` for the places of a step's batch, or `(ids, weights)`, where a token's
            weight counts in the mean of the loss (0: not trained).
        out: Result folder; `out/training` holds the checkpoint and `log.jsonl`.
        block_size, landmark_token_id, top_k: See `convert_to_landmark`. A model that has landmarks keeps its own.
        steps: Optimiser steps. batch_size: Rows of a step, over all processes.
        length: Positions of a row, landmarks counted: `length - length // (block_size + 1)` tokens.
        lr, betas, weight_decay, warmup, clip: Of AdamW (decay on matrices alone); warm-up as a share of the steps, then
            a cosine to zero. The paper has 2e-5 for 7 billion parameters; the default is for some millions.
        seed: Of the rows.
        checkpoint_every: Steps between checkpoints. resume: Go on from one if it is there.
        progress: A bar on stderr. stop_after: Leave, with a checkpoint, after that step.

    Returns:
        `out`, which `heedful.layers.load_landmark` loads.

    Raises:
        ValueError: If the model is not in float32 or cannot have landmarks, there is no text or too little, `batch_size` is
            not a multiple of the processes, or a checkpoint is of another run.

    Cost:
        That of training at `length`, with one position in `block_size + 1` more.

    When not to use:
        When the context wanted fits the model: dense attention sees everything.

    Paper:
        "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami and Jaggi,
        arXiv 2305.16300.
    """
    accelerator = accelerator_for(steps, batch_size)
    if model.dtype != torch.float32:
        raise ValueError(f"the model is {model.dtype}, in which small updates are lost: give model.float()")
    if not is_landmark_model(model):
        model = convert_to_landmark(
            model, block_size, landmark_token_id=landmark_token_id, top_k=top_k, train_length=length
        )
    out = Path(out)
    rows = data
    if isinstance(data, str | Path):
        tokens = length - length // (model.config.landmark["block_size"] + 1)
        rows = _TextRows(PackedRows(read_pieces(data), tokenizer, tokens, seed))
    rows = cast(RowSource, rows)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser: Any = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=betas,
    )
    on_device = model.device.type != "cpu"
    objective: Any = _Objective(model, cast(int | None, tokenizer.eos_token_id))
    objective, optimiser = accelerator.prepare(objective, optimiser, device_placement=[on_device] * 2)

    mark = {"steps": steps, "batch_size": batch_size, "length": length, "seed": seed, "lr": lr, **model.config.landmark}
    loop = Loop(
        accelerator, out, optimiser, mark, steps=steps, batch_size=batch_size, rate=lambda step: schedule(step, steps, warmup),
        seed=seed, clip=clip, checkpoint_every=checkpoint_every, resume=resume, progress=progress, stop_after=stop_after,
    )  # fmt: skip
    for step in loop:
        batch = rows.batch(step, loop.places)
        ids, weights = batch if isinstance(batch, tuple) else (batch, None)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = objective(ids.to(model.device), None if weights is None else weights.to(model.device))
        loop.backward(loss)
        loop.take({"loss": loss}, batch_size * length)
    if not loop.complete:
        return out
    model.eval()
    loop.finish(model, tokenizer)
    return out
