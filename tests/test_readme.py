"""The README's examples, run one after another as a reader would."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def examples():
    text = README.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text[text.index("## Five examples") :], re.S)


def test_there_are_five_short_examples():
    assert len(examples()) == 5
    assert max(len(code.splitlines()) for code in examples()) <= 12


@pytest.mark.filterwarnings("ignore")
def test_examples_run(capsys):
    torch.manual_seed(0)
    names: dict = {}
    for code in examples():
        exec(compile(code, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "dark and stormy" in printed
    assert names["result"].stats.tokens_per_step > 1


def test_no_registry_host_is_named():
    root = README.parent
    hosts = ("pypi" + ".org", "files.python" + "hosted.org", "registry.npm" + "js.org", "deb.debian" + ".org")
    for pattern in ("*.md", "*.toml", "*.txt", "*.yml", "Makefile", "src/**/*.py", "docs/**/*.md", ".ci/run"):
        for path in root.glob(pattern):
            text = path.read_text(encoding="utf-8")
            assert not [host for host in hosts if host in text], path
