"""The prompt formats of LLaVA's versions: system text, speakers and separators."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ConversationTemplate:
    """How turns are written. Every answer ends with the end-of-sequence token, so generation always
    stops by id.

    The last two fields belong to a checkpoint rather than to a style;
    ``CoresProcessor.conversation`` sets them.
    """

    name: str
    system: str
    opening: str  # before the first question of the sequence, with {system} in it
    user: str  # before every later question
    assistant: str  # between a question and its answer
    image_gap: str  # between the image and the question
    answer_end: str = ""  # after an answer, before the end-of-sequence token
    bos_every_turn: bool = False
    image_marks: tuple[str, str] | None = None  # around the image: ("<im_start>", "<im_end>")
    strip_at_tokens: bool = False
    """White space next to a token is dropped, and the text after it starts like the first text of a
    sequence. Transformers' slow LLaMA tokenizer did so to every sequence that the checkpoints of
    LLaVA v1, LISA and CoReS were trained on; ``dataset.conversation.encoding`` has an example."""

    def before(self, index: int) -> str:
        """What stands before question ``index`` of a sequence, counted from 0."""
        return self.user if index else self.opening.replace("{system}", self.system)

    def chat_template(self, image_token: str, space_first: bool = True) -> str:
        """The same format as a Jinja template of transformers' ``apply_chat_template``, one
        ``image_token`` per image.

        Answers and their end are inside ``{% generation %}``, so that
        ``return_assistant_tokens_mask`` gives the labels. A first message of the role "system"
        replaces the system text. ``space_first``: whether the tokenizer puts a space before a text,
        as LLaMA's does. White space next to a token is the tokenizer's part
        (``model.checkpoints.llava.set_spaces``).
        """
        start, end = self.image_marks or ("", "")
        words = {
            "SYSTEM": self.system,
            "OPENING": self.opening,
            "USER": self.user,
            "ASSISTANT": self.assistant,
            "IMAGE": start + image_token + end,
            "IMAGE_GAP": self.image_gap,
            "ANSWER_END": self.answer_end,
            "SPACE": " " if space_first else "",
            "BOS_EVERY_TURN": self.bos_every_turn,
            "STRIP": self.strip_at_tokens,
        }
        return re.sub(
            rf"<<({'|'.join(words)})>>",
            lambda found: json.dumps(words[found[1]], ensure_ascii=False),
            _CHAT_TEMPLATE,
        )


_CHAT_TEMPLATE = """
{%- macro text_of(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}{%- for part in content if part['type'] == 'text' -%}\
{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = text_of(messages[0]['content']) -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = <<SYSTEM>> -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {%- set before = <<OPENING>>.replace('{system}', system) if loop.first else <<USER>> -%}
    {%- if loop.first or <<BOS_EVERY_TURN>> -%}
      {{- bos_token -}}
      {%- if <<STRIP>> or not before.startswith(' ') -%}{{- <<SPACE>> -}}{%- endif -%}
    {%- endif -%}
    {%- set images = [] if message['content'] is string else \
message['content'] | selectattr('type', 'equalto', 'image') | list -%}
    {{- before.rstrip(' ') if images else before -}}
    {%- for image in images -%}{{- <<IMAGE>> + <<IMAGE_GAP>> -}}{%- endfor -%}
    {{- text_of(message['content']) | trim + <<ASSISTANT>> -}}
  {%- else -%}
    {{- ' ' -}}
    {%- generation -%}{{- text_of(message['content']) | trim + <<ANSWER_END>> + eos_token -}}\
{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}"""

_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = _USER_SYSTEM.replace("curious user", "curious human").replace("user's", "human's")
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)

_TEMPLATES = (
    ConversationTemplate(
        "llava_v1", _HUMAN_SYSTEM, "{system} USER: ", "USER: ", " ASSISTANT:", "\n"
    ),
    ConversationTemplate(
        "vicuna_v1", _USER_SYSTEM, "{system} USER: ", "USER: ", " ASSISTANT:", "\n"
    ),
    ConversationTemplate(
        "llava_v0", _HUMAN_SYSTEM, "{system}###Human: ", "Human: ", "###Assistant:", "\n", "###"
    ),
    ConversationTemplate(
        name="llava_llama_2",
        system=_LLAMA_2_SYSTEM,
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        user="[INST] ",
        assistant=" [/INST]",
        image_gap="\n",
        answer_end=" ",
        bos_every_turn=True,
    ),
    ConversationTemplate("tiny", "", "USER: ", "USER: ", " ASSISTANT:", " "),
)
TEMPLATES = {template.name: template for template in _TEMPLATES}


def get_template(name: str | ConversationTemplate) -> ConversationTemplate:
    """The template of that name; a template is returned as it is. Raises ValueError that lists the
    known names."""
    if isinstance(name, ConversationTemplate):
        return name
    if name not in TEMPLATES:
        raise ValueError(f"unknown conversation template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
