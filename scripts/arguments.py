"""Types of command-line arguments, for argparse."""

from __future__ import annotations

import argparse
import json
from typing import Any


def parse_number(text: str) -> int:
    """A positive whole number."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def parse_numbers(text: str) -> list[int]:
    """ "1,4,8" -> [1, 4, 8]."""
    return [parse_number(part) for part in text.split(",")]


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
