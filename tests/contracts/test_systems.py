"""Every row of `docs/systems.yaml`: its tests exist, and what says `works` works when tiny."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmlm import load
from mmlm.cli.main import find_command
from mmlm.config import read_yaml
from mmlm.connectors import connectors
from mmlm.messages import Clip
from mmlm.modeling import MMLMForConditionalGeneration
from mmlm.recipes import list_recipes
from tests import tiny
from tests.contracts.system_names import CONNECTORS, ENCODERS, MODELS, OTHERS, WORK, names

ROOT = Path(__file__).parents[2]
ROWS = read_yaml(ROOT / "docs" / "systems.yaml")
KEYS = {
    "system",
    "class",
    "paper",
    "covers",
    "works",
    "missing",
    "model",
    "eval",
    "tiny",
    "without",
    "tests",
}


def test_no_system_stands_twice():
    names = [row["system"] for row in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["system"])
def test_a_row_names_tests_that_exist(row):
    assert set(row) <= KEYS
    assert row["tests"] if row["works"] is True else row["missing"]
    for named in row.get("tests", []):
        path, _, test = named.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {re.escape(test)}\(", text, re.MULTILINE), named


COMPOSED = [row for row in ROWS if "model" in row]


@pytest.mark.parametrize("row", COMPOSED, ids=lambda row: row["system"])
def test_the_words_of_a_row_are_read(row):
    connectors.read(row["model"]["connector"], origin=row["system"])


def test_a_row_is_a_model_or_a_measurement():
    options = find_command("eval").parser().format_help()
    for row in ROWS:
        given = ("model" in row) + ("eval" in row)
        assert given == 1 or (not given and row["works"] is False), row["system"]
        asked = row.get("eval", {})
        assert asked.get("benchmark", "beaf") in list_recipes("eval")
        assert asked.get("option", "--probe") in options


def composed(folder: Path, words: dict):
    """A tiny assistant of a row's words."""
    eye = {"use": "hf", "checkpoint": str(tiny.save_vision(folder / "clip")), "layer": -2}
    vision = words.get("vision", {})
    keys = ("image", "video", "reducer", "connector")
    parts = {key: words[key] for key in keys if key in words}
    # An encoder of its own kind replaces the tiny CLIP; other words are added to it.
    made = tiny.compose_tiny(folder, eye=vision if "use" in vision else eye | vision, **parts)
    learn_statistics(made.model.model.vision)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith("_gate"):  # what stands behind a closed gate neither shows nor learns
                weight.fill_(1.0)
    if made.model.model.router is not None:
        name_all_experts(made)
    return made


@torch.no_grad()
def name_all_experts(made):
    """Let an untrained language model choose all experts: its letters score by chance."""
    said, words = [], made.model.model.router.words
    hook = made.model.lm_head.register_forward_pre_hook(lambda _, given: said.append(given[0]))
    made.model(**inputs(made))
    hook.remove()
    asked = said[0][0, 0]  # where the answer to the question for experts would begin
    made.model.lm_head.weight[list(words.letters)] = asked
    made.model.lm_head.weight[words.none] = -asked


def learn_statistics(vision):
    """Let the batch norms of an untrained network see one batch.

    What they divide by is one otherwise, and nothing of the picture may come through them.
    """
    norms = [m for m in vision.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = None
    facts = vision.facts
    with torch.no_grad():
        vision(torch.randn(4, facts.channels, *facts.side, generator=torch.manual_seed(3)))
    for norm in norms:
        norm.eval()


def inputs(assistant, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one picture, or one clip where the model takes clips, and a few words."""
    looks = assistant.processor.image_processor
    picture = tiny.picture(seed, 40, 88)
    if assistant.model.config.video is not None:  # its last frames stand still
        frames = [tiny.picture(seed + number, 40, 88) for number in range(4)]
        picture = Clip((*frames, *frames[-1:] * 4))
    count = assistant.processor.count_tokens(picture)
    ids = [5, *[assistant.model.config.image_token_id] * count, 9, 11]
    return {"input_ids": torch.tensor([ids]), **looks.together([looks.look(picture)])}


def last_logits(assistant, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return assistant.model(**given).logits[0, -1]


FAST = ("RAD-DINO", "ChannelViT", "Registers", "LookHere", "ViT", "Swin", "EVA-02")
"""Encoders of which the fast tier builds one; the others are many and large."""

WORKING = [
    pytest.param(
        row,
        id=row["system"],
        marks=[pytest.mark.slow] * (row["class"] == "E" and row["system"] not in FAST),
    )
    for row in COMPOSED
    if row["works"] is True
]


def test_every_encoder_model_and_connector_has_a_row():
    found = {row["system"]: row["class"] for row in ROWS}
    kinds = {"E": ENCODERS, "M": MODELS, "C": CONNECTORS}
    for kind, text in kinds.items():
        missing = {name for name in names(text) if found.get(name) != kind}
        assert not missing, f"{kind}: {sorted(missing)}"
    assert names(OTHERS) <= set(found)
    working = {row["system"] for row in ROWS if row["works"] is True}
    assert names(WORK) <= working


@pytest.mark.parametrize("row", WORKING)
def test_a_row_that_works_sees_learns_and_comes_back(row, tmp_path):
    made = composed(tmp_path, row.get("tiny", row["model"]))
    given = inputs(made)
    with torch.no_grad():
        first, other = last_logits(made, given), last_logits(made, inputs(made, 1))
    # Another picture moves the answer: beyond rounding, which is below 1e-5 here.
    assert (first - other).abs().max() > 1e-4

    parameters = dict(made.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    learning = {n for n in parameters if MMLMForConditionalGeneration.part_of(n) == "connector"}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learning)
    optimiser = torch.optim.SGD([parameters[name] for name in learning], lr=1.0)
    last_logits(made, given).log_softmax(-1)[7].neg().backward()
    optimiser.step()
    moved = {name for name, p in parameters.items() if not p.equal(before[name])}
    # The same number added to every score changes no softmax: the bias of keys may stand still.
    idle = {f"model.connector.{n}" for n in made.model.model.connector.idle_parameters()}
    assert {n for n in learning - idle if not n.endswith("key.bias")} <= moved <= learning

    with torch.no_grad():
        after = last_logits(made, given)
        assert not after.equal(first)
        made.save(tmp_path / "saved")
        back = load(tmp_path / "saved", device="cpu")
        # A stock class may hold one linear map as two, which rounds once more.
        torch.testing.assert_close(last_logits(back, given), after, rtol=0, atol=1e-5)
        plain = composed(tmp_path / "plain", row["without"])
        assert (last_logits(plain, inputs(plain)) - first).abs().max() > 1e-4
