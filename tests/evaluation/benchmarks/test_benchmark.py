"""Benchmarks as data: every layout is read, and every fault names its rows."""

from __future__ import annotations

import base64
import csv
import json

import pytest
from PIL import Image

from mmlm.errors import ConfigError, DataError, EvaluationError, MMLMError
from mmlm.evaluation import BenchmarkConfig, load_benchmark
from tests.evaluation.conftest import write_rows

ROWS = [
    {"id": "a", "image": "0.png", "question": "What?", "answer": "red"},
    {"id": "b", "image": "1.png", "question": "Who?", "answer": "green"},
]


@pytest.fixture
def folder(tmp_path):
    for number in range(2):
        Image.new("RGB", (8, 8), ("red", "green")[number]).save(tmp_path / f"{number}.png")
    return tmp_path


def config(**values):
    return BenchmarkConfig.from_dict({"dataset": {"path": "rows.jsonl"}, **values})


def read(folder, rows, **values):
    path = write_rows(folder, rows)
    return load_benchmark(config(**values), data=path)


class TestLayouts:
    def test_jsonl(self, folder):
        benchmark = read(folder, ROWS)
        assert [item.id for item in benchmark.items] == ["a", "b"]
        assert benchmark.items[0].images == (folder / "0.png",)

    def test_csv_with_quotes_and_lists_in_cells(self, folder):
        with (folder / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "question", "answer", "choices"])
            writer.writerow(["0.png", "What, exactly?", "red", '["red", "blue"]'])
        benchmark = load_benchmark(config(), data=folder / "rows.csv")
        assert benchmark.items[0].target.choices == ("red", "blue")
        assert benchmark.prompt(benchmark.items[0]) == "What, exactly?"

    def test_json_of_objects_by_id(self, folder):
        (folder / "rows.json").write_text(json.dumps({"x": ROWS[0] | {"id": "x"}}))
        assert load_benchmark(config(), data=folder / "rows.json").items[0].id == "x"

    def test_tsv_with_pictures_in_its_cells(self, folder):
        coded = base64.b64encode((folder / "0.png").read_bytes() + b"\0" * 2000).decode()
        (folder / "rows.tsv").write_text(
            f"index\timage\tquestion\tanswer\n7\t{coded}\tWhat?\tred\n"
        )
        benchmark = load_benchmark(config(id="index"), data=folder / "rows.tsv")
        assert benchmark.items[0].images[0].startswith(b"\x89PNG")
        assert benchmark.items[0].id == "7"

    def test_parquet_with_pictures_as_datasets_writes_them(self, folder):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        picture = {"bytes": (folder / "0.png").read_bytes(), "path": "0.png"}
        table = pyarrow.table({"image": [picture], "question": ["What?"], "answer": ["red"]})
        (folder / "data").mkdir()
        parquet.write_table(table, folder / "data" / "test-0.parquet")
        assert isinstance(load_benchmark(config(), data=folder / "data").items[0].images[0], bytes)

    def test_a_folder_with_metadata(self, folder):
        write_rows(folder, ROWS, "metadata.jsonl")
        assert len(load_benchmark(config(), data=folder).items) == 2

    def test_one_column_for_each_option_with_empty_cells(self, folder):
        rows = [ROWS[0] | {"answer": "B", "A": "blue", "B": "red", "C": ""}]
        benchmark = read(folder, rows, choices=["A", "B", "C"], scorer="choice")
        assert benchmark.items[0].target.choices == ("blue", "red")

    def test_answers_of_ten_people(self, folder):
        people = [{"answer": "red", "answer_id": n} for n in range(10)]
        benchmark = read(folder, [ROWS[0] | {"answer": people}], scorer="vqa")
        assert benchmark.items[0].target.references == ("red",) * 10

    def test_text_alone(self, folder):
        benchmark = read(folder, [{"question": "2 + 2?", "answer": "4"}], image=None)
        assert benchmark.items[0].images == ()


class TestPrompts:
    def test_options_get_letters(self, folder):
        rows = [ROWS[0] | {"choices": ["red", "blue"]}]
        benchmark = read(folder, rows, question="{question}\n{options}\nAnswer.", scorer="choice")
        assert benchmark.prompt(benchmark.items[0]) == "What?\nA. red\nB. blue\nAnswer."

    def test_a_column_that_is_not_there_is_named(self, folder):
        with pytest.raises(EvaluationError, match="'hint'"):
            read(folder, ROWS, question="{question} {hint}")

    def test_braces_in_a_question_stay(self, folder):
        benchmark = read(folder, [ROWS[0] | {"question": "Is {x} red?"}])
        assert benchmark.prompt(benchmark.items[0]) == "Is {x} red?"


