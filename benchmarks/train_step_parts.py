"""What `train_step.py` compares: shapes, samples, the sides, and the FLOPs that a step needs.

The sides take the same samples and begin with the same weights. `Stock` is a user's own loop,
`Trl` is `trl.SFTTrainer` on the same class with the same padding collator, `Ours` is MMLM's step.
With `align` the connector alone learns: `Stock` then encodes every picture again, and `Ours`
reads its features from the cache on disk, as in every epoch after the first.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 8
IMAGE_TOKENS = 196
MEDIAN_TEXT, SIGMA_TEXT, LONGEST_TEXT = 67, 0.9, 1024
VOCABULARY = 49153


def samples(count: int) -> list[dict[str, Any]]:
    """Return samples as (ids, labels, pixels): log-normal text behind one picture."""
    import torch

    draw = torch.Generator().manual_seed(0)
    lengths = (MEDIAN_TEXT * (SIGMA_TEXT * torch.randn(count, generator=draw)).exp()).round()
    made = []
    for number, length in enumerate(lengths.clamp(4, LONGEST_TEXT).int().tolist()):
        text = torch.randint(10, VOCABULARY - 10, (length,), generator=draw)
        ids = torch.cat([torch.full((IMAGE_TOKENS,), VOCABULARY - 1), text])
        labels = ids.clone()
        labels[: IMAGE_TOKENS + length // 2] = -100
        pixels = torch.randn(3, 224, 224, generator=draw)
        made.append({"ids": ids, "labels": labels, "pixels": pixels, "key": str(number)})
    return made


def stock_model(tiny: bool) -> Any:
    """Return stock LLaVA of the stated shapes with random weights."""
    import torch
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=VOCABULARY, tie_word_embeddings=True,
        rope_theta=100000.0, max_position_embeddings=8192,
    )  # fmt: skip
    if tiny:
        vision.num_hidden_layers = text.num_hidden_layers = 2
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1,
            image_seq_length=IMAGE_TOKENS, vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )  # fmt: skip


class Stock:
    """A user's own loop: stock class, padding collator, AdamW."""

    fused = False

    def __init__(self, model: Any, dtype: Any, *, align: bool = False) -> None:
        import torch

        self.dtype = dtype
        self.model = self.prepared(model, dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(
                "connector" in name or "projector" in name
                if align
                else ".vision_tower." not in name and ".vision." not in name
            )
        self.learnt = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.learnt, lr=1e-5, fused=self.fused)

    def prepared(self, model: Any, dtype: Any) -> Any:
        """Return the model as this side uses it."""
        return model.to(dtype).train()

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad to the longest, on the right."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = pad_sequence([s["ids"] for s in batch], batch_first=True, padding_value=0)
        labels = pad_sequence([s["labels"] for s in batch], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(s["ids"]) for s in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        pixels = torch.stack([s["pixels"] for s in batch]).to(self.dtype)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}

    def loss(self, batch: list[dict[str, Any]]) -> Any:
        """The loss of one batch."""
        return self.model(**self.collate(batch)).loss

    def step(self, batch: list[dict[str, Any]]) -> None:
        """One optimiser step."""
        self.loss(batch).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def go(self, batches: list[list[dict[str, Any]]]) -> float:
        """Take a step for each batch; return the seconds."""
        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
        return time.perf_counter() - start


class Trl(Stock):
    """`trl.SFTTrainer` on the stock class, with the padding collator of the first side."""

    def go(self, batches: list[list[dict[str, Any]]]) -> float:
        """Train on the batches, in order; return the seconds from the first step to the last."""
        import transformers
        from torch.utils.data import SequentialSampler
        from trl import SFTConfig, SFTTrainer

        class Watch(transformers.TrainerCallback):
            began = ended = 0.0

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.began = self.began or time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                self.ended = time.perf_counter()

        class InOrder(SFTTrainer):
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(self.train_dataset)

        from datasets import Dataset

        flat, watch = [sample for batch in batches for sample in batch], Watch()
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                folder, per_device_train_batch_size=BATCH, max_steps=len(batches), report_to=[],
                learning_rate=1e-5, lr_scheduler_type="constant", optim="adamw_torch",
                logging_strategy="no", save_strategy="no", use_cpu=True, bf16=False,
                gradient_checkpointing=False, remove_unused_columns=False, max_grad_norm=0.0,
                disable_tqdm=True, dataloader_num_workers=0, packing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            )  # fmt: skip
            trainer = InOrder(
                self.model, settings, processing_class=_tokenizer(), callbacks=[watch],
                train_dataset=Dataset.from_dict({"number": list(range(len(flat)))}),
                data_collator=lambda rows: self.collate([flat[row["number"]] for row in rows]),
            )  # fmt: skip
            trainer.train()
        return watch.ended - watch.began

    def step(self, batch: list[dict[str, Any]]) -> None:
        """One optimiser step."""
        self.go([batch])


