"""Which pictures are trained on, and which are held out: one artist's, and those of some names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_lcl.demo.pictures import Picture, is_chosen, near_duplicates


@dataclass(frozen=True)
class Split:
    """All pictures, each in one of the two lists."""

    training: list[Picture]
    held_out: list[Picture]
    near: frozenset[str]
    """keys of the held-out pictures that have a near-duplicate in training"""
    artist: str
    """none of whose pictures is trained on"""

    @property
    def distinct(self) -> list[Picture]:
        """The held-out pictures without a near-duplicate in training."""
        return [p for p in self.held_out if p.key not in self.near]

    def sets(self) -> dict[str, list[Picture]]:
        """Held-out pictures to name, before and after near-duplicates are left out.

        artist: pictures of the held-out artist with names that others' pictures have in training. names: pictures of
        any artist with names that are not trained on. No picture is in them that its artist has for two names.
        """
        trained = {p.name for p in self.training}

        def of_artist(p: Picture) -> bool:
            return p.artist == self.artist and p.name in trained

        def of_names(p: Picture) -> bool:
            return p.name not in trained and p.name in held_out_names

        held_out_names = {p.name for p in self.held_out if p.artist != self.artist}
        names: dict[tuple[str, bytes], set[str]] = {}
        for picture in self.held_out:
            names.setdefault((picture.artist, picture.data), set()).add(picture.name)
        one_name = {drawn for drawn, of in names.items() if len(of) == 1}
        kinds: dict[str, Callable[[Picture], bool]] = {"artist": of_artist, "names": of_names}
        found = {}
        for name, belongs in kinds.items():
            found[name] = [p for p in self.held_out if (p.artist, p.data) in one_name and belongs(p)]
            found[f"{name}-distinct"] = [p for p in found[name] if p.key not in self.near]
        return {name: pictures for name, pictures in found.items() if pictures}


def split(pictures: Sequence[Picture], artist: str, name_fraction: float) -> Split:
    """Hold out an artist's pictures, and those of `name_fraction` of the names, chosen by a hash of the name."""
    training: list[Picture] = []
    held_out: list[Picture] = []
    for picture in pictures:
        held = picture.artist == artist or is_chosen(picture.name, name_fraction, "held out")
        (held_out if held else training).append(picture)
    near = near_duplicates(held_out, training)
    return Split(training, held_out, frozenset(held_out[k].key for k in near), artist)