class TestFaults:
    def test_missing_pictures_are_named_and_counted(self, folder):
        rows = [row | {"id": f"{n}", "image": f"gone/{n}.png"} for n, row in enumerate(ROWS * 6)]
        with pytest.raises(
            EvaluationError, match=r"12 of 12 rows(.|\n)*gone/0\.png(.|\n)*and 4 more"
        ):
            read(folder, rows)

    def test_ids_that_stand_twice(self, folder):
        with pytest.raises(EvaluationError, match="rows 0 and 1: both have the id 'a'"):
            read(folder, [ROWS[0], ROWS[1] | {"id": "a"}])

    @pytest.mark.parametrize("column", ["image", "answer"])
    def test_wrong_columns(self, folder, column):
        row = {key: value for key, value in ROWS[0].items() if key != column}
        with pytest.raises(EvaluationError, match=f"no column '{column}'"):
            read(folder, [row])

    def test_too_few_annotators(self, folder):
        with pytest.raises(EvaluationError, match="answers of 9 annotators, not 10"):
            read(folder, [ROWS[0] | {"answer": ["red"] * 9}], scorer="vqa")

    def test_an_answer_that_is_none_of_the_choices(self, folder):
        with pytest.raises(EvaluationError, match="none of its choices"):
            read(folder, [ROWS[0] | {"choices": ["blue", "pink"]}], scorer="choice")

    def test_choices_that_are_the_same(self, folder):
        with pytest.raises(EvaluationError, match="are the same"):
            read(folder, [ROWS[0] | {"choices": ["red", "Red.", "blue"]}], scorer="choice")

    def test_an_address_instead_of_a_picture(self, folder):
        with pytest.raises(EvaluationError, match="is a URL"):
            read(folder, [ROWS[0] | {"image": "https://example.org/a.png"}])

    def test_a_line_that_is_not_json(self, folder):
        (folder / "rows.jsonl").write_text('{"id": 1}\nnot json\n')
        with pytest.raises(DataError, match="line 2 is not JSON"):
            load_benchmark(config(), data=folder / "rows.jsonl")

    def test_a_csv_with_a_ragged_line(self, folder):
        (folder / "rows.csv").write_text("image,question,answer\n0.png,What, now?,red\n")
        with pytest.raises(DataError, match="line 2 has another number of cells"):
            load_benchmark(config(), data=folder / "rows.csv")

    def test_no_rows(self, folder):
        (folder / "rows.jsonl").write_text("")
        with pytest.raises(DataError, match="holds no rows"):
            load_benchmark(config(), data=folder / "rows.jsonl")

    def test_a_filter_that_keeps_nothing(self, folder):
        values = {"path": "rows.jsonl", "where": {"id": "z"}}
        with pytest.raises(EvaluationError, match="no row has id"):
            read(folder, ROWS, dataset=values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"scorer": "exakt"}, "Did you mean 'exact'"),
            ({"scorer": {"use": "vqa", "dialect": "llama"}}, "speaks official, llava"),
            ({"scorer": {"name": "name"}, "kind": "id"}, "says nothing about the kind"),
            ({"generate": {"max_tokens": 3}}, "no such key"),
            ({"decide": "likelihood"}, "needs choices"),
        ],
    )
    def test_settings_that_are_wrong(self, folder, values, message):
        with pytest.raises(MMLMError, match=message):
            read(folder, ROWS, **values)

    def test_an_unknown_key_of_the_file(self, folder):
        (folder / "x.yaml").write_text("dataset: {path: rows.jsonl}\nscorers: exact\n")
        with pytest.raises(ConfigError, match="scorers: no such key"):
            load_benchmark(folder / "x.yaml")


def test_every_benchmark_of_ours_is_a_valid_config():
    from mmlm.config import read_yaml
    from mmlm.recipes import list_recipes

    for path in list_recipes("eval").values():
        BenchmarkConfig.from_dict(read_yaml(path), origin=str(path))
