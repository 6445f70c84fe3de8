"""The words of `mmlm serve` and `mmlm app`."""

from __future__ import annotations

import pytest

from mmlm.cli import run
from mmlm.cli.app import COMMANDS
from mmlm.errors import UsageError
from mmlm.serving.ports import free_port


def read(*words):
    return COMMANDS["serve"].read(words)


def test_adapters_are_names_and_folders():
    options = read("base", "--adapter", "birds=a/b", "--adapter", "maps=c=d")
    assert options.adapter == [("birds", "a/b"), ("maps", "c=d")]
    for word in ("birds", "=a", "birds="):
        with pytest.raises(UsageError, match="NAME=FOLDER was expected"):
            read("base", "--adapter", word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "vlm"], "vlm"),
        (["--bits", "3"], "3"),
        (["--cache-mb", "-1"], "--cache-mb must be 0 or more"),
        (["--engine-url", "http://127.0.0.1:1"], "belong to --engine vllm"),
        (["--engine", "vllm", "--bits", "4"], "--engine-options"),
        (["--port", "0"], "1 to 65535"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, told, capsys):
    assert run(["serve", "owner/model", "--port", str(free_port()), *words]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(capsys):
    for command in ("app", "serve"):
        assert run([command, "./nowhere"]) == 2
        assert "There is no folder ./nowhere" in capsys.readouterr().err
