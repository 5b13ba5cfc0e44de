"""Whether the draft was trained on the tokens of its target."""

from __future__ import annotations

import json

from vllm import envs
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

FILE = "tokenizer.json"  # to load the tokenizer takes seconds; to read its tokens does not

logger = init_logger("vllm.ssd")


def warn_of_other_tokens(target: ModelConfig, draft: ModelConfig) -> None:
    """Warn if the draft's tokenizer gives other ids: what it drafts is then rejected.

    Nothing is said where there is nothing to compare, as with a draft without a tokenizer, for it needs none.
    """
    if target.skip_tokenizer_init or envs.VLLM_USE_MODELSCOPE:  # whose files are not found by their Hub id
        return
    try:
        ours = get_hf_file_bytes(FILE, target.tokenizer, target.tokenizer_revision)
        drafts = get_hf_file_bytes(FILE, draft.model, draft.revision)
        if ours is None or drafts is None or ours == drafts:
            return
        ids, draft_ids = read_ids(ours), read_ids(drafts)
    except Exception as error:  # whatever a file may have in it, the engine starts
        logger.debug("The tokenizers of target and draft cannot be compared: %s", error)
        return
    num_other = sum(draft_ids.get(token) != index for token, index in ids.items())
    if num_other:
        logger.warning(
            "%d of %d tokens of the target's tokenizer have another id in the draft's, or none: drafts are "
            "rejected where they occur; choose a draft of the target's family",
            num_other,
            len(ids),
        )


def read_ids(tokenizer: bytes) -> dict[str, int]:
    """The id of each token, of the text of a `tokenizer.json`."""
    content = json.loads(tokenizer)
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # of Unigram: pairs of token and score
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content["added_tokens"]}
