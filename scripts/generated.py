"""Write the pages that are made from code, or check that they are up to date.

    python scripts/generated.py write|check

docs/cli.md is the command line's help; docs/schemas/ holds the JSON Schema of every file format. `check` also compares
the version with the changelog. Exits with 1 if anything is out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from unmemorize import cli, neurons, records
from unmemorize.isolate import plan

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {
    "audit": records.Audit,
    "audit_pictures": records.PictureAudit,
    "audit_neurons": records.NeuronAudit,
    "localization": records.TextLocalization,
    "neurons": neurons.NeuronFile,
    "plan": plan.PlanFile,
}


def command_line_page() -> str:
    """Return docs/cli.md: every verb with its arguments and options, read from the verbs' own signatures."""
    pages = [
        "# Command line\n",
        "Made by `scripts/lint` from the program. Every verb also takes `--json` (the result as JSON on stdout), "
        "`--debug` (the traceback of a mistake) and `--help`. Progress goes to stderr. Exit codes: 0 done; 1 an audit "
        "or a check did not hold; 2 a mistake, explained in one line; 3 a defect; 130 interrupted.\n",
    ]
    for name, verb in cli.VERBS.items():
        rows = [_row(parameter) for parameter in cli.user_parameters(verb)]
        places = [option.strip("`") for option, _, _ in rows if not option.startswith("`-")]
        table = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
        pages.append(f"## {name}\n\n{inspect.getdoc(verb)}\n")
        pages.append(f"    {' '.join(['unmemorize', name, *places])} [OPTIONS]\n")
        pages.append("\n".join(["option | values | meaning", "---|---|---", *table]) + "\n")
    return "\n".join(pages)


def _row(parameter: inspect.Parameter) -> tuple[str, str, str]:
    """Return option, values and meaning of a verb's parameter."""
    kind, info = get_args(parameter.annotation)
    dashed = parameter.name.replace("_", "-")
    is_argument = type(info).__name__ == "ArgumentInfo"
    declared = info.default if isinstance(info.default, str) else f"--{dashed}"
    option = (info.metavar or dashed.upper()) if is_argument else declared
    text = info.help or ""
    if parameter.default is inspect.Parameter.empty and not is_argument:
        text += " Required."
    elif not any(parameter.default is nothing for nothing in (inspect.Parameter.empty, None, False)):
        text += f" Default: {parameter.default}."
    return f"`{option}`", _values(kind), text


def _values(kind: Any) -> str:
    """Describe a type in one word: its choices, or its name; empty for a switch."""
    kinds = [
        k
        for k in (get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))
        if k is not NoneType
    ]
    if get_origin(kinds[0]) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kinds[0]))
    if get_origin(kinds[0]) in (list, tuple):
        return f"{_values(get_args(kinds[0])[0])}, repeatable"
    return {"str": "text", "int": "whole number", "float": "number", "Path": "path", "bool": ""}[
        kinds[0].__name__
    ]


def pages() -> dict[Path, str]:
    """Return every generated file with its content."""
    made = {ROOT / "docs" / "cli.md": command_line_page()}
    for name, model in FORMATS.items():
        schema = json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
        made[ROOT / "docs" / "schemas" / f"{name}.json"] = schema
    return made


def problems() -> list[str]:
    """Return what is out of date, one line each."""
    found = [
        f"{path.relative_to(ROOT)} is out of date; run scripts/lint"
        for path, text in pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if version is None or version.group(1) not in released[:1]:
        stated = version.group(1) if version else "missing"
        found.append(f"version {stated} in pyproject.toml is not the newest of CHANGELOG.md, {released[:1]}")
    return found


def main(task: str) -> int:
    """Write or check; returns the exit code."""
    if task == "write":
        for path, text in pages().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    found = problems()
    print("\n".join(found) if found else "generated pages and version: up to date")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
