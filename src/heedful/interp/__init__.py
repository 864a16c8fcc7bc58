"""Reads attention: which heads do what, and what happens without them."""

from heedful.interp.ablation import HeadOutputs, HeadRemoval, ablate_heads, head_outputs, recall_without_heads
from heedful.interp.head_scores import HeadScores
from heedful.interp.needles import Needle, NeedlePrompt, NeedleRecall, needle_prompts, needle_recall
from heedful.interp.retrieval_heads import retrieval_scores

__all__ = [
    "HeadOutputs",
    "HeadRemoval",
    "HeadScores",
    "Needle",
    "NeedlePrompt",
    "NeedleRecall",
    "ablate_heads",
    "head_outputs",
    "needle_prompts",
    "needle_recall",
    "recall_without_heads",
    "retrieval_scores",
]
