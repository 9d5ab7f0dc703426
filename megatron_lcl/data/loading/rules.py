"""Which sequences are read from documents, and the rules by which a document of a kind becomes some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_lcl.config import Data
from megatron_lcl.errors import UserError


@dataclass(frozen=True)
class Sequences:
    """Which sequences are read from documents; an objective says it (`objectives.base.Objective.sequences`)."""

    interleaved: bool = True
    """a document as it stands, each image as `<soi>`, P placeholders, `<eoi>`; else a sequence `<sot> text <soi>` for
    each image-text pair, the image encoded apart from it"""
    contrast: bool = True
    """images that a text precedes take part in the contrast, or in whatever compares them with their contexts"""
    targets: bool = True
    """each token's target is the next one, but for placeholders and `<eoi>`; else there are no targets"""
    captions: bool = False
    """of image-text pairs: each has a sequence `<sot> <soi>`, P placeholders, `<eoi> text <eot>`, of which targets are
    this text and `<eot>` alone; with `contrast` it stands behind `<sot> text <soi>` in the same pack, for the same
    image slot, else it is all of the pair"""

    def __post_init__(self) -> None:
        if self.captions and self.interleaved:
            raise ValueError("captions=True with interleaved=True: captions are of image-text pairs; interleaved=False")

    @property
    def doubled(self) -> bool:
        """A pair is two sequences of one pack."""
        return self.captions and self.contrast


INTERLEAVED = Sequences()
PAIRS = Sequences(interleaved=False, targets=False)
CAPTIONED_PAIRS = Sequences(interleaved=False, captions=True)
CAPTIONS = Sequences(interleaved=False, contrast=False, captions=True)


class Rules(NamedTuple):
    """What the sequences of a document depend on besides the document; plain numbers, for compiled code."""

    num_patches: int
    """P: placeholders per image; 0: a sequence per image-text pair, the image outside of it (`Sequences`)"""
    max_tokens: int
    """token slots of one sequence: min(context length, T); less for a pair's `<sot> text <soi>` whose text has to fit
    its caption too"""
    max_images: int
    """images of one sequence: I"""
    selects: bool
    """the documents are matched: select by similarity"""
    min_similarity: float
    images_per_segment: int
    images_per_document: int
    min_images: int
    image_first: float
    pairs: bool
    """the documents are image-text pairs: the image goes with the text"""
    reference_pairs: bool
    """pairs in the reference's one-ended forms"""
    carry_text: bool
    """where a document is cut before an image, the end of the text before it goes along (evaluation)"""
    caption_patches: int = 0
    """of image-text pairs: placeholders of a pair's caption; 0: it has none (`Sequences.captions`)"""
    captions_alone: bool = False
    """a pair's caption is its only sequence"""
    alternatives: bool = False
    """the texts of a document are alternatives: one is drawn, and the others are not there"""
    cut_beside_images: bool = False
    """a text that does not fit one sequence with the images of its segment is cut, so that what fits stands beside the
    nearest one on either side"""
    last_of_text: bool = False
    """where pairs are sequences of their own, of a text before its image that is too long the last tokens are kept"""
    in_turn: bool = False
    """of alternatives each is read once in as many epochs as there are (`sequence.in_turn`); else each epoch draws"""

    @property
    def image_tokens(self) -> int:
        """Token slots of one image: `<soi>`, P placeholders, `<eoi>`."""
        return self.num_patches + 2

    def of_whole_documents(self) -> dict[str, Any]:
        """What the sizes of whole documents depend on, by name, without what earlier versions did not have, where it
        is off: their caches stay good."""
        later = ("captions_alone", "alternatives", "cut_beside_images", "last_of_text", "in_turn")
        rules = self._replace(max_images=0, cut_beside_images=False, last_of_text=False, in_turn=False)._asdict()
        return {name: value for name, value in rules.items() if value or name not in later}


def longest_text(sequences: Sequences, num_patches: int, context_length: int, tokens_per_pack: int) -> int:
    """Tokens of a text that a sequence without an image has room for; of a pair, that each of its sequences has."""
    tokens = min(context_length, tokens_per_pack)
    if sequences.captions:  # the caption has the same text and is the longer one
        tokens -= num_patches + 2
    if sequences.doubled:  # and both stand in one pack
        tokens = min(tokens, (tokens_per_pack - num_patches - 2) // 2)
    return tokens - 2  # `<sot>` and `<soi>` or `<eot>`


def rules_for(
    data: Data,
    num_patches: int,
    context_length: int,
    images_per_pack: int,
    *,
    pairs: bool,
    sequences: Sequences = INTERLEAVED,
    matched: bool = False,
    carry_text: bool = False,
    alternatives: bool = False,
    cut_beside_images: bool = True,
    last_of_text: bool = False,
    in_turn: bool = False,
) -> Rules:
    """The rules for documents of one kind: pairs (their texts alternatives or not), matched or (neither) natural.
    UserError if not even one image fits a sequence.

    carry_text, alternatives, cut_beside_images, last_of_text, in_turn: see `Rules`.
    """
    max_tokens = min(context_length, data.tokens_per_pack)
    smallest = num_patches + 5 if sequences.interleaved or sequences.captions else 4
    if sequences.doubled and data.tokens_per_pack < num_patches + 8:
        raise UserError(
            f"data.tokens_per_pack = {data.tokens_per_pack} cannot hold both sequences of an image-text pair: an image "
            f"of {num_patches} patches, six special tokens and twice one of text; give it at least {num_patches + 8}"
        )
    if max_tokens < smallest:
        lengths = {"model.language.context_length": context_length, "data.tokens_per_pack": data.tokens_per_pack}
        short = " and ".join(name for name, length in lengths.items() if length < smallest)
        raise UserError(
            f"a sequence of {max_tokens} tokens cannot hold an image of {num_patches} patches, four special tokens and "
            f"one of text; give {short} at least {smallest}"
        )
    return Rules(
        num_patches=num_patches if sequences.interleaved else 0,
        max_tokens=longest_text(sequences, num_patches, context_length, data.tokens_per_pack) + 2,
        max_images=images_per_pack,
        selects=matched,
        min_similarity=data.min_similarity,
        images_per_segment=data.max_images_per_segment,
        images_per_document=data.max_images,
        min_images=data.min_images,
        image_first=data.image_first,
        pairs=pairs,
        reference_pairs=pairs and data.pair_layout == "reference" and sequences.interleaved,
        carry_text=carry_text,
        caption_patches=num_patches if sequences.captions else 0,
        captions_alone=sequences.captions and not sequences.doubled,
        alternatives=alternatives,
        cut_beside_images=cut_beside_images,
        last_of_text=last_of_text,
        in_turn=in_turn,
    )
