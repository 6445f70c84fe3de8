"""The Auto classes know MMLM in either order of imports, and `import mmlm` stays light."""

from __future__ import annotations

import pytest

KNOWS = """
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = CONFIG_MAPPING["mmlm"]
print(config.__name__, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config].__name__)
print(PROCESSOR_MAPPING[config].__name__)
import sys
from mmlm.autoclasses import _Watcher
print(sum(isinstance(finder, _Watcher) for finder in sys.meta_path), "watchers left")
"""
NAMES = ["MMLMConfig MMLMForConditionalGeneration", "MMLMProcessor"]


FAST = [
    "import mmlm",
    "import mmlm\nfrom transformers import Trainer",
]
SLOW = [
    "from transformers import AutoConfig\nimport mmlm",
    "import mmlm, transformers",
    "from transformers import Trainer\nimport mmlm",
    "import mmlm.modeling",
    "import mmlm.processing",
    "from mmlm.assistant import compose",
    "import mmlm\nmmlm.Assistant",
]


@pytest.mark.parametrize(
    "first",
    [*FAST, *(pytest.param(code, marks=pytest.mark.slow) for code in SLOW)],
    ids=lambda code: code.replace("\n", "; "),
)
def test_the_auto_classes_know_mmlm_whatever_is_imported_first(run_python, first):
    assert run_python(first + KNOWS).splitlines() == [*NAMES, "0 watchers left"]


def test_import_mmlm_loads_neither_torch_nor_transformers(run_python):
    code = "import sys, mmlm; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_every_public_name_can_be_used(run_python):
    code = "import mmlm; print([n for n in mmlm.__all__ if getattr(mmlm, n, None) is None])"
    assert run_python(code) == "[]"


def test_a_name_that_is_not_public_is_told_with_those_that_are(run_python):
    code = """
import mmlm
try: mmlm.lod
except AttributeError as error: print(error)
"""
    assert "no attribute 'lod'. It has: Assistant, Chat" in run_python(code)
