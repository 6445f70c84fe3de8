"""What learns is named by public names, reported by part, and refused when it matches nothing."""

import pytest
import torch
from torch import nn

from mmlm.errors import ConfigError
from mmlm.training.learning import freeze, matching, public_name, table
from tests.tiny import compose_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("parts")).model


def learning(model):
    return {public_name(n).split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


def test_only_what_a_pattern_names_learns(model):
    freeze(model, {"connector.*": 1e-3})
    assert learning(model) == {"connector"}


def test_a_part_can_be_named_alone_and_by_layer(model):
    freeze(model, {"connector": 1e-3, "language.layers.1": 1e-4})
    names = [public_name(n) for n, p in model.named_parameters() if p.requires_grad]
    assert any(n.startswith("language.layers.1.") for n in names)
    assert not any(n.startswith("language.layers.0.") for n in names)


def test_the_last_of_several_patterns_counts(model):
    chosen = matching(model, {"language.*": 1e-4, "language.layers.1.*": 1e-5})
    assert chosen["model.language.layers.1.mlp.up_proj.weight"] == "language.layers.1.*"
    assert chosen["model.language.layers.0.mlp.up_proj.weight"] == "language.*"


@pytest.mark.parametrize("pattern", ["conector.*", "language.layers.99.*", ""])
def test_a_pattern_that_matches_nothing_is_an_error(model, pattern):
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(model, {"connector.*": 1.0, pattern: 1.0})


def test_a_tied_head_is_explained(tmp_path):
    tied = compose_tiny(tmp_path, language="smollm").model
    with pytest.raises(ConfigError, match=r"language\.embed_tokens"):
        freeze(tied, {"head.*": 1.0})


def test_wrappers_change_no_public_name(model):
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    for name, _ in wrapped.named_parameters():
        assert public_name(name) == public_name(name.removeprefix("module."))


@pytest.fixture
def tuned(tmp_path):
    """A model with adapters beside the query and value projections."""
    pytest.importorskip("peft", reason="needs the extra [train]")
    from mmlm.language.adapters import LoraAdapterConfig, add_adapters

    model = compose_tiny(tmp_path).model
    add_adapters(model, LoraAdapterConfig(rank=2, targets=("q_proj", "v_proj")))
    return model


@pytest.mark.parametrize("pattern", ["adapters.*", "adapters", "language.*", "language", "*"])
def test_a_general_pattern_means_the_adapters_and_not_the_weights_around_them(tuned, pattern):
    reports = {r.part: r for r in freeze(tuned, {"connector.*": 1.0, pattern: 1e-4})}
    assert reports["adapters"].learning == reports["adapters"].total > 0
    assert reports["language"].learning == 0
    learn = {n for n, p in tuned.named_parameters() if p.requires_grad and "language" in n}
    assert learn
    assert all("lora_" in name for name in learn)


def test_adapters_of_some_layers_can_be_named(tuned):
    chosen = matching(tuned, {"language.layers.1.*": 1e-4})
    assert len(chosen) == 4
    assert all(".layers.1.self_attn." in name and "lora_" in name for name in chosen)


def test_a_weight_without_an_adapter_learns_where_it_is_named(tuned):
    chosen = matching(tuned, {"adapters.*": 1e-4, "language.norm.*": 1e-5})
    assert chosen["model.language.norm.weight"] == "language.norm.*"
    assert len(chosen) == 1 + 2 * 2 * 2


def test_a_pattern_for_adapters_that_are_not_there_says_where_they_come_from(model):
    with pytest.raises(ConfigError, match="`adapters:` in the stage"):
        freeze(model, {"adapters.*": 1.0})


def test_an_untied_head_stands_still_when_the_language_part_learns(model):
    reports = {r.part: r for r in freeze(model, {"language.*": 1.0})}
    assert (reports["head"].learning, reports["language"].learning) == (
        0, reports["language"].total,
    )  # fmt: skip
    assert reports["head"].total == model.lm_head.weight.numel()
    assert not model.lm_head.weight.requires_grad
    assert model.get_input_embeddings().weight.requires_grad


def test_the_table_counts_every_weight(model):
    reports = freeze(model, {"connector.*": 1.0})
    assert sum(r.total for r in reports) == sum(p.numel() for p in model.parameters())
    assert "connector" in table(reports)
    assert "100.0 %" in table(reports)


def test_a_gradient_step_moves_what_learns_and_nothing_else(model):
    freeze(model, {"connector.*": 1.0})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.randint(0, 250, (1, 20))
    ids[0, 1:17] = model.config.image_token_id
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids).loss.backward()
    optimizer.step()
    moved = {public_name(n).split(".")[0] for n, p in model.named_parameters()
             if not torch.equal(p, before[n])}  # fmt: skip
    assert moved == {"connector"}
