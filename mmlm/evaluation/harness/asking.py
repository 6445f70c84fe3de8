"""What both harnesses need: a prompt with pictures in it becomes a request of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmlm.generation import Request
from mmlm.messages import Clip, ImagePart, Message, Text

PLACE = "<image>"
"""Where a harness wants a picture inside a prompt."""

_FILMS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def request(prompt: str, pictures: Sequence[Any]) -> Request:
    """Return a request; pictures stand where the prompt says, else in front of it.

    >>> request("Is <image> like <image>?", ["a", "b"]).messages[0].images
    ['a', 'b']
    >>> request("What is it?", ["a"]).images
    ['a']

    The path of a film becomes a clip, which a model without a video policy refuses.

    >>> request("What happens?", ["a.mp4"]).images
    [Clip(source='a.mp4')]
    """
    pictures = [Clip(each) if _is_film(each) else each for each in pictures]
    parts = prompt.split(PLACE)
    if not pictures or len(parts) != len(pictures) + 1:
        return Request(prompt, list(pictures))
    content: list[Text | ImagePart] = []
    for number, part in enumerate(parts):
        content += [Text(part)] if part else []
        content += [ImagePart(pictures[number])] if number < len(pictures) else []
    return Request(messages=(Message("user", tuple(content)),))


def _is_film(shown: Any) -> bool:
    return isinstance(shown, str) and shown.lower().endswith(_FILMS)


def settings_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    r"""Return a harness's generation settings in our words; the unknown ones are left to it.

    >>> settings_of({"until": ["\n\n"], "temperature": 0, "do_sample": False, "top_p": None})
    {'max_new_tokens': 1024, 'stop': ('\n\n',), 'temperature': 0.0}
    """
    stops = asked.get("until") or ()
    found: dict[str, Any] = {"max_new_tokens": int(asked.get("max_new_tokens") or 1024)}
    if stops:
        found["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
    samples = asked.get("do_sample", True)
    found["temperature"] = float(asked.get("temperature") or 0.0) if samples else 0.0
    if found["temperature"] > 0 and asked.get("top_p"):
        found["top_p"] = float(asked["top_p"])
    if int(asked.get("num_beams") or 1) > 1:
        found["num_beams"] = int(asked["num_beams"])
    return found
