"""``python -m bench start``."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import start

SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
ARGUMENTS = [
    "start",
    "--tiny",
    json.dumps(SMALL),
    "--devices",
    "1",
    "--tokens",
    "5",
    "--context",
    "64",
    "--buckets",
    "1",
]


def test_a_start_compiles_what_the_first_token_and_the_buckets_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.compile_cache.VARIABLE, "off")
    facts = start.started(command._parser().parse_args(ARGUMENTS), time.time())
    assert facts["case"] == "2 layers, w8a16" and facts["programs"] >= 3 and facts["from_cache"] == 0
    assert 0 < facts["compile_s"] <= facts["first_token_s"] + 0.1 and facts["buckets_s"] > 0
    json.dumps(facts)


def test_both_starts_share_one_cache_that_begins_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = list[str]()

    def ran(line: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        cache = env[start.compile_cache.VARIABLE]
        caches.append(cache)
        kept = len(list(Path(cache).iterdir()))
        Path(cache, "program").touch()
        facts = {
            "case": "2 layers", "tokens": 5, "import_s": 1.0, "weights_s": 2.0, "first_token_s": 9.0 - 8 * kept,
            "compile_s": 1.0, "buckets_s": 3.0, "buckets": "1", "programs": 4, "from_cache": kept, "cores": 2,
            "environment": {"date": "d", "sources": "s"}, "folder": "h200",
        }  # fmt: skip
        assert line[2] == "bench.start" and line[-2:] == ["--buckets", "1"] and float(env["GLM52_START_BEGAN"]) > 1e9
        return subprocess.CompletedProcess(line, 0, f"said\n{start.ANSWER}{json.dumps(facts)}\n")

    monkeypatch.setattr(subprocess, "run", ran)
    assert start.main(command._parser().parse_args([*ARGUMENTS, "--results", str(tmp_path)])) == 0
    assert len(set(caches)) == 1 and len(caches) == 2 and not Path(caches[0]).exists()
    _, figures = start.FILE.read(tmp_path / "h200" / "step" / start.NAME)
    assert {(f.start, f.first_token_s, f.from_cache) for f in figures} == {("first", 9.0, 0), ("second", 1.0, 1)}
    assert "second start: 1.0 s to the first token of 5" in capsys.readouterr().out


def test_a_start_that_fails_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 7, "no memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert start.main(command._parser().parse_args([*ARGUMENTS, "--results", str(tmp_path)])) == 7
    assert not list(tmp_path.iterdir())
