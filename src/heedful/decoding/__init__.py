"""Lossless generation: a drafter proposes a tree of tokens, the engine verifies it in one forward of the model.

Read in this order: tree (what is proposed), drafter (who proposes), engine (draft, verify, walk, commit), masks and cache
(what makes one forward verify many continuations), selection (generate's own choices), support (what is refused and why),
generate (the public functions), graph with device_walk (the same on a GPU, as CUDA graphs) and its kernels (settle_rows,
draft_kernels, write_rows, move_rows, row_argmax, fused_linear); then the drafters: prompt_lookup, token_recycling (both with
their form in on_device), sequence, and those with weights (trained, which sizing helps to a size; longspec has beam_kernels).
"""

from heedful.decoding.drafter import DeviceDrafter, DeviceStep, Drafter, DraftingOutputs
from heedful.decoding.generate import Generation, custom_generate, generate
from heedful.decoding.graph import release_graphs
from heedful.decoding.hidden_transfer import HiddenTransfer
from heedful.decoding.longspec import LongSpec
from heedful.decoding.medusa import Medusa
from heedful.decoding.prompt_lookup import PromptLookup
from heedful.decoding.sequence import Sequence
from heedful.decoding.stats import DecodingStats
from heedful.decoding.token_recycling import TokenRecycling
from heedful.decoding.trained import TrainedDrafter
from heedful.decoding.tree import DraftTree

__all__ = [
    "DecodingStats",
    "DeviceDrafter",
    "DeviceStep",
    "DraftTree",
    "Drafter",
    "DraftingOutputs",
    "Generation",
    "HiddenTransfer",
    "LongSpec",
    "Medusa",
    "PromptLookup",
    "Sequence",
    "TokenRecycling",
    "TrainedDrafter",
    "custom_generate",
    "generate",
    "release_graphs",
]
