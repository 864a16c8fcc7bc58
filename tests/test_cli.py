"""The command line: bad input is one line and status 2, good input is the public function's result."""

import json
import os
from pathlib import Path

import pytest

from heedful import cli


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["heedful", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question_id": i, "category": "qa", "turns": ["Who was Scrooge?"]}) + "\n" for i in range(2)
        )
    )
    return path


def test_list(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "list", "--json")
    assert code == 0
    assert {record["slug"] for record in json.loads(out)} == {
        "act", "hidden-transfer", "hip", "landmark", "lightning2", "longspec", "medusa", "moh", "retrieval-heads", "sinklora",
        "token-recycling",
    }  # fmt: skip
    code, out, _ = run(capsys, monkeypatch, "list")
    assert code == 0
    assert "2408.08696" in out


BAD = {
    "no such zoo model": (["generate", "hello", "--model", "nosuch"], "nosuch"),
    "no such folder": (["generate", "hello", "--model", "./nosuch"], "no such folder"),
    "folder without config": (["generate", "hello", "--model", "{tmp}"], "config.json"),
    "folder without weights": (["generate", "hello", "--model", "{tmp}/empty"], "weights"),
    "unknown drafter": (["generate", "hello", "--drafter", "oracle"], "oracle"),
    "empty prompt": (["generate", "  "], "prompt is empty"),
    "prompt beyond the context": (["generate", "word " * 4200], "context"),
    "unknown slug": (["reproduce", "nosuch"], "nosuch"),
    "report into no folder": (["demo", "--report", "{tmp}/no/such/report.html"], "no folder"),
    "report is a folder": (["demo", "--report", "{tmp}"], "folder"),
    "plot of an unknown kind": (["heads", "--plot", "{tmp}/map.xyz"], ".png"),
    "no question file": (["bench", "decode", "--questions", "{tmp}/none.jsonl"], "none.jsonl"),
    "question file without questions": (["bench", "decode", "--questions", "{tmp}/blank.jsonl"], "question"),
    "unknown drafter in the bench": (
        ["bench", "decode", "--questions", "{tmp}/questions.jsonl", "--drafters", "none,oracle"],
        "oracle",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, questions, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "blank.jsonl").write_text("\n")
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = BAD[case]
    code, out, err = run(capsys, monkeypatch, *[argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_report_without_permission(capsys, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = run(capsys, monkeypatch, "demo", "--report", tmp_path / "report.html")
    assert code == 2
    assert "permission" in err


def test_generate_compares_with_plain_decoding(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "generate", "It was a dark", "--max-new-tokens", 12, "--compare")
    assert code == 0
    assert out.strip()
    assert "tokens are identical" in err


def test_generate_samples_reproducibly(capsys, monkeypatch):
    texts = [
        run(
            capsys,
            monkeypatch,
            "generate",
            "She said",
            "--max-new-tokens",
            12,
            "--temperature",
            0.9,
            "--seed",
            3,
            "--drafter",
            "none",
        )[1]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_heads_writes_scores_and_picture(capsys, monkeypatch, tmp_path):
    code, out, _ = run(
        capsys,
        monkeypatch,
        "heads",
        "--length",
        192,
        "--instances",
        1,
        "--json",
        tmp_path / "heads.json",
        "--plot",
        tmp_path / "map.png",
    )
    assert code == 0
    scores = json.loads((tmp_path / "heads.json").read_text())
    assert len(scores) == 60
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert out.strip()


def test_bench_decode(capsys, monkeypatch, tmp_path, questions):
    code, out, _ = run(
        capsys, monkeypatch, "bench", "decode", "--questions", questions, "--drafters", "none,prompt-lookup", "--max-new-tokens", 12,
        "--json", tmp_path / "bench.json",
    )  # fmt: skip
    assert code == 0
    assert "prompt-lookup" in out
    assert json.loads(Path(tmp_path / "bench.json").read_text())
