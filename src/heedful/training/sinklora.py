"""SinkLoRA's recipe: a longer context for a RoPE model by interpolated positions and LoRA on grouped attention.

Read in this order: extend_context (positions), adapt (what is trained), train_sinklora (the loop).
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.kernels import ShiftedSparseAttention
from heedful.seam import attach
from heedful.training.loop import Loop, accelerator_for
from heedful.training.rows import PackedRows, read_documents

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def extend_context(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Linear position interpolation: positions are divided by `factor`, so `factor` times as many lie in the old range.

    Changes the model (its config too, which `save_pretrained` writes) and returns it. Its weights stay; without any
    training on them the compressed positions cost some quality at every length.

    Example:
        >>> import heedful
        >>> from heedful.training import extend_context
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> extend_context(model, 4).config.max_position_embeddings
        16384

    Args:
        model: A transformers model with rotary position embeddings, not scaled or scaled linearly. Layers with a sliding
            window that have positions of their own (Gemma 3) keep these: their window is not extended.
        factor: At least 1; the new context over the old one. Multiplies a linear factor that is already there.

    Raises:
        ValueError: If the factor is below 1, or the model has no rotary embedding, or one that is scaled otherwise.

    Cost:
        None.

    When not to use:
        For a model that was trained with another scaling (YaRN, Llama 3's): keep its own.

    Paper:
        "Extending Context Window of Large Language Models via Positional Interpolation", Chen, Wong, Chen, Tian,
        arXiv 2306.15595.
    """
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1 (the new context over the old one), got {factor}")
    config: Any = model.config.get_text_config(decoder=True)
    rotary = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and getattr(module, "config", None) is config
    ]
    parameters = getattr(config, "rope_parameters", None)
    if not rotary or not parameters:
        raise ValueError(f"{type(model).__name__} has no rotary position embedding that transformers can scale")
    by_layer_type = "rope_type" not in parameters
    kinds = {k: v for k, v in parameters.items() if v is not None} if by_layer_type else {"": parameters}
    new = {}
    for kind, values in kinds.items():
        if kind == "sliding_attention":
            new[kind] = values
            continue
        if values["rope_type"] not in ("default", "linear"):
            raise ValueError(
                f"the model's positions are scaled by {values['rope_type']!r}; extend_context only knows models without "
                "scaling or with 'linear'"
            )
        new[kind] = {**values, "rope_type": "linear", "factor": float(factor) * float(values.get("factor", 1.0))}
    config.rope_parameters = new if by_layer_type else new[""]
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
    for name, module in rotary:
        parent = model.get_submodule(name.rpartition(".")[0])
        device = next(module.buffers()).device
        setattr(parent, name.rpartition(".")[2], type(module)(config).to(device))
    return model


def adapt(model: PreTrainedModel, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0) -> Any:
    """What SinkLoRA and LongLoRA train: LoRA on the attention's projections, and all norms and embeddings in place.

    Returns a PEFT model. Norms and embeddings are the model's own parameters, not copies, so tied embeddings stay tied and
    `merge_and_unload()` gives the whole tuned model. They matter most: LoRA alone does not reach long contexts.

    Args:
        model: A causal language model with projections q_proj, k_proj, v_proj and o_proj.
        rank, alpha, dropout: Of LoRA.

    Raises:
        ValueError: If the model has no such projections.
    """
    from peft import LoraConfig, get_peft_model

    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in _PROJECTIONS if name not in found]
    if missing:
        raise ValueError(f"{type(model).__name__} has no linear modules {', '.join(missing)} to put LoRA on")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(_PROJECTIONS))  # type: ignore[arg-type]
    adapted: Any = get_peft_model(model, config)
    for module in adapted.modules():
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Embedding) or kind.endswith("norm"):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    return adapted


