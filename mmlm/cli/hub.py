"""`mmlm export`, `mmlm import`, `mmlm push`: models in other forms, and on the Hub."""

from __future__ import annotations

from pathlib import Path

from mmlm.cli.base import Command, Options, Parser, hush, one_of
from mmlm.errors import UsageError

_FORMS = {
    "stock": "a class of transformers; an error says why, where the composition equals none",
    "mmlm": "MMLM's own class; every composition has this form",
    "remote-code": "MMLM's own class with its code, for people who have no MMLM",
    "gguf": "two files for llama.cpp and a Modelfile for Ollama; CLIP or SigLIP with mlp",
    "adapter": "the adapters of a run that kept them, as PEFT reads them, beside their base",
    "delta": "only what was learnt, beside the names of the base parts",
}


_CLASSES = (
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "fast_vlm",
    "fuyu",
    "gemma3",
    "hyperclovax_vision",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "perception_lm",
    "smolvlm",
)
"""The stock classes by name, listed here because the library is not loaded for `--help`."""


def _export_arguments(parser: Parser) -> None:
    parser.word("model", metavar="MODEL", help="a run, a model folder, or a Hub id")
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        required=True,
        type=one_of("format", [*_FORMS, *_CLASSES]),
        help="; ".join(f"{name}: {about}" for name, about in _FORMS.items())
        + f"; or that class and no other: {', '.join(_CLASSES)}",
    )
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="a new folder")


def _export(options: Options) -> None:
    _refuse_existing(options.out)
    from mmlm import hub
    from mmlm.assistant import load

    hush()
    assistant = load(options.model, device="cpu")
    if options.to == "delta":
        assistant.save(options.out, delta=True)
    elif options.to == "adapter":
        hub.export_adapter(assistant.model, assistant.processor, options.out)
    elif options.to in ("mmlm", "remote-code"):
        hub.save_mmlm(
            assistant.model, assistant.processor, options.out, notes=assistant.notes,
            with_code=options.to == "remote-code",
        )  # fmt: skip
    elif options.to == "gguf":
        from mmlm.hub.gguf import save_gguf

        proof = save_gguf(assistant.model, assistant.processor, options.out, notes=assistant.notes)
        if proof is None:
            print("Not compared with llama.cpp: pip install 'mmlm[llamacpp]' has it asked.")
        else:
            print(f"llama.cpp's next token about a fixed picture is the model's: {proof.token!r}.")
    else:
        target = None if options.to == "stock" else hub.stock_classes[options.to]()
        hub.save_stock(
            assistant.model, assistant.processor, options.out, target=target,
            notes=assistant.notes,
        )  # fmt: skip
    form = _FORMS.get(options.to, f"the class {options.to} of transformers")
    print(f"{options.out} holds the model as {form.split(';')[0]}.")


def _import_arguments(parser: Parser) -> None:
    parser.word(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder or Hub id of a stock class, or a checkpoint of LLaVA, TinyLLaVA, Bunny, "
        "MobileVLM, nanoVLM or Prismatic",
    )
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="a new folder")


def _import(options: Options) -> None:
    _refuse_existing(options.out)
    from mmlm import hub
    from mmlm.assistant import load

    hush()
    assistant = load(options.checkpoint, device="cpu")
    hub.save_mmlm(assistant.model, assistant.processor, options.out, notes=assistant.notes)
    print(
        "".join(f"Note: {note}.\n" for note in assistant.model.config.sources.get("notes", []))
        + f"{options.out} holds it as MMLM's own class. In a recipe: model: {{from: {options.out}}}"
    )


def _push_arguments(parser: Parser) -> None:
    parser.word("model", metavar="MODEL", help="a run or a model folder")
    parser.word("repo", metavar="REPO", help="where to: NAME/MODEL on the Hub")
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument("--force", action="store_true", help="replace what stands there")


def _push(options: Options) -> None:
    if not Path(options.model).is_dir():
        raise UsageError(f"mmlm push: there is no folder {options.model}.")
    from mmlm.hub import model_of_run, push_folder

    folder = Path(model_of_run(options.model))
    print(push_folder(folder, options.repo, force=options.force, private=options.private))


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds files already and is left as it is. Name a new folder.")


COMMANDS = {
    "export": Command(
        name="export",
        usage="MODEL --to FORMAT --out DIR",
        about="Write a model in another form.",
        arguments=_export_arguments,
        run=_export,
        examples=[
            ("mmlm export runs/quickstart --to delta --out small", "a few megabytes"),
            ("mmlm export runs/quickstart --to mmlm --out own", "MMLM's own class"),
            ("mmlm export runs/llava --to gguf --out small", "for llama.cpp and Ollama"),
            ("mmlm export own --to remote-code --out open", "opens where no MMLM is installed"),
        ],
    ),
    "import": Command(
        name="import",
        usage="CHECKPOINT --out DIR",
        about="Read a checkpoint that is a class of transformers, or of another project, and "
        "write\nit as MMLM's own class.",
        arguments=_import_arguments,
        run=_import,
        examples=[("mmlm import llava-hf/llava-1.5-7b-hf --out llava", "28 GB to download")],
    ),
    "push": Command(
        name="push",
        usage="MODEL REPO [options]",
        about="Upload a model, its card and its recipe to the Hugging Face Hub.",
        arguments=_push_arguments,
        run=_push,
        examples=[("mmlm push runs/quickstart me/my-vlm --private", "asks for no other settings")],
    ),
}
