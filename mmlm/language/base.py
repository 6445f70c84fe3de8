"""What a language model promises, and the registry in which kinds of them stand.

A recipe names one under `model.language`. Loading gives a causal LM of transformers and its
tokenizer; everything else about it is probed. This module loads nothing itself.
"""

from __future__ import annotations

from typing import Any

from mmlm.config import PartConfig
from mmlm.registry import Registry


class LanguageConfig(PartConfig):
    """Base of the configs of language models."""

    def load(self, *, dtype: Any = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer.

        Args:
            dtype: The precision of the weights; that of the checkpoint when left out.

        Returns:
            A causal LM of transformers with its weights, and its tokenizer.
        """
        raise NotImplementedError


languages = Registry["LanguageConfig"]("language model", plural="languages")
"""Kinds of language models, by the name that recipes use."""
