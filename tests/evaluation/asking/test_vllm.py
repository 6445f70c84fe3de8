"""vLLM as a backend: its answers and likelihoods are those of the model in memory.

What it gives is asked of a real vLLM where that is installed; on a CPU it takes minutes to start.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import mmlm
from mmlm.errors import EvaluationError, MissingExtraError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.asking.backend import LocalBackend
from mmlm.evaluation.asking.vllm_backend import VLLMBackend, mean_of_learnt
from mmlm.evaluation.benchmarks.conditions import Case, cases
from mmlm.evaluation.benchmarks.items import Item
from mmlm.evaluation.scorers import Target
from mmlm.generation import GenerationSettings
from tests import vllm_on_cpu

SMALL = {
    **vllm_on_cpu.SETTINGS, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
CASE = Case("made", "image", Item("7", "x", {}, (), (), Target(("a",))), "?", (), (), ("a", "b"))


def test_without_the_package_the_extra_is_named():
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"mmlm\[vllm\]"):
            VLLMBackend("somewhere")
    else:
        pytest.skip("vLLM is installed")


def said_of(read, logprobs):
    """Return what vLLM says of a prompt, as far as it is looked at."""
    given = [None, *({token: SimpleNamespace(logprob=value)} for token, value in logprobs)]
    return SimpleNamespace(prompt_token_ids=read, prompt_logprobs=given)


def test_the_tokens_of_a_choice_are_counted_from_the_end():
    # One placeholder (9) became three; the last token is learnt by nobody.
    output = said_of([1, 9, 9, 9, 5, 6, 0], [(9, -1), (9, -1), (9, -1), (5, -2), (6, -4), (0, -9)])
    assert mean_of_learnt(CASE, output, [1, 9, 5, 6, 0], [-100, -100, 5, 6, -100]) == -3.0


def test_other_tokens_than_were_written_are_refused():
    output = said_of([1, 8, 7], [(8, -1), (7, -1)])
    with pytest.raises(EvaluationError, match="made, item 7, otherwise than they are written"):
        mean_of_learnt(CASE, output, [1, 5, 6], [-100, 5, 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vllm_on_cpu.save_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def engine(folder):
    """The folder in vLLM, in this process."""
    pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SMALL.items():
            patch.setenv(key, value)
        yield VLLMBackend(
            folder, max_images=2, dtype="float32", enforce_eager=True, max_model_len=512,
            max_num_seqs=4,
        )  # fmt: skip


@pytest.mark.slow
def test_answers_and_likelihoods_are_those_of_the_model_in_memory(folder, engine, colours):
    local = LocalBackend(mmlm.load(folder))
    benchmark = load_benchmark(colours / "colours.yaml")
    items = [item for item in benchmark.items if item.kind == "choice"][:3]
    found = [
        case
        for condition in ("image", "blind")
        for case in cases(benchmark, condition, items, seed=0)
    ]
    settings = GenerationSettings(max_new_tokens=6)
    wanted = local.answer(found, settings)
    # Six tokens are six bytes here; a letter that they cut in half is shown in two ways.
    given = engine.answer(found, settings)
    assert [text.rstrip("\ufffd") for text in given] == [text.rstrip("\ufffd") for text in wanted]
    assert len(set(given)) > 1
    # Both in float32; two orders of addition.
    for theirs, ours in zip(engine.likelihoods(found), local.likelihoods(found), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("decide", ["generate", "likelihood"])
def test_a_benchmark_is_measured_by_vllm(engine, colours, tmp_path, decide):
    file = colours / "colours.yaml"
    text = file.read_text().replace("path: rows.jsonl", "path: rows.jsonl, where: {kind: choice}")
    file.write_text(f"{text}decide: {decide}\ngenerate: {{max_new_tokens: 4}}\n")
    result = evaluate(
        engine, file, tmp_path / "out", quiet=True, limit=4, conditions=("image",),
        with_report=False,
    )  # fmt: skip
    score = result.score("colours", "choice")
    assert score.n == 4
    if decide == "likelihood":
        assert score.parse_fail_rate == 0.0


@pytest.mark.slow
def test_settings_that_vllm_does_not_have_are_refused(engine):
    with pytest.raises(EvaluationError, match="searches no beams"):
        engine.answer([CASE], GenerationSettings(num_beams=2))
