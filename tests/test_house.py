"""Rules of CONTRIBUTING that a machine can keep are kept here."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGE = ROOT / "mmlm"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stat().st_size]
MOST_LINES_IN_A_MODULE = 500
MOST_LINES_IN_A_FUNCTION = 80
MOST_LINES_IN_AN_OUTER_SCRIPT = 30
OUTER_SCRIPTS = ["data_recipes/build.py", "train/train.py", "eval/evaluate.py", "app/app.py"]

# A package index has one address, and it is nobody's business but the user's.
INDEX_HOST = re.compile(
    r"(--(extra-)?index-url|--find-links|index-url\s*=|registry\s*=\s*http|\bpypi\.org/simple"
    r"|files\.pythonhosted\.org|registry\.npmjs\.org|registry\.yarnpkg\.com|download\.pytorch\.org/whl)"
)
# Pages that only name the rule, not a host.
SPEAKS_OF_THE_RULE = {"tests/test_house.py"}


def tracked_files() -> list[Path]:
    """Every file that git knows, or would know after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_where_it_is_and_fits_on_its_pages(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [
        function.name
        for function in functions
        if (function.end_lineno or 0) - function.lineno >= MOST_LINES_IN_A_FUNCTION
    ]

    assert ast.get_docstring(tree), "begin the module with a docstring that says which room this is"
    assert text.count("\n") <= MOST_LINES_IN_A_MODULE, "split the module along its ideas"
    assert not long, f"too long to be read at once, split by steps: {', '.join(long)}"


def test_no_room_imports_the_root_of_the_package():
    """`from mmlm import hub` names a room and is fine; a public name would be a circle."""
    rooms = {path.stem for path in PACKAGE.iterdir()}
    circles = [
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name == "mmlm" for alias in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "mmlm"
            and not {alias.name for alias in node.names} <= rooms
        )
    ]
    assert circles == []


@pytest.mark.parametrize("script", OUTER_SCRIPTS)
def test_an_outer_script_is_thin_and_only_calls_the_library(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    imports = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert text.count("\n") < MOST_LINES_IN_AN_OUTER_SCRIPT
    assert any(name.split(".")[0] == "mmlm" for name in imports)


def test_outer_scripts_have_names_of_their_own():
    names = [Path(script).name for script in OUTER_SCRIPTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", ["data_recipes", "train", "eval"])
def test_the_first_line_of_a_recipe_folder_says_where_the_code_is(folder):
    first = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert "mmlm/" in first


def test_no_file_names_the_host_of_a_package_index():
    named = []
    for path in tracked_files():
        name = str(path.relative_to(ROOT))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name not in SPEAKS_OF_THE_RULE and INDEX_HOST.search(text):
            named.append(name)
    assert named == []


def test_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[a-z0-9.-]+==[\w.]+", line)]
    assert wrong == []


def test_no_large_file_is_in_the_repository():
    large = [str(path) for path in tracked_files() if path.stat().st_size > 2 * 2**20]
    assert large == []
