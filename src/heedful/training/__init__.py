"""Recipes as functions: what is trained, on which data, for how long.

Read in this order: recall and wordings (synthetic tasks), corpus (rows of tokens), muon, pretrain, refine, evaluate; for
all other recipes rows (their text) and loop (their steps); for drafters drafting, then medusa, hidden_transfer, longspec,
zoo_drafters (those that ship); to tune a model landmark, moh, sinklora.
"""

from heedful.training.drafting import train_drafter
from heedful.training.evaluate import evaluate
from heedful.training.hidden_transfer import train_hidden_transfer
from heedful.training.landmark import train_landmark
from heedful.training.longspec import train_longspec
from heedful.training.medusa import self_distill, train_medusa
from heedful.training.moh import train_moh
from heedful.training.pretrain import pretrain
from heedful.training.refine import refine
from heedful.training.sinklora import extend_context, train_sinklora

__all__ = [
    "evaluate",
    "extend_context",
    "pretrain",
    "refine",
    "self_distill",
    "train_drafter",
    "train_hidden_transfer",
    "train_landmark",
    "train_longspec",
    "train_medusa",
    "train_moh",
    "train_sinklora",
]
