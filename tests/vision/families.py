"""One small random member of every family of image encoders in transformers and timm.

The families are the libraries' own lists: bare models of transformers whose input is pixels, and
modules of timm. Members are made small by taking few layers, or by taking timm's smallest names.
`UNFIT` holds the families that are no encoder in our sense, each with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.vision import VisionEncoder, encoders
from mmlm.vision.probe import run_shapes

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xxtiny", "tiny", "mini", "xs", "small")
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

_PACKED = (
    "takes the patches of pictures as its own model has cut them, with their grids, and no pixels"
)
_CLIPS = "takes whole clips: some do so under `use: hf_clips`, see test_hf_clips.py"

UNFIT: dict[str, str] = {
    **{
        f"hf:{name}": _PACKED
        for name in (
            "cohere_compass_vision",
            "cosmos3_edge_vision",
            "dots3_note_vision_encoder",
            "exaone4_5_vision",
            "gemma4_vision",
            "glm4v_moe_vision",
            "glm4v_vision",
            "glm5_next_vision",
            "glm_image_vision",
            "glm_ocr_vision",
            "hunyuan_vl_vision",
            "inkling2_vision",
            "inkling_vision",
            "kimi_k25_vision",
            "lfm3_vl_vision",
            "minicpm_ocr_vision",
            "minicpmv4_7_vision",
            "minimax_m3_vl_vision",
            "molmo2_vision",
            "muse_glimmer_vision",
            "muse_spark_vision",
            "paddleocr_vl_vision",
            "qwen3_5_moe_vision",
            "qwen3_5_vision",
            "qwen3_vl_moe_vision",
            "qwen3_vl_vision",
            "qwen4_exp_vision",
            "video_llama_3_vision",
        )
    },
    **{
        f"hf:{name}": _CLIPS
        for name in (
            "timesformer",
            "videomae",
            "videoprism_vision_model",
            "vivit",
            "vjepa2",
            "xclip_vision_model",
        )
    },
    "hf:qwen2_5_vl_vision": "has one output, for `layer: last` alone: see test_qwen_vit.py",
    "hf:vit_mae": "hides most patches and shuffles the others",
    "hf:efficientnet": "untrained, its many normed layers let nothing of the picture through",
    "hf:depth_pro": "cuts one picture of 1536 pixels into 35 by itself, to tell depth",
    "hf:dinat": "needs the package natten, which is not installed",
    "hf:glm_image_vqmodel": "makes pictures out of codes",
    "hf:groupvit_vision_model": "puts its patches into eight groups, which have no places",
    "hf:hgnet_v2": "is only a backbone of detectors there; timm's hgnet is the same network",
    "hf:mgp-str": "reads one word and gives its letters",
    "hf:mllama_vision_model": "needs the number of a picture's proportions beside its tiles",
    "hf:sam3_video": "follows things through a film",
    "hf:seggpt": "needs a second picture and its masks",
    "hf:yolos": "puts a hundred tokens for boxes behind those of places",
    "hf:timm_backbone": "is timm's network behind another name; `use: timm` is the same",
}
"""Families that are no encoder in our sense, and why. They are refused when they are named."""

WORDS: dict[str, dict[str, Any]] = {
    "hf:llama4_vision_model": {
        "intermediate_size": 256
    },  # four times its width, as it is published
    "hf:sam2_hiera_det_model": {"hidden_size": 96, "num_attention_heads": 1},
    "timm:gemma4_vit": {"arguments": {"depth": 2}},  # 2,304 tokens at its own side
}
"""What a family needs beside its name: timm's name of the member, or keys of the config."""

