"""Small models that ship with the package, so that everything runs with no download.

    model, tokenizer = heedful.zoo.load("classics-20m")

Each is a standard folder that ``AutoModelForCausalLM.from_pretrained(heedful.zoo.path(name))`` loads; its ``README.md``
states data, recipe and measured results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROOT = Path(__file__).parent

__all__ = ["excerpt", "load", "names", "path"]


def names() -> list[str]:
    """Names of the bundled models."""
    return sorted(folder.name for folder in _ROOT.iterdir() if (folder / "config.json").exists())


def path(name: str) -> Path:
    """Folder of a bundled model.

    Raises:
        ValueError: there is no bundled model of that name.
    """
    if name not in names():
        raise ValueError(
            f"no bundled model {name!r}: there are {', '.join(names())}; for another model give its folder or hub id to from_pretrained"
        )
    return _ROOT / name


def load(
    name: str = "classics-20m", *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A bundled model, in eval mode, and its tokenizer (which puts BOS in front of every text by itself).

    Args:
        name: see `names`.
        dtype: default float32. The weights are stored in bfloat16, so nothing is lost, and CPUs are faster with float32.
        device: where the model goes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def excerpt() -> str:
    """About 200 kB of held-out public-domain prose, which no bundled model was trained on."""
    return (_ROOT / "excerpt.txt").read_text(encoding="utf-8")
