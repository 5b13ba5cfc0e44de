"""Marks tests by their folder and gives every engine started by a test a safe environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
MARKED_FOLDERS = ("unit", "e2e", "v2")

# Before any test imports vLLM, and inherited by every process that a test starts. The reasons are in
# scripts/setup_env.sh, which sets the same for the scripts; these make plain `pytest` do as well.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

# Workers that run side by side (scripts/test.sh) have their targets on different cores.
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker:
    _cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(_cores[int(_worker.removeprefix("gw")) % len(_cores)])

# A Hub cache of the tests' own (tests/support/hub.py): Hugging Face's packages read its place when they are
# imported.
_hub_home = tempfile.TemporaryDirectory(prefix="vllm-ssd-tests-hub-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _hub_home.name
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)

# On a busy machine an example may take any time; and CI tries the same examples every time, so that it is red
# only for what a change did. Runs by hand continue looking for new ones.
settings.register_profile(
    "ssd", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("ssd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {item.path.relative_to(TESTS).parts[0] for item in items}
    if "v2" in folders and len(folders) > 1:
        raise pytest.UsageError("tests/v2 sets up Triton's interpreter and needs a run of its own")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
