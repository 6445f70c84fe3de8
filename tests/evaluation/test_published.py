"""Every benchmark of ours reads a copy of its published layout, and marks right and wrong."""

from __future__ import annotations

import pytest
from PIL import Image

from mmlm.evaluation import load_benchmark
from mmlm.evaluation.conditions import cases
from mmlm.evaluation.results import predict, summarise
from mmlm.recipes import list_recipes

from .conftest import write_rows

PEOPLE = ["red"] * 9 + ["blue"]
MMBENCH = {"hint": "nan", "category": "color", "source": "x", "L2-category": "y", "comment": "nan",
           "split": "dev", "A": "cat", "B": "dog", "C": "ant", "D": "nan"}  # fmt: skip

# Columns as they are published, two rows each, and a right answer to each row.
PUBLISHED = {
    "pope": (
        [{"id": "0", "question_id": "1", "question": "Is there a dog?", "answer": answer,
          "image_source": "COCO_1", "category": split, "image": "0.png"}
         for answer, split in (("yes", "random"), ("no", "popular"))],
        ["Yes", "No"],
    ),
    "mme": (
        [{"question_id": "code/1.png", "image": "0.png", "question": "Is it?", "answer": answer,
          "category": "count"} for answer in ("Yes", "No")],
        ["Yes", "No"],
    ),
    "vqav2": (
        [{"question_id": number, "question": "What?", "image": "0.png", "question_type": "what",
          "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n}
                      for n, a in enumerate(PEOPLE)],
          "answer_type": "other", "multiple_choice_answer": "red", "image_id": 7}
         for number in (1, 2)],
        ["red", "Red."],
    ),
    "okvqa": (
        [{"question_id": str(n), "image": "0.png", "question": "What?", "answers": PEOPLE}
         for n in (1, 2)],
        ["red", "a red"],
    ),
    "textvqa": (
        [{"question_id": n, "image_id": "x", "question": "What?", "image": "0.png",
          "ocr_tokens": ["a"], "answers": PEOPLE} for n in (1, 2)],
        ["red", "Red"],
    ),
    "vizwiz": (
        [{"question_id": f"VizWiz_val_{n}.jpg", "question": "What?", "image": "0.png",
          "answers": ["unanswerable"] * 10, "category": "unanswerable"} for n in (1, 2)],
        ["unanswerable", "Unanswerable"],
    ),
    "mmbench": (
        [{**MMBENCH, "index": 5, "question": "What?", "image": "0.png", "answer": "B"},
         {**MMBENCH, "index": 1000005, "A": "dog", "B": "cat", "question": "What?",
          "image": "0.png", "answer": "A"}],
        ["B", "(A)"],
    ),
    "seedbench": (
        [{"answer": "C", "choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z",
          "data_id": "1", "data_type": "image", "question": "What?", "question_id": str(n),
          "question_type_id": 1, "image": ["0.png"], "segment": None} for n in (1, 2)],
        ["C", "C"],
    ),
    "scienceqa": (
        [{"image": "0.png", "question": "What?", "choices": ["cat", "dog"], "answer": 1,
          "hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science",
          "topic": "biology"} for _ in (1, 2)],
        ["B", "B. dog"],
    ),
    "ai2d": (
        [{"question": "What?", "options": ["root", "leaf", "stem", "bud"], "answer": "1",
          "image": "0.png"} for _ in (1, 2)],
        ["B", "(B)"],
    ),
    "chartqa": (
        [{"type": kind, "question": "How many?", "answer": "10", "image": "0.png"}
         for kind in ("human_test", "augmented_test")],
        ["10.4", "10"],
    ),
    "docvqa": (
        [{"questionId": str(n), "question": "Who?", "question_types": ["form"], "image": "0.png",
          "docId": 1, "answers": ["Paris", "paris"], "data_split": "val"} for n in (1, 2)],
        ["paris", " PARIS "],
    ),
    "infovqa": (
        [{"questionId": str(n), "question": "Who?", "answers": ["12%"], "image": "0.png"}
         for n in (1, 2)],
        ["12%", "12%"],
    ),
    "ocrbench": (
        [{"dataset": name, "question": "What is written?", "question_type": "Regular",
          "answer": answer, "image": "0.png"}
         for name, answer in (("IIIT5K", ["CENTRE"]), ("HME100k", ["x ^ 2"]))],
        ["The word is centre.", "x^2"],
    ),
    "realworldqa": (
        [{"image": "0.png", "question": "Which? A. x B. y", "answer": answer}
         for answer in ("A", "two")],
        ["a.", "Two"],
    ),
    "gqa": (
        [{"id": str(n), "imageId": "0", "question": "Is it?", "answer": "yes",
          "isBalanced": True} for n in (1, 2)],
        ["Yes", "yes."],
    ),
    "refcoco": (
        [{"id": str(n), "image": "0.png", "expression": "left cat", "box": [0.1, 0.1, 0.5, 0.5]}
         for n in (1, 2)],
        ["[0.1, 0.1, 0.5, 0.5]", "(0.12, 0.1), (0.5, 0.5)"],
    ),
}  # fmt: skip

OURS = [name for name in list_recipes("eval") if not name.startswith("quickstart")]


@pytest.mark.parametrize("name", OURS)
def test_a_benchmark_reads_its_published_layout(name, tmp_path):
    rows, right = PUBLISHED[name]
    for place in ("0.png", "0.jpg", "gqa/images/0.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / place)

    benchmark = load_benchmark(name, data=write_rows(tmp_path, rows))
    assert len(benchmark.items) == 2
    found = cases(benchmark, "image", benchmark.items, seed=0)
    assert all(case.prompt and "{" not in case.prompt for case in found)
    for answers, wanted in ((right, 1.0), (["", ""], 0.0)):
        predictions = [
            predict(benchmark.scorers[case.item.kind], case, answer)
            for case, answer in zip(found, answers, strict=True)
        ]
        score = summarise(benchmark, benchmark.kinds[0], "image", predictions, seed=0).score
        if name == "mme":
            wanted *= 200
        if name == "pope" and not answers[0]:
            wanted = 0.5  # in its script, everything that is not a no is a yes
        assert score == pytest.approx(wanted), predictions
