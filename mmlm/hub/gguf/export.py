"""Writing the folder: two GGUF files, Ollama's Modelfile, and a page that says what differs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.hub.aside import written_aside
from mmlm.hub.gguf.eye import write_eye
from mmlm.hub.gguf.fits import differences, why_no_gguf
from mmlm.hub.gguf.modelfile import modelfile
from mmlm.hub.gguf.proof import Proof, can_prove, prove
from mmlm.hub.gguf.text import write_text
from mmlm.hub.save import own_state
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.processing import MMLMProcessor

TEXT, EYE = "model.gguf", "mmproj.gguf"


def save_gguf(
    model: MMLMForConditionalGeneration,
    processor: MMLMProcessor,
    folder: Path,
    *,
    notes: dict[str, Any] | None = None,
) -> Proof | None:
    """Write the folder, and ask llama.cpp about a picture where it is installed.

    Args:
        model: The joined model.
        processor: Its processor.
        folder: Where to; new, or an earlier export.
        notes: What a card would say; its ``title`` is used.

    Returns:
        What both sides said, or None where llama.cpp is not installed.

    Raises:
        ConfigError: if llama.cpp does not compute this composition; names the conditions.
        MissingExtraError: if the package `gguf` is not installed.
        CheckpointError: if the folder cannot be written, or llama.cpp says something else.
    """
    reasons = why_no_gguf(model.config, processor.tokenizer)
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise ConfigError(
            f"llama.cpp cannot run this composition:\n{listed}\nChange what is listed, or "
            f"export it with `--to stock` or `--to remote-code`."
        )
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", needed_for="Writing GGUF files", extra="llamacpp")
    title = str((notes or {}).get("title") or "A vision-language assistant")
    state = own_state(model)
    with written_aside(folder) as aside:
        write_text(aside / TEXT, model.config, state, processor, title=title)
        write_eye(aside / EYE, model.config, state, title=title)
        (aside / "Modelfile").write_text(
            modelfile(processor, model=TEXT, eye=EYE), encoding="utf-8"
        )
        proof = prove(model, processor, aside / TEXT, aside / EYE) if can_prove() else None
        (aside / "README.md").write_text(_page(title, model, proof), encoding="utf-8")
    return proof


def _page(title: str, model: MMLMForConditionalGeneration, proof: Proof | None) -> str:
    if proof is None:
        said = "llama.cpp was not at hand when this folder was written; nothing was compared."
    else:
        said = (
            f"llama.cpp was asked about a fixed picture when this folder was written: its "
            f"likeliest next token {proof.token!r} {'ties with' if proof.is_tie else 'is'} that of "
            "the model"
            + ("." if proof.apart is None else f" (log-probabilities {proof.apart:.1e} apart).")
        )
    differs = "\n".join(f"- {line}" for line in differences(model.config))
    return (
        f"# {title}\n\nFor llama.cpp, written by MMLM. {said}\n\n"
        f"```console\nllama-server -m {TEXT} --mmproj {EYE} --jinja\n"
        f"ollama create my-assistant -f Modelfile\n```\n\n"
        f"Ollama puts a picture right before the question, without the line break that the model "
        f"has seen in training; it was not run.\n\n## What differs\n\n{differs}\n"
    )
