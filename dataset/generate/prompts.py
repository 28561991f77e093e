"""What the models are told. A change here changes the requests, so that none of their earlier
answers is found in the journal.

The line breaks behind a backslash are no part of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cores.dataset.generate.scenes import MarkedObject

CAPTION = """Describe this photograph for somebody who cannot see it and will later be quizzed \
about it. Write one paragraph of 60 to 120 words in plain English. Say what kind of place it is, \
what is going on, which things are there, what state they are in, and how they relate to each \
other: what stands on what, who holds what, what belongs together. Only report what can be seen; \
do not guess names, brands or feelings. Do not mention the photograph itself, and give no \
coordinates."""

QUESTIONS = """You invent questions that teach a vision system to think before it points. You get \
a description of a photograph and the things that a person traced in it. For each traced thing, \
write one question whose only fitting answer in this photograph is that thing (all of it, where \
there is more than one), and one answer.

The question
- can be answered only by thinking: about purpose, cause and effect, safety, habit, what somebody \
would need next, or how things here depend on each other;
- never calls the thing by its name, by another word for it, or by a part of its name;
- fits this photograph, and no other thing in it fits as well;
- does not say where in the frame the thing is, and speaks of no outlines, regions, numbers, lists \
or descriptions;
- is one sentence of 6 to 35 words.

The answer is one sentence of 6 to 40 words that calls the thing by the name given and says why it \
is the one.

Here is one for a kettle on a stove beside a window: {"object": "kettle", "question": "Somebody \
just came in from the cold and wants tea; what has to be filled before the stove is of any use?", \
"answer": "The kettle, because the water for tea is heated in it."}

Reply with one JSON object and nothing else: {"pairs": [{"object": …, "question": …, "answer": …}, \
…]}, in the order of the things."""

EXEMPLARS = """You write short pairs of a question and an answer about parts of everyday things. \
They show a reader how to reason from a purpose to a part: first where the part is, then what it \
looks like.

The question asks for a part through what it is for or what happens at it, names the whole thing \
it belongs to where that helps, has 4 to 20 words and ends with a question mark. The answer has \
exactly two sentences and 8 to 40 words. The first says where on the thing it appears, the second \
what it usually is: shape, material, look. Plain ASCII, no brackets, no lists, no numbers of any \
kind. Every pair is about another part, and facts must be right.

An example from the domain of kitchens: {"q": "What does a kettle pour from?", "a": "It typically \
appears on the side of the kettle body. It is usually a narrow curved tube."}

Reply with one JSON object and nothing else: {"pairs": [{"q": …, "a": …}, …]}."""

REPHRASE = """You say the same thing in other words. You get one request that asks for a thing in \
a picture. Write other wordings that ask for exactly the same thing: nothing may be added, left \
out or made more or less precise, and no name may appear that the request does not use. Keep every \
colour, side, number and negation as it is. A request that is a whole sentence stays one; a \
request that is only a phrase stays a phrase. Vary the grammar and the verbs, not only single \
words.

Reply with one JSON object and nothing else: {"wordings": ["…", …]}."""

Messages = list[dict[str, Any]]


def _untagged(text: str) -> str:
    """Text from elsewhere, in one line that cannot close or open a tag of a prompt."""
    return " ".join(text.replace("<", "‹").replace(">", "›").split())


def caption_messages(part: dict[str, Any]) -> Messages:
    """``part``: the picture, see ``client.image_part``."""
    return [{"role": "user", "content": [{"type": "text", "text": CAPTION}, part]}]


def question_messages(
    summary: str, objects: Sequence[MarkedObject], others: Iterable[str]
) -> Messages:
    """``objects``: those to ask about; ``others``: names of what else is there."""
    lines = []
    for o in objects:
        size = "small" if o.share < 0.03 else "medium" if o.share < 0.15 else "large"
        lines.append(f"- {o.name} | {o.count} in the picture | {o.where} | {size}")
    parts = [f"<summary>\n{_untagged(summary)}\n</summary>"] if summary else []
    parts += ["<important_objects>", *lines, "</important_objects>"]
    parts.append(f"<also_there>{', '.join(others) or 'nothing else'}</also_there>")
    return [{"role": "system", "content": QUESTIONS}, {"role": "user", "content": "\n".join(parts)}]


def exemplar_messages(domain: str, count: int, known: Sequence[str]) -> Messages:
    """``known``: questions that must not be asked again."""
    taken = "\n".join(f"- {_untagged(question)}" for question in known) or "- none"
    content = f"<domain>{_untagged(domain)}</domain>\n<how_many>{count}</how_many>"
    content += f"\n<taken>\n{taken}\n</taken>"
    return [{"role": "system", "content": EXEMPLARS}, {"role": "user", "content": content}]


def rephrase_messages(text: str, count: int) -> Messages:
    content = f"<request>{_untagged(text)}</request>\n<how_many>{count}</how_many>"
    return [{"role": "system", "content": REPHRASE}, {"role": "user", "content": content}]


def repair(messages: Messages, reply: str, complaints: Sequence[str], wanted: str) -> Messages:
    """The messages so far, the ``reply``, what was wrong with it and what is still ``wanted``."""
    found = "\n".join(f"- {_untagged(complaint)}" for complaint in complaints)
    content = f"<refused>\n{found}\n</refused>\nWrite new ones, in the same form, {wanted}."
    return [
        *messages,
        {"role": "assistant", "content": reply or "(nothing)"},
        {"role": "user", "content": content},
    ]
