"""What layers of a language model take of a device, counted without weights, against sums and a measured peak."""

import itertools
import re

import pyarrow as pa
import pytest
import torch
from language import llama
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.inputs import Inputs
from imu_ray.models.blocks import checkpoint_blocks
from imu_ray.models.choice import choose_layers
from imu_ray.models.spec import ModelSpec
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.memory import memory_of
from imu_ray.scopes.seen import weigh
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.objectives import OBJECTIVES

EIGHT = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "dtype": "bfloat16",
}  # fmt: skip
PARAMETERS = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096


def counted(folder, scope, *preconditioners):
    """Of a folder with settings alone, for rows of 512 tokens, one at a time."""
    config, rows = UnlearnConfig().with_overrides({"ascent.scope": scope}), pa.table({"tokens": [[1] * 512] * 3})
    spec = ModelSpec(f"hf:{folder}")
    part = Inputs.open(spec, rows, "sequence", None, config, spec.skeleton()).part
    settings = [config.with_overrides({"ascent.preconditioner": each}).ascent for each in preconditioners]
    return [memory_of(part, each, 1) for each in settings]


@pytest.mark.slow
def test_a_model_of_eight_billion_parameters_fits_with_adapters_and_not_whole(tmp_path):
    LlamaConfig(**EIGHT).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(tmp_path / "lora")
    plain, curved = counted(tmp_path / "lora", "adapters", "none", "kfac")
    assert plain.weights == pytest.approx(2 * PARAMETERS, rel=0.01)
    assert plain.activations_checkpointed < plain.activations / 5
    for size, of_plain, of_curved in ((40, True, False), (80, True, True)):
        assert (plain.verdict(size)[0], curved.verdict(size)[0]) == (of_plain, of_curved)
    assert "40 GB: does not fit" in curved.verdict(40)[1]
    assert curved.verdict(40)[1].endswith("or set ascent.preconditioner: none")
    (whole,) = counted(tmp_path / "base", "usable", "kfac")
    assert re.match(r"80 GB: does not fit, .* curvature \d+.*move adapters", whole.verdict(80)[1])
    assert whole.layers > 8 * 5 * (PARAMETERS - 128256 * 4096), "every layer in float64, five times"


def peak_of(work):
    """Bytes of tensors that are held at most at once, whatever the process keeps of what was freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    # No public call tells what was taken and freed within operations.
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("again", [False, True])
def test_the_count_is_above_what_the_tensors_of_a_pass_take_and_at_most_twice_that(again):
    rows, tokens = 8, torch.randint(0, 4096, (8, 256), generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 4096}
    model = llama(torch.float32, **sizes, max_position_embeddings=256, use_cache=False)
    if again:
        checkpoint_blocks(model)
    task, config = SequenceTask(ForgetSetConfig(), 256, 4096), UnlearnConfig()
    names = choose_layers(model, tokens[:2], ["*.q_proj"], "")
    part = Layers.of_names(model, task, names, tokens[:2], config)
    share = torch.ones(rows)

    def work():
        pull_of = lambda outputs: weigh(OBJECTIVES["bounded_ascent"](outputs, tokens, outputs), share)
        part.add_gradient({}, part.weights(), (tokens,), pull_of)

    found, count = peak_of(work), memory_of(part, config.ascent, rows)
    assert count.checkpointed == again
    expected = count.peak - count.weights - max(count.layers, count.curvature)  # those are there, or not part of a pass
    assert expected / 2 <= found <= expected
