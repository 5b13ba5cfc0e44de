"""The tokenizer: byte-level BPE of 1024 tokens, trained on the generated text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .text import document_chain

VOCAB_SIZE = 1024
BOS, EOS = "<s>", "</s>"
MAX_POSITIONS = 2048
# The user's text opens a document and the assistant goes on with it.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ '\n' }}{% endfor %}"


def train_tokenizer(seed: int, documents: int = 6000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the first documents of many chains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chains = (document_chain(f"{seed}/bpe/{index}") for index in range(documents // 8))
    texts = (text for chain in chains for text in islice(chain, 8))
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add the begin-of-text rule, the special tokens and the chat template."""
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def chain_tokens(tokenizer: PreTrainedTokenizerFast, seed: int | str, length: int) -> list[int]:
    """Return the first length token ids of a chain: every document is <s> text </s>."""
    tokens: list[int] = []
    chain: Iterator[str] = document_chain(seed)
    while len(tokens) < length:
        tokens += [*tokenizer(next(chain))["input_ids"], tokenizer.eos_token_id]
    return tokens[:length]
