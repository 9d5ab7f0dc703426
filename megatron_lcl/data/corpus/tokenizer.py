"""One interface for SentencePiece models, CLIP's byte-pair encoding and any tokenizer.json.

Five special tokens follow the base vocabulary in the reference's order: `<start_of_text>`, `<end_of_text>`,
`<img_placehold>`, `<start_of_img>`, `<end_of_img>`. No text ever encodes to one of them: such a string inside a text is
text.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import operator
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.data.corpus.clip_text import clip_words
from megatron_lcl.data.corpus.files import CORPUS_MANIFEST
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_file

JoinedEncoder = Callable[[list[str]], tuple[bytes, list[int]]]
"""Texts → all their ids one after another as int32, and how many each has. UnicodeEncodeError for lone surrogates."""
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>", "<img_placehold>", "<start_of_img>", "<end_of_img>")


_PROBES = (
    "Upper and lower",
    " before,  two and after ",
    "\ta\n\nb\r\n",
    "e\u0301 \u00e9 \ufb01 \uff21 \u00a0 \u3000",
    "don't 1,000.50 % !?",
    "\u6c34\u8eca\u5c0f\u5c4b \u043c\u0435\u043b\u044c\u043d\u0438\u0446\u0430 \U0001f600\u200d\U0001f469",
    "<s></s><unk><|endoftext|>[CLS]",
    "\u0001\u007f&amp;",
)
"""texts that come back changed where a tokenizer normalizes, lacks an alphabet, or knows special tokens"""


class Tokenizer(ABC):
    """Text to token ids and back. Special-token ids are `base_size` … `base_size + 4`.

    `load` reads only files of the classes in this module; another package's class reads its own.
    """

    base_size: int
    """ids of the base vocabulary: 0 … base_size-1"""
    file_name: str
    """the name under which a corpus keeps its copy"""

    @property
    def vocab_size(self) -> int:
        """All ids, special tokens included."""
        return self.base_size + len(SPECIAL_TOKENS)

    @property
    def sot(self) -> int:
        return self.base_size

    @property
    def eot(self) -> int:
        return self.base_size + 1

    @property
    def placeholder(self) -> int:
        return self.base_size + 2

    @property
    def soi(self) -> int:
        return self.base_size + 3

    @property
    def eoi(self) -> int:
        return self.base_size + 4

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens. ValueError for one text in place of several."""
        return self._encode_batch(several(texts))

    @abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    @abstractmethod
    def joined_encoder(self) -> JoinedEncoder:
        """What encodes as a corpus stores it, for many calls from one thread; drop it before the process forks."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; special tokens come out under their names. UserError for what is no id of this tokenizer."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(map(operator.index, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"a text has ids from {min(ids)} to {max(ids)}; the tokenizer's are 0 to {self.vocab_size - 1}. If it "
                "is of a corpus, `megatron-lcl verify` says which"
            )
        if ids and max(ids) < self.base_size:
            return self._decode(ids)
        return "".join(
            "".join(SPECIAL_TOKENS[i - self.base_size] for i in run) if special else self._decode(list(run))
            for special, run in groupby(ids, key=lambda i: i >= self.base_size)
        )

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of base ids."""

    @cached_property
    def is_lossless(self) -> bool:
        """Whether texts come back exactly: found with texts that normalizers and missing alphabets change."""
        try:
            return all(self.decode(self.encode(text)) == text for text in self._probes())
        except Exception:  # noqa: BLE001 - another library's, for a text that it cannot encode
            return False

    def _probes(self) -> Sequence[str]:
        return _PROBES

    @cached_property
    def separates_texts(self) -> bool:
        """Whether ids of two texts, one after the other, read as if a space stood between them: CLIP's ends of words,
        the space that many SentencePiece models put before every text."""
        ids = self.encode("a")
        return self.decode(2 * ids) != 2 * self.decode(ids)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids."""

    @property
    @abstractmethod
    def content(self) -> bytes:
        """The bytes of a file that `load`, or the class itself, reads."""

    def save(self, path: str | Path) -> None:
        """Write a file that `load`, or the class itself, reads."""
        Path(path).write_bytes(self.content)

    @property
    def entry(self) -> dict[str, str | int]:
        """What the manifest of a corpus says of it."""
        return {"file": self.file_name, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}


def several(texts: Iterable[str]) -> list[str]:
    """The texts as a list. ValueError for a str: its characters would each be a text."""
    if isinstance(texts, str):
        raise ValueError(f"{texts!r} is one text, where several are expected; give a list: [{texts!r}]")
    return list(texts)


def load(source: str | Path) -> Tokenizer:
    """A tokenizer from `"clip"`, a SentencePiece model, a `tokenizer.json` of Hugging Face's tokenizers, a file that
    `save` wrote, or a corpus's folder.

    Raises UserError where there is no such file or it is none of these.
    """
    if str(source) == "clip":
        return ClipTokenizer(_installed_merges())
    path = Path(source)
    if exists(path / CORPUS_MANIFEST):
        try:
            path /= json.loads((path / CORPUS_MANIFEST).read_bytes())["tokenizer"]["file"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path / CORPUS_MANIFEST} is damaged, and does not name a tokenizer") from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f'no tokenizer at {path} ({error.strerror}); give "clip", a SentencePiece .model, or a tokenizer.json'
        ) from None
    if path.suffix == ".json":
        try:
            tree = json.loads(data)
            if "model" in tree:
                return JsonTokenizer(data, str(path))
            return ClipTokenizer([_pair(line) for line in tree["merges"]])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is neither a tokenizer.json of Hugging Face's tokenizers nor one that megatron_lcl saved"
            ) from None
    return SentencePieceTokenizer(data, str(path))


# --- SentencePiece -----------------------------------------------------------------------------------------------


_LONG = 300
"""characters of a text from which on an array of its ids is faster than a list"""


class SentencePieceTokenizer(Tokenizer):
    """Any SentencePiece model, given as its serialized bytes."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "model") -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._name = name
        self._processor = SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeDecodeError):  # the second where the damage is in the message about it
            raise UserError(f"{name} is not a SentencePiece model") from None
        self.base_size = self._processor.GetPieceSize()

    def __reduce__(self) -> tuple[type, tuple[bytes, str]]:
        return type(self), (self._model, self._name)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encode(texts, int, num_threads=1)

    def joined_encoder(self) -> JoinedEncoder:
        from sentencepiece import ThreadPool

        pool = ThreadPool(1)  # else each call starts a thread, which takes as long as ten short texts

        def encode(texts: list[str]) -> tuple[bytes, list[int]]:
            if sum(map(len, texts)) >= _LONG * len(texts):
                arrays = self._encode(texts, "numpy", thread_pool=pool)
                return b"".join(arrays), list(map(len, arrays))
            lists = self._encode(texts, int, thread_pool=pool)
            joined = array("I")  # no id is negative, and to an array of "i" Python takes twice as long
            deque(map(joined.fromlist, lists), 0)  # for each, without a loop in Python
            return joined.tobytes(), list(map(len, lists))

        return encode

    def _encode(self, texts: list[str], out_type: Any, **threads: Any) -> list[Any]:
        try:
            return self._processor.Encode(texts, out_type=out_type, **threads)
        except TypeError:  # what it says of a str that UTF-8 cannot hold
            for text in texts:
                text.encode()
            raise

    def _decode(self, ids: list[int]) -> str:
        return self._processor.Decode(ids)

    @property
    def fingerprint(self) -> str:
        return "sentencepiece-" + xxhash.xxh3_128_hexdigest(self._model)

    @property
    def content(self) -> bytes:
        return self._model


