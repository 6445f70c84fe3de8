"""Whatever the papers of the house show is run, read or parsed here.

    ```python   blocks of one page run one after another in one namespace, in a folder that
                `prepare` fills; the Hub's parts are replaced by tiny random ones of the same kind
    ```yaml     a recipe, a benchmark, or data: read by the config that it belongs to
    ```toml     parsed
    ```console  and ```bash: command lines of ours are parsed by the command that they call,
                and targets of make must exist

A block after `<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmlm.cli.main import COMMANDS, find_command
from mmlm.config import parse_yaml
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+? -->\n+)?^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Parts that the pages name, and the tiny ones that stand in for them.
STAND_INS = {
    "google/siglip2-base-patch16-256": "parts/siglip",
    "openai/clip-vit-base-patch32": "parts/clip",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "parts/smollm",
}


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that are not left out."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, match.start()) + 1, match["language"], match["text"])
        for match in BLOCK.finditer(text)
        if not match["skip"]
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def _named(*languages: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for block in BLOCKS
        if block.language in languages
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: parts, a trained model, pictures, data."""
    folder = tmp_path_factory.mktemp("docs")
    for kind in ("clip", "siglip"):
        tiny.save_vision(folder / "parts" / kind, kind)
    tiny.save_language(folder / "parts" / "smollm", "smollm")
    rows = []
    for index in range(8):
        picture = folder / "pictures" / f"{index}.png"
        picture.parent.mkdir(exist_ok=True)
        tiny.picture(index).save(picture)
        row = {"image": f"pictures/{index}.png", "question": "What is this?"}
        rows.append({**row, "answer": f"Thing {index}.", "thing": str(index)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures.jsonl").write_text(text)
    (folder / "questions.jsonl").write_text(text)
    (folder / "questions.yaml").write_text(
        "dataset: {path: questions.jsonl}\nscorer: keyword\ngenerate: {max_new_tokens: 4}\n"
    )
    tiny.picture(1).save(folder / "photo.jpg")
    tiny.compose_tiny(folder / "made").save(folder / "runs" / "quickstart" / "model")
    return folder


def _with_stand_ins(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python":
            # Lines of the page, so that a traceback points into it.
            code = "\n" * block.line + _with_stand_ins(block.text)
            exec(compile(code, block.page, "exec"), namespace)


@pytest.mark.parametrize("block", _named("yaml"))
def test_the_yaml_of_a_page_is_read_by_its_config(block):
    from mmlm.evaluation import BenchmarkConfig
    from mmlm.training import Recipe

    values = parse_yaml(block.text, origin=block.page)
    assert isinstance(values, dict), "a block holds keys"
    if "dataset" in values:
        BenchmarkConfig.from_dict(values, origin=block.page)
    # A piece of a recipe, for reading, is put into a whole one.
    elif {"model", "stages", "run"} & set(values):
        Recipe.from_dict({**PIECES, **values}, origin=block.page)
        _check_parts(values.get("model", {}))
    else:
        pytest.fail(f"{sorted(values)} belong to no config; name the language of the block text")


STAGE = {"name": "align", "learn": ["connector.*"], "data": "a.jsonl", "until": {"epochs": 1}}
PIECES: dict[str, Any] = {"model": {"vision": {}, "language": {}}, "stages": [STAGE]}


def _check_parts(model: dict[str, Any]) -> None:
    """Let every part of a `model:` read its own settings."""
    from mmlm.cli.parts import load_registry

    for kind, words in model.items():
        if kind != "from":
            load_registry(kind).read(words, origin=f"model.{kind}")


@pytest.mark.parametrize("block", _named("toml"))
def test_the_toml_of_a_page_parses(block):
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("block", _named("bash", "console", "text"))
def test_the_command_lines_of_a_page_are_known(block):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets
        if "mmlm" in words[:1] or words[-1:] == ["mmlm"]:
            name, *rest = words[1:] or ["--help"]
            if name in COMMANDS:
                find_command(name).read(rest)


def _table(config: Any) -> str:
    """Return the settings of a config as a Markdown table."""
    lines = ["| key | default | |", "|---|---|---|"]
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        told = "required" if field.is_required() else f"`{json.dumps(default)}`"
        lines.append(f"| `{name}` | {told} | {' '.join((field.description or '').split())} |")
    return "\n".join(lines)


FIELDS = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Fill the tables of settings of a page; `python -m tests.test_docs` writes them."""
    from mmlm.training import recipe

    return FIELDS.sub(lambda m: f"{m[1]}{_table(getattr(recipe, m[2]))}\n{m[3]}", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_settings_are_those_of_the_configs(page):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m tests.test_docs"


def test_every_command_is_shown_on_some_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if not re.search(rf"mmlm {name}\b", text)]
    assert missing == []


def test_every_link_between_pages_leads_somewhere():
    lost = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert lost == []


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_tables(each.read_text(encoding="utf-8")), encoding="utf-8")
