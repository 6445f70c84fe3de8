"""Chat templates: how one is rendered, and how it learns about images.

A language model's template expects text. `wrap_template` puts a prelude before it that
turns a list of text and image parts into text with ``<image>`` placeholders; the result is
an ordinary chat template, which processors save and every tool that reads templates can
use. Nothing here tokenises, and nothing here knows which words the loss covers: that is
`mmlm.language.skeleton`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmlm.errors import TemplateError
from mmlm.messages import ImagePart, Message, Text, to_openai

IMAGE_TOKEN = "<image>"
"""The placeholder of an image, in templates and tokenizers."""

DEFAULT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- 'USER: ' + message['content'] + '\\n' }}
    {%- else %}
        {{- 'ASSISTANT: ' + message['content'] + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}"""
"""The template of language models that bring none, such as GPT-2 and other base models."""

_MESSAGES = "mmlm.messages"
_WITH_SYSTEM = (
    "([] if mmlm.messages and mmlm.messages[0]['role'] == 'system' "
    "else [dict(role='system', content=SYSTEM)]) + mmlm.messages"
)
_MARK = "{#- mmlm: text and image parts become text -#}"
_JOIN_PARTS = (
    _MARK
    + """
{%- set mmlm = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or message['content'] is not iterable -%}
        {%- set mmlm.messages = mmlm.messages + [message] -%}
    {%- else -%}
        {%- set turn = namespace(text='') -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {%- set turn.text = turn.text + part['text'] -%}
            {%- else -%}
                {%- set turn.text = turn.text + IMAGE + ('' if loop.last else '\\n') -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set mmlm.messages = mmlm.messages + [dict(message, content=turn.text)] -%}
    {%- endif -%}
{%- endfor -%}
"""
)
_PRELUDE = _JOIN_PARTS + "VARIABLES{%- set messages = MESSAGES "
_JOINED_ALREADY = "{%- set mmlm = namespace(messages=messages) -%}\n"
_WRITTEN_JOIN = re.compile(re.escape(_JOIN_PARTS).replace("IMAGE", r'("(?:[^"\\]|\\.)*")'))


def wrap_template(
    template: str,
    *,
    image_token: str = IMAGE_TOKEN,
    variables: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> str:
    r"""Return `template` with a prelude that accepts lists of text and image parts.

    An image part becomes ``<image>\n`` where something follows it in its turn, else
    ``<image>``. Text-only messages render exactly as before. A template that is wrapped
    already is returned as it stands.

    Args:
        template: The chat template of a language model.
        image_token: The placeholder of an image.
        variables: Values of the template's own variables, such as ``{"enable_thinking":
            False}``; they travel with the template and yield to what a caller passes.
        system: What the system turn says where a conversation has none, instead of what the
            template then says by itself.
    """
    if is_wrapped(template):
        return template
    fixed = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}"
        "{% endif -%}\n"
        for name, value in (variables or {}).items()
    )
    prelude = _PRELUDE.replace("IMAGE", _jinja_literal(image_token)).replace("VARIABLES", fixed)
    messages = _MESSAGES
    if system is not None:
        messages = _WITH_SYSTEM.replace("SYSTEM", _jinja_literal(system))
    prelude = prelude.replace("MESSAGES", messages)
    # White space at the head of the template is the template's: begin it on a line of its own
    # (the newline after a block belongs to the block) instead of trimming it.
    return prelude + ("%}\n" if template[:1].isspace() else "-%}") + template


def _jinja_literal(value: Any) -> str:
    """Write a plain value as Jinja source; JSON and Jinja agree on all of them."""
    return json.dumps(value, ensure_ascii=False) if value is not None else "none"


def is_wrapped(template: str) -> bool:
    """Whether a template is one that `wrap_template` made."""
    return template.startswith(_MARK)


def template_of(tokenizer: Any) -> str:
    """Return the template that a tokenizer brings, or the plain default one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return str(template or DEFAULT_TEMPLATE)


class Renderer:
    """Renders conversations with one template, as a stock processor would.

    What the prelude of `wrap_template` does to the parts of a turn is done here in Python, and the
    rest of the template rendered: the same text in a third of the time.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.template = template
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        join = _WRITTEN_JOIN.match(template)
        self._place = None if join is None else str(json.loads(join[1]))
        self._rest = template if join is None else _JOINED_ALREADY + template[join.end() :]

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render a conversation.

        Raises:
            TemplateError: if the template refuses the conversation, or fails on it.
        """
        return self._render(messages, add_generation_prompt, markers=False)[0]

    def with_markers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Render, and say which characters stand inside ``{% generation %}`` markers."""
        return self._render(messages, False, markers=True)

    @property
    def has_markers(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return "endgeneration" in self.template

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, *, markers: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        place = self._place
        try:
            rendered: Any = render_jinja_template(
                conversations=[_blind(messages) if place is None else _joined(messages, place)],
                chat_template=self._rest,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=markers,
                **self.variables,
            )
        except (JinjaError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise TemplateError(_refusal(messages, error)) from None
        texts, spans = rendered
        return texts[0], [(begin, end) for begin, end in spans[0]] if markers else []


def _blind(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Write messages as a template that takes parts sees them: an image is only a place."""
    return to_openai(
        [
            Message(
                message.role,
                tuple(part if isinstance(part, Text) else ImagePart() for part in message.content),
            )
            for message in messages
        ]
    )


def _joined(messages: Sequence[Message], place: str) -> list[dict[str, Any]]:
    """Write messages as the prelude of a wrapped template leaves them: every turn is a text."""
    rows: list[dict[str, Any]] = []
    for message in messages:
        last = len(message.content) - 1
        words = [
            part.text if isinstance(part, Text) else place if index == last else f"{place}\n"
            for index, part in enumerate(message.content)
        ]
        rows.append({"role": message.role, "content": "".join(words)})
    return rows


def _refusal(messages: Sequence[Message], error: Exception) -> str:
    """Say why a template failed on a conversation, and what would mend it."""
    roles = [message.role for message in messages]
    turns = [role for role in roles if role != "system"]
    mend = "Check the conversation, or give another template."
    if not turns or turns[0] != "user":
        mend = "Begin the conversation with a user turn."
    elif any(one == other for one, other in pairwise(turns)):
        mend = "Join neighbouring turns of one speaker, so that user and assistant alternate."
    elif "system" in roles:
        mend = "Put the words of the system turn at the head of the first user turn."
    return (
        f"The chat template refuses a conversation of {', '.join(roles) or 'no turns'}: "
        f"{str(error) or type(error).__name__}. {mend}"
    )


def takes_parts(renderer: Renderer, image_token: str) -> bool:
    """Whether a template handles lists of text and image parts by itself."""
    words = "words7c1e"
    try:
        text = renderer([Message("user", (ImagePart(), Text(words)))])
    except TemplateError:
        return False
    return text.count(words) == 1 and text.count(image_token) == 1 and "'type'" not in text
