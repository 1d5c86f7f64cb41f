"""Pages agree with the program: generated files, the version, and every command of the README."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?:<!-- run: (?P<how>[^>]*?) -->\n)?```(?P<language>sh|python)\n(?P<commands>.*?)```", re.DOTALL
)


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "scripts" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readme_blocks(how: str, language: str = "sh") -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [block.groupdict() for block in BLOCK.finditer(text)]
    return [block["commands"] for block in found if (block["how"], block["language"]) == (how, language)]


def test_generated_pages_and_version_are_up_to_date(generated: ModuleType) -> None:
    assert generated.problems() == []


def test_a_stale_page_is_noticed(
    generated: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    monkeypatch.setattr(generated, "pages", lambda: {page: "new"})
    (tmp_path / "pyproject.toml").write_text('version = "2.0.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n\n## 1.0.0\n")
    stale, version = generated.problems()
    assert "page.md is out of date" in stale
    assert "2.0.0" in version


def test_every_page_links_to_files_that_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert len(pages) > 5
    assert not broken


def test_every_block_of_the_readme_says_how_it_is_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    hows = [found["how"] for found in BLOCK.finditer(text)]
    assert hows
    assert all(how and (how in ("test", "slow") or how.startswith(("no, ", "by "))) for how in hows)


def test_the_readme_names_the_test_command_that_the_gate_runs() -> None:
    assert any(
        block.strip() == "scripts/test"
        for block in readme_blocks("by continuous integration, as the last step of scripts/check")
    )
    assert (ROOT / "scripts" / "check").read_text().rstrip().endswith('exec scripts/test "$@"')
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec scripts/check")


def run_block(commands: str, folder: Path) -> str:
    programs = Path(sys.executable).parent
    if not (programs / "unmemorize").exists():
        pytest.skip("unmemorize is not installed in this environment")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("commands", readme_blocks("test"))
def test_commands_of_the_readme_work(commands: str, tmp_path: Path) -> None:
    assert run_block(commands, tmp_path).strip()


@pytest.mark.parametrize("code", readme_blocks("test", "python"))
def test_python_of_the_readme_works(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with_sinks, without = (float(line.split()[-1]) for line in done.stdout.splitlines())
    assert with_sinks < without


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("commands", readme_blocks("slow"))
def test_long_commands_of_the_readme_work(commands: str) -> None:
    last_line = run_block(commands, ROOT).splitlines()[-1]
    assert Path(last_line).is_file()
