"""The dialect `lmms-eval` against lmms-eval's own functions, on thousands of made-up answers."""

from __future__ import annotations

import random
from importlib import import_module
from importlib.util import find_spec

import pytest

from mmlm.evaluation.scorers import Row, Target, read_scorer
from mmlm.evaluation.scorers.boxes import overlap, read_box
from mmlm.evaluation.scorers.exams import (
    read_ai2d,
    read_mmbench,
    read_mmmu,
    read_scienceqa,
    read_seed,
)
from mmlm.evaluation.scorers.mentions import Words, count_mentions
from mmlm.evaluation.scorers.mmmu_open import mmmu_open_right, read_mmmu_open
from mmlm.evaluation.scorers.reading import anls, relaxed_accuracy
from mmlm.evaluation.scorers.vqa import vqa_accuracy
from mmlm.evaluation.scorers.yes_no import read_mme, read_yes_no

pytestmark = [
    pytest.mark.slow,  # importing lmms-eval takes longer than the tests
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs mmlm[harness]"),
]

COUNT = 2500
OPTIONS = ["a red car", "two dogs", "7/11", "None of them"]
PIECES = (
    "A", "B", "C", "D", "E", "a", "b", "(A)", "(B)", "(C)", "B.", "C.", "A:", "D)", "(D).", ":B",
    "**B**", "the", "an", "answer is", "The answer is", "So", "thus", "result =", "=", "x", "not",
    "yes", "Yes", "YES", "no", "No", "none", "None", "y", "n", "maybe", "I don't know", "cannot",
    "red", "a red car", "A red car", "two dogs", "dog", "dogs", "7/11", "john's", "isnt", "it's",
    "won't", "2", "two", "10", "1,000", "1000", "3.14", "3.144", "0.5", "50%", "-4", "1e3", "$5",
    ".5", "5.", "cafe", "t-shirt", "t shirt", "T-Shirt", "half/full", "a@b", "\n", "\t", "  ", ",",
    ".", "!", "?", ";", "'", "\u201cx\u201d", "\uff21\uff22\uff11", "\u3000", "\u00bd", "\u00e9",
    "[0.1, 0.2, 0.5, 0.6]", "[.1,.2,.5,.6]", "(0.1, 0.2, 0.5, 0.6)", "[0.1,0.2,0.5,0.60]",
    "[5, 0, 1, 1]", "[0.1 , 0.2, 0.5, 0.6]",
)  # fmt: skip


def answers(seed, most=7):
    """Made-up answers: pieces in a row, with and without spaces, some empty."""
    dice = random.Random(seed)
    for _ in range(COUNT):
        glue = dice.choice((" ", " ", " ", ""))
        yield glue.join(dice.choices(PIECES, k=dice.randint(0, most)))


def theirs(module, name):
    return getattr(import_module(f"lmms_eval.tasks.{module}"), name)


def agree(pairs):
    """Fail with the first answers on which the two differ."""
    wrong = [(answer, ours, wanted) for answer, ours, wanted in pairs if ours != wanted]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:5]}"


@pytest.mark.parametrize(
    ("task", "dialect"),
    [("vqav2", "lmms-eval"), ("textvqa", "llava"), ("vizwiz_vqa", "llava"), ("ok_vqa", "llava")],
)
def test_vqa_accuracy(task, dialect):
    function = theirs(f"{task}.utils", f"{task}_process_results")
    dice = random.Random(task)

    def pairs():
        for answer in answers(task, most=3):
            pool = [answer, *dice.sample(PIECES, 2)]
            people = dice.choices(pool, k=10) if dice.random() < 0.8 else [pool[0]] * 10
            given = [{"answer": p, "answer_id": n} for n, p in enumerate(people)]
            doc = {"question_id": 1, "answers": given if task == "vqav2" else list(people)}
            wanted = function(doc, [answer])["exact_match"]
            yield (answer, people), vqa_accuracy(answer, people, dialect=dialect), round(wanted, 6)

    agree(pairs())


