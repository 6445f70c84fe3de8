"""Checkpoints of other projects, by their published names, answer as the parts they are made of."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmlm.assistant import load
from mmlm.errors import CheckpointError
from tests.tiny import compose_tiny, picture, save_vision

MLP = {"use": "mlp"}
SHUFFLE = {"use": "pixel_shuffle", "factor": 2}


def compose(folder: Path, vision: str = "clip", **parts):
    eye = {"use": "hf", "checkpoint": str(save_vision(folder / vision, vision))}
    return compose_tiny(folder, eye=eye | parts.pop("eye", {}), **parts)


def text_values(assistant) -> dict:
    values = assistant.model.config.text_config.to_dict()
    return {key: value for key, value in values.items() if key != "model_type"}


def write(folder: Path, assistant, values: dict, state: dict, *, pickled: bool = False) -> Path:
    """Write a folder as the project would: config, weights, tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values, default=str))
    assistant.processor.tokenizer.save_pretrained(folder)
    apart = {key: value.clone().contiguous() for key, value in state.items()}
    if pickled:
        torch.save(apart, folder / "pytorch_model.bin")
    else:
        save_file(apart, folder / "model.safetensors")
    return folder


def renamed(assistant, pairs: list[tuple[str, str]], drop: tuple[str, ...] = ()) -> dict:
    """Return the model's tensors under a project's names."""
    state = {}
    for key, value in assistant.model.state_dict().items():
        if key.startswith(drop) if drop else False:
            continue
        old, new = next(pair for pair in pairs if key.startswith(pair[0]))
        state[new + key.removeprefix(old)] = value
    return state


