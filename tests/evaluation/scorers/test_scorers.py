"""Scorers: the worked examples of the published scripts, and what all scorers have in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.errors import ConfigError
from mmlm.evaluation.scorers import Row, Target, read_scorer, scorers
from mmlm.evaluation.scorers.boxes import overlap, read_box
from mmlm.evaluation.scorers.choice import read_choice
from mmlm.evaluation.scorers.exams import read_mmbench
from mmlm.evaluation.scorers.names import exact, names_in
from mmlm.evaluation.scorers.pairs import BeafConfig, HallusionConfig
from mmlm.evaluation.scorers.reading import (
    anls,
    contains,
    levenshtein,
    levenshtein_plainly,
    relaxed_accuracy,
)
from mmlm.evaluation.scorers.text import find, stems_of
from mmlm.evaluation.scorers.vqa import vqa_accuracy
from mmlm.evaluation.scorers.yes_no import precision_recall, read_mme, read_yes_no


def people(**answers):
    return [answer.replace("_", " ") for answer, times in answers.items() for _ in range(times)]


JOHN = ["john 's"] * 5 + ["x"] * 5


class TestVQA:
    @pytest.mark.parametrize(
        ("answer", "gts", "official", "lmms", "llava", "vlmevalkit"),
        [
            ("Yes", people(yes=10), 0.0, 1.0, 1.0, 1.0),
            ("yes.", people(yes=9, no=1), 1.0, 1.0, 1.0, 1.0),
            ("red", people(red=3, blue=7), 0.9, 0.9, 0.9, 0.9),
            ("two", ["2"] * 3 + ["3"] * 7, 0.9, 0.9, 0.9, 0.9),
            ("5.", ["5"] * 5 + ["6"] * 5, 1.0, 1.0, 1.0, 0.0),
            ("John's", JOHN, 0.0, 0.0, 1.0, 0.0),
            ("1,000", ["1000"] * 5 + ["x"] * 5, 1.0, 1.0, 1.0, 1.0),
            ("the dog is red", people(red=9, blue=1), 0.0, 0.0, 0.0, 0.0),
        ],
    )
    def test_the_table_of_the_dialects(self, answer, gts, official, lmms, llava, vlmevalkit):
        found = [
            vqa_accuracy(answer, gts, dialect=name)
            for name in ("official", "lmms-eval", "llava", "vlmevalkit")
        ]
        assert found == [official, lmms, llava, vlmevalkit]

    @pytest.mark.parametrize(
        ("answer", "score"),
        [
            ("unanswerable", 1.0),
            ("Unanswerable.", 1.0),
            ("dog", 0.6),
            ("unsuitable", 0.6),
            ("unanswerable because it is blurry", 0.0),
            ("", 0.0),
        ],
    )
    def test_vizwiz(self, answer, score):
        assert vqa_accuracy(answer, people(unanswerable=6, unsuitable=2, dog=2)) == score


class TestGQA:
    @pytest.mark.parametrize(
        ("answer", "truth", "raw", "llava", "lmms"),
        [
            ("Yes.", "yes", 0, 1, 1),
            ("yes ", "yes", 0, 0, 0),
            ("tshirt", "t-shirt", 0, 0, 1),
            ("yes!", "yes", 0, 0, 1),
            ("the man", "man", 0, 0, 0),
        ],
    )
    def test_the_table_of_the_dialects(self, answer, truth, raw, llava, lmms):
        found = [exact(answer, [truth], dialect=name) for name in ("raw", "llava", "lmms-eval")]
        assert found == [raw, llava, lmms]


class TestPOPE:
    @pytest.mark.parametrize(
        ("answer", "official", "lmms", "vlmevalkit"),
        [
            ("No, there is no dog.", "no", None, "no"),
            ("NO", "yes", "no", "no"),
            ("no\n", "yes", "no", "no"),
            ("There isn't a dog.", "yes", None, None),
            ("Yes, there is no doubt.", "no", None, None),
            ("", "yes", None, None),
        ],
    )
    def test_the_table_of_the_dialects(self, answer, official, lmms, vlmevalkit):
        found = [
            read_yes_no(answer, dialect=name) for name in ("official", "lmms-eval", "vlmevalkit")
        ]
        assert found == [official, lmms, vlmevalkit]

    def test_the_set_of_five(self):
        scorer = read_scorer({"use": "yes_no", "dialect": "official"}, origin="test")
        answers = [
            ("Yes", "yes"),
            ("Yes, a dog", "yes"),
            ("No", "no"),
            ("No", "yes"),
            ("Yes", "no"),
        ]
        rows = [row(scorer, answer, truth, str(n)) for n, (answer, truth) in enumerate(answers)]
        also = scorer.also(rows)
        assert sum(each.mark.score for each in rows) / 5 == 0.6
        assert [round(also[name], 3) for name in ("precision", "recall", "f1")] == [0.667] * 3
        assert also["yes_share"] == 0.6

    def test_nobody_says_yes_and_nothing_breaks(self):
        assert precision_recall([False, False], [True, False])["f1"] == 0.0


class TestMME:
    @pytest.mark.parametrize(
        ("answer", "official", "lmms"),
        [
            ("Yes", "yes", "yes"),
            ("  Yes", None, "yes"),
            ("Y", None, "yes"),
            ("None", "no", "no"),
            ("I know it is yes", None, None),
            ("The answer is yes", None, None),
            ("yesterday", "yes", "yes"),
        ],
    )
    def test_reading(self, answer, official, lmms):
        assert read_mme(answer) == official
        assert read_mme(answer, dialect="lmms-eval") == lmms

    def test_points_of_two_subtasks(self):
        scorer = read_scorer("mme", origin="test")
        rows = [
            row(scorer, "yes", "yes", "1", image="a", group="color"),
            row(scorer, "no", "no", "2", image="a", group="color"),
            row(scorer, "yes", "yes", "3", image="b", group="color"),
            row(scorer, "yes", "no", "4", image="b", group="color"),
            row(scorer, "yes", "no", "5", image="c", group="count"),
            row(scorer, "no", "yes", "6", image="c", group="count"),
        ]
        assert scorer.value(scorer.tallies(rows).sum(axis=0)) == 125.0


class TestReading:
    @pytest.mark.parametrize(
        ("answer", "truth", "score"),
        [("Paris", "paris", 1.0), ("parsi", "paris", 0.6), ("$ 1,000", "$1,000", 6 / 7),
         ("Total: 12", "12", 0.0), ("abcd", "abef", 0.5)],
    )  # fmt: skip
    def test_anls(self, answer, truth, score):
        assert anls(answer, [truth]) == pytest.approx(score)

    def test_anls_at_a_half_is_nothing_in_the_paper(self):
        assert anls("abcd", ["abef"], dialect="paper") == 0.0

    def test_anls_divides_by_raw_lengths_in_lmms_eval(self):
        padded = "parsi" + " " * 10
        assert anls(padded, ["paris"], dialect="lmms-eval") == pytest.approx(0.8667, abs=1e-4)
        assert anls(padded, ["paris"]) == pytest.approx(0.6)

    @settings(max_examples=50, deadline=None)
    @given(st.text("ab", max_size=6), st.text("ab", max_size=6))
    def test_levenshtein_equals_the_definition(self, first, second):
        def slowly(a, b):
            if not a or not b:
                return len(a) + len(b)
            same = a[0] != b[0]
            return min(slowly(a[1:], b) + 1, slowly(a, b[1:]) + 1, slowly(a[1:], b[1:]) + same)

        assert levenshtein(first, second) == slowly(first, second)
        assert levenshtein_plainly(first, second) == slowly(first, second)

    @settings(max_examples=300, deadline=None)
    @given(st.text("ab C", max_size=9), st.text("ab C", min_size=1, max_size=9))
    def test_anls_equals_the_library(self, answer, truth):
        anls_star = pytest.importorskip("anls_star")
        theirs = anls_star.anls_score(truth, answer)
        assert anls(answer, [truth]) == pytest.approx(theirs)

    @pytest.mark.parametrize(
        ("answer", "truth", "score"),
        [("10.5", "10", 1), ("10.51", "10", 0), ("45%", "0.45", 1), ("45", "45%", 0),
         ("0.0", "0", 0), ("1,000", "1000", 0), ("$5", "5", 0), ("2010", "2011", 1),
         ("yes.", "yes", 0), ("nan", "5", 0)],
    )  # fmt: skip
    def test_relaxed_accuracy(self, answer, truth, score):
        assert relaxed_accuracy(answer, truth) == score

    def test_contains(self):
        assert contains("The word is CENTRE", ["centre"]) == 1
        assert contains("12345", ["234"]) == 1
        assert contains("cent re", ["centre"]) == 0
        assert contains("X^2", ["x^2"], formula=True) == 0


class TestBoxes:
    def test_a_box_equals_itself(self):
        assert overlap(read_box("[.1,.1,.5,.5]"), (0.1, 0.1, 0.5, 0.5)) == pytest.approx(1.0)

    def test_a_half_that_floats_made_less_counts_only_here(self):
        ours, theirs = (
            read_scorer({"use": "box", "dialect": name}, origin="test")
            for name in ("mmlm", "lmms-eval")
        )
        target = Target(("[0.1, 0.1, 0.5, 0.5]",))
        assert ours.mark("[.1,.1,.3,.5]", target).score == 1.0
        assert theirs.mark("[0.1,0.1,0.3,0.5]", target).score == 0.0

    def test_overlap_equals_the_library(self):
        masks = pytest.importorskip("pycocotools.mask")
        random = np.random.default_rng(0)
        corners = random.integers(0, 20, (200, 2, 2))
        boxes = [(*two.min(axis=0), *(two.max(axis=0) + 1)) for two in corners]
        sides = np.array([(a, b, c - a, d - b) for a, b, c, d in boxes], dtype=np.float64)
        theirs = masks.iou(sides[:100], sides[100:], [0] * 100)
        ours = [[overlap(one, other) for other in boxes[100:]] for one in boxes[:100]]
        assert np.allclose(ours, theirs)

    def test_boxes_that_do_not_touch(self):
        assert overlap((10, 10, 50, 50), (0, 0, 1, 1)) == 0.0

    def test_two_empty_boxes_do_not_divide_by_zero(self):
        assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


class TestChoice:
    OPTIONS = ("a red car", "a bus", "a dog", "an ant")

    @pytest.mark.parametrize(
        ("answer", "number"),
        [
            ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B)", 1), ("**B**", 1), (" B ", 1),
            ("B. a bus", 1), ("B) a bus", 1), ("B: a bus", 1), ("a bus", 1), ("Bus.", 1),
            ("It is a bus.", 1), ("buses", 1), ("The answer is B", 1), ("Answer: B", 1),
            ("The correct answer is **B**. A is wrong.", 1), ("Option (C)", 2), ("Surely (D).", 3),
            ("a dog or a bus", None), ("I don't know", None), ("", None), ("E", None), ("1", None),
            ("The answer is clear", None), ("A dog is what I see", 2),
        ],
    )  # fmt: skip
    def test_reads_what_a_person_would(self, answer, number):
        assert read_choice(answer, self.OPTIONS) == number

    def test_an_option_that_is_a_letter_is_a_text_first(self):
        assert read_choice("A", ["C", "B", "A"]) == 2

    def test_the_longer_of_two_names_wins(self):
        assert read_choice("I see a red panda", ["panda", "red panda"]) == 1

    def test_mmbench_needs_every_order_right(self):
        scorer = read_scorer("mmbench", origin="test")
        choices = ("a cat", "a dog")
        rows = [
            row(scorer, "A", "a cat", "7", choices=choices),
            row(scorer, "A", "a dog", "1000007", choices=choices),
            row(scorer, "B", "a dog", "8", choices=choices),
        ]
        assert scorer.value(scorer.tallies(rows).sum(axis=0)) == 0.5

    def test_mmbench_never_draws(self):
        assert read_mmbench("Cannot determine the answer", self.OPTIONS) is None


class TestNames:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(["cat", "category", "red", "panda", "of"]), max_size=6))
    def test_names_are_found_as_whole_words(self, words):
        text = " ".join(words)
        assert bool(find(stems_of(text), ["cat"])) == ("cat" in words)

    def test_all_names_are_read_in_order(self):
        text = "a cat, two dogs and a hot dog"
        assert names_in(text, ["dog", "hot dog", "cat"]) == ["cat", "dog", "hot dog"]


def row(scorer, answer, truth, identity, *, image=None, group="", choices=()):
    target = Target((truth,), choices)
    return Row(identity, image or identity, group, scorer.mark(answer, target), target)


EXAMPLES = {
    "vqa": Target(("red",) * 10),
    "yes_no": Target(("yes",)),
    "mme": Target(("yes",)),
    "box": Target(("[0, 0, 1, 1]",)),
    "letter": Target(("B",)),
    "count": Target(("3",)),
    "amber": Target(("yes",)),
    "hallusion": Target(("1",), facts=dict.fromkeys(HallusionConfig.fact_columns, "x")),
    "beaf": Target(("yes",), facts=dict.fromkeys(BeafConfig.fact_columns, "x")),
    "amber_describe": Target(("dog",), facts={"hallu": ["cat"]}),
}


@pytest.fixture(autouse=True, scope="module")
def beside_ambers_words(tmp_path_factory):
    """Stand where the files are that a scorer names."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "relation.json").write_text('{"dog": ["puppy"], "cat": []}')
    (folder / "safe_words.txt").write_text("photo\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.parametrize("name", list(scorers))
class TestEveryScorer:
    @settings(max_examples=40, deadline=None)
    @given(answer=st.text(max_size=60))
    def test_marks_any_text_between_nothing_and_all(self, name, answer):
        scorer = read_scorer(name, origin="test")
        target = EXAMPLES.get(name, Target(("a dog",), ("a cat", "a dog"), ("a cat", "a dog")))
        assert scorer.fault(target) is None
        mark = scorer.mark(answer, target)
        assert 0.0 <= mark.score <= 1.0
        assert mark.reading is not None or mark.score == 0.0

    def test_refuses_a_row_without_an_answer(self, name):
        assert read_scorer(name, origin="test").fault(Target(())) is not None

    def test_speaks_each_of_its_dialects_and_no_other(self, name):
        for dialect in scorers[name].dialects:
            config = read_scorer({"use": name, "dialect": dialect}, origin="test")
            assert dialect in config.label or len(config.dialects) == 1
            assert scorers.read(config.to_dict(), origin="test") == config
        with pytest.raises(ConfigError, match="speaks"):
            read_scorer({"use": name, "dialect": "klingon"}, origin="test")


@pytest.mark.parametrize("truth", ["A", "the", "...", "an"])
def test_an_empty_answer_is_never_right(truth):
    for name in ("exact", "keyword", "name"):
        assert read_scorer(name, origin="test").mark("", Target((truth,))).score == 0.0
    assert exact("A.", ["a"]) == 1.0
