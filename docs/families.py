"""Writes docs/families.md: what `heedful.attach` does on each model family, found by running it.

    python docs/families.py

Every family is a tiny random model (tests/tiny_models.py). For each the script runs the checks of
tests/family_checks.py without padding, with left and with right padding, and generation with a dynamic, a static and a
chunked cache; what fails is written down as it failed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import family_checks  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import heedful  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "beams": {"num_beams": 2},
}


def generates(name: str, way: dict[str, Any]) -> bool:
    """Whether generation under an identity edit and a probe gives the tokens of the plain model."""
    model = tiny_models.build(name)
    given = tiny_models.inputs(model, padding="left" if tiny_models.FAMILIES[name].kind == "decoder" else None)
    given.pop("decoder_input_ids", None)
    how = {**given, **way, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**how)
    parts = family_checks.Identity("logits", rows="last"), family_checks.Weights(rows="last")
    with heedful.attach(model, *parts):
        return torch.equal(model.generate(**how), plain)


def row(name: str) -> str:
    """The table's line of one family."""
    family = tiny_models.FAMILIES[name]
    if not hasattr(transformers, family.model_class):
        return f"| {name} | `{family.model_class}` | not in this transformers | | | |"
    if family.kind == "none":
        try:
            heedful.attach(tiny_models.build(name))
        except ValueError:
            return f"| {name} | `{family.model_class}` | impossible | | | {family.care}; a clear error |"
        raise AssertionError(f"{name} was expected to be refused")
    wrong: list[str] = []
    figures = {"identity": 0.0, "probe": 0.0}
    for padding in (None, "left", "right") if family.kind != "vision" else (None,):
        try:
            found = family_checks.check(name, padding)
            figures = {key: max(value, found[key]) for key, value in figures.items()}
        except AssertionError as error:
            wrong.append(f"{padding or 'no'} padding: {error}")
    if family.kind in ("decoder", "vision-language", "encoder-decoder"):
        for label, way in WAYS.items():
            try:
                if not generates(name, way):
                    wrong.append(f"{label}: other tokens")
            except Exception as error:
                try:  # what the plain model cannot do either is not the seam's
                    model = tiny_models.build(name)
                    given = tiny_models.inputs(model)
                    given.pop("decoder_input_ids", None)
                    model.generate(**given, **way, max_new_tokens=6, do_sample=False)
                    wrong.append(f"{label}: {type(error).__name__}")
                except Exception:
                    pass
    status = "does not hold" if wrong else "with care" if family.care else "holds"
    remark = "; ".join([*wrong, *(text for text in (family.care, family.note) if text)])
    sizes = f"{figures['identity']:.0e} | {figures['probe']:.0e}"
    return f"| {name} | `{family.model_class}` | {status} | {sizes} | {remark} |"


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# Model families",
        "",
        "<!-- Written by docs/families.py from tests/tiny_models.py: run it, do not edit. -->",
        "",
        f"What `heedful.attach` does on tiny random models, found by running it with transformers "
        f"{transformers.__version__} and torch {torch.__version__.split('+')[0]} on a CPU in float32. On every family "
        "that holds: attached without parts, or with probes only, the logits are bit-identical; after detaching, the "
        "model is exactly as before. *Identity* is the largest change of the outputs under an edit that changes nothing, "
        "at any stage; *probe* the largest difference of the weights from the family's own eager attention. Text models "
        "also generate the same tokens with dynamic and static caches, chunked prefill and beams, as far as the plain "
        "model can. Any other model whose attention goes through transformers' `AttentionInterface` can be attached to "
        "as well; models without it (GPT-J, MPT, DeBERTa, Longformer) are refused.",
        "",
        "| family | model class | attach | identity | probe | what to know |",
        "|---|---|---|---|---|---|",
    ]
    for name in tiny_models.FAMILIES:
        lines.append(row(name))
        print(lines[-1], flush=True)
    (ROOT / "docs" / "families.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
