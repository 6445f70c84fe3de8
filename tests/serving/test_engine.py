from __future__ import annotations

import threading
import time

import pytest

from mmlm.errors import ImageError, MMLMError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine, in_words
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny):
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny", max_together=2)


LONG = GenerationSettings(max_new_tokens=400, stop=())
SHORT = GenerationSettings(max_new_tokens=8)


def long_talk(tiny):
    """Return a question whose answer the tiny model does not end before many tokens."""
    for number in range(40):
        talk = [user(f"{number}?", [picture(number)])]
        if Sessions(tiny.model, tiny.processor).answer(talk, LONG)[1].num_tokens > 150:
            return talk
    return pytest.fail("no question has a long answer")


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not happen within ten seconds")


def in_thread(call):
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_answers_at_the_same_time_are_those_given_alone(tiny, engine):
    talks = [[user(f"What is {n}?", [picture(n)])] for n in range(5)]
    told = [[] for _ in talks]

    def ask(number):
        for piece in engine.stream(talks[number], SHORT, client=str(number)):
            told[number].append(piece.text)

    threads = [in_thread(lambda n=n: ask(n)) for n in range(5)]
    for thread in threads:
        thread.join(60)
    for talk, said in zip(talks, told, strict=True):
        alone = Sessions(tiny.model, tiny.processor).answer(talk, SHORT)[0]
        assert "".join(said).strip() == alone
    until(lambda: engine._worker is None)
    assert engine.is_idle


def test_a_client_with_many_requests_does_not_keep_another_one_waiting(tiny):
    engine, order = Engine(Sessions(tiny.model, tiny.processor), name="t", max_together=1), []
    first = engine.stream(long_talk(tiny), LONG, client="a")
    next(first)

    def ask(client):
        for _ in engine.stream([user("What?")], SHORT, client=client):
            pass
        order.append(client)

    threads = []
    for number, client in enumerate("aaab"):
        threads.append(in_thread(lambda client=client: ask(client)))
        until(lambda number=number: engine.num_waiting > number)
    first.close()
    for thread in threads:
        thread.join(60)
    assert order.index("b") <= 1


def test_who_leaves_ends_the_answer_within_one_token_and_keeps_the_cache(tiny, engine):
    talk, steps = long_talk(tiny), []
    handle = tiny.model.register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = engine.stream(talk, LONG)
        for _ in range(3):
            next(pieces)
        pieces.close()
        after = len(steps)
        time.sleep(0.1)
        assert len(steps) == after
        assert engine.is_idle
        last = list(engine.stream(talk, SHORT))[-1]
        assert last.usage.num_cached_tokens == last.usage.num_prompt_tokens - 1
    finally:
        handle.remove()


def test_who_stops_waiting_leaves_the_line(tiny):
    engine = Engine(Sessions(tiny.model, tiny.processor), name="t", max_together=1)
    first, stop, got = engine.stream(long_talk(tiny), LONG), threading.Event(), []
    next(first)
    thread = in_thread(lambda: got.extend(engine.stream([user("What?")], SHORT, stop)))
    until(lambda: engine.num_waiting == 1)
    stop.set()
    thread.join(10)
    assert (got, engine.num_waiting) == ([], 0)
    first.close()


def test_a_fault_is_that_of_one_request(engine):
    with pytest.raises(ImageError):
        list(engine.stream([user("What?", ["nowhere.png"])], SHORT))
    with pytest.raises(MMLMError, match="tokens"):
        list(engine.stream([user("a" * 5000)], SHORT))
    assert engine.is_idle
    assert list(engine.stream([user("What?")], SHORT))


def test_the_model_may_be_used_for_something_else_between_two_tokens(tiny, engine):
    pieces = engine.stream(long_talk(tiny), LONG)
    next(pieces)
    assert engine.between(lambda: threading.current_thread() is engine._worker)
    with pytest.raises(ImageError):
        engine.between(lambda: (_ for _ in ()).throw(ImageError("no")).send(None))
    next(pieces)
    pieces.close()


def test_faults_become_words_without_inner_details(caplog):
    assert in_words(ImageError("The picture is empty.")) == "The picture is empty."
    assert "ran out of memory" in in_words(MemoryError())
    words = in_words(KeyError("/home/somebody/secret"))
    assert "KeyError" in words
    assert "secret" not in words
    assert "answering failed" in caplog.text
