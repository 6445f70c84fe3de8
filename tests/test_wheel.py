"""The wheel holds one name, and every recipe; an installed package finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sources that are here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_installs_one_name_and_carries_every_recipe(wheel):
    files = ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mmlm"}
    assert "mmlm/py.typed" in files

    shipped = {Path(name).name for name in files if name.startswith("mmlm/_recipes/")}
    outer = [
        "train/recipes",
        "train/deepspeed",
        "eval/benchmarks",
        "data_recipes/mixtures",
        "data_recipes/sources",
    ]
    assert shipped == {path.name for folder in outer for path in (ROOT / folder).iterdir()}
    assert "quickstart.yaml" in shipped


def test_an_unpacked_wheel_lists_the_same_recipes_as_the_checkout(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path)
    code = (
        "import mmlm, mmlm.recipes as r; "
        "print(mmlm.__file__); print(*[name for kind in r.KINDS for name in r.list_recipes(kind)])"
    )

    def listed(root: Path) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        run = [sys.executable, "-c", code]
        done = subprocess.run(
            run, env=environment, cwd=root.parent, capture_output=True, text=True, check=True
        )
        where, names = done.stdout.splitlines()
        assert Path(where).is_relative_to(root)
        return names.split()

    assert listed(tmp_path) == listed(ROOT)
