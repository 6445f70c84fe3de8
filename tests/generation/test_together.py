"""Answers that grow together are those that each would get alone."""

from __future__ import annotations

import pytest
import torch

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.generation.together import Together
from mmlm.messages import user
from tests.tiny import TEXT_KINDS, compose_tiny, picture

SETTINGS = GenerationSettings(max_new_tokens=24)
TALKS = [
    [user("What is this, and what is it not?", [picture(1)])],
    [user("And?")],
    [user("Both of them?", [picture(2), picture(3)])],
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


class Crowd:
    """Runs answers together, as a server does."""

    def __init__(self, sessions):
        self.sessions, self.together = sessions, Together(sessions)
        self.said, self.growing, self.ended = {}, {}, {}

    def join(self, name, talk, settings=SETTINGS, **options):
        answering = self.sessions.begin(talk, settings, **options)
        self.said[name] = []
        self.growing[name] = answering
        self.read(name, self.sessions.prefill(answering))

    def read(self, name, logits):
        answering = self.growing[name]
        if isinstance(logits, Exception):
            self.leave(name, logits)
            return
        piece = answering.take(logits)
        self.said[name] += [] if piece is None else [piece.text]
        if answering.ended:
            self.said[name].append(answering.rest().text)
            self.leave(name, answering.usage)

    def leave(self, name, how):
        self.together.part()
        self.ended[name] = how
        self.sessions.end(self.growing.pop(name))

    def step(self):
        names = list(self.growing)
        steps = self.together.step([self.growing[name] for name in names])
        for name, logits in zip(names, steps, strict=True):
            self.read(name, logits)

    def finish(self):
        while self.growing:
            self.step()
        return {name: "".join(said).strip() for name, said in self.said.items()}


@pytest.mark.parametrize("language", TEXT_KINDS)
def test_answers_together_equal_answers_alone(tmp_path, language):
    tiny = compose_tiny(tmp_path, "siglip", language)
    crowd = Crowd(Sessions(tiny.model, tiny.processor))
    for name, talk in enumerate(TALKS):
        crowd.join(name, talk)
    told = crowd.finish()
    for name, talk in enumerate(TALKS):
        alone, usage = Sessions(tiny.model, tiny.processor).answer(talk, SETTINGS)
        assert told[name] == alone
        assert crowd.ended[name].num_tokens == usage.num_tokens


def test_who_joins_late_or_leaves_early_changes_nothing_for_the_others(tiny):
    sessions = Sessions(tiny.model, tiny.processor)
    alone = [sessions.answer(talk, SETTINGS)[0] for talk in TALKS]
    crowd = Crowd(Sessions(tiny.model, tiny.processor))
    crowd.join("a", TALKS[0])
    for _ in range(3):
        crowd.step()
    crowd.join("b", TALKS[1])
    crowd.step()
    crowd.join("c", TALKS[2], GenerationSettings(max_new_tokens=2))
    crowd.step()
    crowd.leave("a", "gone")
    crowd.join("d", TALKS[2])
    told = crowd.finish()
    assert told["b"] == alone[1]
    assert told["d"] == alone[2]
    # What the one that left had heard is the beginning of its answer, and its cache is whole.
    assert alone[0].startswith(told["a"])
    again, usage = crowd.sessions.answer(TALKS[0], SETTINGS)
    assert again == alone[0]
    assert usage.num_cached_tokens == usage.num_prompt_tokens - 1


def test_one_forward_serves_all(tiny):
    crowd = Crowd(Sessions(tiny.model, tiny.processor))
    calls = []
    for name, talk in enumerate(TALKS):
        crowd.join(name, talk)
    handle = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        crowd.step()
        assert len(calls) == 1
    finally:
        handle.remove()


def test_a_step_that_fails_for_all_is_tried_for_each(tiny):
    crowd = Crowd(Sessions(tiny.model, tiny.processor))
    alone = [crowd.sessions.answer(talk, SETTINGS)[0] for talk in TALKS]
    crowd.sessions.forget()
    for name, talk in enumerate(TALKS):
        crowd.join(name, talk)
    layer = tiny.model.model.language.layers[1]

    def full(module, args, kwargs):
        if kwargs.get("hidden_states", args[0] if args else None).shape[0] > 1:
            raise MemoryError

    handle = layer.register_forward_pre_hook(full, with_kwargs=True)
    try:
        crowd.step()  # breaks behind the first layer, whose cache has grown already
    finally:
        handle.remove()
    assert list(crowd.finish().values()) == alone


def test_a_fault_of_one_answer_is_not_that_of_the_others(tiny, monkeypatch):
    crowd = Crowd(Sessions(tiny.model, tiny.processor))
    alone = crowd.sessions.answer(TALKS[1], SETTINGS)[0]
    for name, talk in enumerate(TALKS[:2]):
        crowd.join(name, talk)
    poisoned = crowd.growing[0]
    layer = tiny.model.lm_head

    def poison(module, args, output):
        if output.shape[0] == 2 and 0 in crowd.growing:
            output[crowd.together._group.index(poisoned)] = torch.nan
        return output

    handle = layer.register_forward_hook(poison)
    try:
        crowd.step()
    finally:
        handle.remove()
    assert "not finite" in str(crowd.ended[0])
    assert crowd.finish()[1] == alone
