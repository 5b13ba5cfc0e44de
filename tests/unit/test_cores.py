"""Which cores the draft and the target's ranks get."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest
from configs import Pair, assert_one_line, create, refusal

import vllm_ssd

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    vllm_ssd.register()


def test_a_tensor_parallel_target(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has physical cores of its own; and an earlier engine's binding is not the user's."""
    on_cores(monkeypatch, {core: core % 4 for core in range(8)})
    for _ in range(2):
        config = create(pair, TWO_RANKS)
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "4|6"
        assert config.speculative_config.placement.cores == (7,)
        assert config.speculative_config.draft_parallel_config.tensor_parallel_size == 1


@pytest.mark.parametrize(
    ("num_ranks", "reserved", "shares"),
    [
        (1, None, [[8, 9]]),
        (1, 2, [[8]]),
        (1, 0, [[8, 9, 10]]),
        (1, 6, [[8, 9, 10]]),  # more than there are
        (2, None, [[8, 9], [12, 13, 14]]),
        (2, 4, [[8], [12, 13]]),
    ],
)
def test_targets_are_placed_as_vllm_does(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, reserved: int | None, shares: list[list[int]]
) -> None:
    """A NUMA node, one thread of each physical core, and a core for the engine's other processes."""
    from vllm.utils.cpu_resource_utils import LogicalCPUInfo

    from vllm_ssd import cores

    cpus = [LogicalCPUInfo(id=i, physical_core=i % 8, numa_node=i % 8 // 4) for i in range(16)]
    monkeypatch.setattr(cores, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(cores, "get_visible_memory_node", lambda: sorted({cpu.numa_node for cpu in cpus}))
    monkeypatch.setattr(cores.envs, "VLLM_CPU_NUM_OF_RESERVED_CPU", reserved, raising=False)
    # The draft's core 3 is one physical core with 11, of the first node.
    assert cores._shares_of_ranks({3}, num_ranks) == shares
    monkeypatch.setattr(cores, "get_visible_memory_node", lambda: [1])  # as numactl may say
    if num_ranks == 1 and reserved is None:
        assert cores._shares_of_ranks({3}, 1) == [[12, 13, 14]]


def test_an_engine_without_ssd_is_not_bound_as_one_with_it_was(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    on_cores(monkeypatch, {core: core for core in range(4)})
    create(pair)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    EngineArgs(model=str(pair[0]), max_model_len=256).create_engine_config()
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto"


def test_a_tensor_parallel_target_with_too_few_cores(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cores(monkeypatch, {0: 0, 1: 1})
    assert_one_line(refusal(pair, TWO_RANKS), "2 ranks", "VLLM_CPU_OMP_THREADS_BIND")


@pytest.mark.parametrize(
    ("text", "cores"), [("1", [1]), ("0,4-6", [0, 4, 5, 6]), ("8-11,15", [8, 9, 10, 11, 15]), ("3-3", [3])]
)
def test_lists_of_cores(text: str, cores: list[int]) -> None:
    from vllm_ssd.cores import parse_cores

    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "1,", "1-", "-1", "1..3", "1-2-3", "0,3-2"])
def test_malformed_lists_of_cores(text: str) -> None:
    from vllm_ssd.cores import parse_cores

    with pytest.raises(ValueError, match="ssd_draft_cores"):
        parse_cores(text)


def on_cores(monkeypatch: pytest.MonkeyPatch, physical: dict[int, int], others: Collection[int] = ()) -> None:
    """A machine of these logical cores, each of a physical one, bound to nothing.

    Args:
        others: cores of other engines.
    """
    from vllm.utils.cpu_resource_utils import LogicalCPUInfo

    from vllm_ssd import cores

    cpus = [LogicalCPUInfo(id=core, physical_core=place, numa_node=0) for core, place in physical.items()]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(physical))
    monkeypatch.setattr(cores, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(cores, "get_visible_memory_node", lambda: sorted({cpu.numa_node for cpu in cpus}))
    monkeypatch.setattr(cores, "cores_of_others", lambda own: set(others))
    monkeypatch.setattr(cores, "_bound", None)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")


class TestCores:
    """Who gets which core, on a machine of four."""

    @pytest.fixture(autouse=True)
    def four_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_cores(monkeypatch, {core: core for core in range(4)})

    @staticmethod
    def chosen(cores: str | None = None) -> list[int]:
        from vllm_ssd.cores import choose_draft_cores

        return choose_draft_cores(cores, "cpu", Path())

    def test_the_draft_takes_the_last_core(self) -> None:
        assert self.chosen() == [3]

    def test_the_draft_takes_the_last_core_that_the_target_leaves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "2-3")
        assert self.chosen() == [1]
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
        assert self.chosen() == [3]  # none left: they share

    def test_the_target_is_bound_to_the_rest(self) -> None:
        from vllm_ssd.cores import _leave_cores_to_draft

        _leave_cores_to_draft({3}, 1, set())
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"  # less one for vLLM's other processes

    def test_a_target_bound_by_the_user_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_ssd.cores import _leave_cores_to_draft

        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-2")
        _leave_cores_to_draft({1, 3}, 1, set())
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-2"

    @pytest.mark.parametrize(
        ("binding", "shared"), [("0-2", None), ("0-3", "3"), ("0,1|2,3", "3"), ("nobind", "3")]
    )
    def test_shared_cores_are_told(
        self, monkeypatch: pytest.MonkeyPatch, binding: str, shared: str | None
    ) -> None:
        from vllm_ssd import cores

        said: list[str] = []
        monkeypatch.setattr(cores.logger, "warning", lambda text, *args: said.append(text % args))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
        cores._warn_of_shared_cores({3}, set())
        assert [f"share core {shared}," in text for text in said] == [True] * (shared is not None)


def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of from now on."""
    from vllm_ssd import cores

    said: list[str] = []
    monkeypatch.setattr(cores.logger, "warning", lambda text, *args: said.append(text % args))
    return said


@pytest.mark.parametrize(
    ("num_cores", "others", "draft", "target"),
    [
        (8, [0, 7], 6, "1,2,3,4"),  # less the draft's, the others' and one for vLLM's other processes
        (4, [3], 2, "0"),
        (4, [2, 3], 1, "0"),
    ],
)
def test_a_second_engine_takes_what_the_first_has_left(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, num_cores: int, others: list[int], draft: int, target: str
) -> None:
    on_cores(monkeypatch, {core: core for core in range(num_cores)}, others)
    said = warnings_of(monkeypatch)
    assert create(pair).speculative_config.placement.cores == (draft,)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == target
    assert not [text for text in said if "core" in text]


@pytest.mark.parametrize(
    ("binding", "draft", "bound", "shared"),
    [
        ("auto", None, "0,1", "0,1,3"),  # as if there were no other engine
        ("0", None, "0", "0,3"),
        ("0", "1", "0", "0,1"),
    ],
)
def test_engines_that_have_to_share_are_told(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, binding: str, draft: str | None, bound: str, shared: str
) -> None:
    on_cores(monkeypatch, {core: core for core in range(4)}, others=range(4))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    said = warnings_of(monkeypatch)
    config = create(pair, ssd_draft_cores=draft).speculative_config
    assert config.placement.cores == (int(draft or 3),)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == bound
    (line,) = [text for text in said if "another engine" in text]
    assert f"core {shared} " in line
    assert "ssd_draft_cores" in line
    assert "VLLM_CPU_OMP_THREADS_BIND" in line


def test_engines_tell_one_another_their_cores(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own is none of the others'."""
    from vllm_ssd import cores
    from vllm_ssd.link.announcement import Announcement

    stock = cores.cores_of_others
    on_cores(monkeypatch, {core: core for core in range(4)})
    first = create(pair).speculative_config.placement
    assert first.engine_cores == {0, 1, 3}
    before = stock(first.engine_id)  # of engines that run beside this test
    announcement = Announcement(first.engine_id, first.engine_cores, [])
    try:
        assert stock(first.engine_id) == before
        assert stock("another") == before | {0, 1, 3}
    finally:
        announcement.close()