def same(assistant, folder: Path) -> None:
    again = load(folder, device="cpu")
    question = ("What is it?", [picture(3)])
    asked = [one.processor.encode_chat(_messages(question), add_generation_prompt=True)
             for one in (assistant, again)]  # fmt: skip
    assert asked[0].ids == asked[1].ids
    ours, theirs = (
        one.model(
            input_ids=torch.tensor([encoded.ids]),
            pixel_values=encoded.pixel_values,
            **one.processor.image_processor.sizes(encoded.image_sizes),
        ).logits
        for one, encoded in zip((assistant, again), asked, strict=True)
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def _messages(question):
    from mmlm.messages import user

    return [user(*question)]


def llava_values(assistant, folder: Path, **more) -> dict:
    tower = folder / "clip"
    return {
        **text_values(assistant),
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 32,
        "image_aspect_ratio": "pad",
        **more,
    }


LLAVA = [
    ("model.connector.layers.", "model.mm_projector."),
    ("model.vision.tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.marks.weight", "model.image_newline"),
    ("model.language.", "model."),
    ("lm_head.", "lm_head."),
]


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("held", [False, True], ids=["tower elsewhere", "tower inside"])
def test_llava_1_5(tmp_path, held, pickled):
    assistant = compose(tmp_path, image={"use": "letterbox"}, connector=MLP)
    state = renamed(assistant, LLAVA, () if held else ("model.vision.",))
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as older files do
    values = llava_values(assistant, tmp_path)
    same(assistant, write(tmp_path / "theirs", assistant, values, state, pickled=pickled))


def test_llava_1_6_with_its_tiles_and_newline(tmp_path):
    tiles = {"use": "tiles", "rule": "anyres", "grids": [[2, 1], [1, 2]], "layout": "unpad"}
    assistant = compose(tmp_path, image=tiles, connector=MLP)
    state = renamed(assistant, LLAVA)
    state["model.image_newline"] = state["model.image_newline"][0]
    more = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    pins = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
    values = llava_values(assistant, tmp_path, **more, **pins)
    same(assistant, write(tmp_path / "theirs", assistant, values, state))


def test_bunny_with_siglip(tmp_path):
    assistant = compose(tmp_path, "siglip", language="qwen2", connector=MLP)
    state = renamed(assistant, LLAVA)
    values = llava_values(assistant, tmp_path, model_type="bunny-qwen2")
    values |= {"mm_vision_tower": str(tmp_path / "siglip"), "image_aspect_ratio": "square"}
    values |= {"tie_word_embeddings": True}
    same(assistant, write(tmp_path / "theirs", assistant, values, state))


def test_mobilevlm_v2(tmp_path):
    connector = {"use": "ldpv2"}
    assistant = compose(tmp_path, image={"use": "letterbox"}, connector=connector)
    pairs = [
        ("model.connector.mlp.", "model.mm_projector.mlp.mlp."),
        ("model.connector.places.", "model.mm_projector.peg.peg.0."),
        *LLAVA,
    ]
    values = llava_values(assistant, tmp_path, model_type="mobilevlm")
    values["mm_projector_type"] = "ldpnetv2"
    folder = write(tmp_path / "theirs", assistant, values, renamed(assistant, pairs))
    same(assistant, folder)


def test_mobilevlm_v1(tmp_path):
    assistant = compose(tmp_path, image={"use": "letterbox"}, connector={"use": "ldp"})
    with torch.no_grad():
        for name, weight in assistant.model.model.connector.named_parameters():
            weight.add_(0.1) if "norm" in name else None
    projector, pairs = "model.mm_projector.", []
    for place, block in enumerate(("stay", "halve"), 1):
        for ours, theirs in (
            ("depth", "0.0"), ("depth_norm", "0.1"), ("squeeze", "1.fc1"),
            ("excite", "1.fc2"), ("point", "2.0"), ("point_norm", "2.1"),
        ):  # fmt: skip
            there = f"{projector}mb_block.{place}.block.{theirs}."
            pairs.append((f"model.connector.{block}.{ours}.", there))
    pairs += [(f"model.connector.mlp.{i}.", f"{projector}mlp.{i + 1}.") for i in (0, 2)]
    values = llava_values(assistant, tmp_path, model_type="mobilevlm", mm_projector_type="ldpnet")
    state = renamed(assistant, [*pairs, *LLAVA])
    same(assistant, write(tmp_path / "theirs", assistant, values, state))


def test_llava_onevision_with_a_cut_siglip_and_a_shrunk_map(tmp_path):
    """The tower's last block is not in the file, and a large map is shrunk to two tiles."""
    grids = [[1, 1], [2, 1], [1, 2], [2, 2]]
    tiles = {"use": "tiles", "rule": "anyres", "grids": grids, "layout": "unpad", "shrink_above": 2}
    eye = {"layer": -2}
    assistant = compose(tmp_path, "siglip", image=tiles, connector=MLP, language="qwen2", eye=eye)
    last = "model.vision.tower.encoder.layers.2."
    state = renamed(assistant, LLAVA, (last, "model.vision.tower.head."))
    state["model.image_newline"] = state["model.image_newline"][0]
    values = llava_values(assistant, tmp_path, model_type="llava_qwen") | {
        "mm_vision_tower": str(tmp_path / "siglip"),
        "image_aspect_ratio": "anyres_max_2",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "(1x1),(1x2),(2x1),(2x2)",
        "tie_word_embeddings": True,
    }
    folder = write(tmp_path / "theirs", assistant, values, state)
    same(assistant, folder)
    # The range begins with one tile; the order of width and height is theirs.
    config = load(folder, device="cpu").model.config
    assert config.image["grids"] == [[1, 1], [2, 1], [1, 2], [2, 2]]
    assert config.vision_config.num_hidden_layers == 2


def test_tinyllava_factory(tmp_path):
    assistant = compose(tmp_path, "siglip", connector=MLP)
    pairs = [
        ("model.connector.layers.", "connector._connector."),
        ("model.vision.tower.", "vision_tower._vision_tower.vision_model."),
        ("model.language.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ]
    config = assistant.model.config
    values = {
        "model_type": "tinyllava",
        "text_config": config.text_config.to_dict(),
        "vision_config": config.vision_config.to_dict(),
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
    }
    folder = write(tmp_path / "theirs", assistant, values, renamed(assistant, pairs))
    same(assistant, folder)


def test_nanovlm(tmp_path):
    eye = {"layer": "last", "mean": [0.0] * 3, "std": [1.0] * 3}
    bare = {"use": "linear", "bias": False}
    assistant = compose(tmp_path, "siglip", eye=eye, reducer=SHUFFLE, connector=bare)
    pairs = [
        ("model.connector.linear.", "MP.proj."),
        ("model.vision.tower.embeddings.patch_embedding.", "vision_encoder.patch_embedding.conv."),
        ("model.vision.tower.embeddings.position_embedding.weight",
         "vision_encoder.patch_embedding.position_embedding"),
        ("model.vision.tower.post_layernorm.", "vision_encoder.layer_norm."),
        ("model.vision.tower.encoder.layers.", "vision_encoder.blocks."),
        ("model.language.embed_tokens.", "decoder.token_embedding."),
        ("model.language.norm.", "decoder.norm."),
        ("model.language.layers.", "decoder.blocks."),
        ("lm_head.", "decoder.head."),
    ]  # fmt: skip
    state = renamed(assistant, pairs, ("model.vision.tower.head.",))
    theirs: dict = {}
    for key, value in state.items():
        for old, new in (
            ("layer_norm1", "ln1"), ("layer_norm2", "ln2"), ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"), ("self_attn.o_proj", "self_attn.out_proj"),
            ("self_attn", "attn"),
        ):  # fmt: skip
            key = key.replace(old, new)
        theirs[key] = value
    for block in range(3):
        for kind in ("weight", "bias"):
            stem = f"vision_encoder.blocks.{block}.attn."
            parts = [theirs.pop(f"{stem}{letter}_proj.{kind}") for letter in "qkv"]
            theirs[f"{stem}qkv_proj.{kind}"] = torch.cat(parts)
    position = "vision_encoder.patch_embedding.position_embedding"
    theirs[position] = theirs[position][None]
    text = assistant.model.config.text_config
    values = {
        "vit_hidden_dim": 32, "vit_inter_dim": 64, "vit_patch_size": 8, "vit_img_size": 32,
        "vit_n_heads": 4, "vit_n_blocks": 3, "vit_ln_eps": 1e-6, "lm_hidden_dim": 32,
        "lm_inter_dim": 64, "lm_rms_eps": text.rms_norm_eps, "lm_re_base": 10000,
        "lm_max_position_embeddings": 1024, "lm_vocab_size": text.vocab_size, "lm_n_heads": 4,
        "lm_n_kv_heads": 2, "lm_n_blocks": 2, "lm_tie_weights": False,
        "mp_pixel_shuffle_factor": 2, "vlm_extra_tokens": {"image_token": "<|image|>"},
    }  # fmt: skip
    folder = write(tmp_path / "theirs", assistant, values, theirs)
    same(assistant, folder)
    assert "as words" in load(folder, device="cpu").model.config.sources["notes"][0]


FUSED = {"use": "norm_mlp", "norms": 0, "hidden_widths": [256, 32]}


@pytest.mark.parametrize("fused", [False, True], ids=["one encoder", "fused pair"])
def test_prismatic(tmp_path, fused):
    letterbox = {"image": {"use": "letterbox"}}
    if fused:
        names = [str(save_vision(tmp_path / kind, kind))
                 for kind in ("dinov2_with_registers", "siglip")]  # fmt: skip
        eyes = [{"use": "hf", "checkpoint": name, "layer": -2, "side_px": 32} for name in names]
        pair = {"use": "mixture", "fuse": "channels", "encoders": eyes}
        assistant = compose_tiny(tmp_path, eye=pair, connector=FUSED, **letterbox)
        said = {"vision_backbone_id": "dinosiglip-vit-so-384px", "image_size": 32}
        said |= {"arch_specifier": "no-align+fused-gelu-mlp", "vision_checkpoints": names}
    else:
        assistant = compose(tmp_path, connector=MLP, **letterbox)
        said = {"vision_backbone_id": "clip-vit-l-336px", "arch_specifier": "no-align+gelu-mlp"}
        said |= {"vision_checkpoint": str(tmp_path / "clip")}
    pairs = [
        ("model.connector.layers.", "projector.projector."),
        ("model.language.", "llm_backbone.llm.model."),
        ("lm_head.", "llm_backbone.llm.lm_head."),
    ]
    state = renamed(assistant, pairs, ("model.vision.",))
    values = {
        "model": {
            **said,
            "llm_backbone_id": "vicuna-v15-7b",
            "image_resize_strategy": "letterbox",
            "llm_checkpoint": str(tmp_path / "llama"),
            "llm_vocab_size": assistant.model.config.text_config.vocab_size,
        }
    }
    folder = tmp_path / "theirs"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    assistant.processor.tokenizer.save_pretrained(folder)
    nested = {"model": {"projector": {}, "llm_backbone": {}}, "step": 7}
    for key, value in state.items():
        part, _, name = key.partition(".")
        nested["model"][part][name] = value
    torch.save(nested, folder / "checkpoints/latest-checkpoint.pt")
    same(assistant, folder)


def test_what_has_no_place_is_listed(tmp_path):
    assistant = compose(tmp_path, image={"use": "letterbox"}, connector=MLP)
    state = renamed(assistant, LLAVA, ("model.vision.",)) | {"extra.gate": torch.zeros(2)}
    values = llava_values(assistant, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors have no place.*extra\.gate"):
        load(write(tmp_path / "theirs", assistant, values, state), device="cpu")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mm_projector_type": "ldpnet_x"}, "ldpnet_x"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
    ],
)
def test_what_mmlm_has_no_part_for_is_said(tmp_path, more, said):
    assistant = compose(tmp_path, connector=MLP)
    state = renamed(assistant, LLAVA, ("model.vision.",))
    values = llava_values(assistant, tmp_path) | more
    with pytest.raises(CheckpointError, match=said):
        load(write(tmp_path / "theirs", assistant, values, state), device="cpu")


def test_a_pickle_that_runs_code_is_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    assistant = compose(tmp_path, connector=MLP)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llava_values(assistant, tmp_path), default=str))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(CheckpointError, match="is refused"):
        load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


PUBLISHED = {
    "lusxvr/nanoVLM-222M": "nanoVLM",
    "mtgv/MobileVLM_V2-1.7B": "MobileVLM V2",
    "mtgv/MobileVLM-1.7B": "MobileVLM V1",
    "tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B": "TinyLLaVA",
    "BAAI/Bunny-v1_0-2B-zh": "Bunny",
    "liuhaotian/llava-v1.5-7b": "LLaVA-1.5",
    "liuhaotian/llava-v1.6-vicuna-7b": "LLaVA-1.6",
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": "LLaVA-OneVision",
}


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED, ids=PUBLISHED.values())
def test_a_published_checkpoint_names_a_colour(name, tmp_path):
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
    folder = snapshot_download(name, local_dir=tmp_path / "theirs", allow_patterns=wanted)
    red = Image.new("RGB", (336, 336), (220, 20, 20))
    asked = "What colour is this picture? Answer with one word."
    assert "red" in load(folder, device="cpu").answer(asked, [red], max_new_tokens=8).lower()