def test_pope_and_mme():
    pope, mme = theirs("pope.utils", "pope_process_results"), theirs("mme.utils", "parse_pred_ans")

    def pairs():
        for answer in answers("pope", most=3):
            for truth in ("yes", "no"):
                found = pope({"question_id": 1, "answer": truth}, [answer])["pope_accuracy"]
                yield (
                    answer,
                    float(read_yes_no(answer, dialect="lmms-eval") == truth),
                    found["score"],
                )
            yield answer, read_mme(answer, dialect="lmms-eval") or "other", mme(answer)

    agree(pairs())


def test_mmbench():
    judge = theirs("mmbench.mmbench_evals", "MMBench_Evaluator")()

    def pairs():
        for answer in answers("mmbench"):
            letter = judge.can_infer(answer, dict(zip("ABCD", OPTIONS, strict=True)))
            wanted = "ABCD".find(letter) if letter else None
            yield (
                answer,
                read_mmbench(answer, OPTIONS, dialect="lmms-eval"),
                (
                    None if wanted == -1 else wanted  # an E, where there are four options
                ),
            )

    agree(pairs())


def test_mmmu_where_nothing_is_drawn_at_random(monkeypatch):
    module = "_task_utils.mmmu_mcq_utils"
    parse = theirs(module, "parse_mmmu_multi_choice_response")
    drawn = import_module(f"lmms_eval.tasks.{module}").random
    monkeypatch.setattr(drawn, "choice", lambda choices: None)
    named = dict(zip("ABCD", OPTIONS, strict=True))

    def pairs():
        for answer in answers("mmmu"):
            letter = parse(answer, list("ABCD"), named)
            number = read_mmmu(answer, OPTIONS, dialect="lmms-eval")
            yield answer, None if number is None else "ABCD"[number], letter

    agree(pairs())


def test_mmmu_open():
    parse = theirs("mmmu.utils", "parse_open_response")
    right = theirs("mmmu.utils", "eval_open")

    def pairs():
        for answer in answers("open"):
            for truth in ("2", "red", "3.14", "x"):
                # An empty answer is unreadable here; theirs finds the empty text in nothing.
                ours = mmmu_open_right(read_mmmu_open(answer), [truth])
                yield (answer, truth), ours, right(truth, parse(answer))

    agree(pairs())


def test_scienceqa_seed_and_ai2d():
    science = theirs("scienceqa.utils", "sqa_process_results")
    seed = theirs("seedbench.utils", "seed_process_result")

    def pairs():
        for answer in answers("letters", most=3):
            doc = {"choices": OPTIONS, "answer": 1}
            ours = read_scienceqa(answer, OPTIONS, dialect="lmms-eval") == 1
            yield answer, float(ours), science(doc, [answer])["exact_match"]
            doc = {"answer": "B", "data_type": "image", "question_id": 1}
            first = seed(doc, [answer])["seed_all"]["pred"]
            yield answer, read_seed(answer, OPTIONS, dialect="lmms-eval") == 1, first == "B"

    agree(pairs())


def test_ai2d():
    chosen = theirs("ai2d.utils", "MultiChoiceRegexFilter")("x")
    import string

    strip = str.maketrans("", "", string.punctuation)

    def pairs():
        for answer in answers("ai2d", most=3):
            (said,) = chosen.apply([[answer]], [{}])
            wanted = said.lower().translate(strip) == "b"  # exact_match, as its task sets it
            yield answer, read_ai2d(answer, OPTIONS) == 1, wanted

    agree(pairs())


def test_charts_documents_and_text_in_pictures():
    relaxed = theirs("chartqa.utils", "relaxed_correctness")
    near = import_module("lmms_eval.api.metrics").anls
    held = theirs("ocrbench.utils", "ocrbench_process_results")
    dice = random.Random(0)
    scorer = read_scorer({"use": "contains", "dialect": "lmms-eval"}, origin="test")

    def pairs():
        for answer in answers("reading", most=2):
            truth = dice.choice(PIECES)
            yield (answer, truth), relaxed_accuracy(answer, truth), float(relaxed(answer, truth))
            wanted = near([truth, "red"], [answer])["anls"]
            yield (answer, truth), anls(answer, [truth, "red"], dialect="lmms-eval"), wanted
            for source in ("IIIT5K", "HME100k"):
                facts = {"dataset": source, "answer": [truth], "question_type": "x"}
                found = held(facts, [answer])["ocrbench_accuracy"]["score"]
                yield answer, scorer.mark(answer, Target((truth,), facts=facts)).score, found

    agree(pairs())


