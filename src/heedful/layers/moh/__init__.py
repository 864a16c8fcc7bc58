"""Mixture-of-Head attention (MoH, arXiv 2410.11842): attention heads as experts, of which each token has a few.

`MixtureOfHeads` is the layer with trained routers, `convert_to_moh` turns a pretrained model's own attention into MoH by
the norms of its queries. Read in this order: routing, layer, conversion.
"""

from heedful.layers.moh.conversion import balance_loss, convert_to_moh
from heedful.layers.moh.layer import MixtureOfHeads

__all__ = ["MixtureOfHeads", "balance_loss", "convert_to_moh"]
