"""From files to packed batches: MMLM against a torch DataLoader over the stock LLaVA processor.

    python benchmarks/data_path.py                    everything
    python benchmarks/data_path.py --json out.json    the same, and the figures as JSON
    python benchmarks/data_path.py --only plan fill   some parts: speed, plan, memory, start, fill

speed   Photos (640 x 480, JPEG) with conversations are decoded, resized and cropped to 336, turned
        into normalised floats and token ids, and put into batches, on two cores. The peer is what a
        user would write: `DataLoader` with two workers, whose collate function calls
        `LlavaProcessor` (CLIP image processor, padding). It makes no labels and reads its rows from
        a list in memory; MMLM plans from headers, proves the loss mask, packs, and reads its rows
        from a JSONL file. Both use one tokenizer and one chat template, and are timed in turn. Bare
        is Pillow alone on one core: open, decode, resize, and nothing else. Beside samples a second
        stands the processor time of a sample, workers included, which others on the machine
        disturb less.
plan    How many samples are planned in a second on one core: rows read, token counts of pictures
        taken from their headers, text tokenised, mask proven; and the same without the text.
memory  Resident memory of a fresh process that has read 200 samples, by the rows of its source.
start   From opening a source of a million rows to the first batch.
fill    How full packed rows are, for lengths like those of LLaVA-665K: 576 image tokens and a
        log-normal text for each of its parts (the parts' sizes are published, the lengths are our
        estimate), cut off at 2,048 as LLaVA does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("speed", "plan", "memory", "start", "fill")
SIDE_PX, PATCH_PX = 336, 14
PHOTO_PX = (640, 480)
ROW_TOKENS = 4096
BATCH = 8
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Parts of LLaVA-665K (haotian-liu/LLaVA, issue 702): rows, whether there is a picture, and - our
# estimate - median and sigma of the text's length in tokens.
MIX_665K = (
    (157_712, True, 300, 0.55),  # LLaVA-Instruct
    (40_688, False, 900, 0.9),  # ShareGPT
    (82_783, True, 110, 0.5),  # VQAv2
    (72_140, True, 130, 0.5),  # GQA
    (8_998, True, 60, 0.3),  # OKVQA
    (80_000, True, 95, 0.4),  # OCR-VQA
    (66_160, True, 45, 0.3),  # A-OKVQA
    (21_953, True, 40, 0.3),  # TextCaps
    (48_447, True, 330, 0.5),  # RefCOCO
    (86_417, True, 400, 0.5),  # Visual Genome
)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of a side (default 5)")
    parser.add_argument("--samples", type=int, default=600, help="samples in a round (default 600)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large source")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="few samples: shows that it runs")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.rounds, options.samples, options.rows = 1, 24, 2000
    return options


def words() -> list[str]:
    """Return a thousand pronounceable words."""
    draw = random.Random(0)
    starts = ("b", "br", "c", "ch", "d", "f", "g", "l", "m", "n", "p", "r", "s", "st", "t", "w")
    ends = ("a", "e", "i", "o", "u", "ee", "ai", "ou")
    return [
        "".join(draw.choice(starts) + draw.choice(ends) for _ in range(draw.randint(1, 4)))
        for _ in range(1000)
    ]


def text_of(draw: random.Random, vocabulary: list[str], length: int) -> str:
    """Return a text of so many words; common ones stand first in the vocabulary."""
    return " ".join(vocabulary[int(draw.random() ** 3 * 1000)] for _ in range(max(1, length)))


def write_photos(folder: Path, count: int) -> list[str]:
    """Write photos: noise on several scales, which compresses about as photos do."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    names: list[str] = []
    for index in range(count):
        image = np.zeros((PHOTO_PX[1], PHOTO_PX[0], 3))
        for scale in (80, 20, 5, 2):
            small = draw.normal(0, scale**0.5 * 5, (PHOTO_PX[1] // scale, PHOTO_PX[0] // scale, 3))
            layers = [
                np.asarray(Image.fromarray(small[:, :, c].astype(np.float32)).resize(PHOTO_PX))
                for c in range(3)
            ]
            image += np.stack(layers, axis=2)
        names.append(f"{index}.jpg")
        pixels = (image + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / names[-1], quality=90)
    return names


def write_rows(folder: Path, names: list[str], count: int, *, name: str, turns: int = 3) -> Path:
    """Write rows in LLaVA's shape, each with one photo and a few turns."""
    draw, vocabulary = random.Random(1), words()
    questions = [text_of(draw, vocabulary, 10) for _ in range(200)]
    answers = [text_of(draw, vocabulary, int(draw.lognormvariate(3.2, 0.7))) for _ in range(200)]
    path = folder / name
    with path.open("w") as file:
        for index in range(count):
            conversation: list[dict[str, str]] = []
            for turn in range(1 + index % turns):
                place = "<image>\n" if turn == 0 else ""
                asked = questions[(index + turn) % 200]
                conversation.append({"from": "human", "value": place + asked})
                conversation.append({"from": "gpt", "value": answers[(index * 7 + turn) % 200]})
            image = names[index % len(names)]
            row = {"id": index, "image": image, "conversations": conversation}
            file.write(json.dumps(row) + "\n")
    return path


def tokenizer_of(folder: Path) -> Any:
    """Return a byte-level BPE tokenizer of 8,000 tokens, learnt from the words of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw, vocabulary = random.Random(2), words()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([text_of(draw, vocabulary, 100) for _ in range(200)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", chat_template=TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def our_processor(folder: Path) -> Any:
    """Compose CLIP at 336 px with a language model, both tiny: only the processor is measured."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    import mmlm

    tokenizer = tokenizer_of(folder / "language")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=SIDE_PX, patch_size=PATCH_PX
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    text = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=ROW_TOKENS,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(folder / "language")
    assistant = mmlm.compose(
        image={"use": "crop"},
        vision={"use": "hf", "checkpoint": str(folder / "vision"), "layer": -2},
        connector={"use": "mlp"},
        language={"use": "causal_lm", "checkpoint": str(folder / "language")},
    )
    return assistant.processor


def stock_processor(ours: Any) -> Any:
    """Return LLaVA's own processor with the same tokenizer and the same sizes."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=ours.tokenizer, patch_size=PATCH_PX,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=ours.chat.template,
    )  # fmt: skip


class StockCollate:
    """What a user's collate function does: open, render, and call the processor."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor, self.folder = processor, folder

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Make a padded batch of rows."""
        from PIL import Image

        texts, images = [], []
        for row in rows:
            messages = []
            for turn in row["conversations"]:
                said = turn["value"].removeprefix("<image>\n")
                content: list[dict[str, str]] = [{"type": "text", "text": said}]
                if said != turn["value"]:
                    content.insert(0, {"type": "image"})
                role = "user" if turn["from"] == "human" else "assistant"
                messages.append({"role": role, "content": content})
            texts.append(self.processor.apply_chat_template(messages, tokenize=False))
            images.append(Image.open(self.folder / row["image"]).convert("RGB"))
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt")


def run_stock(processor: Any, path: Path, count: int) -> int:
    """Go through the rows with the DataLoader; return the number of samples."""
    from torch.utils.data import DataLoader

    with path.open() as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    loader: Any = DataLoader(
        rows, batch_size=BATCH, num_workers=2, collate_fn=StockCollate(processor, path.parent)
    )
    return sum(int(batch["pixel_values"].shape[0]) for batch in loader)


def our_steps(processor: Any, path: Path, count: int | None, *, rows_per_step: int = 2) -> Any:
    """Return MMLM's stream over a file of rows."""
    from mmlm.data import PackingConfig, open_mixture
    from mmlm.data.pipeline import StepStream
    from mmlm.data.planning import Planner

    packing = PackingConfig(row_tokens=ROW_TOKENS)
    mixture = open_mixture(path.name, folder=path.parent)
    planner = Planner(
        mixture, processor, max_tokens=packing.row_tokens, max_tiles=packing.max_tiles
    )
    pixels = processor.image_processor.pixels
    return StepStream(
        planner, packing, rows_per_step=rows_per_step, num_samples=count, threads=2,
        pixels=lambda image: ("", pixels(image)),
    )  # fmt: skip


def run_ours(processor: Any, path: Path, count: int) -> int:
    """Go through the rows with MMLM, batches included; return the number of samples."""
    import torch

    from mmlm.data.collate import collate_packed

    seen = 0
    for step in our_steps(processor, path, count):
        for row in step.rows:
            collate_packed(row.samples)
            torch.cat([tiles for _, tiles in row.images])
            seen += len(row.samples)
    return seen


def run_bare(path: Path, names: list[str], count: int) -> int:
    """Open, decode and resize with Pillow, on this core."""
    from PIL import Image

    for index in range(count):
        with Image.open(path.parent / names[index % len(names)]) as image:
            image.convert("RGB").resize((SIDE_PX * 4 // 3, SIDE_PX), Image.Resampling.BICUBIC)
    return count


def measure_speed(folder: Path, ours: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time the sides in turn on two cores."""
    import torch

    torch.set_num_threads(1)
    names = write_photos(folder, 8 if options.tiny else 128)
    path = write_rows(folder, names, options.samples, name="speed.jsonl")
    stock = stock_processor(ours)
    sides = {
        "mmlm": lambda: run_ours(ours, path, options.samples),
        "stock": lambda: run_stock(stock, path, options.samples),
        "bare": lambda: run_bare(path, names, options.samples // 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    costs: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-1, options.rounds):
        for name, run in sides.items():
            started, used = time.perf_counter(), cpu_seconds()
            seen = run()
            if round_ >= 0:  # the first is to warm up
                rates[name].append(seen / (time.perf_counter() - started))
                costs[name].append(1000 * (cpu_seconds() - used) / seen)
    rate = {name: statistics.median(found) for name, found in rates.items()}
    cost = {name: statistics.median(found) for name, found in costs.items()}
    return {
        "samples_per_second": rate,
        "rounds": rates,
        "over_stock": rate["mmlm"] / rate["stock"],
        "over_bare_per_core": rate["mmlm"] / 2 / rate["bare"],
        "cpu_milliseconds_a_sample": cost,
        "cpu_over_stock": cost["stock"] / cost["mmlm"],
        "cpu_over_bare": cost["bare"] / cost["mmlm"],
        "largest_pixel_difference": _difference(ours, stock, folder / names[0]),
        "photo_bytes": statistics.mean((folder / name).stat().st_size for name in names),
    }


def cpu_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _difference(ours: Any, stock: Any, photo: Path) -> float:
    """Return by how much the pixels of both sides differ."""
    from PIL import Image

    theirs = stock.image_processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
    return float((ours.image_processor.pixels(str(photo)) - theirs).abs().max())


def measure_plan(folder: Path, ours: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Plan rows on this core, with their text and without."""
    from mmlm.data import open_mixture
    from mmlm.data.planning import Planned, Planner, size_of
    from mmlm.messages import images_of

    count = 200 if options.tiny else 6000
    names = write_photos(folder, 16)
    path = write_rows(folder, names, count, name="plan.jsonl")
    mixture = open_mixture(path.name, folder=folder)
    planner = Planner(mixture, ours, max_tokens=ROW_TOKENS, max_tiles=256)
    planner.plan(0)
    started = time.perf_counter()
    planned = [planner.plan(position) for position in range(count)]
    whole = count / (time.perf_counter() - started)
    assert all(isinstance(one, Planned) for one in planned)
    counter = ours.image_processor.counter
    started = time.perf_counter()
    for position in range(count):
        place = mixture.place(position)
        sample = mixture.sources[place.source].sample(place.row)
        for image in images_of(sample.messages):
            counter.count(size_of(image, counter.policy.readers))
    headers = count / (time.perf_counter() - started)
    return {
        "samples_per_second": whole,
        "headers_alone_per_second": headers,
        "seconds_for_a_million_by_headers": 1e6 / headers,
    }


def child(what: str, place: str) -> None:
    """Measure in a fresh process: `memory` or `start`."""
    import torch
    from transformers import AutoTokenizer

    from mmlm.processing import MMLMProcessor

    torch.set_num_threads(1)
    path = Path(place)
    ours = MMLMProcessor.from_pretrained(path.parent / "processor")
    assert isinstance(
        ours.tokenizer, type(AutoTokenizer.from_pretrained(path.parent / "processor"))
    )
    before = resident()
    started = time.perf_counter()
    seen, first = 0, 0.0
    for step in our_steps(ours, path, None, rows_per_step=1):
        first = first or time.perf_counter() - started
        seen += step.num_samples
        if what == "start" or seen >= 200:
            break
    print(json.dumps({"first_batch_seconds": first, "bytes": resident(), "before": before}))


def resident() -> int:
    """Return this process's resident memory without pages of files, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def in_child(what: str, path: Path) -> dict[str, float]:
    """Run `child` and return what it says."""
    command = [sys.executable, __file__, "--child", what, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def large_source(folder: Path, ours: Any, rows: int) -> Path:
    """Write a source of so many rows over a few photos, once."""
    if not (folder / "processor").exists():
        ours.save_pretrained(folder / "processor")
    path = folder / f"large-{rows}.jsonl"
    return path if path.exists() else write_rows(folder, write_photos(folder, 4), rows,
                                                 name=path.name, turns=1)  # fmt: skip


def measure_memory(folder: Path, ours: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure resident memory at three sizes."""
    sizes = [options.rows // 100, options.rows // 10, options.rows]
    found = {rows: in_child("memory", large_source(folder, ours, rows)) for rows in sizes}
    mib = {str(rows): round(one["bytes"] / 2**20, 1) for rows, one in found.items()}
    grown = found[sizes[2]]["bytes"] - found[sizes[0]]["bytes"]
    return {"mib_by_rows": mib, "bytes_a_row": grown / (sizes[2] - sizes[0])}


def measure_start(folder: Path, ours: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time the first batch of the large source."""
    path = large_source(folder, ours, options.rows)
    started = time.perf_counter()
    said = in_child("start", path)
    return {
        "rows": options.rows,
        "seconds": said["first_batch_seconds"],
        "seconds_with_python_and_imports": time.perf_counter() - started,
    }


class Length(NamedTuple):
    """What the packer sees of a sample."""

    position: int
    num_tokens: int
    num_tiles: int


def lengths_665k(count: int, *, longest: int = 2048) -> list[Length]:
    """Draw lengths like those of LLaVA-665K."""
    draw = random.Random(0)
    weights = [part[0] for part in MIX_665K]
    found: list[Length] = []
    for position in range(count):
        _, has_image, median, sigma = draw.choices(MIX_665K, weights)[0]
        text = int(median * draw.lognormvariate(0, sigma)) + 10
        found.append(Length(position, min(longest, text + 576 * has_image), int(has_image)))
    return found


def measure_fill(options: argparse.Namespace) -> dict[str, Any]:
    """Pack the lengths with the default settings."""
    from mmlm.data import Packer, PackingConfig

    lengths = lengths_665k(3000 if options.tiny else 60_000)
    packer = Packer(PackingConfig(row_tokens=ROW_TOKENS))
    started = time.perf_counter()
    rows = [row for length in lengths for row in packer.add(length)]
    seconds = time.perf_counter() - started
    padded = sorted(lengths[: len(lengths) // BATCH * BATCH], key=lambda one: one.position)
    batches = [padded[start : start + BATCH] for start in range(0, len(padded), BATCH)]
    real = sum(one.num_tokens for one in padded)
    return {
        "occupancy": sum(row.num_tokens for row in rows) / (len(rows) * ROW_TOKENS),
        "occupancy_of_padding": real
        / sum(BATCH * max(one.num_tokens for one in batch) for batch in batches),
        "samples_a_row": sum(len(row.samples) for row in rows) / len(rows),
        "microseconds_a_sample": 1e6 * seconds / len(lengths),
    }


GOALS = {
    "speed.over_stock": (">=", 1.5),
    "speed.over_bare_per_core": (">=", 0.9),
    "plan.seconds_for_a_million_by_headers": ("<=", 60.0),
    "memory.bytes_a_row": ("<=", 64.0),
    "start.seconds": ("<=", 3.0),
    "fill.occupancy": (">=", 0.97),
}
"""What the data path is to reach."""


def main() -> None:
    """Measure the parts that were asked for."""
    options = arguments()
    if options.child:
        child(*options.child)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours = our_processor(folder / "parts") if options.only != ["fill"] else None
        measures = {
            "speed": lambda: measure_speed(folder, ours, options),
            "plan": lambda: measure_plan(folder, ours, options),
            "memory": lambda: measure_memory(folder, ours, options),
            "start": lambda: measure_start(folder, ours, options),
            "fill": lambda: measure_fill(options),
        }
        for name in options.only:
            found[name] = measures[name]()
            print(f"{name:8}{json.dumps(found[name])}", flush=True)
    for goal, (sign, limit) in GOALS.items():
        part, key = goal.split(".")
        if part in found:
            value = found[part][key]
            holds = value >= limit if sign == ">=" else value <= limit
            print(f"{goal:40}{value:10.3f}  {sign} {limit:<6} {'yes' if holds else 'NO'}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
