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

__all__ = ["drafters", "excerpt", "load", "names", "path"]


def _folders() -> dict[str, bool]:
    """The bundled folders, and whether each holds a model (whose config names its type) or a drafter."""
    configs = {file.parent.name: file.read_text(encoding="utf-8") for file in sorted(_ROOT.glob("*/config.json"))}
    return {name: '"model_type"' in config for name, config in configs.items()}


def names() -> list[str]:
    """Names of the bundled models."""
    return [name for name, is_model in _folders().items() if is_model]


def drafters() -> list[str]:
    """Names of the bundled drafters: the model's name and the method's, ``classics-20m-medusa`` for instance."""
    return [name for name, is_model in _folders().items() if not is_model]


def path(name: str) -> Path:
    """Folder of a bundled model or drafter.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _folders():
        raise ValueError(
            f"no bundled model {name!r}: there are {', '.join(_folders())}; for another model give its folder or hub id to from_pretrained"
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
    if name not in names():
        raise ValueError(
            f"{name} is a drafter, not a model: load it with its class's from_pretrained(heedful.zoo.path({name!r}))"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def excerpt() -> str:
    """About 200 kB of held-out public-domain prose, which no bundled model was trained on."""
    return (_ROOT / "excerpt.txt").read_text(encoding="utf-8")
