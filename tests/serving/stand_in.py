"""A program that takes the words of `vllm serve` and answers without a model."""

from __future__ import annotations

import argparse
import os
import sys

import uvicorn

from mmlm.serving.openai_api import build_api
from tests.serving.fakes import FakeSpeaker


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("folder")
    for flag in ("--host", "--port", "--served-model-name"):
        parser.add_argument(flag, required=True)
    for flag in ("--limit-mm-per-prompt", "--allowed-media-domains", "--max-model-len"):
        parser.add_argument(flag)
    told = parser.parse_args(words)
    if told.max_model_len == "0":
        sys.exit("max_model_len must be positive")
    app = build_api([FakeSpeaker(told.served_model_name)], keys=[os.environ["VLLM_API_KEY"]])
    uvicorn.run(app, host=told.host, port=int(told.port), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1:])
