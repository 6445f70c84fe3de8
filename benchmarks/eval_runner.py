"""A benchmark's questions: `mmlm.evaluate` against one `generate` after another, in one run.

    python benchmarks/eval_runner.py                    the whole comparison
    python benchmarks/eval_runner.py --json out.json    the same, and the figures as JSON
    python benchmarks/eval_runner.py --questions 60     a first impression
    python benchmarks/eval_runner.py --profile          where the runner's time goes

600 questions, three on each picture; 70 % are answered in up to 5 tokens, 30 % are captions of
60 tokens. The peer is what a user writes first: the stock class from the same folder, its own
processor, one picture and question at a time, `generate`. Both sides have the same weights
(SigLIP-B/16-224 and SmolLM2-135M shapes, random), the same dtype and threads, read the same JPEG
files and prompts, and end with the same texts, which is checked. Ours is the whole of
`mmlm.evaluate` but for the report: hashes of weights and pictures, and every answer on the disk.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

from letter_tokenizer import save_letter_tokenizer

SHORT_TOKENS, CAPTION_TOKENS = 5, 60
PER_PICTURE = 3
ASKED = (
    "Is there a dog in the image?", "How many people are there?", "What colour is the car?",
    "Which side is the cup on?", "What is the man holding?", "Is it raining?", "What is written?",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=600, help="how many (default 600)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the runner (default 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--profile", action="store_true", help="profile the runner, and no peer")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    return parser.parse_args()


def save_parts(folder: Path, tiny: bool) -> dict[str, Any]:
    """Write an encoder and a language model of the stated shapes; return the words of a recipe."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    width, layers = (32, 2) if tiny else (768, 12)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=2 if tiny else 12, image_size=224, patch_size=16,
        )
    ).save_pretrained(folder / "vision")  # fmt: skip
    width, layers = (36, 2) if tiny else (576, 30)
    language = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rope_theta=100000.0,
            tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=None,
            eos_token_id=257, pad_token_id=None,
        )
    )  # fmt: skip
    for parameter in language.parameters():
        # Larger weights keep the likeliest word clearly apart from the next.
        parameter.data.mul_(2.0) if parameter.dim() > 1 else None
    language.save_pretrained(folder / "language")
    save_letter_tokenizer(folder / "language")
    return {
        "vision": {"use": "hf", "checkpoint": str(folder / "vision"), "layer": "last"},
        "language": {"use": "causal_lm", "checkpoint": str(folder / "language")},
    }


def save_stock(folder: Path, options: argparse.Namespace) -> Path:
    """Write the stock folder that both sides open."""
    import torch

    import mmlm

    torch.manual_seed(0)
    assistant = mmlm.compose(
        **save_parts(folder, options.tiny), dtype=getattr(torch, options.dtype)
    )
    reasons = assistant.save(folder / "model")
    if reasons:
        raise SystemExit(f"no stock class: {reasons}")
    return folder / "model"


def save_questions(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write pictures and two benchmarks, of short answers and of captions; return the rows."""
    import numpy as np
    from PIL import Image

    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        picture = number // PER_PICTURE
        path = folder / f"{picture}.jpg"
        if not path.is_file():
            small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            small.resize((640, 480)).save(path, "JPEG", quality=90)
        caption = number % 10 >= 7
        question = "Describe the image." if caption else f"{ASKED[number % len(ASKED)]} {number}"
        rows.append({"id": str(number), "image": path.name, "question": question, "answer": "x",
                     "kind": "captions" if caption else "short"})  # fmt: skip
    for kind, tokens in (("short", SHORT_TOKENS), ("captions", CAPTION_TOKENS)):
        lines = (json.dumps(row) + "\n" for row in rows if row["kind"] == kind)
        (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / f"{kind}.yaml").write_text(
            f"dataset: {{path: {kind}.jsonl}}\ngenerate: {{max_new_tokens: {tokens}}}\n",
            encoding="utf-8",
        )
    return rows


def time_peer(model: Path, folder: Path, rows: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Answer one after another with the stock class; return seconds and texts."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    stock = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor: Any = AutoProcessor.from_pretrained(model)

    def answer(row: dict[str, Any]) -> str:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        talk = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        image = Image.open(folder / row["image"]).convert("RGB")
        inputs = processor(images=image, text=text, return_tensors="pt").to(stock.dtype)
        tokens = CAPTION_TOKENS if row["kind"] == "captions" else SHORT_TOKENS
        with torch.inference_mode():
            output = stock.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    answer(rows[0])
    start = time.perf_counter()
    texts = [answer(row) for row in rows]
    return time.perf_counter() - start, texts


def time_ours(
    model: Path, folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[float, list[str]]:
    """Answer with the runner; return seconds and texts in the order of the rows."""
    import mmlm

    assistant = mmlm.load(model, device="cpu")
    benchmarks = [folder / f"{kind}.yaml" for kind in ("short", "captions")]

    def run(out: str, **more: Any) -> Any:
        return mmlm.evaluate(
            assistant, benchmarks, folder / out, conditions=("image",), quiet=True,
            with_report=False, batch_size=options.batch_size, **more,
        )  # fmt: skip

    run("warm", limit=2)
    profile = cProfile.Profile() if options.profile else None
    start = time.perf_counter()
    result = profile.runcall(run, "timed") if profile else run("timed")
    seconds = time.perf_counter() - start
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    said = {p.case.item.id: p.answer for p in result.predictions}
    return seconds, [said[row["id"]] for row in rows]


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, rows = save_stock(folder, options), save_questions(folder, options.questions)
        ours, texts = time_ours(model, folder, rows, options)
        print(f"mmlm.evaluate      {len(rows) / ours:8.3f} items/s")
        if options.profile:
            return
        peer, wanted = time_peer(model, folder, rows)
        print(f"one at a time      {len(rows) / peer:8.3f} items/s")
    same = sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(rows)
    figures = {
        "questions": len(rows), "questions_a_picture": PER_PICTURE,
        "items_per_second": {"mmlm": len(rows) / ours, "one_at_a_time": len(rows) / peer},
        "speed_ratio": peer / ours, "share_of_equal_texts": same, "dtype": options.dtype,
        "batch_size": options.batch_size, "torch": torch.__version__, "threads": options.threads,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
