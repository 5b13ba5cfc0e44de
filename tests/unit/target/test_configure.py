"""What crosses from the user to the draft process: plain values, with which the draft finds its files."""

from __future__ import annotations

import enum
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hub
import msgspec
import numpy as np
import pytest
import torch
from configs import Pair, assert_one_line, create, refusal

import vllm_ssd
from vllm_ssd.link.messages import Configure

NAMES = {"target": "me/target", "draft": "me/draft"}
HubPair = tuple[str, str]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    vllm_ssd.register()


@pytest.fixture(scope="module")
def commits(pair: Pair) -> dict[str, str]:
    """The commit of each model of the pair, in the tests' Hub cache as `NAMES`; branches are main and v1."""
    models = {"target": pair[0], "draft": pair[1]}
    return {
        which: hub.publish(model, NAMES[which], branches=("main", "v1")) for which, model in models.items()
    }


def sent(config: Any) -> Configure:
    """What the draft process reads of what the target's worker writes."""
    from vllm_ssd.target.worker import _configure

    line = msgspec.json.encode(_configure(config.speculative_config, config))
    return msgspec.json.decode(line, type=Configure)


def engine_config(configure: Configure) -> Any:
    """vLLM's config as the draft process makes it."""
    from vllm_ssd.draft.loading import engine_config

    return engine_config(configure)


def find_weights(config: Any) -> None:
    """Find the draft's files, as its loader does.

    Raises:
        RuntimeError: if they are not there.
        OSError: the same.
    """
    from vllm.model_executor.model_loader import get_model_loader

    get_model_loader(config.load_config).download_model(config.model_config)


def shrunk(config: Any) -> Any:
    config.intermediate_size = 96
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = config.rope_parameters | {"rope_theta": 5000.0}
    return config


# What a user can write: options of the engine, and of the speculative config.
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing more": ({}, {}),
    "a branch": ({"revision": "v1"}, {"revision": "v1"}),
    "a code revision": ({"code_revision": "main"}, {"code_revision": "v1"}),
    "a tokenizer": ({"tokenizer": "me/draft", "tokenizer_revision": "v1"}, {}),
    "no tokenizer": ({"skip_tokenizer_init": True}, {}),
    "overrides of the target": ({"hf_overrides": {"rope_theta": 5000.0}}, {}),
    "a type of torch": ({"dtype": torch.bfloat16}, {}),
    "a type of the draft": ({"dtype": "bfloat16"}, {"ssd_draft_dtype": torch.float32}),
    "numbers of numpy": ({"seed": np.int64(3)}, {"ssd_branch_budget": np.int64(6)}),
    "a folder of weights": ({"download_dir": "weights"}, {}),
    "another kv cache": ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "auto"}),
    "loader of the target": ({"load_format": "safetensors"}, {}),
    "loader of the draft": (
        {},
        {"draft_load_config": {"load_format": "safetensors", "use_tqdm_on_load": False}},
    ),
    "a backend": ({}, {"attention_backend": "CPU_ATTN", "moe_backend": "triton"}),
    "remote code": ({"trust_remote_code": True}, {"max_model_len": 128, "enforce_eager": False}),
}


@pytest.mark.parametrize("is_by_id", [True, False], ids=["Hub ids", "folders"])
@pytest.mark.parametrize(("engine", "speculative"), WRITTEN.values(), ids=WRITTEN.keys())
def test_the_draft_takes_what_a_user_writes(
    pair: Pair, commits: dict[str, str], engine: dict[str, Any], speculative: dict[str, Any], is_by_id: bool
) -> None:
    models: Any = tuple(NAMES.values()) if is_by_id else pair
    config = create(models, engine, **speculative)
    configure = sent(config)
    assert configure.model == str(models[1])
    assert configure.engine_args["revision"] == (
        commits["draft"] if is_by_id else speculative.get("revision")
    )
    taken = engine_config(configure)
    assert taken.model_config.model == str(models[1])
    assert taken.model_config.get_vocab_size() == 512
    assert taken.model_config.max_model_len == speculative.get("max_model_len", 256)
    draft = config.speculative_config.draft_model_config
    assert taken.model_config.hf_config.to_dict() == draft.hf_config.to_dict()
    if "download_dir" not in engine:
        find_weights(taken)


def test_a_commit(commits: dict[str, str]) -> None:
    configure = sent(create(tuple(NAMES.values()), revision=commits["draft"]))  # type: ignore[arg-type]
    assert configure.engine_args["revision"] == commits["draft"]
    find_weights(engine_config(configure))


def test_a_branch_that_moves_after_the_start(pair: Pair) -> None:
    """A draft that is started again is the same one."""
    hub.publish(pair[0], "me/moving")
    before = hub.publish(pair[1], "me/moving", branches=("main", "old"))
    configure = sent(create((pair[0], "me/moving")))  # type: ignore[arg-type]
    hub.publish(pair[0], "me/moving")
    assert configure.engine_args["revision"] == before
    assert engine_config(configure).model_config.hf_config.num_hidden_layers == 2


