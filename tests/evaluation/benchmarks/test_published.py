"""Every benchmark of ours reads a copy of its published layout, and marks right and wrong."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from PIL import Image

from mmlm.errors import ConfigError
from mmlm.evaluation import load_benchmark
from mmlm.evaluation.benchmarks.benchmark import load_config, suite
from mmlm.evaluation.benchmarks.conditions import cases
from mmlm.evaluation.results import predict_all, summarise
from mmlm.recipes import list_recipes
from tests.evaluation.conftest import write_rows

PEOPLE = ["red"] * 9 + ["blue"]
MMBENCH = {"hint": "nan", "category": "color", "source": "x", "L2-category": "y", "comment": "nan",
           "split": "dev", "A": "cat", "B": "dog", "C": "ant", "D": "nan"}  # fmt: skip

MMMU_NONE = dict.fromkeys([f"image_{n}" for n in range(3, 8)])
SAID = ["a dog runs on the grass", "two cats sleep on a bed"]

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
        [{"id": str(n), "imageId": "0", "image": "0.png", "question": "Is it?", "answer": "yes",
          "isBalanced": True} for n in (1, 2)],
        ["Yes", "yes."],
    ),
    "pope_old_random": (
        [{"question_id": n, "image": "0.png", "text": "Is there a snowboard in the image?",
          "label": label} for n, label in enumerate(("yes", "no"), start=1)],
        ["Yes", "No"],
    ),
    "mmmu": (
        [{"id": "validation_Art_1", "question": "What is <image 1>?", "explanation": "",
          "options": "['It\\'s a cat', \"a dog\"]", "image_1": "0.png", "image_2": None,
          "answer": "B", "question_type": "multiple-choice", "subfield": "x", **MMMU_NONE},
         {"id": "validation_Art_2", "question": "How many <image 1> <image 2>?", "options": "[]",
          "explanation": "", "image_1": "0.png", "image_2": "0.png", "answer": "8",
          "question_type": "open", "subfield": "x", **MMMU_NONE}],
        ["(B)", "x = 8.004"],
    ),
    "mmstar": (
        [{"index": n, "question": "Which? A: x, B: y, C: z, D: w", "image": "0.png",
          "answer": "B", "category": "math", "l2_category": "geometry", "meta_info": {"a": "b"}}
         for n in (0, 1)],
        ["B", "B: y"],
    ),
    "mathvista": (
        [{"pid": "1", "question": "Which?", "image": "images/1.jpg", "decoded_image": "0.png",
          "choices": ["29", "38"], "unit": None, "precision": None, "answer": "38",
          "question_type": "multi_choice", "answer_type": "text", "query": "Hint: … Which?"},
         {"pid": "2", "question": "How much?", "image": "images/2.jpg", "decoded_image": "0.png",
          "choices": None, "unit": None, "precision": 1.0, "answer": "1.4",
          "question_type": "free_form", "answer_type": "float", "query": "Hint: … How much?"}],
        ["(B)", "The answer is 1.4"],
    ),
    "hallusionbench": (
        [{"category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0",
          "figure_id": figure, "sample_note": "x", "question_id": "0", "question": "Is it?",
          "gt_answer_details": "It is.", "gt_answer": answer, "filename": "x", "image": "0.png"}
         for figure, answer in (("1", "1"), ("2", "0"))],
        ["Yes", "No"],
    ),
    "amber": (
        [{"id": n, "image": "0.png", "query": "Is the sky sunny in this image?"}
         for n in (1005, 1006)],
        ["Yes", "No"],
    ),
    "amber_describe": (
        [{"id": n, "image": "0.png", "query": "Describe this image."} for n in (1, 2)],
        ["A dog on the beach.", "Puppies."],
    ),
    "chair": (
        [{"question_id": str(n), "image": "0.png", "gt_object": ["dog"]} for n in (1, 2)],
        ["A dog.", "Two dogs"],
    ),
    "beaf": (
        [{"id": 1, "image": "0.jpg", "question": "Is there a train in the image?",
          "orig_img": True, "removed_q": True, "gt": "yes"},
         {"id": 10, "image": "0_00.png", "question": "Is there a train in the image?",
          "orig_img": False, "removed_q": True, "gt": "no"}],
        ["Yes", "No"],
    ),
    "coco_captions": (
        [{"question_id": f"{n}.jpg", "image": "0.png", "question": "Please", "answer": [text] * 5,
          "id": n} for n, text in enumerate(SAID)],
        SAID,
    ),
    "flickr30k": (
        [{"image": "0.png", "caption": [text] * 5, "sentids": ["1"], "img_id": str(n),
          "filename": "x.jpg"} for n, text in enumerate(SAID)],
        SAID,
    ),
    "nocaps": (
        [{"image": "0.png", "image_id": n, "annotations_captions": [text] * 10,
          "image_domain": "out-domain"} for n, text in enumerate(SAID)],
        SAID,
    ),
    **{name: (
        [{"question_id": "1", "image": "0.png", "question": "Please describe",
          "answer": ["left cat", "the cat"], "bbox": [0.8, 0.8, 3.2, 3.2], "iscrowd": 0}],
        ["[0.1, 0.1, 0.5, 0.5]", "(0.12, 0.1), (0.5, 0.5)"],
    ) for name in ("refcoco", "refcoco_plus", "refcocog")},
    "tallyqa": (
        [{"answer": 4, "data_source": "amt", "image": "0.png", "image_id": 9, "issimple": simple,
          "question": "How many?", "question_id": n} for n, simple in ((1, True), (2, False))],
        ["4", "Four headlights."],
    ),
    "vsr": (
        [{"image": "0.png", "image_link": "x", "caption": "The cat is left of the dog.",
          "label": label, "relation": "left of", "annotator_id": 1} for label in (1, 0)],
        ["yes", "No."],
    ),
    "mmvet": (
        [{"question_id": f"v1_{n}", "image": "0.png", "question": "What?",
          "answer": "42<AND>blue<OR>azure", "image_source": "x", "capability": "rec,ocr"}
         for n in (0, 1)],
        ["42 and blue", "It is azure, 42."],
    ),
    "vstar": (
        [{"image": "0.png", "text": "What colour?\n(A) red\n(B) blue", "category": "direct",
          "label": "B", "question_id": str(n)} for n in (0, 1)],
        ["B", "(B)"],
    ),
    **{name: (
        [{"index": str(n), "question": "What?", "image": "0.png", "answer": "C", "A": "w",
          "B": "x", "C": "y", "D": "z", "category": "single", "cycle_category": f"{n}"}
         for n in (0, 1)],
        ["C", "y"],
    ) for name in ("hrbench4k", "hrbench8k")},
    "blink": (
        [{"idx": f"val_Counting_{n}", "sub_task": "Counting", "question": "How many?",
          "image_1": "0.png", "image_2": "0.png", "image_3": None, "image_4": None,
          "choices": ["0", "3"], "answer": "(B)", "prompt": "How many? (A) 0 (B) 3"}
         for n in (1, 2)],
        ["B", "(B)"],
    ),
    "muirbench": (
        [{"idx": str(n), "task": "Counting", "image_relation": "x", "image_type": "y",
          "question": "How many in <image> and <image>?", "options": ["1", "2", "None"],
          "answer": "B", "image_list": ["0.png", "0.png"]} for n in (1, 2)],
        ["B", "2"],
    ),
    "videomme": (
        [{"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law",
          "url": "x", "videoID": "film", "question_id": f"001-{n}", "task_type": "Counting",
          "question": "How many?", "options": ["A. one.", "B. two.", "C. three.", "D. four."],
          "answer": "C"} for n in (1, 2)],
        ["C", "three."],
    ),
    "nextqa": (
        [{"video": "4010069381", "frame_count": 300, "width": 1, "height": 1, "question": "why",
          "answer": 2, "qid": n, "type": "CW", **{f"a{k}": f"text {k}" for k in range(5)}}
         for n in (0, 1)],
        ["C", "text 2"],
    ),
}  # fmt: skip

OURS = [name for name in list_recipes("eval") if load_config(name).dataset.build is None]


NEEDS = {"chair": "textblob", "amber_describe": "textblob", "coco_captions": "pycocoevalcap",
         "flickr30k": "pycocoevalcap",
         "nocaps": "pycocoevalcap"}  # fmt: skip


def write_copy(name, folder, rows):
    """Write a benchmark's files and pictures as they are published; return the file of rows."""
    for place in ("0.png", "0.jpg", "0_00.png", "4010069381/000.jpg", "4010069381/001.jpg"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        # The second of BEAF's pictures is another one.
        Image.new("RGB", (8, 8), "blue" if "_00" in place else "red").save(folder / place)
    reds = [Image.new("RGB", (8, 8), (200, 10 * number, 0)) for number in range(12)]
    reds[0].save(folder / "film.gif", save_all=True, append_images=reds[1:])
    if name == "amber":
        truths = [{"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
                  {"id": 1006, "type": "discriminative-relation", "truth": "no"}]  # fmt: skip
        (folder.parent / "annotations.json").write_text(json.dumps(truths))
    if name == "amber_describe":
        truths = [{"id": n, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}
                  for n in (1, 2)]  # fmt: skip
        (folder.parent / "annotations.json").write_text(json.dumps(truths))
        (folder.parent / "relation.json").write_text('{"dog": ["puppy"], "cat": []}')
        (folder.parent / "safe_words.txt").write_text("photo\n")
    return write_rows(folder, rows)


@pytest.mark.parametrize("name", OURS)
def test_a_benchmark_reads_its_published_layout(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "json"))
    rows, right = PUBLISHED[name]
    folder = tmp_path / "copy"
    benchmark = load_benchmark(name, data=write_copy(name, folder, rows))
    assert len(benchmark.items) == 2
    found = cases(benchmark, "image", benchmark.items, seed=0)
    assert all(case.prompt and "{" not in case.prompt for case in found)
    scorer = next(iter(benchmark.scorers.values()))
    if name in ("coco_captions", "flickr30k", "nocaps"):  # the same without Java
        scorer = scorer.model_copy(update={"dialect": "mmlm"})
    for answers, wanted in ((right, 1.0), (["", ""], 0.0)):
        predictions = predict_all(scorer, found, answers)
        mine = replace(benchmark, scorers=dict.fromkeys(benchmark.kinds, scorer))
        score = summarise(mine, benchmark.kinds[0], "image", predictions, seed=0).score
        if name == "mme":
            wanted *= 200
        if name.startswith("pope") and not answers[0]:
            wanted = 0.5  # in its script, everything that is not a no is a yes
        if scorer.metric == "CIDEr":
            wanted *= 10  # what equal captions get
        if name in ("chair", "amber_describe"):
            wanted = 0.0  # nothing was mentioned that is not there
        if name == "beaf" and answers[0]:
            wanted = 1.0
        assert score == pytest.approx(wanted), predictions


def encoded(value, picture):
    """Put pictures into a row as `datasets` writes them."""
    if value == "0.png":
        return picture
    return [encoded(each, picture) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name", [name for name in OURS if load_config(name).dataset.hub and name != "scienceqa"]
)
def test_the_same_file_reads_the_parquet_of_the_hub(name, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows, _ = PUBLISHED[name]
    copy = write_copy(name, tmp_path / "copy", rows).parent
    dataset = load_config(name).dataset
    content = (copy / "0.png").read_bytes()
    picture = {"bytes": content, "path": "0.png"}
    if name in ("hrbench4k", "hrbench8k"):
        picture = base64.b64encode(content + b"\0" * 2000).decode()
    if dataset.images:
        picture = "0.png"
    rows = [{key: encoded(value, picture) for key, value in row.items()} for row in rows]
    several = dataset.config if isinstance(dataset.config, tuple) else (dataset.config or "data",)
    shard = tmp_path / "hub" / several[0] / f"{dataset.split}-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    if dataset.images:
        (copy / "0.png").rename(tmp_path / "hub" / "0.png")
    parquet.write_table(pyarrow.Table.from_pylist(rows), shard)
    # What lies beside it is another split, and must not be read.
    parquet.write_table(pyarrow.table({"x": [1]}), shard.with_name("other-00000-of-00001.parquet"))
    if isinstance(dataset.config, tuple):
        for other in several[1:]:
            (tmp_path / "hub" / other).mkdir()
            own = [{**row, "idx": f"{other} {n}"} for n, row in enumerate(rows)]
            parquet.write_table(
                pyarrow.Table.from_pylist(own), tmp_path / "hub" / other / shard.name
            )
    if dataset.join is not None and dataset.join.config:
        beside = tmp_path / "hub" / dataset.join.config / shard.name
        beside.parent.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist([{"id": "0", "image": picture}]), beside)

    benchmark = load_benchmark(name, data=tmp_path / "hub")
    assert len(benchmark.items) == 2 * len(several)
    assert all(item.images for item in benchmark.items)


def test_every_benchmark_names_its_canary_or_says_none():
    for name in OURS:
        text = list_recipes("eval")[name].read_text(encoding="utf-8")
        canary = load_config(name).canary
        assert "canary:" in text, name
        assert canary is None or (canary.origin and 0 < canary.score < 1), name


def test_every_suite_has_its_benchmarks():
    members = {name: load_config(name).suites for name in OURS}
    assert {suite for suites in members.values() for suite in suites} == {
        "core", "ocr", "hallucination", "reasoning", "grounding",
    }  # fmt: skip
    assert suite("ocr") == ["chartqa", "docvqa", "infovqa", "ocrbench", "textvqa"]
    with pytest.raises(ConfigError, match="Did you mean 'core'"):
        suite("cor")
