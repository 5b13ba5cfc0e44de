"""Whether the draft was trained on the tokens of its target."""

from __future__ import annotations

import json

from vllm import envs
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

FILE = "tokenizer.json"  # to load the tokenizer takes seconds; to read its tokens does not

logger = init_logger("vllm.ssd")


def check_tokens(target: ModelConfig, draft: ModelConfig) -> None:
    """Warn if the draft's tokenizer gives other ids: what it drafts is then rejected.

    Nothing is said where there is nothing to compare, as with a draft without a tokenizer, for it needs none.
    But models with different numbers of tokens must have a tokenizer in common: then only padding differs.

    Raises:
        ValueError: if the numbers differ, and the tokenizers too or nobody knows.
    """
    sizes = target.get_vocab_size(), draft.get_vocab_size()
    is_same_size = sizes[0] == sizes[1]
    if is_same_size and target.skip_tokenizer_init:
        return
    try:
        difference = _difference(target, draft)
    except Exception as error:  # whatever a file may have in it, the engine starts
        logger.debug("The tokenizers of target and draft cannot be compared: %s", error)
        difference = None if is_same_size else f"their {FILE} cannot be compared"
    if difference is None:
        return
    if not is_same_size:
        raise ValueError(
            f"target and draft need the same vocabulary, these have {sizes[0]} and {sizes[1]} tokens, and "
            f"{difference}; choose a draft of the target's family"
        )
    logger.warning(
        "%s: drafts are rejected where they occur; choose a draft of the target's family", difference
    )


def _difference(target: ModelConfig, draft: ModelConfig) -> str | None:
    """How the draft's tokenizer differs from the target's; None if all of the target's tokens are the same.

    Raises:
        Exception: if they cannot be compared.
    """
    if envs.VLLM_USE_MODELSCOPE:
        raise ValueError("its files are not found by their Hub id")
    ours = get_hf_file_bytes(FILE, target.tokenizer, target.tokenizer_revision)
    drafts = get_hf_file_bytes(FILE, draft.model, draft.revision)
    if ours is None or drafts is None:
        raise ValueError(f"a model has no {FILE}")
    if ours == drafts:
        return None
    ids, draft_ids = read_ids(ours), read_ids(drafts)
    num_other = sum(draft_ids.get(token) != index for token, index in ids.items())
    if not num_other:
        return None
    return (
        f"{num_other} of {len(ids)} tokens of the target's tokenizer have another id in the draft's, or none"
    )


def read_ids(tokenizer: bytes) -> dict[str, int]:
    """The id of each token, of the text of a `tokenizer.json`."""
    content = json.loads(tokenizer)
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # of Unigram: pairs of token and score
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content["added_tokens"]}
