"""LongSpec's training: short texts with moved positions first, long ones after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.decoding.longspec import LongSpec
from heedful.training.drafting import train_drafter
from heedful.training.rows import PackedRows, rows_of


def train_longspec(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    stage: int = 1,
    drafter: LongSpec | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    length: int | None = None,
    lr: float | None = None,
    tree_shape: tuple[int, ...] = (4, 16, 16, 16, 16),
    calibration_rows: int = 8,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Trains a LongSpec draft block on the frozen model and writes its folder.

    Stage 1 reads short texts (1,024 tokens) with anchor-offset positions at a rate of 5e-4; stage 2 long ones (the context of
    the model, 32,768 at most) at 5e-6, beginning with the block of stage 1 (``drafter=``). AdamW, betas 0.9 and 0.95, weight
    decay 0.1, clip 1.0, 10 % warm-up, cosine.

    Example:
        >>> import heedful
        >>> from heedful.decoding import LongSpec
        >>> from heedful.training import train_longspec
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> out = train_longspec(model, tokenizer, "text.txt", "runs/block", steps=300)  # doctest: +SKIP
        >>> more = LongSpec.from_pretrained(out)  # doctest: +SKIP
        >>> train_longspec(model, tokenizer, "books.txt", "runs/long", stage=2, drafter=more)  # doctest: +SKIP

    Args:
        model, tokenizer: the target. data: a file of text, or its `PackedRows`. out: result folder.
        stage: 1 or 2. drafter: to begin with; default in stage 1: an untrained block.
        steps, batch_size, length, lr, seed: of the training; the defaults of length and lr are the stage's.
        tree_shape: of the beam tree that the drafter will draft.
        calibration_rows: prompts of 64 tokens on which shapes of trees are measured, so that the drafter fits its tree to a device;
            0: none.
        **options: of `train_drafter`.

    Returns:
        ``out``, which `LongSpec.from_pretrained` loads.

    Raises:
        ValueError: an unknown stage, stage 2 without a block, a model whose cached keys LongSpec cannot read; what `train_drafter`
            raises.

    Cost:
        A step is a forward of the model and of one block, with the block's backward pass; ``B T V`` logits in float32 are most of
        its memory at short lengths.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 (short texts) or 2 (long ones), got {stage}")
    if stage == 2 and drafter is None:
        raise ValueError("stage 2 goes on from a block of stage 1: pass it as drafter=LongSpec.from_pretrained(...)")
    longest = min(32_768, model.config.get_text_config(decoder=True).max_position_embeddings)
    length = length or (1024 if stage == 1 else longest)
    rows = rows_of(data, tokenizer, length, seed)
    drafter = drafter or LongSpec.for_model(model, tree_shape=tree_shape)

    def calibrate() -> None:
        drafter.calibrate(model, rows.of(64, seed + 1).batch(0, range(calibration_rows)))

    return train_drafter(
        drafter, model, tokenizer, rows, out, steps=steps, batch_size=batch_size, length=length, seed=seed,
        lr=lr or (5e-4 if stage == 1 else 5e-6), betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, finish=calibrate if calibration_rows else None, **options,
    )  # fmt: skip
