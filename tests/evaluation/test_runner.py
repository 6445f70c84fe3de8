"""The runner: nothing is lost, nothing is answered twice, nothing stale is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from PIL import Image

from mmlm.errors import EvaluationError
from mmlm.evaluation import evaluate

from .conftest import THINGS, Parrot, sees, write_rows


def run(model, folder, out, **options):
    return evaluate(model, folder / "colours.yaml", out, quiet=True, **options)


def test_a_model_that_looks_is_right_with_the_image_and_not_without(colours, tmp_path):
    result = run(Parrot(sees), colours, tmp_path / "out")

    assert result.score("colours", "choice").score == 1.0
    assert result.score("colours", "name").score == 1.0
    assert result.score("colours", "name", "blind").score == pytest.approx(2 / 12)
    assert result.score("colours", "name", "shuffled").score == 0.0
    assert result.score("colours", "choice").chance == 0.25


def test_results_are_the_documented_list(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out")

    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(rows) == 6
    for row in rows:
        assert {"set", "question", "condition", "n", "score", "low", "high"} <= set(row)
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        assert row["n"] == 12


def test_every_answer_stands_in_the_predictions(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out")

    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 72
    shuffled = [row for row in rows if row["condition"] == "shuffled"]
    assert all(row["shown_from"] not in (None, row["id"]) for row in shuffled)


def test_equal_questions_are_answered_once(colours, tmp_path):
    model = Parrot(sees)
    run(model, colours, tmp_path / "out", conditions=("blind",))

    questions = [request.question for request in model.asked]
    assert len(questions) == len(set(questions))
    assert questions.count("Which colour?") == 1


def test_a_second_run_asks_nothing(colours, tmp_path):
    first, second = Parrot(sees), Parrot(sees)
    before = run(first, colours, tmp_path / "out").scores
    after = run(second, colours, tmp_path / "out").scores

    assert second.asked == []
    assert before == after


def test_a_changed_picture_is_asked_again(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))
    Image.new("RGB", (9, 9), "white").save(colours / "0.png")

    again = Parrot(sees)
    run(again, colours, tmp_path / "out", conditions=("image",))
    assert len(again.asked) == 2


def test_other_weights_are_asked_again(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))

    other = Parrot(sees, fingerprint="another parrot")
    run(other, colours, tmp_path / "out", conditions=("image",))
    assert len(other.asked) == 24


def test_other_settings_and_prompts_are_asked_again(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))
    file = colours / "colours.yaml"
    text = file.read_text()

    for change in ("generate: {max_new_tokens: 7}\n", "question: 'Say it. {question}'\n"):
        file.write_text(text + change)
        again = Parrot(sees)
        run(again, colours, tmp_path / "out", conditions=("image",))
        assert len(again.asked) == 24


def test_another_scorer_needs_no_new_answers(colours, tmp_path):
    run(Parrot(lambda request: "a red thing"), colours, tmp_path / "out", conditions=("image",))
    file = colours / "colours.yaml"
    file.write_text(file.read_text().replace("name: name", "name: exact"))

    again = Parrot(sees)
    result = run(again, colours, tmp_path / "out", conditions=("image",))
    assert again.asked == []
    assert result.score("colours", "name").scorer == "exact/mmlm@1"
    assert result.score("colours", "name").score == 0.0


def test_a_line_cut_short_is_answered_again(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))
    log = tmp_path / "out" / "answers.jsonl"
    log.write_bytes(log.read_bytes()[:-9])

    again = Parrot(sees)
    result = run(again, colours, tmp_path / "out", conditions=("image",))
    assert len(again.asked) == 1
    assert result.score("colours", "choice").score == 1.0


def test_a_log_that_is_damaged_in_the_middle_is_refused(colours, tmp_path):
    run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))
    log = tmp_path / "out" / "answers.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], b"\0\0\0\n", *lines[4:]]))

    with pytest.raises(EvaluationError, match="damaged in the middle"):
        run(Parrot(sees), colours, tmp_path / "out", conditions=("image",))


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from conftest import Parrot, sees
from mmlm.evaluation import evaluate

def slowly(request):
    time.sleep(0.05)
    return sees(request)

evaluate(Parrot(slowly), {yaml!r}, {out!r}, quiet=True, batch_size=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on_and_loses_nothing(colours, tmp_path):
    out = tmp_path / "out"
    script = KILLED.format(
        tests=os.path.dirname(__file__), yaml=str(colours / "colours.yaml"), out=str(out)
    )
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    log = out / "answers.jsonl"
    while not log.is_file() or log.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_bytes().count(b"\n")
    assert not (out / "results.json").exists()

    rest = Parrot(sees)
    interrupted = run(rest, colours, out)
    whole = run(Parrot(sees), colours, tmp_path / "whole")
    total = (tmp_path / "whole" / "answers.jsonl").read_bytes().count(b"\n")
    assert len(rest.asked) == total - kept
    assert interrupted.scores == whole.scores


def test_empty_and_unreadable_answers_are_counted(colours, tmp_path):
    model = Parrot(lambda request: "who knows" if request.images else "")
    result = run(model, colours, tmp_path / "out")

    assert result.score("colours", "choice").parse_fail_rate == 1.0
    assert result.score("colours", "choice", "blind").empty_rate == 1.0
    assert result.score("colours", "choice").empty_rate == 0.0


def test_an_answer_of_ten_megabytes_is_refused(colours, tmp_path):
    with pytest.raises(EvaluationError, match="11,000,000 characters"):
        run(Parrot(lambda request: "blah blah. " * 1_000_000), colours, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_likelihoods_that_are_no_numbers_are_refused(colours, tmp_path, value):
    class Broken:
        weights = "broken"

        def likelihoods(self, cases):
            return [[0.5, value, 0.1, 0.2] for _ in cases]

    file = colours / "colours.yaml"
    text = file.read_text().replace("path: rows.jsonl", "path: rows.jsonl, where: {kind: choice}")
    file.write_text(text + "decide: likelihood\n")
    with pytest.raises(EvaluationError, match="one finite number for each"):
        run(Broken(), colours, tmp_path / "out")
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == b""


def test_a_model_that_likes_a_letter_is_found_out_by_permuted_options(colours, tmp_path):
    rows = []
    for number in range(12):
        thing = THINGS[number % len(THINGS)]
        others = [name for name in THINGS if name != thing][:3]
        rows.append({"id": str(number), "image": f"{number}.png", "question": "Which colour?",
                     "choices": [thing, *others], "answer": "A"})  # fmt: skip
    write_rows(colours, rows)
    (colours / "colours.yaml").write_text(
        'dataset: {path: rows.jsonl}\nquestion: "{question}\\n{options}"\nscorer: choice\n'
    )
    likes = run(Parrot(lambda r: "A"), colours, tmp_path / "a", conditions=("image", "permuted"))
    assert likes.score("colours", "choice").score == 1.0
    assert likes.score("colours", "choice", "permuted").score == 0.0

    def reads(request):
        options = [line.split(". ") for line in request.question.splitlines()[1:]]
        return next(letter for letter, name in options if name == sees(request))

    looks = run(Parrot(reads, "b"), colours, tmp_path / "b", conditions=("image", "permuted"))
    assert looks.score("colours", "choice", "permuted").score == 1.0


def test_a_limit_draws_the_same_items_for_every_model(colours, tmp_path):
    drawn = []
    for name in ("a", "b"):
        result = run(Parrot(sees, name), colours, tmp_path / name, limit=5)
        drawn.append({p.case.item.id for p in result.predictions})
    larger = run(Parrot(sees), colours, tmp_path / "c", limit=9)

    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 10
    assert drawn[0] < {p.case.item.id for p in larger.predictions}


def test_a_model_without_a_name_is_refused(colours, tmp_path):
    class Nameless:
        def answer_all(self, requests, batch_size=8, **settings):
            return ["red"] * len(requests)

    with pytest.raises(EvaluationError, match="has no `fingerprint`"):
        run(Nameless(), colours, tmp_path / "out")


def test_two_processes_may_not_write_one_log(colours, tmp_path):
    from mmlm.evaluation.asking.answers import AnswerLog

    with (
        AnswerLog(tmp_path / "out" / "answers.jsonl"),
        pytest.raises(EvaluationError, match="Another process"),
    ):
        run(Parrot(sees), colours, tmp_path / "out")


def test_answers_that_cannot_be_matched_to_questions_are_refused(colours, tmp_path):
    class Loses(Parrot):
        def answer_all(self, requests, batch_size=8, **settings):
            return ["red"]

    with pytest.raises(EvaluationError, match="answers came back"):
        run(Loses(sees), colours, tmp_path / "out")


def test_unknown_conditions_are_refused(colours, tmp_path):
    with pytest.raises(EvaluationError, match="image, blind, shuffled, permuted"):
        run(Parrot(sees), colours, tmp_path / "out", conditions=("deaf",))
