"""Code in a process where nothing of vLLM is patched yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ASK_FOR_SSD = """
args = EngineArgs(model=target, max_model_len=128,
                  speculative_config={"method": "ssd", "model": draft, "num_speculative_tokens": 2})
try:
    args.create_engine_config()
except ValueError as error:
    print("REFUSED:", error)
"""

# Imports vLLM, which takes seconds, and forks for each piece of code, so that each has vLLM as it comes.
SERVER = """
import json, os, sys, traceback
import vllm.engine.arg_utils, vllm.triton_utils.dispatcher, vllm.v1.metrics.loggers
import vllm.v1.sample.rejection_sampler
assert "vllm_ssd" not in sys.modules
for line in sys.stdin:
    code, arguments, environment, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["-c", *arguments]
        exit_code = 1
        try:
            exec(compile(code, "code", "exec"), {"__name__": "__main__"})
            exit_code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    print("ENDED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_without_plugins(code: str, pair: tuple[Path, Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process where nothing is patched yet; VLLM_PLUGINS keeps vLLM from loading us itself.

    The code leaves `EngineArgs`, `target` and `draft` to what asks for method "ssd" after it.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    asked = [code + ASK_FOR_SSD, [*map(str, pair)], {**os.environ, "VLLM_PLUGINS": "none"}, str(folder)]
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    exit_code = next(int(line.split()[1]) for line in server.stdout if line.startswith("ENDED "))
    stdout, stderr = ((folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert exit_code == 0, stderr
    return subprocess.CompletedProcess([], exit_code, stdout, stderr)


@cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, whose end of its standard input closes then."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": "none"},
    )
