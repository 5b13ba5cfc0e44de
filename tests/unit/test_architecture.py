"""The house rules that a machine can check: who imports whom, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 400

# What each part may import beside itself and the standard library: a folder, or a file where it differs.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"compat", "repairs"},
    "config": {"compat", "cores", "link", "placement", "target", "vocabularies", "pydantic", "torch", "vllm"},
    "placement": {"cores", "link", "vllm"},
    "cores": {"link", "numpy", "vllm"},
    "vocabularies": {"vllm"},
    "compat": {"config", "metrics", "repairs", "torch", "vllm"},
    "repairs": {"target", "torch", "vllm"},
    "metrics": {"link", "prometheus_client", "vllm"},
    "failures": set(),
    "target": {"compat", "config", "failures", "kernels", "link", "placement", "plan", "repairs", "verify"}
    | {"msgspec", "numpy", "psutil", "torch", "vllm"},
    "draft": {"failures", "link", "plan", "verify", "numpy"},
    "draft/__main__": {"__init__", "kernels", "link", "plan", "msgspec"},
    "draft/engine": {"compat", "kernels", "link", "numpy", "torch", "vllm"},
    "draft/loading": {"compat", "link", "torch", "vllm"},
    "draft/inputs": {"numpy", "torch", "vllm"},
    "draft/sampling": {"kernels", "verify", "numpy", "torch", "vllm"},
    "draft/graphs": {"link", "numpy", "torch"},
    "link": {"verify", "msgspec", "numpy", "torch"},
    "link/outcome_cache_gpu": {"kernels", "numpy", "torch", "vllm"},
    "verify": {"numpy", "torch"},
    "verify/murmur": {"numba", "numpy"},
    "plan": {"numpy"},
    "kernels": {"link", "torch", "triton"},
}


def name_of(path: Path) -> str:
    """Of a file of the package, from its root: "draft/server"; the root itself is "__init__"."""
    place = path.relative_to(ROOT)
    inside = place if place.parts[0] == "kernels" else place.relative_to("vllm_ssd")
    name = inside.with_suffix("").as_posix()
    return name.removesuffix("/__init__")


FILES = {
    name_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("vllm_ssd", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a tree names in imports, each with its package's name in front."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (ast.literal_eval(part) for part in node.args if isinstance(part, ast.Constant))


def own_file(module: str) -> str | None:
    """Which of our files it is, or is a name of; None where it is none of ours."""
    first, *parts = module.split(".")
    if first != "vllm_ssd":
        return None
    while parts and "/".join(parts) not in FILES:
        parts.pop()
    return "/".join(parts) or "__init__"


def part_of(module: str) -> str:
    """The part of ours that it lies in, or the name of another's package."""
    own = own_file(module)
    return module.split(".")[0] if own is None else own.split("/")[0]


def test_who_imports_whom() -> None:
    found = []
    for name, tree in FILES.items():
        part = name.split("/")[0]
        allowed = ALLOWED[name if name in ALLOWED else part] | {part} | sys.stdlib_module_names
        found += [f"{name}: {module}" for module in imports(tree) if part_of(module) not in allowed]
    assert not found


def test_every_row_of_the_table_is_of_something() -> None:
    assert ALLOWED.keys() <= {part for name in FILES for part in (name, name.split("/")[0])}


def loaded_with(part: str) -> set[str]:
    """The files that are loaded with those of a part, whatever is called."""
    loaded: set[str] = set()
    waiting = [name for name in FILES if name.split("/")[0] == part]
    while waiting:
        name = waiting.pop()
        if name in loaded:
            continue
        loaded.add(name)
        at_once = [node for node in FILES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
        waiting += [own for node in at_once for module in imports(node) if (own := own_file(module))]
    return loaded


def test_neither_half_is_loaded_with_the_other() -> None:
    """Nor by way of what they share."""
    assert not [name for name in loaded_with("draft") if name.split("/")[0] == "target"]
    assert not [name for name in loaded_with("target") if name.split("/")[0] == "draft"]


def test_no_file_is_two_ideas() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("vllm_ssd", "kernels", "scripts", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > MOST_LINES} == set()
