"""vLLM as a backend; it needs a GPU and the package."""

from __future__ import annotations

import pytest

from mmlm.errors import MissingExtraError
from mmlm.evaluation import evaluate
from mmlm.evaluation.asking.vllm_backend import VLLMBackend
from tests.evaluation.conftest import sees  # noqa: F401  (the colours fixture draws what it reads)
from tests.tiny import compose_tiny


def test_without_the_package_the_extra_is_named():
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"mmlm\[vllm\]"):
            VLLMBackend("somewhere")
    else:
        pytest.skip("vLLM is installed")


@pytest.mark.gpu
@pytest.mark.slow
def test_a_stock_folder_is_answered(colours, tmp_path):
    pytest.importorskip("vllm")
    compose_tiny(tmp_path).save(tmp_path / "model")
    backend = VLLMBackend(tmp_path / "model", gpu_memory_utilization=0.3, enforce_eager=True)
    result = evaluate(
        backend, colours / "colours.yaml", tmp_path / "out", quiet=True, limit=4,
        conditions=("image",), with_report=False,
    )  # fmt: skip
    assert result.score("colours", "choice").n == 4
