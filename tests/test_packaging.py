"""What is published: the wheel's content, its requirements and pins, and imports that stay light."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def pinned_versions() -> dict[str, str]:
    """Canonical package name -> exact version, from constraints.txt."""
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def closure(requirements: list[str]) -> set[str]:
    """Canonical names of everything that installing `requirements` here brings, from the installed metadata."""
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, parent_extra = todo.pop()
        environment = {**default_environment(), "extra": parent_extra}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(Requirement(text), extra) for text in metadata.requires(name) or []]
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built here as pip would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def wheel_file(wheel: zipfile.ZipFile, name: str) -> Message:
    """A file of the wheel's .dist-info folder, parsed as headers."""
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return HeaderParser().parsestr(wheel.read(path).decode())


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"glm52_jax", "pallas_kernels"}
    sources = [*ROOT.glob("glm52_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= set(names)


def test_wheel_is_typed_and_licensed(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {"glm52_jax/py.typed", "pallas_kernels/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_requires_neither_triton_nor_torch_on_the_cpu(wheel: zipfile.ZipFile) -> None:
    requirements = [Requirement(text) for text in wheel_file(wheel, "METADATA").get_all("Requires-Dist", [])]
    plain = {canonicalize_name(r.name) for r in requirements if r.marker is None}
    extras = [r for r in requirements if r.marker is not None]
    gpu = {canonicalize_name(r.name) for r in extras if r.marker and r.marker.evaluate({"extra": "cuda13"})}
    assert "jax" in plain
    assert not plain & {"triton", "jax-triton", "torch", "transformers"}
    assert {"triton", "jax-triton"} <= gpu


def test_command_line_entry_exists(wheel: zipfile.ZipFile) -> None:
    (path,) = [n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt")]
    assert "glm52 = glm52_jax.cli:main" in wheel.read(path).decode().splitlines()
    from glm52_jax.cli import main

    assert callable(main)


def test_constraints_pin_everything_that_is_installed() -> None:
    installed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]) - {PROJECT["name"]}
    assert not installed - pinned_versions().keys(), "run ./dev lock"


def test_constraints_are_exact_versions_that_the_project_allows() -> None:
    pins = pinned_versions()
    assert all(re.fullmatch(r"\d+(\.\d+)*", version) for version in pins.values()), pins
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_constraints_leave_cuda_packages_and_registries_open() -> None:
    assert not [name for name in pinned_versions() if re.search(r"nvidia|cuda|triton|torch", name)]
    assert "://" not in CONSTRAINTS
    assert not re.search(r"^-", CONSTRAINTS, re.MULTILINE)


IMPORT_ALL = """
import importlib, pkgutil, glm52_jax
for module in pkgutil.walk_packages(glm52_jax.__path__, "glm52_jax."):
    importlib.import_module(module.name)
assert "jax" in sys.modules
"""
HELP = "from glm52_jax.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    "program", [pytest.param(IMPORT_ALL, id="every module"), pytest.param(HELP, id="glm52 --help")]
)
def test_cpu_path_imports_neither_triton_nor_torch(program: str, tmp_path: Path) -> None:
    # The heavy packages are made importable, so that an import inside try/except or behind find_spec shows too.
    heavy = ("triton", "jax_triton", "torch", "transformers")
    for name in heavy:
        (tmp_path / f"{name}.py").write_text("__version__ = '99'\n")
    script = f"""
import atexit, sys
atexit.register(lambda: print("HEAVY", sorted(set(sys.modules) & {set(heavy)!r})))
sys.argv = ["glm52", "--help"]
{program}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_suite_runs_on_the_cpu_with_strict_promotion() -> None:
    assert jax.default_backend() == "cpu"
    with pytest.raises(ValueError, match="dtype_promotion=strict"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)
