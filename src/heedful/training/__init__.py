"""Recipes as functions: what is trained, on which data, for how long.

Read in this order: recall and wordings (synthetic tasks), corpus (rows of tokens), muon, pretrain, refine, evaluate.
"""

from heedful.training.evaluate import evaluate
from heedful.training.pretrain import pretrain
from heedful.training.refine import refine

__all__ = ["evaluate", "pretrain", "refine"]