def test_weights_in_a_folder_of_their_own(pair: Pair, commits: dict[str, str], tmp_path: Path) -> None:
    """`download_dir` has the weights, as vLLM puts them, and the Hub cache the rest."""
    weights = ".safetensors"
    hub.publish(pair[1], "me/parted", is_part=lambda name: not name.endswith(weights))
    hub.publish(pair[1], "me/parted", cache=tmp_path, is_part=lambda name: name.endswith(weights))
    config = create((NAMES["target"], "me/parted"), {"download_dir": str(tmp_path)})  # type: ignore[arg-type]
    find_weights(engine_config(sent(config)))
    options = {"download_dir": str(tmp_path)}
    config = create((NAMES["target"], "me/parted"), draft_load_config=options)  # type: ignore[arg-type]
    find_weights(engine_config(sent(config)))


def test_overrides_that_are_a_function(pair: Pair, commits: dict[str, str]) -> None:
    """vLLM applies them to a draft_model as well."""
    config = create(tuple(NAMES.values()), {"hf_overrides": shrunk})  # type: ignore[arg-type]
    assert config.speculative_config.draft_model_config.hf_config.intermediate_size == 96
    configure = sent(config)
    assert set(configure.engine_args["hf_overrides"]) == {"intermediate_size", "rope_parameters"}
    taken = engine_config(configure).model_config.hf_config
    assert taken.intermediate_size == 96
    assert taken.rope_parameters["rope_theta"] == 5000.0


def test_a_quantized_draft(pair: Pair) -> None:
    configure = sent(create(pair, {"dtype": "bfloat16"}, quantization="fp8"))
    assert configure.engine_args["quantization"] == "fp8"
    assert engine_config(configure).model_config.quantization == "fp8"