def train_sinklora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    length: int = 16384,
    factor: float | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    micro_batch_size: int = 1,
    lr: float = 2e-5,
    warmup_steps: int = 20,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    group_size_ratio: float = 0.25,
    shift_ratio: float = 0.25,
    num_sink_tokens: int = 4,
    boundary: str = "separate",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Fine-tunes a model on rows longer than its context and writes it, merged, to a folder `from_pretrained` loads.

    Positions are interpolated (`extend_context`); LoRA on q, k, v, o, and all norms and embeddings are trained, by AdamW
    at a constant rate after a linear warm-up; attention is restricted to groups while training
    (`heedful.kernels.ShiftedSparseAttention`) and dense in the result. The model that was given becomes the tuned one. Under
    `accelerate launch` the rows of a batch are shared among the processes; a run that was killed goes on from its last
    checkpoint when called again with the same arguments.

    Example:
        >>> import heedful
        >>> from heedful.training import train_sinklora
        >>> model, tokenizer = heedful.zoo.load("classics-20m", device="cuda")
        >>> train_sinklora(model, tokenizer, "books.jsonl", "classics-16k", length=16384, batch_size=8, lr=2e-3)

    Args:
        model: A RoPE model of transformers with its original context, in float32 (a GPU computes in bfloat16 by
            autocast).
        tokenizer: Its tokenizer.
        data: A .txt or .jsonl file (`heedful.training.rows.read_documents`), or the rows themselves.
        out: Result folder; `out/training` holds the checkpoint and `log.jsonl`.
        length: Tokens of a row: the new context. Default 16384.
        factor: Of the positions. Default None: `ceil(length / max_position_embeddings)`.
        steps: Optimiser steps. Default 1000.
        batch_size: Rows of a step, over all processes. Default 64, the paper's.
        micro_batch_size: Rows of a forward; a step adds up the gradients. Default 1.
        lr: Learning rate. Default 2e-5, for 7B models; small models take up to 100 times that.
        warmup_steps, weight_decay, clip: Of AdamW. Default 20, 0, 1.
        rank, alpha, dropout: Of LoRA. Default 8, 16, 0.
        group_size_ratio, shift_ratio, num_sink_tokens, boundary: Of `heedful.kernels.ShiftedSparseAttention`. The defaults are
            SF-Attn; `shift_ratio=0.5, num_sink_tokens=0, boundary="wrap"` is LongLoRA; `group_size_ratio=1.0` trains
            with the model's own full attention.
        gradient_checkpointing: Less memory for a third more time. Default False.
        seed: Of rows, weights and dropout.
        checkpoint_every: Steps between checkpoints. resume: Go on from one if it is there.
        progress: A bar on stderr. stop_after: Leave, with a checkpoint, after that step.

    Returns:
        `out`.

    Raises:
        ValueError: No text, rows longer than it, `batch_size` not a multiple of processes times `micro_batch_size`, a model
            that cannot be adapted, or a checkpoint of a run with other arguments.

    Cost:
        With groups of a quarter of the row, attention is a quarter of dense causal attention's products; the rest of the
        model costs what it costs.

    When not to use:
        Where the tuned model has to keep its short-context quality exactly: interpolation costs some.

    Paper:
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", Zhang,
        arXiv 2406.05678; "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", Chen et al.,
        arXiv 2309.12307.
    """
    accelerator = accelerator_for(steps, batch_size, micro_batch_size)
    on_device = model.device.type != "cpu"
    parts = []
    if group_size_ratio < 1:
        parts = [
            ShiftedSparseAttention(
                group_size_ratio=group_size_ratio, shift_ratio=shift_ratio, num_sink_tokens=num_sink_tokens,
                boundary=boundary,
            )
        ]  # fmt: skip
    rows = data if isinstance(data, PackedRows) else PackedRows(read_documents(data), tokenizer, length, seed)
    out = Path(out)
    original = cast(Any, model.config).get_text_config(decoder=True).max_position_embeddings
    factor = float(math.ceil(length / original)) if factor is None else factor
    torch.manual_seed(seed)
    adapted = adapt(extend_context(model, factor), rank=rank, alpha=alpha, dropout=dropout)
    if gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    prepared, optimiser = accelerator.prepare(adapted, optimiser, device_placement=[on_device] * 2)
    prepared.train()
    device = parameters[0].device
    mark = {
        "steps": steps, "batch_size": batch_size, "length": length, "factor": factor, "seed": seed, "rank": rank,
        "alpha": alpha, "dropout": dropout, "lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "clip": clip,
        "group_size_ratio": group_size_ratio, "shift_ratio": shift_ratio, "num_sink_tokens": num_sink_tokens,
        "boundary": boundary,
    }  # fmt: skip
    loop = Loop(
        accelerator, out, optimiser, mark, steps=steps, batch_size=batch_size,
        rate=lambda step: min(1.0, (step + 1) / max(1, warmup_steps)), seed=seed, clip=clip, checkpoint_every=checkpoint_every,
        resume=resume, progress=progress, stop_after=stop_after,
    )  # fmt: skip
    micro_batches = [
        loop.places[start : start + micro_batch_size] for start in range(0, len(loop.places), micro_batch_size)
    ]
    attached: Any = attach(prepared, *parts) if parts else contextlib.nullcontext()
    with attached:
        for step in loop:
            total = torch.zeros((), device=device)
            for places in micro_batches:
                batch = rows.batch(step, places).to(device)
                last = places is micro_batches[-1]
                with contextlib.nullcontext() if last else accelerator.no_sync(prepared):
                    with torch.autocast(device.type, torch.bfloat16, enabled=on_device):
                        loss: Tensor = prepared(input_ids=batch, labels=batch, use_cache=False).loss / len(
                            micro_batches
                        )
                    loop.backward(loss)
                total += loss.detach().float()
            loop.take({"loss": total}, batch_size * length)
    if not loop.complete:
        return out
    if gradient_checkpointing:
        adapted.gradient_checkpointing_disable()
    merged = adapted.merge_and_unload().eval()
    loop.finish(merged, tokenizer)
    return out
