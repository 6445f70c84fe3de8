"""Every attention gives what separate samples give, packed and padded, forward and backward.

Tolerance: the backends add in another order. Largest relative difference of logits and gradients
seen here in float32 is 4e-6; a leak between samples moves them by more than 1e-2. In bfloat16,
which the kernels of GPUs compute in, the limit is that of the start-up proof, 5e-2.
"""

import pytest
import torch

from mmlm.errors import ConfigError, RegistryError
from mmlm.modeling.backends import attention_backends
from mmlm.training.attention import choose_attention, prove_isolation, set_attention, usable
from mmlm.training.recipe import RunConfig
from tests.tiny import compose_tiny

RTOL = 1e-5
LENGTHS = (7, 12, 3)
CPU = torch.device("cpu")
ON_CPU = ("eager", "sdpa", "segments")
ON_GPU = ("flash_attention_2", "flash_attention_3", "varlen", "flex", "segments", "sdpa", "eager")


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def model(request, tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("attention"), language=request.param).model


def samples_of(model):
    draw = torch.Generator().manual_seed(0)
    most = model.config.image_token_id
    return [torch.randint(0, most, (1, n), generator=draw) for n in LENGTHS]


def packed(samples):
    lengths = [one.shape[1] for one in samples]
    return {
        "input_ids": torch.cat(samples, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def padded(samples):
    longest = max(one.shape[1] for one in samples)
    ids, mask = (torch.zeros(len(samples), longest, dtype=torch.long) for _ in range(2))
    for row, one in enumerate(samples):
        ids[row, : one.shape[1]], mask[row, : one.shape[1]] = one[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model, inputs):
    device = model.lm_head.weight.device
    inputs = {key: value.to(device) for key, value in inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    if "attention_mask" in inputs:
        return logits[inputs["attention_mask"].bool()]
    return logits[0]


def learnt(model, inputs):
    """Return the logits and the gradients of their sum of squares."""
    model.zero_grad()
    logits = logits_of(model, inputs)
    logits.float().pow(2).sum().backward()
    grads = [p.grad.clone() for p in model.model.language.parameters() if p.grad is not None]
    return logits.detach(), grads


def furthest(one, other):
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("shape", [packed, padded])
def test_learns_what_separate_samples_learn(model, name, shape):
    samples = samples_of(model)
    set_attention(model, "eager")
    alone, gradients = learnt(model, padded(samples))
    set_attention(model, attention_backends[name].implementation)
    together, others = learnt(model, shape(samples))
    assert furthest(together, alone) < RTOL
    assert len(others) == len(gradients)
    assert max(map(furthest, others, gradients)) < RTOL


@pytest.mark.parametrize("shape", [packed, padded])
def test_flex_attention_says_the_same_on_a_cpu(model, shape):
    samples = samples_of(model)
    set_attention(model, "eager")
    alone = logits_of(model, padded(samples))
    set_attention(model, attention_backends["flex"].implementation)
    with torch.no_grad():
        assert furthest(logits_of(model, shape(samples)), alone) < RTOL


@pytest.mark.parametrize("name", [*ON_CPU, "flex"])
def test_the_proof_of_isolation_runs_with_each(model, name):
    set_attention(model, attention_backends[name].implementation)
    assert prove_isolation(model).holds


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "varlen", "flex"])
def test_what_cannot_train_here_is_refused_with_the_reason(model, name):
    with pytest.raises(ConfigError, match=r"CPU|CUDA"):
        choose_attention(model, RunConfig(attention=name), CPU)


def test_a_misspelt_name_is_refused_with_the_nearest(model):
    with pytest.raises(RegistryError, match=r"Did you mean 'segments'"):
        choose_attention(model, RunConfig(attention="segment"), CPU)


def test_auto_takes_segments_on_a_cpu_and_says_why(model):
    choice = choose_attention(model, RunConfig(), CPU)
    assert choice.packed
    assert choice.backend == attention_backends["segments"].implementation
    assert "CPU" in choice.reason
    assert [one.use for one, _ in usable(CPU, torch.float32)] == ["segments", "sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("shape", [packed, padded])
def test_on_a_gpu_it_learns_what_separate_samples_learn(model, name, shape):
    device = torch.device("cuda")
    missing = attention_backends[name].missing(device, torch.bfloat16)
    if missing is not None:
        pytest.skip(missing)
    on_gpu = model.to(device)
    on_gpu.cast(torch.bfloat16)
    try:
        samples = samples_of(model)
        set_attention(model, "eager")
        alone, gradients = learnt(model, padded(samples))
        set_attention(model, attention_backends[name].implementation)
        together, others = learnt(model, shape(samples))
        assert furthest(together, alone) < 5e-2
        assert max(map(furthest, others, gradients)) < 5e-2
        assert prove_isolation(model).holds
    finally:
        model.cast(torch.float32).to("cpu")
