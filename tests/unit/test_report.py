"""The whole report: what it holds, what it refuses, what hostile text cannot do, and that it never varies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.html_page import parsed
from tests.unit.synthetic_audit import synthetic_audit
from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.report import render, write_report

EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>\"'"


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    return synthetic_audit(3, ("standard", "dedup", "cap:8", "sinks")).model_dump(mode="json")


def run_folder(path: Path, audit: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    return path


def test_page_nests_ids_are_unique_and_nothing_is_fetched(tmp_path: Path, audit: dict[str, Any]) -> None:
    page = parsed(render([run_folder(tmp_path, audit)]))
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert page.handlers == []
    assert {"h1", "h2", "main", "svg", "title", "desc", "table"} <= set(page.tags)


def test_verdict_comes_first_and_every_section_is_there(tmp_path: Path, audit: dict[str, Any]) -> None:
    html = render([run_folder(tmp_path, audit)])
    places = [html.index(f'id="r1-{name}"') for name in _SECTIONS]
    assert places == sorted(places)
    assert html.index(audit["verdict"]) < places[0]
    assert '<p class="big">60%' in html


_SECTIONS = ("done", "frontier", "curves", "loss", "verbatim", "docs", "texts", "all", "limits")


def test_equal_input_gives_equal_bytes_in_another_process(tmp_path: Path, audit: dict[str, Any]) -> None:
    folder = run_folder(tmp_path, audit)
    code = (
        f"import sys; from unmemorize.report import render; html = render([{str(folder)!r}]);"
        "sys.stdout.buffer.write(html.encode())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == render([folder]).encode()


def test_report_never_imports_torch(tmp_path: Path, audit: dict[str, Any]) -> None:
    folder = run_folder(tmp_path, audit)
    code = (
        f"import sys; from unmemorize.report import write_report; write_report([{str(folder)!r}]);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_hostile_text_stays_text(tmp_path: Path, audit: dict[str, Any]) -> None:
    hostile = json.loads(json.dumps(audit))
    hostile["title"] = hostile["verdict"] = hostile["limits"][0] = EVIL
    hostile["settings"][EVIL] = EVIL
    hostile["environment"]["machine"] = "{{ 7 * 7 }}"
    for method in hostile["methods"]:
        method["label"] = EVIL
        for seed in method["seeds"]:
            seed["documents"][0]["example"] = seed["documents"][0]["source"] = EVIL
            for one in seed["continuations"][:1]:
                one["example"] = one["prefix"][0] = one["truth"][0] = EVIL
                one["generated"] = {state: [EVIL, "\x00", "w" * 9000] for state in one["generated"]}
    html = render([run_folder(tmp_path, hostile)])
    page = parsed(html)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags and page.handlers == []
    assert "{{ 7 * 7 }}" in html and "w" * 300 not in html.split('type="application/json"')[0]


def test_line_breaks_of_a_continuation_run_on_and_stay_in_its_text(
    tmp_path: Path, audit: dict[str, Any]
) -> None:
    said = ["\n", "\n\n", "\n" * 40, " <end>", "\r\n", " " * 30, "\n"]
    broken = json.loads(json.dumps(audit))
    one = next(seed for seed in broken["methods"][-1]["seeds"] if seed["continuations"])["continuations"][0]
    one["generated"] = {"off": said}
    html = render([run_folder(tmp_path, broken)])
    [passage] = [part for part in re.findall(r'<p class="text">(.*?)</p>', html, re.DOTALL) if "end" in part]
    page = parsed(passage)
    assert "".join(page.text) == "".join(said).replace("\r\n", "\n")
    signs = r'<i class="nl"(?: data-n="([^"]*)")?><span>(\n+)</span></i>'
    assert [(number, len(breaks)) for number, breaks in re.findall(signs, passage)] == [
        *[("", 1)] * 3,
        ("&times;40", 40),
        *[("", 1)] * 2,
    ]
    assert "\n" not in re.sub(signs, "", passage)
    assert f'<i class="run" data-n="&times;30"><span>{" " * 30}</span></i>' in passage
    style = html.split("<style>")[1].split("</style>")[0]
    assert '.nl::before { content: "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" attr(data-n);' in style
    assert re.search(
        r"\.nl span, \.run span {[^}]*height: 1em; overflow: hidden;[^}]*white-space: pre;", style
    )


def test_policy_names_the_only_script_that_may_run(tmp_path: Path, audit: dict[str, Any]) -> None:
    import base64
    import hashlib

    html = render([run_folder(tmp_path, audit)])
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_embedded_audit_is_the_audit(tmp_path: Path, audit: dict[str, Any]) -> None:
    html = render([run_folder(tmp_path, audit)])
    found = re.search(r'<script type="application/json" id="r1-data">(.*?)</script>', html, re.DOTALL)
    assert found and json.loads(found[1]) == json.loads(json.dumps(audit))


def test_lone_surrogates_and_huge_names_do_not_break_the_file(tmp_path: Path, audit: dict[str, Any]) -> None:
    odd = json.loads(json.dumps(audit))
    odd["settings"]["note"] = "\ud800"
    for method in odd["methods"]:
        for seed in method["seeds"]:
            seed["documents"][0]["example"] = "n" * 100_000
    path = write_report([run_folder(tmp_path, odd)])
    text = path.read_text(encoding="utf-8")
    assert "n" * 200 not in text.split('type="application/json"')[0]


def test_two_runs_get_a_combined_frontier_and_a_section_each(tmp_path: Path, audit: dict[str, Any]) -> None:
    folders = [run_folder(tmp_path / name, audit) for name in ("one", "two")]
    path = write_report(folders)
    page = parsed(path.read_text(encoding="utf-8"))
    assert path == folders[0] / "report.html" and not (folders[1] / "report.html").exists()
    assert {"combined", "r1", "r2", "all-frontier-0-t", "r2-frontier"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "2 runs compared" in page.text and "sinks B" in page.text


def test_refused_headline_says_why_and_prints_no_number(tmp_path: Path) -> None:
    two = synthetic_audit(2, ("standard", "dedup", "sinks")).model_dump(mode="json")
    html = render([run_folder(tmp_path, two)])
    figures = html[html.index('<div class="figures">') : html.index('id="r1-done"')]
    assert "no figure" in figures and "2 seeds; an interval over seeds needs 3" in figures
    assert '<p class="big">' not in figures


def test_one_seed_shows_its_figures_and_says_so(tmp_path: Path) -> None:
    one = synthetic_audit(1, ("standard", "dedup", "sinks")).model_dump(mode="json")
    html = render([run_folder(tmp_path, one)])
    assert '<p class="big">' in html and "one seed, so they say nothing about another training run" in html


def test_audit_with_nothing_but_headline_figures_is_drawn(tmp_path: Path, audit: dict[str, Any]) -> None:
    bare = json.loads(json.dumps(audit))
    for method in bare["methods"]:
        for seed in method["seeds"]:
            for name in ("states", "documents", "continuations", "curve"):
                seed[name] = []
    page = parsed(render([run_folder(tmp_path, bare)]))
    assert "r1-frontier" in page.ids and "r1-curves" not in page.ids and "r1-docs" not in page.ids


def test_audit_without_methods_is_drawn(tmp_path: Path, audit: dict[str, Any]) -> None:
    page = parsed(render([run_folder(tmp_path, {**audit, "methods": []})]))
    assert "r1-limits" in page.ids and "r1-frontier" not in page.ids


def test_config_is_shown_beside_the_audit(tmp_path: Path, audit: dict[str, Any]) -> None:
    folder = run_folder(tmp_path, audit)
    (folder / "config.json").write_text('{"batch": {"rows": 12345}}', encoding="utf-8")
    html = render([folder])
    assert "config.batch.rows" in html and "12,345" in html


def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path: Path, audit: dict[str, Any]) -> None:
    good = run_folder(tmp_path / "good", audit)
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = run_folder(tmp_path / "torn", audit)
    whole = (torn / "audit.json").read_bytes()
    (torn / "audit.json").write_bytes(whole[: len(whole) // 2])
    misfit = run_folder(tmp_path / "misfit", {**audit, "kind": "guess"})
    config = run_folder(tmp_path / "config", audit)
    (config / "config.json").write_text("[1", encoding="utf-8")
    listed = run_folder(tmp_path / "listed", audit)
    (listed / "config.json").write_text("[1]", encoding="utf-8")
    cases: list[tuple[list[Path], type[Exception], str]] = [
        ([], ConfigError, "needs at least one run folder"),
        ([good, tmp_path / "nowhere"], RunFolderError, "nowhere does not exist"),
        ([good, empty], RunFolderError, "empty holds no audit.json"),
        ([good, torn], FileFormatError, "not complete JSON"),
        ([good, misfit], FileFormatError, "does not fit the audit format at kind"),
        ([good, config], FileFormatError, "config.json is not complete JSON"),
        ([good, listed], FileFormatError, "config.json holds list, expected a JSON object"),
    ]
    for folders, kind, words in cases:
        with pytest.raises(kind, match=re.escape(words)) as caught:
            write_report(folders, tmp_path / "out.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.html").exists() and not (good / "report.html").exists()


def test_unwritable_destination_is_a_run_folder_error(tmp_path: Path, audit: dict[str, Any]) -> None:
    folder = run_folder(tmp_path / "run", audit)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_report([folder], tmp_path / "file" / "report.html")
