"""The `Modelfile` that Ollama reads: which files, how a conversation is written, where it stops.

Ollama has a template language of its own, without loops over parts. What the chat template
writes around a system text, a question and an answer is found by rendering it with marks.
Ollama puts pictures right before the question, without a line break; nothing here was run with
Ollama itself.
"""

from __future__ import annotations

from mmlm.errors import MMLMError
from mmlm.messages import assistant, system, user
from mmlm.processing import MMLMProcessor

_SYSTEM, _QUESTION, _ANSWER = "the system text", "the question", "the answer"


def modelfile(processor: MMLMProcessor, *, model: str, eye: str) -> str:
    """Return the text of a Modelfile beside the two files."""
    stops = [processor.tokenizer.decode([number]) for number in processor.chat.stop_ids]
    lines = [
        f"FROM ./{model}",
        f"FROM ./{eye}",
        f'TEMPLATE """{go_template(processor)}"""',
        "PARAMETER temperature 0",
        *(f'PARAMETER stop "{stop}"' for stop in stops if stop),
    ]
    return "\n".join(lines) + "\n"


def go_template(processor: MMLMProcessor) -> str:
    """Return the chat template in Ollama's language."""
    chat = processor.chat
    asked = chat.render([user(_QUESTION)], add_generation_prompt=True)
    before, _, after = asked.partition(_QUESTION)
    whole = chat.render([user(_QUESTION), assistant(_ANSWER)])
    ending = whole.rpartition(_ANSWER)[2]
    rest = f"{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{ending}"
    try:
        told = chat.render([system(_SYSTEM), user(_QUESTION)], add_generation_prompt=True)
    except MMLMError:  # a template without system texts
        return before + rest
    head, found, tail = told.partition(_SYSTEM)
    if not found:
        return before + rest
    between = tail.partition(_QUESTION)[0]
    return (
        f"{{{{ if .System }}}}{head}{{{{ .System }}}}{between}{{{{ else }}}}{before}"
        f"{{{{ end }}}}{rest}"
    )
