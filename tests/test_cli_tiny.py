"""glm52 make-tiny, the cached tiny model, and whole runs of the command on tiny checkpoints: no fakes here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glm52_jax
from glm52_jax.cli import main
from glm52_jax.cli.make_tiny import cache_root, cached_tiny, tiny_config, write_tiny
from glm52_jax.tiny_tokenizer import tiny_eos_ids
from glm52_jax.tokenizer import Tokenizer

VOCAB = 320
EOS = tiny_eos_ids(VOCAB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny(directory, tiny_config(layers=3), weights="float32")
    return directory


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "glm52_jax"


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail: one line on stderr, nothing on stdout, exit code 2; returns the line."""

    def run(*argv: object) -> str:
        assert main([str(arg) for arg in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("glm52: error: ") and err.count("\n") == 1 and "Traceback" not in err
        return err

    return run


def run(*argv: object) -> None:
    assert main([str(arg) for arg in argv]) == 0


class TestMakeTiny:
    def test_everything_is_there(self, tmp_path, capsys):
        target = tmp_path / "new" / "model"
        run("make-tiny", target, "--weights", "fp8", "--layers", 4, "--shards", 2, "--mtp", "--seed", 5)
        config = json.loads((target / "config.json").read_text())
        assert (
            config["num_hidden_layers"] == 4
            and config["eos_token_id"] == EOS
            and config["num_nextn_predict_layers"] == 1
        )
        assert len(list(target.glob("*.safetensors"))) == 2
        assert Tokenizer.from_dir(target).eos_ids == tuple(EOS)
        capsys.readouterr()
        run("inspect", target, "--json")
        report = json.loads(capsys.readouterr().out)
        assert (
            report["mtp"] == {"announced": 1, "present": True}
            and report["notes"] == []
            and "F8_E4M3" in report["by_dtype"]
        )

    def test_seed_and_determinism(self, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            run("make-tiny", tmp_path / name, "--layers", 1, "--seed", seed)
        a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
        assert a == b != c

    def test_kernel_sized_is_fp8(self, tmp_path):
        run("make-tiny", tmp_path / "k", "--kernel-sized", "--layers", 1)
        config = json.loads((tmp_path / "k" / "config.json").read_text())
        assert config["kv_lora_rank"] == 512 and config["quantization_config"]["quant_method"] == "fp8"

    def test_refuses_a_used_directory(self, tmp_path, fails, capsys):
        target = tmp_path / "t"
        run("make-tiny", target, "--layers", 1, "--shards", 3)
        (target / "notes.txt").write_text("mine")
        capsys.readouterr()
        assert "not empty" in fails("make-tiny", target)
        assert "is a file" in fails("make-tiny", target / "notes.txt", "--force")
        run("make-tiny", target, "--layers", 1, "--force")
        assert [f.name for f in target.glob("model*")] == ["model.safetensors"]  # no shard of the first one is left
        assert (target / "notes.txt").read_text() == "mine"


class TestCache:
    def test_made_once(self, cache):
        first = cached_tiny()
        before = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
        assert cached_tiny() == first and first.parent == cache == cache_root()
        assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == before
        assert os.listdir(cache) == [first.name]

    def test_an_interrupted_run_leaves_nothing(self, cache, monkeypatch):
        def interrupted(directory, vocab_size):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("glm52_jax.tiny_tokenizer.write_tokenizer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cached_tiny()
        assert os.listdir(cache) == []
        assert (cached_tiny() / "tokenizer.json").is_file()

    def test_two_at_once(self, cache, monkeypatch):
        from glm52_jax.tiny_tokenizer import write_tokenizer

        def slow(directory, vocab_size):
            write_tokenizer(directory, vocab_size)
            monkeypatch.setattr("glm52_jax.tiny_tokenizer.write_tokenizer", write_tokenizer)
            cached_tiny()  # another process finishes first

        monkeypatch.setattr("glm52_jax.tiny_tokenizer.write_tokenizer", slow)
        path = cached_tiny()
        assert os.listdir(cache) == [path.name] and (path / "config.json").is_file()

    def test_relative_cache_variable_is_ignored(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_root() == tmp_path / ".cache" / "glm52_jax"


@pytest.fixture(scope="module")
def model(checkpoint) -> glm52_jax.Model:
    return glm52_jax.load(checkpoint, dtype="float32")


class TestWholeRuns:
    """No fakes: files, loader, model, sampling, text."""

    def test_generate_is_the_models_text(self, checkpoint, model, capsys):
        argv = ("generate", checkpoint, "--chat", "Hi", "--dtype", "float32", "--max-new-tokens", 12, "--ignore-eos")
        run(*argv, "--temperature", 0)
        out, err = capsys.readouterr()
        tokenizer = Tokenizer.from_dir(checkpoint)
        ids = tokenizer.chat([{"role": "user", "content": "Hi"}])
        expected = [token.id for token in model.generate(ids, 12, glm52_jax.Sampling(temperature=0.0), stop_ids=())]
        assert out == tokenizer.decode(expected) + "\n"
        assert "12 new tokens" in err
        texts = []
        for seed in (1, 1, 2):
            run(*argv, "--seed", seed)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != texts[2]

    def test_score_is_the_models_logits(self, checkpoint, model, tmp_path):
        ids = [256, 5, 17, 300, 42]
        (tmp_path / "ids.json").write_text(json.dumps(ids))
        run(
            "score",
            checkpoint,
            "--ids",
            tmp_path / "ids.json",
            "--dtype",
            "float32",
            "--out",
            tmp_path / "o.npz",
            "--taps",
        )
        logits, taps = model.score(ids, taps=True)
        with np.load(tmp_path / "o.npz") as found:
            assert set(found) == {"logits", *taps}
            assert {"hidden.0", "hidden.2", "topk.0", "topk.2", "experts.2"} <= set(found)
            assert found["logits"].shape == (5, VOCAB) and found["logits"].dtype == np.float32
            np.testing.assert_allclose(found["logits"], np.asarray(logits), rtol=1e-6, atol=1e-6)
            assert found["topk.0"].dtype == np.int32 and found["hidden.0"].dtype == np.float32

    def test_latent_norm_eps_changes_the_logits(self, checkpoint, tmp_path):
        (tmp_path / "ids.json").write_text("[1, 2, 3]")
        logits = []
        for eps in ("1e-5", "1e-6"):
            run(
                "score",
                checkpoint,
                "--ids",
                tmp_path / "ids.json",
                "--out",
                tmp_path / "o.npz",
                "--latent-norm-eps",
                eps,
            )
            with np.load(tmp_path / "o.npz") as found:
                logits.append(found["logits"])
        assert not np.allclose(*logits, rtol=1e-4)

    def test_generate_tiny(self, cache):
        """As a user runs it: its own process, the default prompt and dtype."""
        argv = [sys.executable, "-m", "glm52_jax.cli", "generate", "--tiny", "--max-new-tokens", "4", "--ignore-eos"]
        done = subprocess.run(argv, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": str(cache.parent)})
        err = done.stderr.decode()
        assert done.returncode == 0, err
        assert "the text it generates is noise" in err and "4 new tokens" in err and "Traceback" not in err
        assert done.stdout.decode().endswith("\n")

    def test_a_reader_that_leaves(self, checkpoint):
        argv = [sys.executable, "-m", "glm52_jax.cli", "inspect", "--json", str(checkpoint)]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
