"""The command line: words, help pages, near misses, exit codes; and what each command prints."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from mmlm.cli import run
from mmlm.cli.base import key_values
from mmlm.cli.chat import Terminal, talk
from mmlm.cli.main import COMMANDS, find_command
from mmlm.errors import ConfigError, UsageError
from mmlm.messages import Message, assistant, user
from tests import tiny


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page_with_examples_that_it_can_read(name, capsys):
    assert run([name, "--help"]) == 0
    page = capsys.readouterr().out
    command = find_command(name)
    assert page.startswith(f"usage: mmlm {name}")
    assert command.about.split()[0] in page
    assert command.examples, "show at least one command line"
    for line, _ in command.examples:
        words = line.split(" < ")[0].replace('"What is this?"', "What").split()
        if words[:2] == ["mmlm", name]:
            command.read(words[2:])


def test_help_lists_every_command(capsys):
    assert run(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in COMMANDS)


def test_help_pages_load_neither_torch_nor_transformers(run_python):
    code = f"""
import sys
from mmlm.cli import run
for name in {["--help", *COMMANDS]!r}:
    run([name, "--help"])
print([m for m in ("torch", "transformers") if m in sys.modules], file=sys.stderr)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    run_python(code)


def test_no_words_at_all_print_the_help_and_are_wrong_usage(capsys):
    assert run([]) == 2
    assert "usage: mmlm COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "no command is named 'trian'. Did you mean 'train'?"),
        (["--versoin"], "no flag is named '--versoin'. Did you mean '--version'?"),
        (["train", "x", "--dryrun"], "no flag is named '--dryrun'. Did you mean '--dry-run'?"),
        (["train", "x", "--dry-ru"], "Did you mean '--dry-run'?"),
        (["train"], "required: RECIPE"),
        (["train", "x", "seed"], "'seed' is not KEY=VALUE"),
        (["train", "x", "a=1", "a=2"], "The key 'a' is given twice: '1' and '2'."),
        (["parts", "conector"], "Did you mean 'connector'?"),
        (["recipes", "cpoy", "x"], "Did you mean 'copy'?"),
        (["recipes", "copy"], "needs the NAME of a recipe"),
        (["doctor", "please"], "one word too many: 'please'"),
        (["chat", "x", "--image", "nothing.png"], "there is no picture nothing.png"),
        (["app", "a", "b", "c"], "one model or two"),
        (["eval", "x", "y", "--conditions", "blnd"], "Did you mean 'blind'?"),
        (["export", "x", "--to", "stok", "--out", "y"], "Did you mean 'stock'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_told_with_the_nearest_right_ones(words, told, capsys):
    assert run(words) == 2
    assert told in capsys.readouterr().err


def test_words_may_stand_before_and_after_flags():
    options = find_command("train").read(["x", "a=1", "--out", "y", "b=2"])
    assert (options.recipe, options.overrides, options.out) == ("x", ["a=1", "b=2"], Path("y"))


def test_what_the_user_can_mend_has_no_traceback(capsys):
    assert run(["train", "no-such-recipe"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ConfigError: No recipe is named 'no-such-recipe'")
    assert "Traceback" not in told


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("mmlm.cli.recipes._table", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["recipes"])


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted() -> str:
        raise KeyboardInterrupt("stopped in stage align; the same command goes on from there")

    monkeypatch.setattr("mmlm.cli.recipes._table", interrupted)
    assert run(["recipes"]) == 1
    assert "the same command goes on from there" in capsys.readouterr().err


def test_keys_and_values_are_split_at_the_first_equals_sign():
    assert key_values(["a.b=c=d", "e="]) == {"a.b": "c=d", "e": ""}
    with pytest.raises(UsageError):
        key_values(["=1"])


def test_recipes_lists_what_there_is_and_copies_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["recipes"]) == 0
    assert "\n  quickstart" in capsys.readouterr().out
    assert run(["recipes", "copy", "quickstart", "--to", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_text().startswith("#")
    assert run(["recipes", "copy", "quickstart", "--to", "mine.yaml"]) == 2
    assert "left as it is" in capsys.readouterr().err


def test_parts_lists_every_registry_and_prints_the_settings_of_a_part(capsys):
    assert run(["parts"]) == 0
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in ("letterbox", "patches", "mlp", "causal_lm"))
    assert run(["parts", "connector", "mlp"]) == 0
    page = capsys.readouterr().out
    assert "depth" in page
    assert "default: 2" in page
    assert run(["parts", "connector", "mpl"]) == 1
    assert "Did you mean 'mlp'?" in capsys.readouterr().err


def test_doctor_finds_this_installation_well(capsys):
    assert run(["doctor"]) == 0
    page = capsys.readouterr().out
    assert "Well: everything that MMLM needs is here." in page
    assert "torch" in page


class FakeChat:
    """Says the question backwards; what is tested here is the terminal."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def ask(self, text: str, images=(), *, stream: bool = False):
        self.messages += [user(text, images), assistant(text[::-1])]
        return iter(text[::-1]) if stream else text[::-1]

    def undo(self) -> None:
        del self.messages[-2:]


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(FakeChat())  # pyright: ignore[reportArgumentType]


def test_a_picture_is_shown_with_the_next_question_only(terminal, tmp_path, capsys):
    tiny.picture().save(tmp_path / "my photo.png")
    assert terminal.take(f"/image '{tmp_path}/my photo.png'")
    terminal.take("abc")
    terminal.take("def")
    first, _, second, _ = terminal._chat.messages
    assert [path.name for path in first.images] == ["my photo.png"]
    assert second.images == []
    assert "cba\nfed\n" in capsys.readouterr().out


def test_a_file_that_is_no_picture_is_refused_before_it_is_asked_about(terminal, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no picture")
    monkey = io.StringIO(f"/image {tmp_path}/a.png\nabc\n")
    sys.stdin, before = monkey, sys.stdin
    try:
        talk(terminal, tmp_path)
    finally:
        sys.stdin = before
    captured = capsys.readouterr()
    assert "a.png" in captured.err
    assert captured.out == "cba\n"
    assert terminal._chat.messages[0].images == []


def test_undo_and_new_take_back(terminal, capsys):
    for line in ("one", "two", "/undo"):
        terminal.take(line)
    assert [turn.text for turn in terminal._chat.messages] == ["one", "eno"]
    terminal.take("/new")
    assert terminal._chat.messages == []
    with pytest.raises(UsageError, match="nothing to take back"):
        terminal.take("/undo")


def test_quit_ends_the_conversation_and_a_misspelt_word_does_not(terminal):
    assert not terminal.take("/quit")
    with pytest.raises(UsageError, match=r"'/imag'.* Did you mean '/image'\?"):
        terminal.take("/imag x")


def test_answers_as_json_are_one_line_each(capsys):
    terminal = Terminal(FakeChat(), as_json=True)  # pyright: ignore[reportArgumentType]
    terminal.take("abc\n")
    assert json.loads(capsys.readouterr().out) == {"question": "abc", "images": [], "answer": "cba"}


def test_ctrl_c_stops_an_answer_and_not_the_conversation(terminal, monkeypatch, capsys):
    def interrupted(text, images=(), *, stream=False):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal._chat, "ask", interrupted)
    assert terminal.take("abc")
    assert capsys.readouterr().out == "half …\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.compose_tiny(folder).save(folder / "saved")
    return folder / "saved"


def test_chat_gives_one_answer_about_a_picture(model, tmp_path, capsys):
    tiny.picture().save(tmp_path / "a.png")
    image = ["--image", str(tmp_path / "a.png")]
    words = ["chat", str(model), *image, "--prompt", "What?", "--max-new-tokens", "4"]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run(words) == 0
    assert capsys.readouterr().out.strip() == told["answer"].strip()


def test_eval_prints_a_table_and_leaves_results_and_a_report(model, tmp_path, capsys):
    rows = []
    for index in range(4):
        tiny.picture(index).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "?", "answer": "a", "thing": str(index)})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "q.yaml").write_text(
        "# Questions.\ndataset: {path: q.jsonl}\nscorer: keyword\ngenerate: {max_new_tokens: 2}\n"
    )
    out = tmp_path / "out"
    assert run(["eval", str(model), str(tmp_path / "q.yaml"), "--out", str(out)]) == 0
    assert "shuffled" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [row["condition"] for row in results] == ["image", "blind", "shuffled"]
    assert all(row["n"] == 4 for row in results)
    assert (out / "report.html").is_file()


def test_export_writes_each_form_and_refuses_a_full_folder(model, tmp_path, capsys):
    for form in ("stock", "mmlm"):
        out = tmp_path / form
        assert run(["export", str(model), "--to", form, "--out", str(out)]) == 0
        assert any(out.iterdir())
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "llava"
    assert json.loads((tmp_path / "mmlm" / "config.json").read_text())["model_type"] == "mmlm"
    assert run(["import", str(model), "--out", str(tmp_path / "mmlm")]) == 2
    assert "left as it is" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_failure(run_python):
    code = """
import subprocess, sys
run = [sys.executable, "-c", "import sys; from mmlm.cli import run; sys.exit(run(['--help']))"]
with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
    command.stdout.close()
    told = command.stderr.read()
assert command.returncode == 0, told
assert b"Traceback" not in told, told
"""
    run_python(code)


def test_a_recipe_error_keeps_its_exit_code_under_torchrun(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0"})
    with pytest.raises(ConfigError):
        find_command("train").run(find_command("train").read(["no-such-recipe"]))
