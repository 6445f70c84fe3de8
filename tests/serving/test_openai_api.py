"""The API, asked over HTTP: what clients get, and what each limit answers."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import warnings

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mmlm.errors import CheckpointError, ConfigError
from mmlm.serving.fetch import Fetcher, FetchError, FetchRules
from mmlm.serving.openai_api import ApiLimits, build_api
from tests.images.test_decode import promised_png
from tests.serving.fakes import FakeSpeaker


def png(width=8, height=8):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def shown(data=None):
    """Return a picture as a part of a message."""
    url = "data:image/png;base64," + base64.b64encode(png() if data is None else data).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def said(text):
    return {"type": "text", "text": text}


def body(*parts, **more):
    content = list(parts) if parts else "What?"
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **more}


def client_of(*speakers, **options):
    return TestClient(build_api(list(speakers) or [FakeSpeaker()], **options))


@pytest.fixture
def client():
    return client_of()


def ask(client, **more):
    return client.post("/v1/chat/completions", **{"json": body(), **more})


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] for line in lines]


def test_models_are_listed(client):
    told = client.get("/v1/models").json()
    assert [row["id"] for row in told["data"]] == ["fake"]
    assert client.get("/v1/models/fake").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404


def test_an_answer_has_text_reason_and_usage(client):
    told = ask(client, json=body(shown(), said("What?"), shown())).json()
    assert told["object"] == "chat.completion"
    (choice,) = told["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "1 turns, 2 pictures: What?", "refusal": None,
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    assert told["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done(client):
    request = body(stream=True, stream_options={"include_usage": True})
    response = ask(client, json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    *rows, done = events(response)
    assert done == "[DONE]"
    first, *middle, last, usage = [json.loads(row) for row in rows]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(row["choices"][0]["delta"]["content"] for row in middle)
    assert text == "1 turns, 0 pictures: What?"
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
    assert len({row["id"] for row in (first, last, usage)}) == 1


def test_several_answers_to_one_question(client):
    told = ask(client, json=body(n=3)).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    rows = [json.loads(row) for row in events(ask(client, json=body(n=2, stream=True)))[:-1]]
    assert [r["choices"][0]["index"] for r in rows if r["choices"][0]["finish_reason"]] == [0, 1]


def test_settings_reach_the_model():
    speaker = FakeSpeaker()
    client = client_of(speaker, limits=ApiLimits(max_new_tokens=100))
    ask(client, json=body(temperature=0.5, top_p=0.9, stop="a", seed=3, max_tokens=7))
    ask(client, json=body(max_tokens=7, max_completion_tokens=9, stop=["a", ""], n=2, seed=-1))
    ask(client, json=body(max_tokens=10**6, top_k=-1, repetition_penalty=1.1))
    first, second, third, last = speaker.settings
    assert (first.temperature, first.top_p, first.stop, first.seed) == (0.5, 0.9, ("a",), 3)
    assert first.max_new_tokens == 7
    assert (second.max_new_tokens, second.stop, second.temperature) == (9, ("a",), 0.0)
    assert (second.seed, third.seed) == (2**63 - 1, 0)
    assert (last.max_new_tokens, last.top_k, last.repetition_penalty) == (100, 0, 1.1)


def test_low_detail_shrinks_a_large_picture_and_no_other():
    speaker = FakeSpeaker()
    large, small = shown(png(1024, 600)), shown(png(300, 200))
    high = json.loads(json.dumps(large))
    high["image_url"]["detail"] = "high"
    assert ask(client_of(speaker), json=body(large, high, small)).status_code == 200
    low, as_it_was, untouched = speaker.heard[0][0].images
    assert low.size == (512, 300)
    assert (as_it_was, untouched) == (png(1024, 600), png(300, 200))


def test_json_is_asked_of_the_model_and_clients_are_told_apart():
    speaker = FakeSpeaker()
    client = client_of(speaker, keys=["first", "second"])
    for key, form in (("first", "json_object"), ("second", "text")):
        request = body(response_format={"type": form})
        assert ask(client, json=request, headers={"authorization": f"Bearer {key}"}).is_success
    assert speaker.forms == [True, False]
    assert len(set(speaker.clients)) == 2


def test_roles_and_words_of_clients_are_understood():
    speaker = FakeSpeaker()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [said("One"), shown(), said("two?")], "name": "anna"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And?"},
    ]
    request = {"messages": messages, "user": "anna", "metadata": {"a": 1}, "logit_bias": None}
    assert ask(client_of(speaker), json=request).status_code == 200
    heard = speaker.heard[0]
    assert [turn.role for turn in heard] == ["system", "user", "assistant", "user"]
    assert heard[1].text == "Onetwo?"
    assert len(heard[1].images) == 1


def test_log_probabilities(client):
    told = ask(client, json=body(logprobs=True, top_logprobs=2)).json()
    content = told["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert content[0]["logprob"] == -0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "What?"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "user was expected"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has no image_url"),
        ({"messages": [{"role": "system", "content": [shown()]}]}, "only users"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n:"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "no tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"frequency_penalty": 0.5}, "repetition_penalty"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, change, words):
    response = ask(client, json={**body(), **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}" * 9])
def test_a_body_that_is_no_request_is_a_400(client, content):
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_what_was_sent_is_not_given_back(client):
    response = ask(client, json=body(temperature="my secret words"))
    assert "secret" not in response.text


def test_unknown_models_paths_and_methods_get_json(client):
    for response, status in (
        (ask(client, json={**body(), "model": "other"}), 404),
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/chat/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert response.headers["allow"] == "POST"
    assert client_of(FakeSpeaker("a"), FakeSpeaker("b")).post(
        "/v1/chat/completions", json={**body(), "model": ""}
    ).status_code == 404  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (png(64, 64)[:-30], "damaged or truncated"),
        (png(14000, 14000), "196000000|14000 x 14000"),
    ],
    ids=["empty", "text", "svg", "truncated", "bomb"],
)
def test_bad_pictures_are_named(client, data, words):
    response = ask(client, json=body(shown(data)))
    assert response.status_code == 400
    error = response.json()["error"]
    assert any(word in error["message"] for word in words.split("|")), error
    assert error["code"] == "image"


def test_a_picture_of_196_megapixels_is_refused_from_its_header(client, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert len(png(14000, 14000)) < 50_000
    assert ask(client, json=body(shown(png(14000, 14000)))).status_code == 400


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_what_pillow_only_warns_of_is_refused(client, action):
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        response = ask(client, json=body(shown(promised_png(12_000, 10_000))))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "image")
    assert "pixels" in response.json()["error"]["message"]


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:8000/"])
def test_no_local_path_is_read_and_no_address_of_this_machine_asked(client, url):
    response = ask(client, json=body({"type": "image_url", "image_url": url}))
    assert response.status_code == 400
    assert "is not an address that pictures are taken from" in response.json()["error"]["message"]


def test_remote_pictures_are_off_and_unfetchable_ones_are_422():
    remote = {"type": "image_url", "image_url": {"url": "https://pictures.example/a.png"}}
    response = ask(client_of(), json=body(remote))
    assert (response.status_code, "off on this server" in response.text) == (400, True)

    class Gone(Fetcher):
        def fetch(self, url):
            raise FetchError("pictures.example answered with status 404.", 422)

    assert ask(client_of(fetcher=Gone()), json=body(remote)).status_code == 422
    small = client_of(rules=FetchRules(max_bytes=10))
    assert ask(small, json=body(shown())).status_code == 413


def test_pictures_letters_and_bytes_are_limited():
    limits = ApiLimits(max_images=2, max_letters=20, max_body_bytes=2000, max_pixels=100)
    client = client_of(limits=limits)
    assert "3 pictures; the limit is 2" in ask(client, json=body(*[shown()] * 3)).text
    assert "21 letters; the limit is 20" in ask(client, json=body(said("a" * 21))).text
    assert ask(client, json=body(shown(png(11, 10)))).status_code == 400
    assert ask(client, json=body(said("a" * 3000))).status_code == 413


def test_a_body_without_a_length_is_counted_as_it_comes():
    client = client_of(limits=ApiLimits(max_body_bytes=2000))
    headers = {"content-type": "application/json"}
    pieces = (b" " * 500 for _ in range(1000))
    response = client.post("/v1/chat/completions", content=pieces, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "A request may have 2,000 bytes."


def test_keys_are_needed_where_keys_are_set():
    client = client_of(keys=["first", "second"])
    for header in ("", "Bearer wrong", "Basic first", "Bearer", "Bearer first second", "Bearer é"):
        headers = {"authorization": header.encode("latin-1")}
        for path in ("/v1/models", "/metrics"):
            response = client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        assert ask(client, headers=headers).status_code == 401
    assert ask(client, headers={"authorization": "Bearer second"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_faults_of_the_model_have_their_status():
    for fault, status, words in (
        (MemoryError(), 503, "ran out of memory"),
        (ConfigError("Beams cannot be streamed."), 400, "Beams"),
        (CheckpointError("The weights are damaged."), 500, "damaged"),
        (KeyError("/home/secret"), 500, "KeyError"),
    ):
        client = client_of(FakeSpeaker(fault=fault))
        response = ask(client, json=body(said("What is this?")))
        assert response.status_code == status
        assert words in response.json()["error"]["message"]
        assert "secret" not in response.text
        assert client.app.state.api.num_open == 0
        assert ask(client, json=body()).status_code == status  # the server lives


def test_a_fault_in_the_middle_of_a_stream_is_an_event():
    client = client_of(FakeSpeaker(fault=MemoryError()))
    *_, error, done = events(ask(client, json=body(said("What is this?"), stream=True)))
    assert "ran out of memory" in json.loads(error)["error"]["message"]
    assert done == "[DONE]"
    assert client.app.state.api.num_open == 0


def test_a_fault_before_the_first_word_of_a_stream_has_its_status(client):
    assert ask(client, json=body(shown(b"hello"), stream=True)).status_code == 400


def test_a_full_line_tells_clients_to_come_back():
    speaker = FakeSpeaker(words=50, pause=0.02)
    client = client_of(speaker, limits=ApiLimits(max_waiting=0))
    threads = [threading.Thread(target=ask, args=(client,)) for _ in range(1)]
    threads[0].start()
    while not speaker.num_said:
        time.sleep(0.01)
    response = ask(client)
    assert response.status_code == 429
    assert response.headers["retry-after"]
    threads[0].join()
    assert ask(client).status_code == 200


def test_a_server_that_is_about_to_stop_says_so(client):
    assert client.get("/ready").json() == {"status": "ready"}
    client.app.state.api.draining = True
    assert client.get("/ready").status_code == 503
    assert ask(client).status_code == 503
    assert client.get("/health").status_code == 200


def test_metrics_count_requests_and_tokens(client):
    ask(client)
    ask(client, json=body(stream=True))
    ask(client, json={})
    text = client.get("/metrics").text
    assert 'mmlm_requests_total{status="200"} 2' in text
    assert 'mmlm_requests_total{status="400"} 1' in text
    assert 'mmlm_tokens_total{kind="answer"} 10' in text
    assert "mmlm_first_token_seconds_count 2" in text
    assert "mmlm_requests_open 0" in text


def test_the_api_describes_itself(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/health", "/ready"} <= set(paths)