# Both are the installed libraries' own lists, of timm with the smallest member of each family;
# a test compares them, so that a family that is new is seen.
TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet26t",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "darknet17",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla34",
    "dpn": "dpn68",
    "edgenext": "edgenext_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_l",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_l",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_lrf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnet_tiny",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_h",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_maxvit",
    "metaformer": "caformer_b36",
    "mlp_mixer": "gmlp_b16_224",
    "mobilenetv3": "tf_mobilenetv3_large_minimal_100",
    "mobilenetv5": "mobilenetv5_300m",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_xs_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetv_040",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2net50d",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_senet154",
    "sequencer": "sequencer2d_l",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s1",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_s3_tiny_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_b_patch16_224",
    "tresnet": "tresnet_l",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p8_224",
}
HF = (
    "aimv2_vision_model",
    "align_vision_model",
    "altclip_vision_model",
    "beit",
    "bit",
    "blip_2_vision_model",
    "blip_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "clipseg_vision_model",
    "cohere_compass_vision",
    "convnext",
    "convnextv2",
    "cosmos3_edge_vision",
    "cvt",
    "data2vec-vision",
    "deit",
    "depth_pro",
    "dinat",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_convnext",
    "dinov3_vit",
    "donut-swin",
    "dots3_note_vision_encoder",
    "efficientnet",
    "exaone4_5_vision",
    "flava_image_model",
    "focalnet",
    "gemma4_vision",
    "git_vision_model",
    "glm4v_moe_vision",
    "glm4v_vision",
    "glm5_next_vision",
    "glm_image_vision",
    "glm_image_vqmodel",
    "glm_ocr_vision",
    "glpn",
    "granite_docling_vision",
    "groupvit_vision_model",
    "hgnet_v2",
    "hiera",
    "hunyuan_vl_vision",
    "idefics3_vision",
    "ijepa",
    "inkling2_vision",
    "inkling_vision",
    "instructblip_vision_model",
    "instructblipvideo_vision_model",
    "internvl_vision",
    "janus_vision_model",
    "kimi_k25_vision",
    "levit",
    "lfm3_vl_vision",
    "llama4_vision_model",
    "maskformer-swin",
    "metaclip_2_vision_model",
    "mgp-str",
    "minicpm_ocr_vision",
    "minicpmv4_7_vision",
    "minimax_m3_vl_vision",
    "mlcd",
    "mlcd_vision_model",
    "mllama_vision_model",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevit",
    "mobilevitv2",
    "molmo2_vision",
    "muse_glimmer_vision",
    "muse_spark_vision",
    "owlv2_vision_model",
    "owlvit_vision_model",
    "paddleocr_vl_vision",
    "phi4_multimodal_vision",
    "pixio",
    "pixtral",
    "poolformer",
    "pp_formulanet_vision",
    "pvt",
    "pvt_v2",
    "qianfan_ocr_vision",
    "qwen2_5_vl_vision",
    "qwen3_5_moe_vision",
    "qwen3_5_vision",
    "qwen3_vl_moe_vision",
    "qwen3_vl_vision",
    "qwen4_exp_vision",
    "radio",
    "regnet",
    "resnet",
    "sam2_hiera_det_model",
    "sam3_video",
    "sam3_vit_model",
    "sam_hq_vision_model",
    "sam_vision_model",
    "sapiens2",
    "segformer",
    "seggpt",
    "siglip2_vision_model",
    "siglip_vision_model",
    "smolvlm_vision",
    "step3p5_vision",
    "swiftformer",
    "swin",
    "swin2sr",
    "swinv2",
    "textnet",
    "timesformer",
    "timm_backbone",
    "tipsv2_vision_model",
    "video_llama_3_vision",
    "videomae",
    "videoprism_vision_model",
    "vit",
    "vit_mae",
    "vit_msn",
    "vitdet",
    "vivit",
    "vjepa2",
    "xclip_vision_model",
    "yolos",
)


def timm_families() -> dict[str, str]:
    """Return the smallest-looking member of each module of timm, by the module's name."""
    import timm

    found: dict[str, str] = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        size = {name: _smallness(name) for name in names}
        found[module] = min(names, key=lambda name: (size[name], len(name), name))
    return found


def _smallness(name: str) -> int:
    for place, word in enumerate(SMALL):
        if word in name:
            return place
    return len(SMALL)


def hf_families() -> dict[str, dict[str, Any]]:
    """Return a small config of each model type of transformers that speaks of pixels."""
    from mmlm.vision.hf_facts import image_model_types

    return {
        model_type: {"model_type": model_type, **shrunk(CONFIG_MAPPING[model_type]())}
        for model_type in image_model_types()
    }


def shrunk(config: Any) -> dict[str, Any]:
    """Return the keys that make a config shallow."""
    keys: dict[str, Any] = {}
    for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"):
        if isinstance(getattr(config, name, None), int) and not hasattr(config, "depths"):
            keys[name] = min(getattr(config, name), 2)
    if not hasattr(config, "hidden_sizes") and not hasattr(config, "depths"):
        small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
        keys |= {name: value for name, value in small.items() if hasattr(config, name)}
    for name in ("depths", "num_blocks", "layer_depths"):
        if isinstance(getattr(config, name, None), (list, tuple)):
            keys[name] = [min(depth, 2) for depth in getattr(config, name)]
    return keys


def words_of(library: str, family: str, member: Any) -> dict[str, Any]:
    """Return the words of a recipe for a member."""
    more = WORDS.get(f"{library}:{family}", {})
    if library == "timm":
        return {"use": "timm", "checkpoint": member, "pretrained": False} | more
    words = {"use": "hf", "config": member | more, "layer": "last", **HALF}
    names_a_side = getattr(CONFIG_MAPPING[family](), "image_size", None) is not None
    return words if names_a_side else words | {"side_px": 224}


