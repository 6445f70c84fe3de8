"""What `one_24gb.yaml` says about memory is what the memory plan says of these models.

The models are built without weights from the shapes that their publishers give, and the words
are read from the head of the recipe, as a user would copy them. The weights of the largest one are
held in 4 bits by layers that stand in for those of bitsandbytes: two weights to a byte, made
whole for each product, forward and backward.
"""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, SiglipVisionConfig

import mmlm.language.adapters as adapting
from mmlm.data.preview import Survey
from mmlm.modeling import MMLMConfig, MMLMForConditionalGeneration
from mmlm.training.forecast import bytes_on_each
from mmlm.training.learning import freeze
from mmlm.training.precision import choose_precision
from mmlm.training.preflight import plan_stage
from mmlm.training.recipe import read_recipe
from mmlm.training.sharding import bytes_of, layers_of

RECIPE = Path(__file__).parents[3] / "train" / "recipes" / "one_24gb.yaml"
GIB = 2**30
# Width, feed-forward width, layers, heads, heads of keys, words, whether the head is the embedding:
# the `config.json` of Qwen/Qwen2.5-*-Instruct.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
SIDE_PX, PATCH_PX, WIDTH = 384, 16, 768  # google/siglip-base-patch16-384
TOKENS_OF_PICTURE = (SIDE_PX // PATCH_PX) ** 2
SAMPLE = SimpleNamespace(num_tokens=TOKENS_OF_PICTURE + 200, num_labels=100, num_tiles=1)


def stated():
    """Return for each size what the head of the recipe says, and the words that make it."""
    found, name = {}, ""
    for line in RECIPE.read_text().splitlines():
        text = line.removeprefix("#").strip()
        if match := re.match(r"([\d.]+B) +([\d.]+) GiB of the GPU(?:, ([\d.]+) GiB of)?", text):
            name = match[1]
            found[name] = (float(match[2]), match[3] and float(match[3]), [])
        elif line.startswith("#         ") and name:
            words = [word for word in shlex.split(text) if "=" in word]
            found[name][2].extend(words)
    return found


class FourBits(nn.Linear):
    """A layer whose weight is held in 4 bits, as far as memory goes."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        packed = torch.empty(plain.weight.numel() // 2, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, given):
        shape = (self.out_features, self.in_features)
        made = Product.apply(given, self.weight, shape)
        return made if self.bias is None else made + self.bias


class Product(torch.autograd.Function):
    """A product with a weight that is made whole only while it is needed."""

    @staticmethod
    def forward(ctx, given, packed, shape):
        ctx.shape, ctx.like = shape, given.dtype
        ctx.save_for_backward(packed)
        return given @ torch.empty(shape, dtype=given.dtype).T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty(ctx.shape, dtype=ctx.like), None, None


def hold_in_four_bits(model, names):
    for name in names:
        model.set_submodule(name, FourBits(model.get_submodule(name)))


def all_of_them(model, layers):
    return {name.rpartition(".")[2] for name in layers}


def model_of(name, recipe):
    """Build the recipe's model on the meta device."""
    width, feed_forward, layers, heads, key_heads, words, tied = SHAPES[name]
    text = Qwen2Config(
        hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=words,
        tie_word_embeddings=tied,
    )  # fmt: skip
    tower = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12,
        num_attention_heads=12, image_size=SIDE_PX, patch_size=PATCH_PX,
    )  # fmt: skip
    rows = SIDE_PX // PATCH_PX
    facts = {
        "width": WIDTH, "side": (SIDE_PX, SIDE_PX), "grid": (rows, rows), "patch": PATCH_PX,
        "stride": PATCH_PX, "mean": (0.5,) * 3, "std": (0.5,) * 3, "feature": "hidden_states[-2]",
    }  # fmt: skip
    config = MMLMConfig(
        text_config=text, vision_config=tower, vision=recipe.model["vision"],
        vision_facts=facts, image=recipe.model["image"], connector=recipe.model["connector"],
        tie_word_embeddings=tied, image_token_id=words - 1,
    )  # fmt: skip
    with torch.device("meta"):
        model = MMLMForConditionalGeneration(config)
    model.tie_weights()
    return model.to(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_recipe_says_what_the_memory_plan_says(name, monkeypatch):
    gpu, machine, words = stated()[name]
    recipe, _, _ = read_recipe(RECIPE, words)
    assert f"-{name}-" in recipe.model["language"]["checkpoint"]
    (stage,) = (one for one in recipe.stages if one.name == "instruct")
    model = model_of(name, recipe)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if (config := stage.adapter_config()) is not None:
        pytest.importorskip("peft", reason="adapters need it")
        monkeypatch.setattr(adapting, "quantise", hold_in_four_bits)
        monkeypatch.setattr(adapting, "load_bitsandbytes", lambda needed_for: None)
        # Without contents no layer can be watched; in this family all of them are called.
        monkeypatch.setattr(adapting, "_used", all_of_them)
        adapting.add_adapters(model, config)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    freeze(model, stage.patterns)
    run = SimpleNamespace(
        recipe=recipe, precision=choose_precision(recipe.run, torch.device("cpu")),
        assistant=SimpleNamespace(model=model), engine=SimpleNamespace(world=1),
    )  # fmt: skip
    plan = plan_stage(run, stage, Survey([SAMPLE] * 50))
    assert plan.how == "one step rehearsed"
    held = bytes_on_each(
        plan, recipe.run.sharding, 1, offload=recipe.run.offload,
        layer=max(bytes_of(layer) for layer in layers_of(model)),
    )  # fmt: skip
    assert held / GIB == pytest.approx(gpu, abs=0.051)
    assert gpu < 0.9 * 24
    if recipe.run.offload:
        aside = plan.gradients + plan.copies + plan.moments
        assert aside / GIB == pytest.approx(machine, abs=0.051)
