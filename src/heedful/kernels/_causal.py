"""What kernels of causal attention ask of a call before they compute it: what they refuse, and what its mask says."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.attention.documents import document_starts
from heedful.seam import AttentionCall
from heedful.seam.site import UNKNOWN_TO_DENSE


def refuse(call: AttentionCall, name: str, *, softcap: bool = False, sinks: bool = False) -> None:
    """Raises for a call that is more than causal attention over the keys it gives.

    softcap, sinks: Whether the kernel knows them.
    """
    reason = None
    if call.cross or not call.causal:
        reason = "is causal self-attention, and this layer attends in both directions or across"
    elif call.position_bias is not None:
        reason = "knows no position bias"
    elif call.dropout > 0:
        reason = "has no dropout; set the config's attention_dropout to 0"
    elif call.softcap is not None and not softcap:
        reason = "knows no softcap of the logits (Gemma 2)"
    elif call.sinks is not None and not sinks:
        reason = "knows no learned sink logits (gpt-oss)"
    for keyword in UNKNOWN_TO_DENSE:
        if call.keywords.get(keyword) is not None and keyword != "cu_seq_lens_q":  # positions say the same
            reason = f"does not know `{keyword}`, which this model passes to its attention"
    if reason is not None:
        raise ValueError(f"layer {call.layer}: {name} {reason}. Leave this layer out with layers=.")


def positions_in_documents(positions: Tensor | None, real: Tensor) -> Tensor | None:
    """Positions that restart where a document begins, `(B, T)`; None if each row is one document.

    positions: What the model says, or None. real: Bool `(B, T)`. A padding token is a document of its own.
    """
    if positions is None or real.shape[1] == 0:
        return None
    slots = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    before = torch.where(real, slots, -1).cummax(1).values.roll(1, 1)  # the last real token before each slot
    before[:, 0] = -1
    follows = positions > positions.gather(1, before.clamp(min=0))  # over a hole in the row too
    starts = torch.where(before == slots - 1, document_starts(positions), ~follows) | (before < 0)
    if not bool((starts & real & (before >= 0)).any()):
        return None
    starts = starts | ~real
    return slots - torch.where(starts, slots, 0).cummax(1).values


def window_of(call: AttentionCall) -> int | None:
    """The layer's own sliding window, or None."""
    window = call.keywords.get("sliding_window", getattr(call.module, "sliding_window", None))
    return window if isinstance(window, int) else None


def check_mask(call: AttentionCall, name: str, real: Tensor, documents: Tensor | None = None) -> None:
    """Raises unless each real row of the call's mask sees exactly the real keys of its document up to its own, with
    nothing added to them. For calls whose keys are its queries' own.

    documents: From `positions_in_documents`.
    """
    mask = call.mask
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    remedy = "Call the model with a 2-D attention_mask or with position_ids that restart, or leave this layer out."
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"layer {call.layer}: {name} cannot read a {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa'."
        )
    length = real.shape[1]
    slot = torch.arange(length, device=mask.device)
    begins = torch.zeros_like(slot).expand(real.shape) if documents is None else slot - documents
    fine = torch.ones((), dtype=torch.bool, device=mask.device)
    step = max(1, (1 << 22) // max(1, length * len(real)))  # rows at a time: no second tensor of the mask's size
    for some in slot.split(step):
        part = mask[:, :, some, :length]
        seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        right = real[:, None] & (slot <= some[:, None]) & (slot >= begins[:, some, None])
        fine = fine & ((seen == right[:, None]) | ~real[:, None, some, None]).all()
        if part.dtype != torch.bool:
            fine = fine & ((part == 0) | ~seen).all()
    if not bool(fine):
        raise ValueError(
            f"layer {call.layer}: {name} honours causal masks with padding and packed documents, and this mask is another "
            f"one (a sliding window, drafted tokens, a prefix, chunks). {remedy}"
        )
