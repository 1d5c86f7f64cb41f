"""The corpus that every Python installation carries: the documentation of the language and its library.

Language topics come from `pydoc_data`, the rest are docstrings of the standard library's modules, classes and
functions, read from source without importing anything. The text differs between Python versions; on one installation
it is always the same, in the same order.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_MIN_CHARACTERS = 200
_MAX_CHARACTERS = 4000
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_docs() -> Iterator[tuple[str, str]]:
    """Yield (text, source): texts of 200 to about 4,000 characters, sources `topics/NAME` and `module/NAME`.

    Sources are unique: of definitions with one name the first counts, and the pieces of a longer text are numbered
    (`topics/NAME#2`).
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from _pieces(topics[name].strip(), f"topics/{name}")
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in _NOT_LIBRARY or "-" in part for part in parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        for name, text in _docstrings(path, module):
            if name not in seen:
                seen.add(name)
                yield from _pieces(text, f"module/{name}")


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # else strict warnings would decide which files parse
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    stack: list[tuple[str, _Definition]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        text = ast.get_docstring(node)
        if text:
            yield name, text
        stack.extend((f"{name}.{child.name}", child) for child in reversed(list(_definitions(node))))


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield what a body defines, also under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _pieces(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Cut a text at blank lines into pieces of the wanted size; shorter ones are dropped."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if pieces[-1] and len(pieces[-1]) + len(paragraph) > _MAX_CHARACTERS:
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    for number, piece in enumerate(pieces, start=1):
        if len(piece.strip()) >= _MIN_CHARACTERS:
            yield piece.strip("\n"), source if number == 1 else f"{source}#{number}"
