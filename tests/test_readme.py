"""What the README says can be run: its Python, in order, and its make targets."""

import dataclasses
import importlib
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxeff import parallelism
from jaxeff.training.cli import option_name

# Of this module, what takes longer than 5 s.
SLOW = {
    "test_the_python_of_a_page_runs_in_order[README.md]",
    "test_the_python_of_a_page_runs_in_order[docs/parallelism.md]",
}

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str, page: str = "README.md") -> list[tuple[int, str]]:
    """Line number and text of each fenced block of that language."""
    text = (ROOT / page).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


@pytest.mark.parametrize("page", ["README.md", "docs/parallelism.md"])
def test_the_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python", page)
    assert snippets, f"{page} shows no Python"
    namespace = {"__name__": "page"}
    for line, snippet in snippets:
        # Blank lines in front make a traceback name the page's own line.
        exec(compile("\n" * line + snippet, ROOT / page, "exec"), namespace)


def test_the_schedules_of_the_page_are_those_that_are_printed():
    shown = [text for _, text in blocks("text", "docs/parallelism.md")]
    made = [parallelism.one_f_one_b(4, 6), parallelism.zero_bubble(4, 6)]
    assert shown[-2:] == [f"{schedule}\n" for schedule in made]


def test_the_thresholds_of_the_page_are_those_that_are_printed(capsys):
    page = "docs/parallelism.md"
    (snippet,) = [text for _, text in blocks("python", page) if "links = {" in text]
    exec(snippet, {})
    assert capsys.readouterr().out in [text for _, text in blocks("text", page)]


def test_the_mesh_of_the_page_is_the_one_that_is_made():
    mesh = parallelism.make_mesh(pipe=2, data=2, tensor=2)
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2, 2)
    (drawn,) = [t for _, t in blocks("text", "docs/parallelism.md") if "pipe 0" in t]
    rows = [
        re.findall(r"(?<= )\d(?= )", x.split("data")[1][3:] + " ")
        for x in drawn.splitlines()
        if x.startswith("  data")
    ]
    assert rows == [[str(i) for i in ids[:, n].ravel()] for n in range(2)]


def test_every_make_command_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"`([^`\n]+)`", text) + [
        text for _, text in blocks("(?:bash|sh|console)")
    ]
    asked = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(code)))
    rules = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert asked, "README.md names no make command"
    assert asked <= set(rules), f"no such make target: {sorted(asked - set(rules))}"


def test_every_file_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#:\s]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README.md links to {missing}"


def test_every_extra_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    named = {e for m in re.findall(r"'\.\[([\w,]+)\]'", text) for e in m.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "export" in named and named <= set(project["optional-dependencies"])


def test_every_option_of_a_script_in_the_readme_exists():
    lines = "\n".join(text for _, text in blocks("sh")).splitlines()
    calls = [re.match(r".*scripts/(\w+)\.py(.*)", line) for line in lines]
    assert any(calls), "README.md shows no script"
    for call in filter(None, calls):
        config = importlib.import_module(f"scripts.{call[1]}").Config
        known = {option_name(f.name) for f in dataclasses.fields(config)} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", call[2])) <= known, call[0]
