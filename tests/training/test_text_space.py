"""A new CLIP under an old assistant: its projection learns from texts, and all else stays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmlm.assistant import load
from mmlm.errors import ConfigError
from mmlm.hub import upgrade
from mmlm.language.sentences import SentenceConfig
from mmlm.training import train
from mmlm.training.objectives import objectives
from mmlm.vision import encoders
from tests import two_towers
from tests.tiny import compose_tiny, picture
from tests.training.tiny_run import tiny_recipe

TEXTS = ["".join(np.random.default_rng(n).choice(list("abcdefgh "), 9)) for n in range(64)]


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """Return the folders of two CLIPs, an old assistant, and the words of its new encoder."""
    place = tmp_path_factory.mktemp("clips")
    old = two_towers.clip()
    two_towers.save_clip(place / "old", old)
    two_towers.save_clip(place / "new", two_towers.turned(old, 24))
    assistant = compose_tiny(place, eye={"use": "embedding", "checkpoint": str(place / "old")})
    assistant.save(place / "assistant")
    words = {"use": "embedding", "checkpoint": str(place / "new"), "into": str(place / "old")}
    return place, assistant, {**words, "depth": 1}


def seen(assistant, count: int = 8) -> torch.Tensor:
    """Return what the encoder makes of some pictures, and what the language model says."""
    logits = []
    for number in range(count):
        looks = assistant.processor.image_processor
        ids = torch.tensor([[5, assistant.model.config.image_token_id, 9, 11]])
        given = looks.together([looks.look(picture(number))])
        with torch.no_grad():
            logits.append(assistant.model(input_ids=ids, **given).logits[0, -1])
    return torch.stack(logits)


def batch(assistant) -> dict[str, torch.Tensor]:
    """Return texts as labels, in one packed row."""
    line: list[int] = []
    for text in TEXTS:
        line += [-100, *assistant.processor.tokenizer(text).input_ids]
    return {"labels": torch.tensor([line])}


def test_an_embedding_is_what_transformers_compares_with_texts(upgraded):
    place, _, _ = upgraded
    eye = encoders.read({"use": "embedding", "checkpoint": str(place / "old")}, origin="x").load()
    stock = two_towers.CLIPModel.from_pretrained(place / "old")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1))
    text = SentenceConfig(checkpoint=str(place / "old")).load()
    ids = text.tokenizer(["a b", "hgf"], return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = stock(pixel_values=pixels, **ids)
        torch.testing.assert_close(eye(pixels).values, whole.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(text(["a b", "hgf"]), whole.text_embeds, rtol=0, atol=1e-6)


def test_a_map_learnt_on_texts_alone_lets_the_old_assistant_see_with_the_new_clip(upgraded):
    place, old, words = upgraded
    model, processor, kept = upgrade(place / "assistant", {"vision": words})
    assert kept[-1] == "connector: 4 of 4 tensors kept"
    new, before = type(old)(model, processor), model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    wanted, first = seen(old), seen(new)
    objective = objectives.read({"use": "text_space"}, origin="x").build(loss_weight="token")
    objective.prepare(model, processor.tokenizer, None)
    projection = model.requires_grad_(False).model.vision.projection.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        projection.parameters(), max_iter=60, line_search_fn="strong_wolfe"
    )
    given = batch(new)

    def step():
        optimiser.zero_grad()
        loss = objective.loss(model, given, len(TEXTS))
        loss.backward()
        return loss

    optimiser.step(step)
    assert float(step().detach()) < 1e-3
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {"model.vision.projection.0.weight", "model.vision.projection.0.bias"}
    spread = (wanted - wanted.mean(0)).abs().mean()  # pictures differ by so much
    assert (first - wanted).abs().mean() > 2 * spread
    assert (seen(new) - wanted).abs().mean() < 0.6 * spread
    pixels = torch.randn(4, 3, 32, 32, generator=torch.manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.model.vision(pixels).values, old.model.model.vision(pixels).values
    assert cosine_similarity(ours, theirs).min() > 0.99


@pytest.mark.slow
def test_a_stage_learns_the_projection_and_opens_no_picture(upgraded, tmp_path):
    place, _, words = upgraded
    rows = [{"image": f"nowhere{n}.png", "question": "?", "answer": t} for n, t in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tiny_recipe(tmp_path)
    recipe["model"] = {"from": str(place / "assistant"), "vision": words}
    recipe["stages"] = [
        {"name": "texts", "learn": ["vision.projection.*"], "data": str(tmp_path / "texts.jsonl"),
         "until": {"epochs": 2}, "step_tokens": 1024, "peak_lr": 3e-2,
         "objective": {"use": "text_space"}},
    ]  # fmt: skip
    (stage,) = train(recipe, tmp_path / "run").stages
    assert stage.samples == 2 * len(TEXTS)
    assert stage.dropped == 0
    assert stage.last_loss < stage.first_loss
    back = load(tmp_path / "run", device="cpu")
    assert back.model.model.vision.projection is not None
    assert back.answer("What?", [picture(1)], max_new_tokens=2) is not None


def test_an_encoder_without_a_projection_is_refused(upgraded):
    _, old, _ = upgraded
    objective = objectives.read({"use": "text_space"}, origin="x").build(loss_weight="token")
    with pytest.raises(ConfigError, match=r"learn: \[vision\.projection\.\*\]"):
        objective.prepare(old.model, old.processor.tokenizer, None)
