"""Medusa-1 (heads on a frozen model) and Medusa-2 (heads and model together), and self-distillation data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from heedful.decoding.medusa import Medusa
from heedful.decoding.trained import mean_where, model_logits
from heedful.training.drafting import is_main_process, own_text, train_drafter
from heedful.training.rows import PackedRows, rows_of


def train_medusa(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | PackedRows,
    out: str | Path,
    *,
    stage: int = 1,
    drafter: Medusa | None = None,
    num_heads: int = 4,
    num_layers: int = 1,
    share_lm_head: bool = True,
    steps: int = 1000,
    batch_size: int = 16,
    length: int = 512,
    lr: float | None = None,
    weighting: str = "decay",
    head_weight: float = 0.2,
    head_weight_schedule: str = "constant",
    distill: bool = False,
    max_nodes: int = 63,
    calibration_rows: int = 32,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Trains Medusa heads, calibrates their tree on the model's own text, and writes the drafter's folder.

    Stage 1 (Medusa-1): the model is frozen; loss ``0.2 sum_k 0.8^k CE_k`` (or ``weighting="equal"``: the plain sum).
    Stage 2 (Medusa-2): the model gets LoRA (r = 32, alpha = 16, dropout 0.05) on all its linear layers and its output head
    (unless that is tied to the embedding), the heads learn at four times its rate, and the loss is
    ``L_LM + w(t) sum_k 0.8^k CE_k``; the merged model goes to ``out/model``. Begin it with the heads of stage 1 (``drafter=``).
    Its output is that of the tuned model, not of the one it began with.

    Example:
        >>> import heedful
        >>> from heedful.decoding import Medusa
        >>> from heedful.training import train_medusa
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> out = train_medusa(model, tokenizer, "text.txt", "runs/heads", steps=300)  # doctest: +SKIP
        >>> drafter = Medusa.from_pretrained(out)  # doctest: +SKIP

    Args:
        model, tokenizer: the target.
        data: a file of text (`read_pieces`) or its `PackedRows`; the model's own answers are best (`self_distill`).
        out: result folder.
        stage: 1 or 2. drafter: to begin with; default: untrained heads.
        num_heads, num_layers, share_lm_head: of new heads.
        steps, batch_size, length, seed: of the training. lr: of the heads; default 1e-3, in stage 2 4e-4 (the model's: a quarter).
        weighting: "decay" or "equal". head_weight: w, constant or, with ``head_weight_schedule="sine"``,
            ``w sin(pi/2 step/steps)`` (self-distilled models: w = 0.01).
        distill: stage 2's L_LM is the divergence from the model with its LoRA switched off, instead of cross-entropy.
        max_nodes: of the calibrated tree. calibration_rows: rows of 128 tokens it is measured on; 0 keeps the default tree.
        **options: of `train_drafter`: ``checkpoint_every``, ``resume``, ``progress``...

    Returns:
        ``out``, which `Medusa.from_pretrained` loads.

    Raises:
        ValueError: an unknown stage, weighting or schedule, and what `train_drafter` raises.

    Cost:
        A step is a forward of the model and of the heads, forward and backward; ``K B T V`` logits in float32 are most of its
        memory. In stage 2 the model runs backward too, with ``distill`` forward twice.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 (heads on a frozen model) or 2 (heads and model together), got {stage}")
    if weighting not in ("decay", "equal"):
        raise ValueError(f"weighting must be 'decay' or 'equal', got {weighting!r}")
    if head_weight_schedule not in ("constant", "sine"):
        raise ValueError(f"head_weight_schedule must be 'constant' or 'sine', got {head_weight_schedule!r}")
    rows = rows_of(data, tokenizer, length, seed)
    drafter = drafter or Medusa.for_model(
        model, num_heads=num_heads, num_layers=num_layers, share_lm_head=share_lm_head
    )
    drafter.weighting, drafter.scale = weighting, head_weight
    common = {"steps": steps, "batch_size": batch_size, "length": length, "seed": seed, **options}

    def calibrate(target: PreTrainedModel) -> None:
        if calibration_rows:
            prompts = rows.of(64, seed + 1).batch(0, range(calibration_rows))
            drafter.calibrate(target, own_text(target, prompts), max_nodes, prompt=64)

    if stage == 1:
        return train_drafter(
            drafter, model, tokenizer, rows, out, lr=1e-3 if lr is None else lr, finish=lambda: calibrate(model), **common
        )  # fmt: skip
    return _train_together(
        drafter, model, tokenizer, rows, Path(out), 4e-4 if lr is None else lr, head_weight, head_weight_schedule, distill,
        calibrate, common,
    )  # fmt: skip


class _Joint(Medusa):
    """The joint loss: the model's own and the heads'."""

    joint: Any

    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.joint
        output = model.get_base_model().get_decoder()(input_ids=input_ids, use_cache=False)  # type: ignore[operator]
        hidden = output.last_hidden_state
        logits = model_logits(settings["base"], hidden[:, :-1]).float()
        wanted = (input_ids if labels is None else labels)[:, 1:]
        if settings["distill"]:
            with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
                before = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            losses = F.kl_div(logits.log_softmax(-1), before, log_target=True, reduction="none").sum(-1)
        else:
            losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        own = mean_where(losses, wanted)
        if settings["schedule"] == "sine":
            self.scale = settings["weight"] * math.sin(math.pi / 2 * self.trained_share)
        heads, figures = self.head_loss(settings["base"], hidden, input_ids, labels)
        return own + heads, {"model_loss": own.detach(), **figures}


def _train_together(
    drafter: Medusa, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: PackedRows, out: Path, lr: float,
    weight: float, schedule: str, distill: bool, calibrate: Callable[[PreTrainedModel], None], common: dict[str, Any],
) -> Path:  # fmt: skip
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    if cast(Any, model.get_output_embeddings()).weight is cast(Any, model.get_input_embeddings()).weight:
        linear = [name for name in linear if model.get_submodule(name) is not model.get_output_embeddings()]
    config = LoraConfig(r=32, lora_alpha=16, lora_dropout=0.05, target_modules=linear)
    adapted = get_peft_model(cast(Any, model), config)
    adapted.train()
    groups = [{"params": [p for p in adapted.parameters() if p.requires_grad], "lr": lr / 4}]
    plain = type(drafter)
    cast(Any, drafter).joint = {
        "base": model, "distill": distill, "schedule": schedule, "weight": weight,
    }  # fmt: skip

    def finish() -> None:
        merged = cast(PreTrainedModel, adapted.merge_and_unload()).eval()
        calibrate(merged)
        if is_main_process():
            merged.save_pretrained(out / "model")
            tokenizer.save_pretrained(out / "model")

    drafter.__class__ = _Joint
    try:
        return train_drafter(
            drafter, cast(Any, adapted), tokenizer, rows, out, lr=lr, joint_groups=groups, finish=finish, **common
        )
    finally:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # stopped on the way
            cast(Any, adapted).unload()
        drafter.__class__ = plain
        del cast(Any, drafter).joint


def self_distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    out: str | Path,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> Path:
    """Writes the model's own answers as JSON lines (``prompt`` and ``answer``): the data that its heads should learn from.

    Training on them counts the answers' tokens alone.

    Args:
        model, tokenizer: the target. prompts: seed prompts. out: the ``.jsonl`` file, written when all are done.
        max_new_tokens: of an answer. temperature: 0 answers greedily.
    """
    from heedful.decoding import PromptLookup, TokenRecycling, generate
    from heedful.decoding import Sequence as Drafters

    if not prompts:
        raise ValueError("self_distill needs prompts, got none")
    sampling: dict[str, Any] = {"do_sample": temperature > 0} | (
        {"temperature": temperature} if temperature > 0 else {}
    )
    drafter, lines = Drafters(PromptLookup(), TokenRecycling()), []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        result = generate(model, ids, drafter, max_new_tokens=max_new_tokens, **sampling)
        answer = tokenizer.decode(result.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        lines.append(json.dumps({"prompt": prompt, "answer": answer}))
    path = Path(out)
    path.with_suffix(".tmp").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    return path
