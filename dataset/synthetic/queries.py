"""The queries of SynthReason: which part of which object, in which words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cores.dataset.synthetic.scenes import SyntheticScene
from cores.dataset.synthetic.vocabulary import EXPLICIT, HABITS, IMPLICIT, PARTS, PURPOSES, held_out


@dataclass
class PartQuery:
    """A question about one part of one object. ``texts``: wordings of the same question."""

    texts: list[str]
    object_index: int
    part: str
    is_sentence: bool  # True: the part is described by its purpose; False: it is named


def plural(part: str) -> str:
    """The word for a part in a query: every part but the nose comes in pairs."""
    return part if part == "nose" else part + "s"


def host_phrases(scene: SyntheticScene, index: int, with_colour_only: bool = False) -> list[str]:
    """Every unambiguous way to name an object of the scene."""
    obj = scene.objects[index]
    phrases = [f"the {obj.colour} {obj.category}"]
    if not with_colour_only and sum(o.category == obj.category for o in scene.objects) == 1:
        phrases += [f"the {obj.category}", f"the {obj.family} that {HABITS[obj.category]}"]
    return phrases


def make_query(
    scene: SyntheticScene, split: str, rng: np.random.Generator, texts: int = 1
) -> PartQuery:
    """Draws one query that ``split`` ("train" or "val") may use, with up to ``texts`` wordings."""
    wanted = split == "val"
    for _ in range(200):
        index = int(rng.integers(len(scene.objects)))
        obj = scene.objects[index]
        part = str(rng.choice(PARTS[obj.family]))
        if not any(p.name == part for p in obj.parts):
            continue
        implicit = bool(rng.random() < 0.6)
        if implicit:
            purposes = [p for p in PURPOSES[part] if held_out(obj.category, part, p) == wanted]
            if not purposes:
                continue
            frames, hosts = IMPLICIT[split], host_phrases(scene, index)
            wordings = [
                f.format(host=h, purpose=p) for f in frames for h in hosts for p in purposes
            ]
        else:
            if held_out(obj.colour, obj.category, part) != wanted:
                continue
            frames, hosts = EXPLICIT[split], host_phrases(scene, index, with_colour_only=wanted)
            wordings = [f.format(host=h, part=plural(part)) for f in frames for h in hosts]
        chosen = rng.choice(len(wordings), size=min(texts, len(wordings)), replace=False)
        return PartQuery([wordings[i] for i in chosen], index, part, implicit)
    raise RuntimeError(
        "no query found for a scene after 200 draws: the held-out rule leaves this scene nothing"
        " to ask"
    )
