"""The documentation keeps its promises: links and widths (docs/check.py), every option in the reference, the pages' commands."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from zotune import options as config
from zotune.cli.app import run

ROOT = Path(__file__).parents[1]
START = sorted((ROOT / "docs" / "start").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORTER = [  # the pages' runs, a few steps long
    (r"--steps \d+", "--steps 3"), (r"max_steps=\d+", "max_steps=3"), (r"--lrs \S+", "--lrs 1e-3"),
    (r"range\(300\)", "range(3)"), (r"forward_passes: \d+", "forward_passes: 16"), (r"seed: \[0, 1, 2\]", "seed: [0]"),
    (r"bench run smoke", "bench run smoke --set budget.forward_passes=8 --set seed=0 --set method=zo-sgd"),
]  # fmt: skip


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


check, hook = load(ROOT / "docs" / "check.py"), load(ROOT / "docs" / "reference" / "hook.py")


def test_links_lead_somewhere_and_lines_and_paragraphs_are_short():
    assert [f"{page.name}:{line}: {said}" for page in check.pages() for line, said in check.faults(page)] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a " * 101, "a paragraph of 101 words"),
        ("x" * 133, "133 characters"),
        ("```\n" + "x" * 133 + "\n```", "133 characters"),
        ("a\n\n    " + "x" * 129, "133 characters"),
        ("- " + "b " * 101, "a paragraph of 102 words"),
        ("[x](nowhere.md)", "nowhere.md: no such file"),
        ("# One\n\n[x](#two)", "no such heading"),
        ("| [x](nowhere.md) |", "nowhere.md: no such file"),
        ("![x](nowhere.png)", "nowhere.png: no such file"),
    ],
)
def test_what_does_not_hold_is_named(text, said, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert any(said in found for _, found in check.faults(page))


@pytest.mark.parametrize(
    "text",
    ["| " + "x" * 200 + " |", "```\n" + "x " * 60 + "\n" + "x " * 60 + "\n```", "# One two\n\n[x](#one-two)",
     "[x](https://example.org/a) `[x](nowhere.md)`"],
)  # fmt: skip
def test_tables_code_and_what_leads_elsewhere_may_be_as_they_are(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert not list(check.faults(page))


def test_a_directive_s_options_are_no_paragraph(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# T\n\n::: a.b\n    options: {members: [" + "x, " * 60 + "]}\n", encoding="utf-8")
    assert not check.fix(page)


def test_the_site_builds_strict(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (
        "index.html",
        "start/rows.html",
        "reference/command-line.html",
        "decisions/index.html",
        "benchmark/report.html",
    ):
        assert (tmp_path / "site" / page).is_file()
    text = (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
    assert ":::" not in text  # a directive that was read as text
    assert 'id="zotune.step.optimizer.ZeroOrderOptimizer.step"' in text


def test_a_rewrapped_page_has_the_same_words_in_short_paragraphs_and_is_left_alone_the_second_time(tmp_path):
    sentence = "One says `a b c` of 3.5 × the loss (see arXiv 2305.17333), and no more than that. "
    page = tmp_path / "page.md"
    page.write_text(
        f"# T\n\n{sentence * 12}\n\n- {sentence * 9}\n- short\n\n| a |\n|---|\n| {sentence * 3} |\n", encoding="utf-8"
    )
    before = page.read_text(encoding="utf-8")
    assert check.fix(page)
    after = page.read_text(encoding="utf-8")
    assert after.split() == before.split()
    assert not list(check.faults(page))
    assert not check.fix(page)
    assert "`a\n" not in after  # code stays on a line
    assert len(check.blocks(after)) > len(check.blocks(before))


@pytest.mark.parametrize("command", hook.COMMANDS)
def test_the_reference_has_every_option_of_every_command(command):
    page = hook.on_page_markdown((ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8"))
    section = page.split(f"\n## {command}\n")[1].split("\n## ")[0]
    kind = hook.COMMANDS[command]
    known = config.TrainConfig.model_fields if command in ("sweep", "compare") else {}
    for name, field in kind.model_fields.items():
        if name not in known:
            row = next(line for line in section.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}` |"))
            assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
            assert ("**required**" in row) == field.is_required()
    assert "<!--" not in page


def test_the_folder_s_page_has_every_key_of_a_result():
    source = (ROOT / "src" / "zotune" / "run" / "result.py").read_text(encoding="utf-8")
    keys = re.findall(r'^        "(\w+)": ', source.split("def result_of")[1].split("\ndef ")[0], re.MULTILINE)
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    assert len(keys) > 30
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_the_way_in_names_every_page_of_a_reader_and_each_is_one_screen():
    for index in (ROOT / "docs" / "index.md", ROOT / "README.md"):
        text = index.read_text(encoding="utf-8")
        assert [page.name for page in START if f"start/{page.name}" not in text] == []
    for page in START:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 95
        assert "result" in page.read_text(encoding="utf-8").lower()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("pages") / "model")


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem == "study" else ()) for p in START]
)
def test_a_page_s_files_and_commands_work_in_their_order(page, material, tmp_path, monkeypatch, capsys):
    """Its titled blocks are written, its commands and scripts run, on a tiny model; of the hub nothing is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = 0
    for language, title, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = body.replace(NAME, str(material))
        for long, short in SHORTER:
            text = re.sub(long, short, text)
        if title:
            path = tmp_path / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if not words or words[0] != "zotune" or "sst2" in words:  # whose rows are the hub's
                    continue
                assert run(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
                ran += 1
        elif language == "python" and title and "import" in text and "def main" not in text and "Method" not in text:
            runpy.run_path(title, run_name="__main__")  # as a process of its own does, less ten seconds of imports
            ran += 1
    assert ran
    for name in ("median", "scoring"):
        sys.modules.pop(name, None)
