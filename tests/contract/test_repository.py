"""Rules about the repository itself: what may be imported, printed, hooked, stored and named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unmemorize

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "unmemorize"


def sources() -> dict[str, str]:
    return {
        path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")
    }


def imported_modules(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_exports_are_sorted_few_and_real() -> None:
    names = unmemorize.__all__
    assert list(names) == sorted(names)
    assert 0 < len(names) <= 40
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(unmemorize, name)]
    assert not missing
    assert set(names) <= set(dir(unmemorize))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        unmemorize.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "module", ["", ".cli", ".corpus", ".errors", ".files", ".ids", ".neurons", ".records", ".report"]
)
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "rensa", "accelerate", "matplotlib", "pandas", "pyarrow"}
    assert not heavy & modules_loaded_by(f"import unmemorize{module}")


def test_only_gates_registers_hooks() -> None:
    assert {name for name, text in sources().items() if "register_forward" in text} == {"gates.py"}


def test_only_the_command_line_prints() -> None:
    printing = {
        name
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"cli.py"}


def test_nothing_unpickles() -> None:
    for name, text in sources().items():
        assert not {"pickle", "dill", "joblib", "shelve"} & set(imported_modules(text)), name
        calls = re.findall(r"torch\s*\.\s*load\s*\(|allow_pickle\s*=\s*True", text)
        assert not calls, f"{name}: {calls}"


def test_nothing_imports_tests_or_benchmarks() -> None:
    for name, text in sources().items():
        roots = {module.partition(".")[0] for module in imported_modules(text)}
        assert not roots & {"tests", "benchmarks", "recipes"}, name


def test_no_folder_of_odds_and_ends() -> None:
    names = {Path(name).stem for name in sources()}
    assert not names & {"utils", "util", "misc", "helpers", "common"}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_path_of_a_machine_is_stored() -> None:
    places = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work|opt|mnt)/\w+")
    found = {}
    for path in tracked_files():
        if not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        try:
            hits = places.findall(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if hits:
            found[path.relative_to(ROOT).as_posix()] = hits
    assert not found


def test_scripts_are_short() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if not path.suffix and path.is_file()]
    assert {path.name for path in scripts} >= {"check", "demo", "lint", "setup", "test"}
    for path in scripts:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 25, path.name
        assert path.stat().st_mode & 0o111, f"{path.name} is not executable"
