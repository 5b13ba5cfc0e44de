"""The commands of the README, as they are run by tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def commands(language: str, target: str, draft: str) -> list[str]:
    """The code blocks in a language ("" for commands) of the section "Use", with these models."""
    section = README.read_text(encoding="utf-8").split("\n## Use\n")[1].split("\n### ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return [
        block.replace("TARGET", target).replace("DRAFT", draft) for name, block in blocks if name == language
    ]


def serve_words(target: str, draft: str) -> list[str]:
    """What follows `vllm serve`, as a shell splits it."""
    (line,) = [block for block in commands("", target, draft) if "--speculative-config" in block]
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    return words[2:]


def snippet(target: str, draft: str) -> str:
    """The Python file."""
    (source,) = commands("python", target, draft)
    return source