def test_boxes():
    read = theirs("refcoco.utils_rec", "parse_float_sequence_within")
    iou = theirs("refcoco.utils_rec", "compute_iou")
    truth = [0.1, 0.2, 0.5, 0.6]

    def pairs():
        for answer in answers("boxes", most=3):
            box = read_box(answer, dialect="lmms-eval")
            yield answer, list(box or (0.0, 0.0, 0.0, 0.0)), read(answer)
            if box is not None and box[0] < box[2] and box[1] < box[3]:
                yield answer, round(overlap(box, truth), 9), round(iou(list(box), truth), 9)

    agree(pairs())


def test_hallusionbench():
    score = theirs("hallusion_bench.evaluate_hb", "hb_aggregation_result_intern")
    scorer = read_scorer({"use": "hallusion", "dialect": "lmms-eval"}, origin="test")
    dice = random.Random(0)
    rows, docs = [], []
    for number, answer in enumerate(answers("hallusion", most=3)):
        places = {"category": "VD", "subcategory": dice.choice("ab"), "set_id": str(number // 40),
                  "figure_id": dice.choice("123"), "question_id": dice.choice("01")}  # fmt: skip
        target = Target((dice.choice("01"),), facts=places)
        rows.append(Row(str(number), "", "", scorer.mark(answer, target), target))
        docs.append({**places, "model_prediction": answer, "gt_answer": target.references[0]})
    also = scorer.also(rows)
    assert sum(row.mark.score for row in rows) / len(rows) == pytest.approx(score(docs, "aAcc"))
    assert also["qAcc"] == pytest.approx(score(docs, "qAcc"))
    assert also["fAcc"] == pytest.approx(score(docs, "fAcc"))


def test_ambers_descriptions(monkeypatch):
    """Nouns and their likeness are given, because theirs need data that no package brings."""
    pytest.importorskip("spacy")
    utils = import_module("lmms_eval.tasks.amber_g.utils")
    things = [f"thing{number}" for number in range(12)]
    dice = random.Random(0)
    wrong = []
    for number in range(COUNT):
        related = {thing: dice.sample(things, dice.randint(0, 2)) for thing in things}
        chosen = dice.sample(things, 6)
        there, likely = chosen[: dice.randint(1, 4)], chosen[4:]
        safe = dice.sample(things, 2)
        nouns = dice.choices(things, k=dice.randint(1, 6))
        close = {frozenset(dice.sample(things, 2)) for _ in range(dice.randint(0, 3))}

        def alike(first, second, threshold=0.8, close=close):
            return first == second or frozenset((first, second)) in close

        monkeypatch.setattr(utils, "extract_nouns", str.split)
        monkeypatch.setattr(utils, "check_synonyms_word", alike)
        names = ("chair", "safe_cover", "hallu_cover", "non_hallu")
        theirs_counts = {f"{name}_{part}": 0 for name in names for part in ("score", "num")}
        utils.process_generative_task(
            {"question_id": number, "text": " ".join(nouns)}, {"truth": there, "hallu": likely},
            related, set(things), safe, 0.8, theirs_counts,
        )  # fmt: skip
        words = Words({k: tuple(v) for k, v in related.items()}, frozenset(safe), frozenset(things))
        ours = count_mentions(nouns, there, likely, words, alike)
        keys = [f"{name}_{part}" for name in names[:3] for part in ("score", "num")]
        if tuple(ours) != tuple(theirs_counts[key] for key in keys):
            wrong.append((nouns, ours, theirs_counts))
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:2]}"
