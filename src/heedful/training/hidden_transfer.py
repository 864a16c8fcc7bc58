"""Hidden Transfer's training: maps alone, against the frozen model's own distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.decoding.hidden_transfer import HiddenTransfer
from heedful.training.drafting import own_text, train_drafter
from heedful.training.rows import PackedRows, rows_of


def train_hidden_transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    drafter: HiddenTransfer | None = None,
    num_transfer_steps: int = 3,
    transfer_layers: list[int] | None = None,
    source: str = "anchor",
    hard_labels: bool = False,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 512,
    lr: float = 2e-3,
    max_nodes: int = 24,
    calibration_rows: int = 32,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Trains Hidden Transfer's maps on the frozen model, calibrates the tree on its own text, and writes the folder.

    Example:
        >>> import heedful
        >>> from heedful.decoding import HiddenTransfer
        >>> from heedful.training import train_hidden_transfer
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> out = train_hidden_transfer(model, tokenizer, "text.txt", "runs/maps", steps=300)  # doctest: +SKIP
        >>> drafter = HiddenTransfer.from_pretrained(out)  # doctest: +SKIP

    Args:
        model, tokenizer: the target. data: a file of text, or its `PackedRows`. out: result folder.
        drafter: to begin with; default: identity maps with ``num_transfer_steps``, ``transfer_layers`` and ``source``.
        hard_labels: cross-entropy of the text instead of the divergence from the model.
        steps, batch_size, length, lr, seed: of the training.
        max_nodes: of the calibrated tree. calibration_rows: rows of 128 tokens it is measured on; 0 keeps the default tree.
        **options: of `train_drafter`.

    Returns:
        ``out``, which `HiddenTransfer.from_pretrained` loads.

    Raises:
        ValueError: a model without decoder layers in ``layers``, or whose cache keeps compressed keys; what `train_drafter` raises.

    Cost:
        A step is a forward of the model, and one of ``num_transfer_steps`` rows for each of its rows through the layers above
        the first transfer, with the backward pass; attention there is recomputed in the backward pass.
    """
    rows = rows_of(data, tokenizer, length, seed)
    drafter = drafter or HiddenTransfer.for_model(
        model, num_transfer_steps=num_transfer_steps, transfer_layers=transfer_layers, source=source
    )
    drafter.hard_labels = hard_labels

    def calibrate() -> None:
        prompts = rows.of(64, seed + 1).batch(0, range(calibration_rows))
        drafter.calibrate(model, own_text(model, prompts), max_nodes, prompt=64)

    return train_drafter(
        drafter,
        model,
        tokenizer,
        rows,
        out,
        steps=steps,
        batch_size=batch_size,
        length=length,
        lr=lr,
        seed=seed,
        finish=calibrate if calibration_rows else None,
        **options,
    )