def check(words: dict[str, Any]) -> str:
    """Hold a member to what every encoder promises; returns a line about it.

    Raises:
        AssertionError: naming the promise that is broken.
        ConfigError: if the encoder refuses the member.
    """
    torch.manual_seed(0)
    encoder = encoders.read(words, origin="vision").load()
    facts = encoder.facts
    side = facts.side_size
    shaped(encoder, side)
    refused(encoder)
    other, another = elsewhere(words, encoder)
    sizes = [f"{side.height}", "alone" if other is None else f"{another.height}x{another.width}"]
    chosen = encoder if other is None else other
    frozen(chosen, another)
    tuned(chosen, another)
    return f"{facts.grid} {facts.width} {facts.rule} " + " ".join(sizes)


def shaped(encoder: VisionEncoder, side: Size) -> None:
    """Grid × tokens at its default size, by shapes where the network allows it."""
    facts = encoder.facts
    out = run_shapes(encoder, lambda module, pixels: module(pixels), (1, facts.channels, *side))
    grid = facts.out_grid(side)
    assert out.grids == (grid,), f"{out.grids} at {side}, promised {grid}"
    assert out.values.shape == (grid.num_tokens, facts.width), out.values.shape


def frozen(encoder: VisionEncoder, side: Size) -> None:
    """Feed it at a size: grid × tokens, finite, and no graph when nothing learns."""
    facts = encoder.facts
    encoder.requires_grad_(False).train()
    out = encoder(torch.randn(1, facts.channels, *side))
    grid = facts.out_grid(side)
    assert out.grids == (grid,), f"{out.grids} at {side}, promised {grid}"
    assert out.values.shape == (grid.num_tokens, facts.width), out.values.shape
    assert out.values.isfinite().all(), "not finite"
    assert not out.values.requires_grad, "a graph without anything that learns"


def tuned(encoder: VisionEncoder, side: Size) -> None:
    """A gradient reaches every pixel's column when it is tuned; bf16 stays finite."""
    pixels = torch.randn(1, encoder.facts.channels, *side, requires_grad=True)
    out = encoder.requires_grad_(True).train()(pixels)
    (out.values * torch.randn_like(out.values)).sum().backward()
    assert pixels.grad is not None, "no gradient into the image"
    assert pixels.grad.isfinite().all(), "a gradient that is not finite"
    share = float((pixels.grad != 0).any(1).float().mean())
    assert share > 0.5, f"a gradient at {share:.0%} of the pixels"
    learnt = [name for name, weight in encoder.named_parameters() if weight.grad is not None]
    idle = encoder.idle_parameters()
    assert learnt, "nothing learns"
    assert not idle & set(learnt), f"named idle, but learns: {sorted(idle & set(learnt))[:3]}"
    low = encoder.requires_grad_(False).to(torch.bfloat16)
    with torch.no_grad():
        values = low(torch.randn(1, encoder.facts.channels, *side).bfloat16()).values
    assert values.dtype == torch.bfloat16, values.dtype
    assert values.isfinite().all(), "not finite in bf16"


def elsewhere(words: dict[str, Any], encoder: VisionEncoder) -> tuple[VisionEncoder | None, Size]:
    """Return the member at another size that it takes, or None and why not."""
    facts = encoder.facts
    if facts.rule == "multiple":
        step = facts.step * max(1, round(64 / facts.step))
        return encoder, Size(step, step + facts.step)
    for side_px in (64, 96, 128, 192, 256, 448):
        if side_px == facts.side[0]:
            continue
        try:
            other = encoders.read(words | {"side_px": side_px}, origin="vision").load()
        except ConfigError:
            continue
        return other, other.facts.side_size
    return None, facts.side_size


def refused(encoder: VisionEncoder) -> None:
    """A size that it does not take is refused, and sizes that work are named."""
    height, width = encoder.facts.side
    with pytest.raises(ConfigError, match=f"It takes {height} x {width}"):
        encoder.facts.out_grid(Size(height + 1, width))


def survey() -> None:
    """Print a line for every family; run by hand when a library is updated."""
    import sys
    import time

    families = {
        **{("timm", name): member for name, member in timm_families().items()},
        **{("hf", name): member for name, member in hf_families().items()},
    }
    chosen = sys.argv[1:]
    for (library, name), member in families.items():
        if (chosen and f"{library}:{name}" not in chosen) or f"{library}:{name}" in UNFIT:
            continue
        begin = time.process_time()
        try:
            line = check(words_of(library, name, member))
        except Exception as error:
            line = f"FAILS {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        shown = member if isinstance(member, str) else ""
        print(f"{library}:{name} {shown} {line} {time.process_time() - begin:.1f}s", flush=True)


if __name__ == "__main__":
    survey()
