"""What the README says can be run: its Python, in order, and its make targets."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of that language."""
    text = (ROOT / "README.md").read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


def test_the_python_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert snippets, "README.md shows no Python"
    namespace = {"__name__": "readme"}
    for line, snippet in snippets:
        # Blank lines in front make a traceback name the README's own line.
        exec(compile("\n" * line + snippet, ROOT / "README.md", "exec"), namespace)


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
