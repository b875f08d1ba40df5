"""The glm52 command: its parsing, its output and its errors with a fake model, and whole runs on a tiny checkpoint."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import glm52_jax
from glm52_jax.cli import common, main
from glm52_jax.cli.generate import Statistics, sampling_options
from glm52_jax.cli.make_tiny import tiny_config, write_tiny
from glm52_jax.generate import NotFiniteError
from glm52_jax.tiny_tokenizer import tiny_eos_ids
from glm52_jax.tokenizer import Tokenizer

VOCAB = 320
EOS = tiny_eos_ids(VOCAB)


class FakeModel:
    """Answers with given ids, and remembers what it was asked."""

    def __init__(self, answer: list[int] | None = None, interrupt_after: int | None = None) -> None:
        self.config = SimpleNamespace(eos_token_ids=(7,), vocab_size=VOCAB)
        self.answer, self.interrupt_after = answer or [], interrupt_after
        self.broken: Exception | None = None
        self.load_options: dict = {}
        self.asked: dict = {}

    def load(self, directory, progress=None, **options):
        self.load_options = {"directory": directory, **options}
        if progress is not None:
            progress(1, 2, "a")
        return self

    def generate(self, ids, **options):
        self.asked = {"ids": ids, **options}
        return self._tokens(options["max_new_tokens"])

    def _tokens(self, most):
        for i, token in enumerate(self.answer[:most]):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield SimpleNamespace(sequence=0, id=token, finished=False)
        if self.broken:
            raise self.broken

    def score(self, ids, taps=False):
        logits = np.arange(len(ids) * VOCAB, dtype=np.float32).reshape(len(ids), VOCAB)
        self.asked = {"ids": ids, "taps": taps}
        return (logits, {"topk.0": np.full((len(ids), 4), -1, np.int64)}) if taps else logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny(directory, tiny_config(layers=3), weights="float32")
    return directory


@pytest.fixture
def fake(monkeypatch) -> FakeModel:
    model = FakeModel([*"Grüße €".encode(), EOS[1]])
    monkeypatch.setattr(glm52_jax, "load", model.load)
    return model


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


class TestGenerate:
    def test_text_on_stdout_and_statistics_on_stderr(self, checkpoint, fake, capsys):
        run("generate", checkpoint, "--prompt", "Hi")
        out, err = capsys.readouterr()
        assert out == "Grüße €\n"
        assert re.search(r"prompt 2 tokens, first token after .* s, second .* 12 new tokens, .* tok/s", err)
        assert "stopped by an end-of-text id" in err
        assert fake.asked["ids"] == [*b"Hi"]

    def test_incomplete_character_comes_at_the_end(self, checkpoint, fake, capsys):
        fake.answer = [*b"a\xe2\x82"]
        run("generate", checkpoint, "--prompt", "Hi")
        out, err = capsys.readouterr()
        assert out == "a\ufffd\n" and "stopped by --max-new-tokens" in err

    def test_nothing_after_the_stop_id(self, checkpoint, fake, capsys):
        fake.answer = [*b"ab", EOS[0], *b"cd"]
        run("generate", checkpoint, "--prompt", "Hi")
        assert capsys.readouterr().out == "ab\n"
        assert tuple(fake.asked["stop_ids"]) == tuple(EOS)

    def test_ignore_eos(self, checkpoint, fake, capsys):
        fake.answer = [*b"ab", EOS[0], *b"cd"]
        run("generate", checkpoint, "--prompt", "Hi", "--ignore-eos")
        assert capsys.readouterr().out == "abcd\n"
        assert fake.asked["stop_ids"] == ()

    def test_chat(self, checkpoint, fake):
        run("generate", checkpoint, "--chat", "Hi", "--system", "Be brief.")
        tokenizer = Tokenizer.from_dir(checkpoint)
        assert fake.asked["ids"] == tokenizer.encode("[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\n")

    def test_messages(self, checkpoint, fake, tmp_path):
        (tmp_path / "m.json").write_text('[{"role": "user", "content": "Grüße"}]', encoding="utf-8")
        run("generate", checkpoint, "--messages", tmp_path / "m.json")
        assert fake.asked["ids"] == Tokenizer.from_dir(checkpoint).chat([{"role": "user", "content": "Grüße"}])

    @pytest.mark.parametrize("flag", ["--prompt", "--chat"])
    def test_stdin(self, checkpoint, fake, monkeypatch, flag):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        run("generate", checkpoint, flag, "-")
        text = "Hi\n" if flag == "--prompt" else "[gMASK]<sop><|user|>\nHi\n<|assistant|>\n"
        assert fake.asked["ids"] == Tokenizer.from_dir(checkpoint).encode(text)

    def test_messages_from_stdin(self, checkpoint, fake, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO('[{"role": "user", "content": "Hi"}]'))
        run("generate", checkpoint, "--messages", "-")
        assert fake.asked["ids"] == Tokenizer.from_dir(checkpoint).chat([{"role": "user", "content": "Hi"}])

    def test_template_arguments(self, checkpoint, fake, tmp_path):
        for file in ("tokenizer.json", "config.json"):
            (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
        (tmp_path / "chat_template.jinja").write_text("{{ enable_thinking }}{{ effort }}")
        run(
            "generate",
            tmp_path,
            "--chat",
            "x",
            "--template-arg",
            "enable_thinking=false",
            "--template-arg",
            'effort="a=b"',
        )
        assert bytes(fake.asked["ids"]) == b"Falsea=b"

    def test_options_reach_the_model(self, checkpoint, fake):
        flags = "--temperature 0.5 --top-p 0.8 --top-k 7 --min-p 0.1 --seed 3 --max-new-tokens 4"
        loading = "--dtype float32 --weights bfloat16 --cache fp8 --linear w8a8 --latent-norm-eps 1e-6"
        run("generate", checkpoint, "--prompt", "Hi", *flags.split(), *loading.split())
        sampling = fake.asked["sampling"]
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.8, 7)
        assert (sampling.min_p, sampling.seed, fake.asked["max_new_tokens"]) == (0.1, 3, 4)
        assert fake.load_options == {
            "directory": checkpoint, "dtype": "float32", "weights": "bfloat16", "cache": "fp8", "linear": "w8a8",
            "latent_norm_eps": 1e-6,
        }  # fmt: skip

    def test_control_characters_do_not_reach_a_terminal(self, checkpoint, fake, capsys, monkeypatch):
        fake.answer = [*b"a\x1b[2J\r\tb\n", *"\x9b".encode()]
        run("generate", checkpoint, "--prompt", "Hi")
        assert capsys.readouterr().out == "a\x1b[2J\r\tb\n\x9b\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        run("generate", checkpoint, "--prompt", "Hi")
        assert capsys.readouterr().out == "a\ufffd[2J\ufffd\tb\n\ufffd\n"

    def test_interrupt(self, checkpoint, fake, capsys):
        fake.interrupt_after = 2
        assert main(["generate", str(checkpoint), "--prompt", "Hi"]) == 130
        out, err = capsys.readouterr()
        assert out == "Gr\n"
        assert "2 new tokens, interrupted" in err and "Traceback" not in err

    def test_logits_that_are_not_finite(self, checkpoint, fake, capsys):
        fake.answer, fake.broken = [*b"ab"], NotFiniteError({0: (2, "NaN")})
        assert main(["generate", str(checkpoint), "--prompt", "Hi"]) == 2
        out, err = capsys.readouterr()
        assert out == "ab\n" and "2 new tokens, broken off" in err and "Traceback" not in err
        assert "glm52: error: logits are not finite: sequence 0 ended at its new token 2: NaN" in err

    def test_verbose_says_what_loading_and_compiling_took(self, checkpoint, fake, capsys):
        run("generate", checkpoint, "--prompt", "Hi", "--verbose")
        err = capsys.readouterr().err
        assert re.search(r"^loaded in \d+\.\d s$", err, re.M)
        assert re.search(r"^compiled 0 programs in 0\.0 s, none kept for the next start$", err, re.M)

    def test_a_fault_of_the_program_keeps_its_traceback(self, checkpoint, fake, capsys):
        fake.answer = ["not an id"]
        with pytest.raises(TypeError):
            main(["generate", str(checkpoint), "--prompt", "Hi"])


class TestSampling:
    FLAGS = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))

    def test_without_a_file_the_model_card_rules(self):
        assert sampling_options({}, self.FLAGS) == {"temperature": 1.0, "top_p": 0.95}

    def test_the_file_rules(self):
        found = {"temperature": 0.6, "top_k": 40, "eos_token_id": 1, "min_p": None}
        assert sampling_options(found, self.FLAGS) == {"temperature": 0.6, "top_k": 40}

    def test_do_sample_false_is_greedy_unless_asked(self):
        found = {"do_sample": False, "temperature": 0.6}
        assert sampling_options(found, self.FLAGS) == {"temperature": 0.0}
        assert sampling_options(found, self.FLAGS | {"temperature": 0.9}) == {"temperature": 0.9}

    def test_zero_is_a_value(self):
        assert sampling_options({"temperature": 0.6}, self.FLAGS | {"temperature": 0.0})["temperature"] == 0.0

    def test_wrong_type(self):
        with pytest.raises(common.CliError, match="temperature='hot' must be a number"):
            sampling_options({"temperature": "hot"}, self.FLAGS)

    def test_rate_leaves_out_the_tokens_that_compile(self):
        line = Statistics(3, [10.0, 20.0, 20.5, 21.0]).line("done")
        assert (
            line
            == "prompt 3 tokens, first token after 10.00 s, second after 20.00 s, 4 new tokens, 2.0 tok/s after the second, done"
        )
        assert "tok/s" not in Statistics(3, [10.0, 20.0]).line("done")
        line = Statistics(3, [10.0, 20.0], compiled=9.25).line("done")
        assert "first token after 10.00 s (9.25 s of it compiling), second after 20.00 s" in line


class TestBadRequests:
    def test_generate(self, checkpoint, fake, fails, tmp_path):
        bad = tmp_path / "bad.json"
        cases = [
            (["--prompt", "a", "--chat", "b"], "not --prompt and --chat"),
            ([], "not none"),
            (["--tiny", "--prompt", "a"], "not both"),
            (["--prompt", "a", "--system", "b"], "--system and --template-arg need --chat"),
            (["--prompt", ""], "prompt is empty"),
            (["--prompt", "a", "--top-p", "0"], "top_p=0.0 must lie in"),
            (["--prompt", "a", "--temperature", "nan"], "temperature"),
            (["--prompt", "a", "--top-k", "-1"], "--top-k"),
            (["--prompt", "a", "--dtype", "float16"], "--dtype"),
            (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
            (["--prompt", "a", "--max-new-tokens", "1048576"], "max_position_embeddings=1048576"),
            (["--prompt", "a", "--bogus"], "--bogus"),
            (["--chat", "a", "--template-arg", "x"], "NAME=JSON"),
            (["--chat", "a", "--template-arg", "x=yes"], "NAME=JSON"),
            (["--messages", tmp_path / "none.json"], "none.json: No such file"),
        ]
        for argv, words in cases:
            assert words in fails("generate", checkpoint, *argv), argv
        for content in ("{", "[]", '{"role": "user"}', '[{"role": "user"}]', '["x"]', "[1e999", "[" * 100_000):
            bad.write_text(content)
            assert "bad.json" in fails("generate", checkpoint, "--messages", bad)
        assert not fake.load_options  # nothing was loaded for any of them

    def test_no_directory(self, fails, tmp_path):
        assert "give a checkpoint directory or --tiny" in fails("generate", "--prompt", "a")
        assert "tokenizer.json: no such file" in fails("generate", tmp_path, "--prompt", "a")
        assert "does not exist" in fails("inspect", tmp_path / "none")
        assert "has no config.json" in fails("inspect", tmp_path)

    def test_errors_of_the_parts(self, checkpoint, fails, tmp_path):
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "ids.json").write_text("[1]")
        score = ("score", tmp_path, "--ids", tmp_path / "ids.json", "--out", tmp_path / "o.npz")
        config = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
        assert "hidden_act='gelu'" in fails(*score)
        assert "hidden_act='gelu'" in fails("inspect", tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 256}))
        assert "model.safetensors" in fails(*score)  # wrong shapes: several lines in one
        (tmp_path / "config.json").write_text(json.dumps(config))
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        assert "model.safetensors" in fails("inspect", tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{% if %}")
        assert "broken chat template" in fails("generate", tmp_path, "--chat", "x")
        assert not (tmp_path / "o.npz").exists()

    def test_debug_shows_the_traceback(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            main(["--debug", "inspect", str(tmp_path / "none")])

    def test_usage(self, fails, capsys):
        assert "No such command" in fails("bogus")
        assert "Missing argument" in fails("inspect")
        assert main([]) == 2
        assert "Usage" in capsys.readouterr().out
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"glm52 {glm52_jax.__version__}\n"


class TestScore:
    def test_contract(self, checkpoint, fake, tmp_path, capsys):
        (tmp_path / "ids.json").write_text("[5, 6, 319]")
        out = tmp_path / "result"  # no .npz: the name is taken as it is
        run("score", checkpoint, "--ids", tmp_path / "ids.json", "--dtype", "float32", "--out", out, "--taps",
            "--latent-norm-eps", "1e-6")  # fmt: skip
        with np.load(out) as found:
            assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
                "logits": ((3, VOCAB), np.float32),
                "topk.0": ((3, 4), np.int32),
            }
        assert fake.asked == {"ids": [5, 6, 319], "taps": True}
        assert fake.load_options["latent_norm_eps"] == 1e-6 and fake.load_options["dtype"] == "float32"
        assert [file.name for file in tmp_path.iterdir() if "result" in file.name] == ["result"]
        run("score", checkpoint, "--ids", tmp_path / "ids.json", "--out", out)
        with np.load(out) as found:
            assert set(found) == {"logits"}

    def test_bad_ids(self, checkpoint, fake, fails, tmp_path):
        ids, out = tmp_path / "ids.json", tmp_path / "o.npz"
        cases = {
            "[]": "non-empty", "3": "non-empty", "{}": "non-empty", "[1": "not valid JSON", "[1, 2.0]": "entry 1 is 2.0",
            "[true]": "entry 0 is True", '["1"]': "entry 0 is '1'", "[320]": "outside the vocabulary [0, 320)",
            "[0, -1]": "entry 1 is -1", "[[1]]": "entry 0 is [1]",
        }  # fmt: skip
        for content, words in cases.items():
            ids.write_text(content)
            assert words in fails("score", checkpoint, "--ids", ids, "--out", out), content
        ids.write_text("[1]")
        assert "does not exist" in fails("score", checkpoint, "--ids", ids, "--out", tmp_path / "none" / "o.npz")
        assert "is a directory" in fails("score", checkpoint, "--ids", ids, "--out", tmp_path)
        assert not fake.load_options and not out.exists()
