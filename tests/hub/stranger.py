"""A Python process that has transformers and no MMLM: what it makes of saved folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.tiny import picture

STRANGER = """
import sys, json
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmlm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
image, trust, *folders = sys.argv[1:]
trust = trust == "trust"
heard = []
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    messages = [{"role": "user", "content": [
        {"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is it?"}]}]
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=trust)
    if type(processor).__name__ == "FuyuProcessor":  # it keeps no chat template
        asked = {"images": Image.open(image), "text": "What is it?"}
        inputs = processor(**asked, return_tensors="pt")
    else:
        asked = {"text": messages}
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    piped = pipe(**asked, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    heard.append([type(model).__name__, type(processor).__name__, answer, piped])
assert not [name for name in sys.modules if name.split(".")[0] == "mmlm"]
print("HEARD" + json.dumps(heard))
"""


def as_a_stranger(
    folders: Sequence[Path], place: Path, *, trust: bool = False
) -> list[tuple[str, str, str, str]]:
    """Ask folders about `picture(3)` where `import mmlm` fails.

    Returns:
        For each folder the names of model and processor, the answer, and that of the pipeline.
    """
    picture(3).save(place / "picture.png")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    caches = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    word = "trust" if trust else "plain"
    command = [sys.executable, "-c", STRANGER, "picture.png", word, *map(str, folders)]
    done = subprocess.run(
        command, cwd=place, env=environment | caches, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Some library may print lines of its own.
    lines = [line for line in done.stdout.splitlines() if "HEARD" in line]
    assert lines, done.stdout[-2000:]
    return [tuple(row) for row in json.loads(lines[-1].partition("HEARD")[2])]
