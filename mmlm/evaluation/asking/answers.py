"""Answers on disk: a log that a killed run leaves whole, and the keys that find them again.

A key is a hash of everything that an answer depends on: the weights, the bytes of the
pictures, the prompt and the settings. Scores are no part of the log: they are computed
from the answers every time, so that a mended scorer never meets a stale score; which
scorer and version gave a score stands beside it in `predictions.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.conditions import Case

_FORMAT = 1


def answer_key(case: Case, *, weights: str, settings: dict[str, Any], decide: str) -> str:
    """Return the key of the answer to a case.

    Equal questions about equal pictures share a key and are answered once; where the answer
    is drawn at random, each item has its own.
    """
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "weights": weights,
        "images": case.image_keys,
        "prompt": case.prompt,
        "settings": settings,
        "decide": decide,
    }
    if decide == "likelihood":
        parts["choices"] = case.choices
    if settings.get("temperature"):
        parts["item"] = [case.benchmark, case.item.id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(assistant: Any) -> str:
    """Return a hash of everything in a model that can change an answer.

    That is every weight, the config, the tokenizer, the chat template and how pictures
    become pixels. An object with a `fingerprint` of its own is asked for it.
    """
    own = getattr(assistant, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(assistant.model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {values.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(values.view(torch.uint8).numpy()))
    digest.update(assistant.model.config.to_json_string().encode())
    processor = assistant.processor
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is not None:
        digest.update(image_processor.to_json_string().encode())
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend is not None else repr(tokenizer).encode())
    chat = getattr(processor, "chat", None)
    digest.update(str(getattr(chat, "template", "")).encode())
    return digest.hexdigest()[:32]


def hashed(text: str) -> str:
    """Return a hash of a text that stands for a model which cannot be looked into."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class AnswerLog:
    """An append-only file of answers, one JSON object a line.

    A line that a kill cut short is dropped when the file is opened, and its item answered
    again. Only one process may write at a time.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        _lock(self._file, path)
        self._answers = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        answers, whole = _whole_lines(self._file)
        rest = self._file.seek(0, os.SEEK_END) - whole
        if rest:
            self._file.seek(whole)
            _check_tail(self.path, whole, self._file.read())
            self._file.truncate(whole)
        return answers

    def learn(self, answers: dict[str, dict[str, Any]]) -> None:
        """Know answers that stand in another log, without writing them into this one."""
        self._answers = {**answers, **self._answers}

    def __contains__(self, key: object) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write answers, and wait until they are on the disk.

        Raises:
            EvaluationError: if the disk does not take them.
        """
        rows = list(rows)
        lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise EvaluationError(
                f"The answers cannot be written to {self.path}: {error}. What was written before "
                f"is kept; make room and run the same command again."
            ) from None
        self._answers.update({row["key"]: row for row in rows})

    def close(self) -> None:
        """Close the file and let the next process write."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Read a log that another process may be writing; a last line cut short is left out.

    Raises:
        EvaluationError: if it is damaged in the middle.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        answers, whole = _whole_lines(file)
        file.seek(whole)
        _check_tail(path, whole, file.read())
    return answers


def _whole_lines(file: BinaryIO) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the answers up to the first line that is none, and how many bytes they take."""
    answers: dict[str, dict[str, Any]] = {}
    whole = 0
    for line in file:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
            answers[row["key"]] = row  # type: ignore[index]
        except (ValueError, TypeError, KeyError):
            break
        whole += len(line)
    return answers, whole


def _check_tail(path: Path, whole: int, tail: bytes) -> None:
    if tail.count(b"\n") > 1:
        raise EvaluationError(
            f"{path} is damaged in the middle, at byte {whole}; only its last line may be cut "
            f"short. Start over with another `out`, or with --fresh."
        )


def _lock(file: Any, path: Path) -> None:
    """Take the file for this process alone, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EvaluationError(
            f"Another process is writing to {path}. Wait for it, or choose another `out`."
        ) from None
    except OSError:
        return
