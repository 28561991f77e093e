"""The world of SynthReason: its objects, parts, colours, purposes and the sentences asked about
them."""

from __future__ import annotations

import zlib

COLOURS = {
    "red": (214, 60, 52),
    "green": (66, 170, 74),
    "blue": (62, 104, 214),
    "yellow": (232, 200, 60),
    "purple": (150, 78, 184),
    "orange": (240, 142, 50),
}

# Parts that look alike share a colour on purpose: only the host tells which one is meant.
DARK = (34, 32, 36)  # eyes, noses, wheels and knobs
GREY = (172, 176, 182)  # wings and blades
GLASS = (188, 226, 238)  # windows and portholes

FAMILIES = {
    "animal": ("dog", "cat", "rabbit", "bear"),
    "vehicle": ("car", "truck", "bus", "robot"),
    "aircraft": ("plane", "helicopter", "drone", "airship"),
}
CATEGORIES = [category for members in FAMILIES.values() for category in members]

PARTS = {
    "animal": ("eye", "nose", "ear"),
    "vehicle": ("wheel", "knob", "window"),
    "aircraft": ("wing", "blade", "porthole"),
}

# What a part is for: a verb phrase that continues "... use to" and "... lets it".
PURPOSES = {
    "eye": ("see", "look around", "watch things", "spot something far away"),
    "nose": ("smell", "sniff", "follow a scent", "notice an odour"),
    "ear": ("hear", "listen", "catch a sound", "notice a noise"),
    "wheel": ("roll", "move along the road", "touch the ground", "travel over land"),
    "knob": (
        "take orders from a hand",
        "change its settings",
        "switch its heating on",
        "tune its radio",
    ),
    "window": (
        "let daylight in",
        "light up its inside",
        "show what it carries",
        "keep out the wind",
    ),
    "wing": ("glide", "stay up in the air", "get lift", "keep its balance in flight"),
    "blade": ("spin", "push the air", "whirl around", "rotate quickly"),
    "porthole": (
        "give a view outside",
        "light up its cabin",
        "let the crew look out",
        "admit some light",
    ),
}

# What only one category of a family does: continues "the animal that ...".
HABITS = {
    "dog": "barks",
    "cat": "purrs",
    "rabbit": "hops",
    "bear": "growls",
    "car": "carries a family",
    "truck": "hauls cargo",
    "bus": "carries many passengers",
    "robot": "obeys commands",
    "plane": "needs a runway",
    "helicopter": "hovers over one place",
    "drone": "takes pictures without a pilot",
    "airship": "floats on gas",
}

# Short queries are phrases and long ones are sentences, as in ReasonSeg, whose loader puts a
# question around a phrase.
EXPLICIT = {
    "train": (
        "the {part} of {host}",
        "the {part} which {host} has got",
        "the {part} that {host} has",
        "{part} of {host}",
    ),
    "val": ("the {part} on {host}", "the {part} belonging to {host}"),
}

IMPLICIT = {
    "train": (
        "what does {host} use to {purpose}?",
        "where is the part that lets {host} {purpose}?",
        "which part helps {host} to {purpose}?",
        "find what {host} needs in order to {purpose}.",
        "if {host} wants to {purpose}, what is it going to use?",
    ),
    "val": ("with which part can {host} {purpose}?", "to {purpose}, what will {host} use?"),
}


def held_out(*combination: str) -> bool:
    """True for the fifth of all combinations that only validation uses. The hash is CRC-32, as
    Python's own differs from process to process."""
    return zlib.crc32("|".join(combination).encode()) % 5 == 0
