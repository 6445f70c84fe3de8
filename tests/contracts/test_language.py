"""What every kind of language model and of adapter promises."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mmlm.errors import ConfigError
from mmlm.language import ChatFormat, languages
from mmlm.language.adapters import adapters, add_adapters, linear_layers, merge_adapters
from mmlm.messages import assistant, user
from tests.language.models import tiny

NEEDS_MORE = {"qlora": "bitsandbytes"}
SEES_PLACES = {"mm_lora"}
"""Kinds that ask where the pictures stand: `tests/language/test_routing.py` has them on a joined
model, with the same promises but for merging, which it refuses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.language.families import FAMILIES

    tokenizer = FAMILIES[0].tokenizer()
    path = tmp_path_factory.mktemp("language") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", list(languages))
class TestEveryLanguageModel:
    """A new kind is tested as soon as it is registered."""

    def config(self, name, folder):
        return languages.read({"use": name, "checkpoint": str(folder)}, origin="model.language")

    def test_its_config_survives_json(self, name, folder):
        config = self.config(name, folder)
        assert languages.read(config.to_dict(), origin="again") == config

    def test_its_config_is_frozen_and_refuses_unknown_keys(self, name, folder):
        with pytest.raises(ValidationError):
            self.config(name, folder).checkpoint = "other"
        with pytest.raises(ConfigError, match="no such key"):
            languages.read({"use": name, "checkpoint": "x", "chekpoint": 1}, origin="x")

    def test_every_field_has_a_sentence(self, name):
        silent = [
            key for key, field in languages[name].model_fields.items() if not field.description
        ]
        assert silent == []

    def test_it_loads_a_causal_model_and_its_tokenizer(self, name, folder):
        model, tokenizer = self.config(name, folder).load()
        encoded = ChatFormat(tokenizer).encode([user("a"), assistant("b")], with_labels=True)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.ids])).logits
        assert logits.shape[:2] == (1, len(encoded.ids))
        assert not model.training

    def test_the_precision_can_be_chosen(self, name, folder):
        model, _ = self.config(name, folder).load(dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", list(adapters))
class TestEveryAdapter:
    """A new kind is tested as soon as it is registered."""

    @pytest.fixture
    def tuned(self, name):
        if name in NEEDS_MORE:
            pytest.importorskip(NEEDS_MORE[name])
        if name in SEES_PLACES:
            pytest.skip("a language model alone has no pictures: tests/language/test_routing.py")
        model = tiny("llama")
        add_adapters(model, adapters.read({"use": name, "rank": 2}, origin="adapters"), prefix="")
        return model

    def test_its_config_survives_json(self, name):
        config = adapters.read({"use": name, "rank": 3, "targets": ["q_proj"]}, origin="adapters")
        assert adapters.read(config.to_dict(), origin="again") == config

    def test_every_field_has_a_sentence(self, name):
        silent = [
            key for key, field in adapters[name].model_fields.items() if not field.description
        ]
        assert silent == []

    def test_one_step_moves_the_adapters_and_nothing_below_them(self, name, tuned):
        learning = [p for p in tuned.parameters() if p.requires_grad]
        below = {
            n: p.detach().clone() for n, p in tuned.named_parameters() if "base_layer.weight" in n
        }
        optimiser = torch.optim.SGD(learning, lr=1.0)
        for _ in range(2):  # the first step reaches only the factor that begins at zero
            optimiser.zero_grad()
            tuned(input_ids=torch.tensor([[3, 5, 7, 9]])).logits.square().mean().backward()
            optimiser.step()
        named = dict(tuned.named_parameters())
        assert all(torch.equal(named[n], value) for n, value in below.items())
        still = [n for n, p in named.items() if "lora_" in n and not p.grad.any()]
        assert still == []

    def test_merging_leaves_a_model_of_ordinary_layers(self, name, tuned):
        count = len(linear_layers(tiny("llama"), ""))
        assert merge_adapters(tuned.eval()) < 6e-2
        assert len(linear_layers(tuned, "")) == count
        assert not any("lora_" in n for n, _ in tuned.named_parameters())
