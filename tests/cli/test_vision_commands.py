"""`mmlm parts vision PATTERN` and `mmlm probe`: what people see before they choose an encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmlm.cli.main import run
from tests.two_towers import save_bert

pytest.importorskip("timm")


def test_a_pattern_lists_encoders_with_sizes_tokens_and_parameters(capsys):
    assert run(["parts", "vision", "test_convnext"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "timm:test_convnext " in line)
    assert "160" in line
    assert "32·n" in line
    assert "stock export" in out


def test_a_pattern_that_nothing_is_like_is_an_error(capsys):
    assert run(["parts", "vision", "no_such_encoder"]) == 2
    assert "lists the families" in capsys.readouterr().err


def test_probe_says_what_an_encoder_gives_and_draws_it(tmp_path, capsys):
    # Two halves of different texture must get different colours.
    pixels = np.zeros((96, 192, 3), dtype=np.uint8)
    pixels[:, 96:] = np.random.default_rng(0).integers(0, 256, (96, 96, 3))
    picture, out = tmp_path / "halves.png", tmp_path / "map.png"
    Image.fromarray(pixels).save(picture)
    words = "{use: patches, patch_px: 16, side_px: 96}"
    assert run(["probe", words, "--image", str(picture), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "any multiples of 16" in said
    assert "6 × 6 =    36 × 768" in said
    drawn = np.asarray(Image.open(out).convert("RGB")).astype(float)
    right = drawn[12:-12, drawn.shape[1] // 2 + 6 : -12]
    left, noise = right[:, : right.shape[1] // 2 - 40], right[:, right.shape[1] // 2 + 40 :]
    assert np.abs(left.mean((0, 1)) - noise.mean((0, 1))).max() > 20
    assert left.std((0, 1)).max() < 1


def test_probe_of_a_network_names_its_stages(capsys):
    assert run(["probe", "timm:test_convnext", "--untrained", "--side", "64"]) == 0
    said = capsys.readouterr().out
    assert "intermediate 3" in said
    assert "used: forward_intermediates" in said
    assert "GFLOPs" in said


def test_probe_says_which_encoders_see_the_same_rows_alike(tmp_path, capsys):
    rows = [{"image": f"{n}.png", "question": "?", "answer": "ab " * n} for n in range(1, 11)]
    for n in range(1, 11):
        Image.new("RGB", (32, 32), (25 * n, 255 - 25 * n, 40)).save(tmp_path / f"{n}.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    texts = str(save_bert(tmp_path / "bert"))
    coarse, fine = (f"{{use: patches, patch_px: {px}, side_px: 32}}" for px in (16, 8))
    asked = ["probe", coarse, "--texts", texts, "--against", fine, "--rows", str(path)]
    assert run(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "compared    10 pictures" in lines[0]
    scores = [float(line.split()[1]) for line in lines[1:]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert run(["probe", coarse, "--texts", texts]) != 0
    assert "--rows" in capsys.readouterr().err