# --- CLIP --------------------------------------------------------------------------------------------------------

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 49152 - 256 - 2


def _installed_merges() -> list[tuple[str, str]]:
    """CLIP's merges from an installed package that ships them; only the file is read."""
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            file = Path(folder) / _MERGES_FILE
            if is_file(file):
                lines = gzip.decompress(file.read_bytes()).decode().split("\n")
                return [_pair(line) for line in lines[1 : _NUM_MERGES + 1]]
    raise UserError(
        f"CLIP's vocabulary ({_MERGES_FILE}) comes with the package open-clip-torch, which is not installed; "
        "`pip install --no-deps open-clip-torch` is enough"
    )


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split()
    return left, right


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


_MAX_WORDS, _MAX_WORD_LENGTH = 200_000, 64


class _WordIds(dict[str, bytes]):
    """Ids of words seen before, as int32; the Rust library encodes the others."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._encode(word)).tobytes()
        if len(word) <= _MAX_WORD_LENGTH:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


class ClipTokenizer(Tokenizer):
    """CLIP's lower-casing byte-pair encoding (Radford et al. 2021), ids as in open_clip's `SimpleTokenizer`.

    Texts are cleaned as there: ftfy, HTML-unescaping twice, white space collapsed, lower case; so it is not lossless.
    """

    file_name = "tokenizer.json"

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self._merges = list(merges)
        letters = list(_byte_alphabet().values())
        vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in self._merges)]
        self._vocabulary = vocabulary
        self.base_size = len(vocabulary)

    def __reduce__(self) -> tuple[type, tuple[list[tuple[str, str]]]]:
        return type(self), (self._merges,)

    @cached_property
    def _words(self) -> _WordIds:
        from tokenizers import Tokenizer, models, pre_tokenizers

        ids = {token: i for i, token in enumerate(self._vocabulary)}
        encoder = Tokenizer(models.BPE(vocab=ids, merges=self._merges, end_of_word_suffix="</w>"))
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return _WordIds(lambda word: encoder.encode(word).ids)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [memoryview(ids).cast("i").tolist() for ids in self._encode_bytes(texts)]

    def joined_encoder(self) -> JoinedEncoder:
        def encode(texts: list[str]) -> tuple[bytes, list[int]]:
            "".join(texts).encode()  # raises for a lone surrogate, which ftfy would replace silently
            pieces = self._encode_bytes(texts)
            return b"".join(pieces), [len(ids) // 4 for ids in pieces]

        return encode

    def _encode_bytes(self, texts: list[str]) -> list[bytes]:
        ids = self._words.__getitem__
        return [b"".join(map(ids, clip_words(text))) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        bytes_of = {letter: b for b, letter in _byte_alphabet().items()}
        text = "".join(self._vocabulary[i] for i in ids).replace("</w>", " ")
        return bytes(bytes_of.get(c, 32) for c in text).decode(errors="replace").rstrip(" ")

    @property
    def fingerprint(self) -> str:
        return "clip-" + xxhash.xxh3_128_hexdigest("\n".join(map(" ".join, self._merges)).encode())

    @property
    def content(self) -> bytes:
        return json.dumps({"type": "clip", "merges": [" ".join(m) for m in self._merges]}).encode()


# --- tokenizer.json -----------------------------------------------------------------------------------------------

_ANY_TEXT = "Any text: \u6c34, \u00e9, \U0001f600 \u0001\n"


class JsonTokenizer(Tokenizer):
    """Any `tokenizer.json` of Hugging Face's `tokenizers`, such as GPT-2's or Llama's, given as its bytes.

    Its own special tokens (`<|endoftext|>` …) keep their ids, and nothing encodes to them: such a string inside a text
    is text. Nothing is added around a text, cut or padded, whatever the file says. UserError where the bytes are no
    such file, or there are texts that it cannot encode.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, name: str = "tokenizer.json") -> None:
        self._data = data
        self._name = name
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{name} has no vocabulary")
        self.base_size = 1 + max(vocabulary.values())
        try:
            if not self.encode(_ANY_TEXT):
                raise ValueError("no tokens")
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise UserError(
                f"{name} cannot encode every text ({error}); give one with byte fallback, or with an unknown token"
            ) from None
        if self._tokenizer.decoder is None:
            raise UserError(f"{name} has no decoder, so that its texts cannot be shown; add one to the file")

    def __reduce__(self) -> tuple[type, tuple[bytes, str]]:
        return type(self), (self._data, self._name)

    @cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(self._data)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._name} is no tokenizer.json that this release of tokenizers reads: {said}"
            ) from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        "".join(texts).encode()  # raises for a lone surrogate, of which the library says something else
        # one by one: in batches the library starts a thread for each core, whatever the number of workers
        return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def joined_encoder(self) -> JoinedEncoder:
        def encode(texts: list[str]) -> tuple[bytes, list[int]]:
            joined, lengths = array("i"), []
            for ids in self._encode_batch(texts):
                joined.fromlist(ids)
                lengths.append(len(ids))
            return joined.tobytes(), lengths

        return encode

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _probes(self) -> Sequence[str]:
        """With each added token among words: one may take the white space around it (`lstrip`, `rstrip`)."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [*_PROBES, *(f"a {token.content} b" for token in added if token.lstrip or token.rstrip)]

    @property
    def fingerprint(self) -> str:
        return "tokenizers-" + xxhash.xxh3_128_hexdigest(self._data)

    @property
    def content(self) -> bytes:
        return self._data
