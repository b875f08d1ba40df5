"""Two checkouts of the step, timed in turns: sides, their processes, and what is said of the ratio."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench import ab, ab_worker
from bench.ab import Outcome, Side
from pallas_kernels import registry
from pallas_kernels.registry import BackendRefused

# A checkout whose steps take as long as its file says, and which knows what it was asked for.
FAKE = {
    "pallas_kernels/registry.py": "def resolve(operation, backends, spec, forced=None):\n    return forced\n",
    "glm52_jax/config.py": "class Config:\n    from_hf = staticmethod(lambda sizes: sizes)\n",
    "glm52_jax/tiny.py": "def tiny_config(**sizes):\n    return sizes\n",
    "bench/step_model.py": (
        "def glm52(layers):\n    return {'layers': layers}\n"
        "class StepSpec:\n"
        "    def __init__(self, config, **spec):\n        self.config, self.spec = config, spec\n"
        "    def shapes(self):\n        return self.spec\n"
        "def make_weights(shapes):\n    return shapes\n"
    ),
    "bench/step.py": (
        "import sys\nfrom types import SimpleNamespace as made\nfrom pallas_kernels import registry\n"
        "class Steps:\n"
        "    in_flight = COUNT\n    program = made(choices=[])\n"
        "    def warm_up(self):\n        print('noise')\n"
        "    def run(self, steps):\n        assert steps == 7\n        return steps * SECONDS\n"
        "def prepare(spec, weights):\n    return made(steps=Steps(), compile_s=1.25)\n"
        "def backends(choices):\n    return {'experts': str(registry.resolve('experts', (), None)), 'asked': str(sys.argv[1])}\n"
    ),
}


def checkout(folder: Path, seconds: float, count: int) -> Path:
    for name, text in FAKE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text.replace("SECONDS", str(seconds)).replace("COUNT", str(count)))
    return folder


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ab.add_options(parser)
    return parser.parse_args(arguments)


def test_sides() -> None:
    assert Side.parse("HEAD~2") == Side("HEAD~2", "HEAD~2", None, {})
    assert Side.parse(".@linear=w8a8,experts=reference") == Side(
        ".@linear=w8a8,experts=reference", ".", "w8a8", {"experts": "reference"}
    )
    assert Side.parse("@router=triton").place == "."
    for text in (".@w8a8", ".@experts=", ".@=triton"):
        with pytest.raises(ValueError, match="OPERATION=BACKEND"):
            Side.parse(text)


def test_two_processes_are_timed_in_turns(tmp_path: Path) -> None:
    """Rounds of as many steps, the fewer of what both can; each side is its own checkout with its own plan."""
    a, b = checkout(tmp_path / "a", 1e-3, 9), checkout(tmp_path / "b", 1.5e-3, 7)
    said: list[str] = []
    given = (
        str(a),
        f"{b}@experts=reference,linear=w8a8",
        "--rounds",
        "5",
        "--rows",
        "2",
        "--tiny",
        '{"vocab_size": 9}',
        "--results",
        str(tmp_path / "results"),
    )
    assert ab.main(options(*given), said.append) == 0
    assert "'experts': 'None'" in said[0] and "'experts': 'reference'" in said[1]
    assert '"linear": "w8a8"' in said[1] and '"linear"' not in said[0] and '"vocab_size": 9' in said[0]
    assert said[2].startswith("A 1.0000 ms, B 1.5000 ms a step; B / A 1.5000, half of 5 pairs in 1.5000 .. 1.5000")
    assert said[2].endswith("B is slower")
    (path,) = (tmp_path / "results").rglob(ab.NAME)
    runs, (figure,) = ab.FILE.read(path)
    assert (figure.a, figure.pairs, figure.a_us, figure.b_us, figure.ratio) == (str(a), 5, 1000.0, 1500.0, 1.5)
    assert figure.b.endswith("linear=w8a8") and "rows=2" in figure.step and figure.run in runs


def test_a_side_that_fails_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / "a", 1e-3, 7)
    (folder / "bench" / "step.py").write_text("raise RuntimeError('broken checkout')\n")
    with pytest.raises(ValueError, match=r"side .*a' ended with status 1"):
        ab.main(options(str(folder), str(folder)), lambda text: None)
    assert "broken checkout" in capfd.readouterr().err
    with pytest.raises(ValueError, match="neither a checkout nor a revision"):
        ab.main(options("no-such-revision", "."), lambda text: None)
    with pytest.raises(ValueError, match="must be a JSON object"):
        ab.main(options(".", ".", "--tiny", "3"))


def test_a_revision_is_unpacked_and_the_repository_only_read(tmp_path: Path) -> None:
    root = checkout(tmp_path / "repository", 1e-3, 7)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(root), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (root / "bench" / "step.py").write_text("later\n")
    with ab.unpacked("HEAD", root) as folder:
        assert "class Steps" in (folder / "bench" / "step.py").read_text() and folder != root
    assert not folder.exists() and git("worktree", "list").count("\n") == 1
    with ab.unpacked(str(root), root) as folder:
        assert (folder / "bench" / "step.py").read_text() == "later\n"


@pytest.mark.parametrize(
    "b,said",
    [
        ((11.0, 10.9, 11.1, 11.0), "B is slower"),
        ((9.0, 9.1, 9.0, 8.9), "B is faster"),
        ((9.0, 11.0, 10.5, 9.5), "no difference beyond the spread"),
    ],
)
def test_a_ratio_is_as_sure_as_its_spread(b: tuple[float, ...], said: str) -> None:
    outcome = Outcome((10.0,) * 4, b)
    assert outcome.ratios == [x / 10 for x in b] and str(outcome).endswith(said)


def test_a_forced_backend_serves_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels.sample_logits import greedy_tokens

    monkeypatch.setattr(registry, "resolve", registry.resolve)
    ab_worker.force({"sample_logits": "triton"})
    with pytest.raises(BackendRefused, match="backend 'triton' refuses"):
        greedy_tokens(np.zeros((1, 8), np.float32))  # type: ignore[arg-type]


def test_the_worker_steps_the_real_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "resolve", registry.resolve)
    sizes = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "indexer_types": ["full"], "vocab_size": 96}
    asked = {
        "folder": str(Path(ab.__file__).parents[1]),
        "backends": {"top_k": "reference"},
        "tiny": sizes,
        "layers": 0,
        "spec": {"rows": 1, "context": 32},
    }
    steps, facts = ab_worker.steps_of(asked)
    assert facts["backends"]["top_k"] == "reference" and facts["compile_s"] >= 0
    assert steps.run(3) > 0
    assert np.asarray(steps.state.arrays.positions).tolist() == [35]
    with pytest.raises(SystemExit, match="glm52_jax comes from"):
        ab_worker.steps_of(asked | {"folder": "/nowhere"})
