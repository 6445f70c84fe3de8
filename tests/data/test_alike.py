"""Copies of a picture look alike, other pictures do not."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from mmlm.data.alike import MOST_DIFFERENT, Look, alike, difference, look_of


def scene(seed: int, side: int = 256) -> Image.Image:
    """A picture with large and small shapes, as photographs and scans have: 1/f noise in colour."""
    draw = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    falling = 1.0 / np.maximum(np.hypot(rows, columns), 1.0 / side) ** 1.5
    layers = [np.fft.ifft2(np.fft.fft2(draw.normal(size=(side, side))) * falling).real
              for _ in range(3)]  # fmt: skip
    values = np.stack([128 + 45 * layer / layer.std() for layer in layers], -1)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "the same": lambda image: image,
    "JPEG 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((128, 128)),
    "another shape": lambda image: image.resize((300, 200)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "one percent cut off": lambda image: image.crop((1, 1, 254, 254)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_looks_alike(copy):
    differences = [difference(look_of(scene(n)), look_of(copy(scene(n)))) for n in range(5)]
    assert max(differences) <= MOST_DIFFERENT


def test_other_pictures_do_not_look_alike():
    looks = [look_of(scene(number, 64)) for number in range(60)]
    assert alike(looks) == []
    assert min(difference(a, b) for a, b in combinations(looks, 2)) > 3 * MOST_DIFFERENT


def test_flat_pictures_are_told_apart_by_colour():
    looks = [look_of(Image.new("RGB", (9, 9), colour)) for colour in ("red", "blue", "red")]
    assert alike(looks) == [(0, 2)]


def test_the_pairs_are_those_of_the_definition():
    draw = np.random.default_rng(0)
    looks = []
    for _ in range(120):
        bits = draw.random(512) < draw.choice([0.02, 0.1, 0.5])
        colour = tuple(draw.integers(100, 130, 3).tolist())
        looks.append(Look(np.packbits(bits).tobytes(), colour))
        flipped = bits ^ (draw.random(512) < 0.03)
        looks.append(Look(np.packbits(flipped).tobytes(), colour))
    for most in (0.0, 0.1, 0.4):
        pairs = [(a, b) for a, b in combinations(range(len(looks)), 2)
                 if difference(looks[a], looks[b]) <= most]  # fmt: skip
        assert alike(looks, most=most) == pairs
    assert alike([]) == []
