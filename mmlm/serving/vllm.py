"""vLLM as the engine: our front before it, on the stock folder. The way to serve many.

    mmlm serve FOLDER --engine vllm ──► a vLLM process on 127.0.0.1 ──► Behind
                                        you are here

The process listens on this machine alone, with a key that nobody else knows, and is told to
fetch no pictures; it ends when we do. MMLM does not depend on vLLM: the program `vllm` must be
on the path, in an environment of its own if need be.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import CheckpointError, UsageError
from mmlm.serving.about import read_about
from mmlm.serving.behind import Behind
from mmlm.serving.ports import free_port

START_SECONDS = 1800.0
"""How long loading may take; a large model is read from disk and compiled."""


class VLLM:
    """A vLLM process on a stock folder.

    Args:
        source: The folder, or the folder of a run.
        options: More words for `vllm serve`, such as ``["--max-model-len", "4096"]``.
        program: What is started; `vllm` on the path when left out.
        max_images: Most pictures of a request.
    """

    def __init__(
        self, source: str | Path, *, options: Sequence[str] = (), program: str | None = None,
        max_images: int = 16,
    ) -> None:  # fmt: skip
        folder = stock_folder(source)
        found = program or shutil.which("vllm")
        if found is None:
            raise UsageError(
                "--engine vllm needs the program `vllm`, which is not on the path. Install vLLM "
                "(an environment of its own will do), or use --engine local."
            )
        about = read_about(source)
        self.name = about.title or folder.name
        port, key = free_port(), secrets.token_urlsafe(24)
        command = [
            found, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", self.name,
            "--limit-mm-per-prompt", json.dumps({"image": max_images}),
            "--allowed-media-domains", "nowhere.invalid", *options,
        ]  # fmt: skip
        self._command = command
        self._environment = {
            "VLLM_ENGINE_READY_TIMEOUT_S": f"{START_SECONDS:.0f}", **os.environ,
            "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.speaker = Behind(
            self.name, f"http://127.0.0.1:{port}", key=key, about=about, **words_of(folder)
        )

    def start(self, seconds: float = START_SECONDS) -> None:
        """Start it, and wait until it answers.

        Raises:
            CheckpointError: if it ends, or takes too long.
        """
        self._process = subprocess.Popen(self._command, env=self._environment)
        deadline = time.monotonic() + seconds
        while not self.speaker.is_ready:
            if self._process.poll() is not None:
                raise CheckpointError(
                    f"vLLM ended with exit code {self._process.returncode} before it answered; "
                    f"what it wrote above says why."
                )
            if time.monotonic() > deadline:
                self.end()
                raise CheckpointError(f"vLLM did not answer within {seconds:,.0f} s.")
            time.sleep(0.5)

    def end(self, seconds: float = 30.0) -> None:
        """End the process; kill it if it does not."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def stock_folder(source: str | Path) -> Path:
    """Return the folder of a stock class.

    Raises:
        UsageError: if it is MMLM's own class, which vLLM does not know.
        CheckpointError: if it is no model folder.
    """
    from mmlm.hub.load import find

    folder = Path(source)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    folder = find(folder if folder.exists() else source)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{folder}/config.json cannot be read: {fault}") from None
    names = config.get("architectures") or ["no class"]
    if str(names[0]).startswith("MMLM"):
        raise UsageError(
            f"{folder} holds MMLM's own class, which vLLM does not know; `mmlm check` says why "
            f"no stock class fits. Use --engine local."
        )
    return folder


def words_of(folder: Path) -> dict[str, Any]:
    """Return the tokenizer of a folder, and its words that are control."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    added = tokenizer.added_tokens_decoder.values()
    control = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return {"tokenizer": tokenizer, "control": sorted(word for word in control if len(word) > 1)}
