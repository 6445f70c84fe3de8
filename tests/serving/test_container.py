"""What the Dockerfile says, done without Docker: its files make the wheel, its words are ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from mmlm.cli.app import COMMANDS
from tests.serving.fakes import FakeSpeaker
from tests.serving.live import serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps():
    """The instructions, each a word and what follows it."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def told(steps, word):
    return [rest for first, rest in steps if first == word]


def test_what_is_copied_is_enough_to_build_the_wheel_with_every_recipe(steps, tmp_path):
    copied = [rest.split() for rest in told(steps, "COPY") if not rest.startswith("--from")]
    for *sources, target in copied:
        for source in sources:
            if (ROOT / source).is_dir():
                left_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, tmp_path / "src" / target, ignore=left_out)
            else:
                (tmp_path / "src").mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / "src" / source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "src")], check=True, capture_output=True)
    files = ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "mmlm/_recipes/train/quickstart.yaml" in files
    assert "mmlm/serving/page.css" in files


def test_the_extras_that_are_installed_exist_and_hold_the_server(steps):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", " ".join(told(steps, "RUN")))
    assert "app" in extras.split(",")
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_it_serves_as_somebody_without_rights_and_can_be_told_to_end(steps):
    assert told(steps, "USER") == ["mmlm"]
    assert json.loads(told(steps, "ENTRYPOINT")[0]) == ["mmlm"]
    command, *words = json.loads(told(steps, "CMD")[0])
    options = COMMANDS[command].parser().parse_args(words)
    assert (options.models, options.host, options.ui) == (["/model"], "0.0.0.0", True)
    assert told(steps, "EXPOSE") == [str(options.port)]
    assert told(steps, "STOPSIGNAL") == ["SIGTERM"]


def test_its_health_check_asks_whether_the_server_is_ready(steps):
    _, _, words = told(steps, "HEALTHCHECK")[0].partition("CMD ")
    _, flag, code = json.loads(words)

    def check(address):
        asked = code.replace("http://127.0.0.1:8000", address)
        assert asked != code
        return subprocess.run([sys.executable, flag, asked], capture_output=True).returncode

    with serving([FakeSpeaker()]) as address:
        assert check(address) == 0
    assert check(address) != 0
