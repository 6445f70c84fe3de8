"""A model behind our own server answers as it does in memory; refusals end the run."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate
from mmlm.evaluation.asking.endpoint import EndpointBackend, data_url
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.scorers import Row, Target, read_scorer
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.serving.engine import Engine
from tests.serving.live import serving
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


def test_our_own_server_gives_the_answers_of_the_model(tiny, tmp_path):
    path = tmp_path / "x.png"
    picture(1).save(path)
    item = Item("1", "x", {}, (path,), ("k",), Target(("a",)))
    shown = [Case("made", "image", item, text, (path,), ("k",), ()) for text in ("What?", "Who?")]
    blind = Case("made", "blind", item, "What?", (), (), ())
    engine = Engine(Sessions(tiny.model, tiny.processor), name="tiny")
    with serving([engine]) as address:
        backend = EndpointBackend(f"{address}/v1")
        assert backend.model == "tiny"
        answers = backend.answer([*shown, blind], GenerationSettings(max_new_tokens=8))
    wanted = [tiny.answer(case.prompt, case.images, max_new_tokens=8) for case in (*shown, blind)]
    assert answers == wanted


class Server:
    """A real server that says what a test wants, and counts what it was asked."""

    def __init__(self, replies):
        self.replies, self.asked = list(replies), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self):
                length = int(self.headers.get("Content-Length") or 0)
                outer.asked.append(json.loads(self.rfile.read(length) or b"null"))
                models = {"data": [{"id": "m", "created": len(outer.asked)}]}
                is_list = self.path.endswith("/models")
                status, body = (200, models) if is_list else outer.replies.pop(0)
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _reply  # noqa: N815

            def log_message(self, *words):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *details):
        self._server.shutdown()
        self._server.server_close()


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


ITEM = Item("7", "x", {}, (), (), Target(("a",)))
ASKED = [Case("made", "image", ITEM, "What?", (), (), ())]


def backend_of(server, **options):
    return EndpointBackend(server.url, "m", wait_seconds=0.01, **options)


def test_a_busy_server_is_asked_again():
    with Server([(503, {}), (429, {}), says("a cat")]) as server:
        assert backend_of(server).answer(ASKED, GenerationSettings()) == ["a cat"]


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(400, {"error": "too many images"})], "says 400: .*too many images"),
        ([(200, {"choices": []})], "no message"),
        ([(500, {})] * 5, "says 500"),
    ],
)
def test_a_refusal_ends_the_run_with_what_was_said(replies, message):
    with Server(replies) as server, pytest.raises(EvaluationError, match=message):
        backend_of(server).answer(ASKED, GenerationSettings())


def test_a_server_that_is_not_there_is_an_error():
    with Server([]) as server:
        url = server.url
    with pytest.raises(EvaluationError, match="cannot be reached"):
        EndpointBackend(url, "m", wait_seconds=0.001)


def test_an_unknown_name_and_settings_that_no_api_has_are_refused():
    with Server([]) as server:
        with pytest.raises(EvaluationError, match="serves no model 'x'; it lists m"):
            EndpointBackend(server.url, "x")
        with pytest.raises(EvaluationError, match="num_beams"):
            backend_of(server).answer(ASKED, GenerationSettings(num_beams=2))
        with pytest.raises(EvaluationError, match="no likelihoods"):
            backend_of(server).likelihoods(ASKED)


def test_the_same_model_at_the_same_address_is_found_again():
    with Server([]) as server:
        assert backend_of(server).weights == backend_of(server).weights


def test_an_evaluation_runs_through_an_address(colours, tmp_path):
    with Server([says("red")] * 24) as server:
        result = evaluate(
            backend_of(server), colours / "colours.yaml", tmp_path / "out", quiet=True,
            conditions=("image",), with_report=False,
        )  # fmt: skip
    assert result.score("colours", "name").score == pytest.approx(2 / 12)


def test_pictures_travel_as_they_are_or_as_png(tmp_path):
    path = tmp_path / "x.jpg"
    picture(0).save(path)
    assert data_url(path).startswith("data:image/jpeg;base64,")
    assert data_url(picture(0)).startswith("data:image/png;base64,")
    with pytest.raises(EvaluationError, match="cannot be shown"):
        data_url(b"nothing")


class TestAJudge:
    def scorer(self, server, cache):
        words = {"use": "judge", "model": "m", "endpoint": server.url, "cache": str(cache)}
        return read_scorer(words, origin="test")

    def rows(self, answers):
        target = Target(("42",), facts={"question": "How many?"})
        return [Row(str(n), str(n), "", (0.0, a), target) for n, a in enumerate(answers)]

    def test_marks_are_read_and_kept(self, tmp_path):
        with Server([says("0.5"), says("Number: 1.0")]) as server:
            scorer = self.scorer(server, tmp_path)
            first = [scorer.settle([a], self.rows([a]))[0] for a in ("about 40", "42")]
            assert [mark.score for mark in first] == [0.5, 1.0]
            asked = len(server.asked)
            again = scorer.settle(["about 40", "42"], self.rows(["about 40", "42"]))
            assert (again, len(server.asked)) == (first, asked)
            assert scorer.label == "judge@1/m"

    def test_a_verdict_without_a_number_is_unreadable_and_nothing_is_not_asked(self, tmp_path):
        with Server([says("splendid")]) as server:
            marks = self.scorer(server, tmp_path).settle(["x", " "], self.rows(["x", " "]))
            assert marks == [(0.0, None), (0.0, None)]
            assert len(server.asked) == 1