def _tokenizer() -> Any:
    """Return a byte tokenizer: the trainer asks for one, and the samples are tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<e>", pad_token="<e>"
    )


class Ours(Stock):
    """MMLM's step: packed rows, attention by segment, lean layers, the loss alone, fused AdamW."""

    fused = True

    def __init__(self, model: Any, dtype: Any, *, align: bool = False) -> None:
        super().__init__(model, dtype, align=align)
        self.cache: Any = None
        if align:
            from mmlm.training.feature_cache import FeatureCache

            self.folder = tempfile.TemporaryDirectory()
            self.cache = FeatureCache(
                Path(self.folder.name), width=768, dtype=dtype, most_bytes=1 << 33
            )

    def prepared(self, model: Any, dtype: Any) -> Any:
        """Return MMLM's class with the same weights."""
        from mmlm.modeling import SEGMENTS
        from mmlm.modeling.lean import keep_less

        ours = in_ours(model).cast(dtype).train()
        ours.get_decoder().set_attn_implementation(SEGMENTS)
        keep_less(ours)
        return ours

    def first_epoch(self, data: list[dict[str, Any]]) -> None:
        """Fill the cache, as the first epoch of an alignment stage does on its way."""
        import torch

        from mmlm.features import VisionFeatures

        for sample in data:
            with torch.no_grad():
                seen = self.model.model.encode_images(sample["pixels"][None].to(self.dtype))
            self.cache.add([(sample["key"], VisionFeatures(seen.values.cpu(), seen.grids))])

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Lay the samples behind one another in one row."""
        import torch

        from mmlm.data.collate import collate_packed
        from mmlm.data.planning import Planned

        rows = [Planned(0, "", 0, "", s["ids"].numpy(), s["labels"].numpy(), (), 1) for s in batch]
        packed = collate_packed(rows)
        if self.cache is None:
            pixels = torch.stack([s["pixels"] for s in batch]).to(self.dtype)
            return {**packed, "pixel_values": pixels}
        known = [self.cache.get(s["key"]) for s in batch]
        grids = [list(grid) for one in known for grid in one.grids]
        values = torch.cat([one.values for one in known])
        return {**packed, "vision_values": values, "vision_grids": torch.tensor(grids)}

    def loss(self, batch: list[dict[str, Any]]) -> Any:
        """The loss of one batch."""
        return self.model(**self.collate(batch), loss_only=True).loss


def in_ours(stock: Any) -> Any:
    """Return MMLM's class with the weights of the stock one."""
    from mmlm.hub import stock_classes
    from mmlm.modeling import MMLMForConditionalGeneration

    side = {"height": 224, "width": 224}
    words = {"image_processor_type": "SiglipImageProcessor", "size": side, "crop_size": side}
    words |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    processor = {"image_processor": words, "patch_size": 16, "num_additional_image_tokens": 0}
    target = stock_classes["llava"]()
    config = target.read(stock.config, processor, origin="benchmark")
    model = MMLMForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(target.to_ours(stock.state_dict(), config, origin="benchmark"))
    return model


def matmul_rate(dtype: Any) -> float:
    """Return this machine's rate of matrix multiplication, in FLOP/s."""
    import torch

    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def flops_of(data: list[dict[str, Any]], tiny: bool, *, align: bool = False) -> dict[str, float]:
    """Return the FLOPs that steps over some samples cannot do without, by part.

    A backward pass costs twice a forward pass where weights learn, and once where they do not;
    with the cache there is no encoder pass.
    """
    layers, vision_layers = (2, 2) if tiny else (30, 12)
    width, kv, hidden = 576, 192, 1536
    per_token = 2 * (2 * width * width + 2 * width * kv + 3 * width * hidden) * layers
    lengths = [len(s["ids"]) for s in data]
    tokens, learnt = sum(lengths), sum(int((s["labels"] != -100).sum()) for s in data)
    causal = sum(2 * length * length * width for length in lengths) * layers
    connector = 2 * (768 * width + width * width) * IMAGE_TOKENS * len(data)
    patch = (4 * 768 * 768 + 2 * 768 * 3072) * 2 * 196 + 4 * 196 * 196 * 768
    weights = 2.0 if align else 3.0
    return {
        "encoder_forward": 0.0 if align else float(patch * vision_layers * len(data)),
        "language_forward_backward": weights * per_token * tokens + 3.0 * causal,
        "connector_forward_backward": 3.0 * connector,
        "head_forward_backward": weights * 2 * width * VOCABULARY * learnt,
    }


_KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "optimiser": ("adam", "foreach"),
    "copies and casts": ("copy", "cat", "to_copy", "clone", "contiguous", "fill", "zero"),
    "norms and activations": ("norm", "silu", "gelu", "softmax", "mean", "rsqrt", "pow"),
    "sums and products": ("add", "mul", "sub", "div", "sum", "neg"),
}


def profile_of(runner: Stock, batch: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of a step's time by kind of operation, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        runner.step(batch)
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        name = event.key.lower().removeprefix("aten::").strip("_")
        kind = next((k for k, words in _KINDS.items() if _is_one(name, words)), "the rest")
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return dict(sorted(((k, v / total) for k, v in spent.items()), key=lambda pair: -pair[1]))


def _is_one(name: str, words: tuple[str, ...]) -> bool:
    return any(name == word or word in name.replace("backward", "") for word in words)
