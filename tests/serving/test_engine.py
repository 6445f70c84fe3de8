from __future__ import annotations

import threading
import time

import pytest

from mmlm.errors import ImageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine, Turns, in_words
from tests.tiny import compose_tiny, picture


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    turns, order, threads = Turns(), [], []
    assert turns.take()

    def wait(number):
        turns.take()
        order.append(number)
        turns.give()

    for number in range(5):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while turns.num_waiting <= number:
            time.sleep(0.001)
    turns.give()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]
    assert turns.take()


def test_who_stops_waiting_leaves_the_line():
    turns, stop, got = Turns(), threading.Event(), []
    turns.take()
    thread = threading.Thread(target=lambda: got.append(turns.take(stop)))
    thread.start()
    stop.set()
    thread.join(5)
    assert got == [False]
    assert turns.num_waiting == 0
    turns.give()
    assert turns.take()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tiny = compose_tiny(tmp_path_factory.mktemp("tiny"))
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny")


def test_a_closed_answer_frees_the_turn(engine):
    settings = GenerationSettings(max_new_tokens=4)
    pieces = engine.stream([user("What?", [picture()])], settings)
    next(pieces)
    assert not engine.turns.take(_set())
    pieces.close()
    assert engine.turns.take()
    engine.turns.give()


def test_a_fault_frees_the_turn(engine):
    with pytest.raises(ImageError):
        list(engine.stream([user("What?", ["nowhere.png"])], GenerationSettings()))
    assert engine.turns.take()
    engine.turns.give()


def test_faults_become_words_without_inner_details(caplog):
    assert in_words(ImageError("The picture is empty.")) == "The picture is empty."
    assert "ran out of memory" in in_words(MemoryError())
    words = in_words(KeyError("/home/somebody/secret"))
    assert "KeyError" in words
    assert "secret" not in words
    assert "answering failed" in caplog.text


def _set():
    event = threading.Event()
    event.set()
    return event
