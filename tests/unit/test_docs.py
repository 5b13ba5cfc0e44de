"""The documents: links and paths lead somewhere, names are the code's, and a newcomer can read them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# The others of that folder are tables that scripts write.
WRITTEN = [path for path in DOCS if path.parent.name != "ablations" or path.name == "README.md"]
MOST_WORDS = 1200
MOST_COLUMNS = 119

LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.-]*(?:/[\w.-]+)*\.(?:py|sh|md|png|json|lock|toml|safetensors)")
NAMED = re.compile(rf"({FILE.pattern}):([A-Za-z_][\w.]*)")
# Ours alone; the field says distribution, predict, receive, patch, continue. A power law is one.
PRIVATE_WORDS = re.compile(
    r"(?<!power )\blaws?\b|\bfore(?:see|saw|tell|told)\w*|\b(?:take|takes|took|taken) in\b|\bgo(?:es)? on\b"
    r"|\bmend\w*",
    re.IGNORECASE,
)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside code blocks."""
    is_code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, line


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = [line.lstrip("# ") for _, line in prose(path) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def files() -> list[str]:
    """All files of the repository that a document may name, from its root."""
    found = [
        path
        for top in ("vllm_ssd", "kernels", "scripts", "tests", "docs", "requirements", ".ci")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return [ids(path) for path in [*found, *ROOT.glob("*.*")]]


def find(name: str) -> list[str]:
    """The files that a name may mean: its end, in whole parts, or all of it."""
    return [path for path in files() if f"/{path}".endswith(f"/{name}")]


@cache
def definitions(path: str) -> set[str]:
    """Constants, functions, classes and their methods, as in "Class.method"."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall("\n".join(line for _, line in prose(path))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        assert not anchor or anchor in headings(other), target


@pytest.mark.parametrize("path", WRITTEN, ids=ids)
def test_files_and_functions_are_there(path: Path) -> None:
    for number, line in prose(path):
        for code in CODE.findall(line):
            where = f"{ids(path)}:{number}: {code}"
            if named := NAMED.fullmatch(code):
                assert any(named[2] in definitions(file) for file in find(named[1])), where
            elif FILE.fullmatch(code) and not code.startswith((".demo/", "/")):
                assert find(code), where
            elif re.fullmatch(r"[\w.]+(?:/[\w.]+)*/", code) and not code.startswith("."):
                assert any(f"/{file}".find(f"/{code}") >= 0 for file in files()), where


@pytest.mark.parametrize("path", WRITTEN, ids=ids)
def test_lines_are_short_and_words_are_the_fields(path: Path) -> None:
    for number, line in prose(path):
        if not line.startswith("|"):
            assert len(line) <= MOST_COLUMNS, f"{ids(path)}:{number}"
        private = PRIVATE_WORDS.search(CODE.sub("", line))
        assert not private, f"{ids(path)}:{number}: {private}"


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_the_docs_have_every_metric() -> None:
    named = re.findall(r'"(vllm:ssd_\w+)"', (ROOT / "vllm_ssd" / "metrics.py").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(vllm:ssd_\w+)` \| \S", text, flags=re.MULTILINE)
    assert named
    assert sorted(told) == sorted(named)
