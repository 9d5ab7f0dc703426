"""Training the tokenizer that a corpus is written with, where none is given."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from megatron_lcl.data.corpus.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer
from megatron_lcl.errors import UserError

MAX_BYTES = 100_000_000
"""of texts that a tokenizer is trained on"""
_LINE_BYTES = 4000
"""of a text that the trainer gets at once"""


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A unigram model trained on the first `MAX_BYTES` of `texts`; the same texts give the same model.

    `vocab_size` counts the five special tokens; fewer pieces come out where the texts do not support so many. Lossless:
    no normalization, byte fallback for rare characters (only U+2581, SentencePiece's mark for a space, comes back as a
    space). No ids are spent on SentencePiece's `<s>`, `</s>` and `<pad>`. UserError without text or for an impossible
    size; whatever `texts` raises.
    """
    import sentencepiece

    smallest = 256 + 1 + 100  # bytes, <unk>, and room for an alphabet
    if vocab_size - len(SPECIAL_TOKENS) < smallest:
        raise UserError(f"--vocab-size {vocab_size}: give at least {smallest + len(SPECIAL_TOKENS)}")
    model = io.BytesIO()
    lines = _training_lines(texts)
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a tokenizer on")
    interrupted: list[BaseException] = []

    def all_lines() -> Iterator[str]:
        try:
            yield first
            yield from lines
        except GeneratorExit:
            raise
        except BaseException as error:  # of which the trainer's RuntimeError has no more than the text
            interrupted.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=all_lines(),
            model_writer=model,
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            model_type="unigram",
            hard_vocab_limit=False,
            byte_fallback=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=_LINE_BYTES + 8,
            num_threads=1,  # sums depend on their order
            minloglevel=2,
        )
    except RuntimeError as error:
        if interrupted:
            raise interrupted[0] from None
        raise UserError(f"cannot train a tokenizer of {vocab_size} ids on these texts: {error}") from None
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines short enough for the trainer, which skips longer ones, cut at a space."""
    left = MAX_BYTES
    for text in texts:
        for line in text.splitlines():
            line = line.replace("\0", " ")  # the trainer refuses it
            while line.strip() and left > 0:
                head = line[: _LINE_BYTES // 4]  # UTF-8 has at most four bytes a character
                if len(head) < len(line) and " " in head.strip():
                    head = head[: head.rindex(" ")] or head
                line = line[len(head) :]
                left -= len(head.encode())
                yield head
        if left <= 0:
            return
