"""Memory without a name: seen by those who are handed it, and gone with the last of them."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from vllm_ssd.link import memory as memory_module
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.memory import SharedMemory
from vllm_ssd.link.outcome_cache import OutcomeCache

WRITE = """
import sys
import numpy as np
from vllm_ssd.link.memory import SharedMemory
SharedMemory(800, int(sys.argv[1])).array(np.int64, (100,))[7] = 5
"""


def test_another_process_writes_and_this_one_reads() -> None:
    memory = SharedMemory(800)
    values = memory.array(np.int64, (10, 10))
    assert not values.any()
    subprocess.run(
        [sys.executable, "-c", WRITE, str(memory.descriptor)],
        check=True,
        timeout=60,
        pass_fds=[memory.descriptor],
    )
    assert values[0, 7] == 5
    assert values.sum() == 5


def test_it_lies_in_no_file_system() -> None:
    memory = SharedMemory(800)
    assert os.fstat(memory.descriptor).st_nlink == 0
    assert not os.get_inheritable(memory.descriptor)


def test_arrays_keep_it_and_the_descriptor_is_closed() -> None:
    memory = SharedMemory(800)
    descriptor = memory.descriptor
    values = memory.array(np.float32, (10,), offset=400)
    del memory
    gc.collect()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)
    values[:] = 3
    assert values.sum() == 30


def test_less_than_what_is_to_be_mapped() -> None:
    """Reading beyond the end would kill the process."""
    memory = SharedMemory(800)
    with pytest.raises(ValueError, match="size"):
        SharedMemory(1 << 20, os.dup(memory.descriptor))


def test_no_room_is_told_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=r"no memory for 8 MiB .*No space left.*max_num_seqs.*branch_budget"):
        OutcomeCache(1024, 64, 11, 1000)
    with pytest.raises(OSError, match=r"no memory for 8 MiB .*max_num_seqs.*ssd_verify='coupled'"):
        DraftProbs(16, 4, 32768)


def test_no_descriptors_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a wrong descriptor, which would be somebody else's or crash."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            memory_module.anonymous_file()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