def test_modelscope(pair: Pair, commits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package, which is not here, finds the files by id and revision, of which vLLM makes no commit."""
    folders = {NAMES["target"]: pair[0], NAMES["draft"]: pair[1]}

    class HubApi:
        def login(self, token: str | None) -> None: ...

        def get_model_files(self, model_id: str, **options: Any) -> list[dict[str, str]]:
            return [{"Path": file.name, "Type": "blob"} for file in folders[model_id].iterdir()]

    def snapshot_download(model_id: str, **options: Any) -> str:
        return str(folders[model_id])

    for name in ("", ".hub", ".hub.api", ".hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, f"modelscope{name}", ModuleType(f"modelscope{name}"))
    sys.modules["modelscope.hub.api"].HubApi = HubApi  # type: ignore[attr-defined]
    sys.modules["modelscope.hub.snapshot_download"].snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    configure = sent(create(tuple(NAMES.values()), revision="v1"))  # type: ignore[arg-type]
    assert (configure.model, configure.engine_args["revision"]) == (NAMES["draft"], "v1")
    assert engine_config(configure).model_config.model == NAMES["draft"]


@pytest.mark.parametrize(
    ("value", "as_sent"),
    [
        (None, None),
        (True, True),
        (np.bool_(True), True),
        (np.int32(3), 3),
        (np.float32(0.5), 0.5),
        (torch.bfloat16, "bfloat16"),
        (Path("/folder"), "/folder"),
        (("a", 1), ["a", 1]),
        ({"a": (1, None)}, {"a": [1, None]}),
    ],
    ids=repr,
)
def test_plain_values(value: Any, as_sent: Any) -> None:
    from vllm_ssd.target.draft_args import plain

    assert plain(value) == as_sent
    assert type(plain(value)) is type(as_sent)


def test_text_that_is_more_than_text() -> None:
    from vllm_ssd.target.draft_args import plain

    class Text(str):
        __slots__ = ()

    class Kind(str, enum.Enum):
        FAST = "fast"

    for value, text in ((Text("main"), "main"), (Kind.FAST, "fast")):
        assert plain({value: value}) == {text: text}
        assert type(plain(value)) is str
        ((key, _),) = plain({value: 1}).items()
        assert type(key) is str


@pytest.mark.parametrize(
    "value",
    [object(), {"a": [object()]}, {1: 2}, float, b"bytes"],
    ids=["an object", "an object within", "a key that is no text", "a class", "bytes"],
)
def test_what_cannot_be_sent_is_refused(value: Any) -> None:
    from vllm_ssd.target.draft_args import plain

    with pytest.raises(ValueError, match="draft process"):
        plain(value)


def test_a_loader_that_cannot_be_sent(pair: Pair) -> None:
    options = {"model_loader_extra_config": {"session": object()}}
    assert_one_line(refusal(pair, draft_load_config=options), "draft_load_config", "object")
    assert_one_line(
        refusal(pair, draft_load_config={"device": "cpu"}), "draft_load_config", "device", "remove"
    )


@pytest.mark.parametrize(
    ("engine", "speculative", "expected"),
    [
        ({"load_format": "safetensors", "download_dir": "/target"}, {}, ("auto", "/target", {})),
        ({"load_format": "dummy"}, {}, ("dummy", None, {})),
        ({"load_format": "dummy"}, {"load_format": "auto"}, ("auto", None, {})),
        (
            {"download_dir": "/target"},
            {"load_format": "PT", "download_dir": "/draft", "model_loader_extra_config": {"a": 1}},
            ("pt", "/draft", {"a": 1}),
        ),
    ],
)
def test_the_drafts_loader_is_its_own(
    pair: Pair, engine: dict[str, Any], speculative: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    from vllm.config import LoadConfig

    given: list[Any] = [speculative, LoadConfig(**speculative)] if speculative else [None]
    for draft_load_config in given:
        load = engine_config(sent(create(pair, engine, draft_load_config=draft_load_config))).load_config
        assert (load.load_format, load.download_dir, load.model_loader_extra_config) == expected


def test_a_draft_in_object_storage() -> None:
    """vLLM has fetched its config alone; its loader is then the target's."""
    from vllm.config import LoadConfig

    from vllm_ssd.target.draft_args import draft_load_config

    ssd: Any = SimpleNamespace(
        draft_load_config=None, draft_model_config=SimpleNamespace(model_weights="s3://drafts/one")
    )
    target = LoadConfig(load_format="runai_streamer", model_loader_extra_config={"concurrency": 4})
    load = draft_load_config(ssd, target)
    assert (load.load_format, load.model_loader_extra_config) == ("runai_streamer", {"concurrency": 4})


def test_random_weights_are_told(pair: Pair) -> None:
    warnings = warnings_of(lambda: sent(create(pair, {"load_format": "dummy"})))
    assert [text for text in warnings if "random weights" in text]
    assert not [text for text in warnings_of(lambda: sent(create(pair))) if "random weights" in text]


@pytest.mark.parametrize(("asked", "given"), [(None, "auto"), ("fp8", "fp8")])
def test_the_drafts_kv_cache_is_its_own(pair: Pair, asked: str | None, given: str) -> None:
    config = create(pair, {"kv_cache_dtype": "fp8_e5m2"}, kv_cache_dtype=asked)
    assert sent(config).engine_args["kv_cache_dtype"] == given


def test_the_drafts_backends_are_its_own(pair: Pair) -> None:
    arguments = sent(create(pair, {"attention_backend": "CPU_ATTN"})).engine_args
    assert (arguments["attention_backend"], arguments["moe_backend"]) == (None, "auto")
    arguments = sent(create(pair, attention_backend="cpu_attn", moe_backend="triton")).engine_args
    assert (arguments["attention_backend"], arguments["moe_backend"]) == ("CPU_ATTN", "triton")


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def warnings_of(do: Callable[[], Any]) -> list[str]:
    """SSD's warnings meanwhile."""
    logger, handler = logging.getLogger("vllm.ssd"), Warnings()
    logger.addHandler(handler)
    try:
        do()
    finally:
        logger.removeHandler(handler)
    return handler.texts


def renumbered(pair: Pair, folder: Path, swapped: int) -> Path:
    """The draft with another tokenizer: as many tokens, of which the last `swapped` have changed places."""
    shutil.copytree(pair[1], folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokens = tokens[: len(tokens) - swapped] + tokens[len(tokens) - swapped :][::-1]
    tokenizer["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_a_draft_with_other_tokens(pair: Pair, tmp_path: Path) -> None:
    other = renumbered(pair, tmp_path / "other", swapped=100)
    warnings = warnings_of(lambda: create(pair, model=str(other)))
    assert len([text for text in warnings if "100 of 512" in text and "tokenizer" in text]) == 1


def test_tokenizers_that_are_not_compared(pair: Pair, tmp_path: Path) -> None:
    other = renumbered(pair, tmp_path / "other", swapped=100)
    same = renumbered(pair, tmp_path / "same", swapped=0)
    bare = tmp_path / "bare"
    shutil.copytree(pair[1], bare, ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    (broken / "tokenizer.json").write_text("{", encoding="utf-8")
    cases = [
        (pair[1], {}),
        (same, {}),  # in another file
        (other, {"skip_tokenizer_init": True}),
        (bare, {}),
        (broken, {}),
    ]
    for draft, engine in cases:
        warnings = warnings_of(lambda: create(pair, engine, model=str(draft)))  # noqa: B023
        assert not [text for text in warnings if "tokenizer" in text], draft


def test_tokens_of_each_kind_of_tokenizer() -> None:
    from vllm_ssd.vocabularies import read_ids

    added = [{"id": 2, "content": "<s>"}]
    for vocab in ({"a": 0, "b": 1}, [["a", -1.5], ["b", -2.0]]):
        tokenizer = {"model": {"vocab": vocab}, "added_tokens": added}
        assert read_ids(json.dumps(tokenizer).encode()) == {"a": 0, "b": 1, "<s>": 2}
