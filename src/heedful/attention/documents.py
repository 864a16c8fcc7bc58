"""Packed rows: several documents behind one another, none of which may see another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def document_starts(positions: Tensor) -> Tensor:
    """Where documents begin in packed rows: bool `(B, T)`, True at a row's first token and wherever positions restart.

    Args:
        positions: int64 `(B, T)`, the position of each token in its document, as transformers' `position_ids`.
    """
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def by_document(function: Callable[..., Tensor], positions: Tensor, *tensors: Tensor) -> Tensor:
    """Runs an operator on each document of packed rows by itself, and packs the results again.

    Documents of about one length (up to twice) are padded on the right to the longest and go through one call
    `function(*tensors, attention_mask=...)`, so no more than twice the tokens are computed, and T documents of any
    lengths take at most log2(T) calls. Differentiable. The operators take the padding mask, so sinks, groups and
    landmarks count from each document's first token.

    Example:
        >>> import torch
        >>> from heedful.attention import by_document, shifted_sparse_attention
        >>> query, key, value = torch.randn(3, 1, 4, 10, 16)
        >>> positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])  # two documents
        >>> output = by_document(
        ...     lambda q, k, v, attention_mask: shifted_sparse_attention(q, k, v, 4, attention_mask=attention_mask),
        ...     positions, query, key, value,
        ... )

    Args:
        function: An operator of tensors `(N, H, L, ...)` or `(N, L)` and `attention_mask`, bool `(N, L)`; it returns
            `(N, H, L, Dv)`. Without any token it is called once, with the empty tensors.
        positions: int64 `(B, T)`, positions in the documents, which restart where a document begins.
        *tensors: `(B, H, T, ...)`, or `(B, T)`: what has two dimensions has no heads.

    Returns:
        `(B, H, T, Dv)`.

    Raises:
        ValueError: If a tensor's batch or length is not that of `positions`.

    Cost:
        A copy of each tensor, and one host synchronisation (the number of documents is not known before).
    """
    batch, length = positions.shape
    for tensor in tensors:
        if tensor.shape[0] != batch or tensor.shape[1 if tensor.ndim == 2 else 2] != length:
            raise ValueError(
                f"positions are ({batch}, {length}) and a tensor has shape {tuple(tensor.shape)}: batch and length must agree"
            )
    if positions.numel() == 0:
        return function(*tensors, attention_mask=torch.ones_like(positions, dtype=torch.bool))
    first = document_starts(positions).flatten().nonzero().squeeze(1)  # of each document, in the flattened rows
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    flat = [x.flatten() if x.ndim == 2 else x.transpose(1, 2).flatten(0, 1) for x in tensors]
    pieces, places = [], []
    size = lengths.clamp(min=1).log2().floor()  # documents of one power of two go together
    for some in size.unique():
        which = (size == some).nonzero().squeeze(1)
        longest = int(lengths[which].max())
        offset = torch.arange(longest, device=positions.device)
        real = offset < lengths[which, None]
        place = torch.where(real, first[which, None] + offset, first[which, None])
        rows = [x[place] if x.ndim == 1 else x[place].transpose(1, 2) for x in flat]
        pieces.append(function(*rows, attention_mask=real).transpose(1, 2)[real])
        places.append(place[real])
    output = torch.empty_like(torch.cat(pieces)).index_copy(0, torch.cat(places), torch.cat(pieces))
    return output.unflatten(0, (batch, length)).transpose(1, 2)
