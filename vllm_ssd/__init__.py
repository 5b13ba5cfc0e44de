"""Speculative Speculative Decoding (SSD, arXiv 2603.03251) as a vLLM plugin."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Make the method "ssd" known to vLLM; the `vllm.general_plugins` entry point.

    vLLM calls it in every process that it starts, more than once and before anything else, so it is
    idempotent and cheap. On a version of vLLM that is not supported nothing changes, except that asking for
    method "ssd" gets one clear error.
    """
    import os

    from vllm_ssd import compat, repairs

    if not compat.is_supported_version():
        compat.refuse_method_ssd()
        return
    try:
        compat.allow_async_scheduling()
        if os.environ.get(repairs.PATCH_ALL) == "1":
            repairs.patch_all_engines()
        compat.add_metrics()
        compat.add_method_ssd()
    except (AttributeError, ImportError) as error:  # vLLM lets it end every engine, also those without SSD
        compat.refuse_method_ssd(f", which lacks something: {error}")
