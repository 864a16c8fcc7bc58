"""The package as a user meets it first: lazy names, the catalog, what importing costs."""

import importlib
import json
import subprocess
import sys

import pytest

import heedful
from heedful import catalog


def test_every_public_name_resolves():
    for name in heedful.__all__:
        assert getattr(heedful, name) is not None
    assert callable(heedful.attach)
    assert callable(heedful.generate)


def test_submodules_do_not_shadow_public_functions():
    importlib.import_module("heedful.seam.attachment")
    assert callable(heedful.attach)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        heedful.nonsense


def test_importing_loads_no_torch():
    code = "import sys, heedful, heedful.cli, heedful.catalog, heedful.zoo; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("method", catalog.methods(), ids=lambda method: method.slug)
def test_catalog_entry_points_resolve_and_document_themselves(method):
    for entry in (method.entry_point, *method.also):
        module, name = entry.split(":")
        assert getattr(importlib.import_module(module), name).__doc__
    module, name = method.entry_point.split(":")
    text = getattr(importlib.import_module(module), name).__doc__
    for section in ("Example:", "Cost:", "When not to use:", "Paper:"):
        assert section in text
    assert method.arxiv in text
    json.dumps(method.to_dict())


def test_catalog_refuses_an_unknown_slug():
    with pytest.raises(ValueError, match="token-recycling"):
        catalog.get("nonsense")
