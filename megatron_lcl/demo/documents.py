"""Pictures with names → documents, in the generic format.

Two kinds of interleaved documents, and pairs, are made of the same pictures, each once in each (where an artist has one
picture for several names of a topic, one of them, drawn for each kind, stands in its documents):

* labels: the name stands right before each picture, what else is said of it after it;
* contexts: what stands before a picture says more than its name, or not the name: what it is like, with the name after
  it; or all names first and then the pictures in their order;
* pairs: a picture with its name, every second one with what else is said.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_lcl.demo.pictures import Picture, is_chosen

Item = dict[str, str]
Record = dict[str, Any]
"""a line of the generic format: `{"items": [...], "kind": ...}`"""
MIN_RUN, MAX_RUN = 3, 7


def runs(pictures: Iterable[Picture], purpose: str, max_words: int = 10**9) -> Iterator[list[Picture]]:
    """Pictures of one artist and topic together, three to seven at a time, in an order drawn for the purpose.

    Fewer where a topic has fewer, and where their descriptions come to more than `max_words`.
    """
    topics: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        topics.setdefault((picture.artist, picture.topic), []).append(picture)
    for (artist, topic), all_members in topics.items():
        rng = random.Random(f"{purpose}/{artist}/{topic}")
        rng.shuffle(all_members)
        members = list({picture.data: picture for picture in all_members}.values())
        while members:
            size = len(members)
            if size > MAX_RUN:
                size = rng.randint(MIN_RUN, min(MAX_RUN, size - MIN_RUN))
            words, stop = 0, 0
            while stop < size and (stop == 0 or words + _num_words(members[stop]) <= max_words):
                words += _num_words(members[stop])
                stop += 1
            yield members[:stop]
            members = members[stop:]


def labels(run: list[Picture]) -> Record:
    """Each name, its picture, and what else is said; every second run begins with its topic."""
    items: list[Item] = []
    if _coin(run, "title"):
        items.append({"text": run[0].topic})
    for picture in run:
        items += [{"text": picture.name}, {"image": picture.file}, {"text": picture.about}]
    return record(items)


def contexts(run: list[Picture]) -> Record:
    """Every second run: what each picture is like, the picture, then its name. The others: all names, all pictures."""
    items = [{"text": run[0].topic}]
    if len(run) > 1 and _coin(run, "form"):
        items.append({"text": f"In this order: {'; '.join(picture.name for picture in run)}."})
        items += [{"image": picture.file} for picture in run]
    else:
        for picture in run:
            items += [{"text": picture.about}, {"image": picture.file}, {"text": picture.name}]
    return record(items)


def pair(picture: Picture) -> Record:
    """A picture with its name, or with what else is said too."""
    text = f"{picture.name}: {picture.about}" if picture.about and _coin([picture], "pair") else picture.name
    return record([{"text": text}, {"image": picture.file}], "pairs")


def record(items: Iterable[Item], kind: str = "natural") -> Record:
    """A line of the generic format; empty texts are left out."""
    return {"items": [item for item in items if item.get("text", " ")], "kind": kind}


def _coin(run: list[Picture], purpose: str) -> bool:
    return is_chosen(run[0].key, 0.5, purpose)


def _num_words(picture: Picture) -> int:
    return len(picture.about.split())
