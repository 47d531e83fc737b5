"""Everything people switch on: checkpointing, LoRA and DoRA, processes, shared-out weights, compiled
blocks, bf16, padding."""

import json
import os
import shutil

import pandas as pd
import pytest
import torch
from conftest import in_two_processes, train
from safetensors.torch import load_file

from aligned_mllm.core import InputError, load_json
from aligned_mllm.data.collate import Collator
from aligned_mllm.training.launch import deepspeed_config, fsdp_config, launch_config, write_configs
from aligned_mllm.models.taps import Taps, decoder_layers
from aligned_mllm.objectives.alignment import minus_cosine
from aligned_mllm.training.config import configured
from aligned_mllm.train import run
from aligned_mllm.training.checkpoint import as_sharded, load_aligned, save_aligned
from aligned_mllm.training.model import AlignedModel, with_targets
from aligned_mllm.training.run import trainer_of
from aligned_mllm.training.trainer import TermTrainer

FEW = {
    "max_steps": 3,
    "logging_steps": 1,
    "evaluation_records": "",
    "save_steps": 3,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}


@pytest.fixture(scope="module")
def mixed_data(small_data):
    "The drawn scenes with every third record in words alone."
    lines = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        if index % 3 == 1:
            line.pop("image", line.pop("images", None))
            for turn in line["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip()
    (small_data / "mixed.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return small_data


def made(data, folder, **settings):
    "A trainer in its starting state, and its first samples."
    trainer = trainer_of(
        configured(settings.pop("recipe", "scenes_viral"), data, folder, {**FEW, **settings})
    )
    trainer.model.train()
    return trainer, [trainer.train_dataset[index] for index in range(6)]


def step(trainer, samples, side: str = "right"):
    "Terms by name (per unit) and gradients of one forward and backward pass."
    batch = Collator(trainer.processing_class.tokenizer.pad_token_id, side)(samples)
    trainer.model.zero_grad()
    terms = trainer.model(targeted(trainer.model, batch))["terms"]
    sum(term.weight * term.mean for term in terms).backward()
    gradients = {
        name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None
    }
    return {term.name: term.mean.item() for term in terms}, gradients


def targeted(model, batch: dict) -> dict:
    "The batch with the targets of the model's objectives."
    (found,) = with_targets([batch], model.objectives.values())
    return found


def apart(one: dict, other: dict) -> float:
    assert set(one) == set(other)
    return max((torch.as_tensor(one[name]) - torch.as_tensor(other[name])).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def plain(mixed_data, tmp_path_factory):
    trainer, samples = made(mixed_data, tmp_path_factory.mktemp("plain"), records="mixed.jsonl")
    return samples, *step(trainer, samples)


def trained(data, folder, **settings):
    """Logged losses and gradient norms of three steps, and how often the first block's inner network
    began (recomputing may stop before its end)."""
    trainer, _ = made(data, folder, **settings)
    calls = []
    decoder_layers(trainer.model.student)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    TermTrainer.train(trainer)  # the steps alone, without the finished folder
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return pd.DataFrame(lines)[["loss", "loss_text", "loss_viral", "grad_norm"]], len(calls)


@pytest.fixture(scope="module")
def kept_activations(mixed_data, tmp_path_factory):
    "Trainings without checkpointing: in full, and adapters above frozen embeddings."
    found = {
        recipe: trained(
            mixed_data, tmp_path_factory.mktemp(recipe), recipe=recipe, records="mixed.jsonl", **off
        )
        for recipe, off in CHECKPOINTED.items()
    }
    assert all(calls == 3 for _, calls in found.values())
    return found


CHECKPOINTED = {"scenes_viral": {}, "scenes_lora_viral": {"lora_dropout": 0.0}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(mixed_data, tmp_path, kept_activations, recipe, reentrant):
    """Through the settings. Adapters above frozen embeddings are the case in which reentrant
    checkpointing can silently train nothing."""
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "records": "mixed.jsonl",
    }
    lines, calls = trained(mixed_data, tmp_path, recipe=recipe, **settings, **CHECKPOINTED[recipe])
    assert calls == 6, "the block was not run again"
    assert (lines - kept_activations[recipe][0]).abs().max().max() < 2e-5 and (
        lines["loss"].diff().dropna() != 0
    ).all()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_and_projector_come_back(small_data, tmp_path, dora):
    """A resumed run ends bit-equal to one that was not stopped; adapters, projector and alignment were
    trained, saved and loaded."""
    settings = {**FEW, "lora_dora": dora, "max_steps": 4, "save_steps": 2}
    trainer = trainer_of(configured("scenes_lora_viral", small_data, tmp_path / "run", settings))
    before = {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    TermTrainer.train(trainer)  # the steps alone, without the finished folder
    trained = {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    kinds = ["lora_A", "lora_B", "modules_to_save", "objective"] + ["lora_magnitude_vector"] * dora
    for kind in kinds:
        assert any(
            kind in name and not torch.equal(value, before[name]) for name, value in trained.items()
        ), kind
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert (
        any("multi_modal_projector" in name for name in saved)
        and any("magnitude" in name for name in saved) == dora
    )
    other = trainer_of(configured("scenes_lora_viral", small_data, tmp_path / "run", settings))
    TermTrainer.train(other, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(
        torch.equal(value, trained[name])
        for name, value in other.model.named_parameters()
        if value.requires_grad
    )


def test_two_processes_with_a_text_only_process_are_one(mixed_data, tmp_path):
    """One sample a process and step: in most steps one of the two has no picture, and no alignment term;
    in the last step of the epoch, one has no sample."""
    words = [
        f"{key}={json.dumps(value)}"
        for key, value in FEW.items()
        if key != "evaluation_records" and "batch_size" not in key
    ]
    words += ["records=mixed.jsonl", "evaluation_records=", "first_records=9"]
    words += ["per_device_train_batch_size=1"]
    words = [word if not word.startswith("max_steps") else "max_steps=6" for word in words]
    statuses, said = train("scenes_viral", mixed_data, tmp_path / "two", *words, processes=2)
    assert statuses == [0, 0], said[-2000:]
    run(
        "scenes_viral",
        mixed_data,
        tmp_path / "one",
        {
            **FEW,
            "max_steps": 6,
            "records": "mixed.jsonl",
            "per_device_train_batch_size": 2,
            "first_records": 9,
        },
    )
    one, two = (
        pd.read_csv(tmp_path / name / "curves.csv").pivot(index="step", columns="name", values="value")
        for name in ("one", "two")
    )
    for name in ("loss_text", "loss_viral", "grad_norm"):
        assert (one[name] - two[name]).abs().max() < 1e-3, name
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert apart(*weights) < 5e-3


def test_two_processes_compute_blocks_again_by_reentrance(mixed_data, tmp_path):
    """DDP and reentrant checkpointing, one process without a picture in most steps: the one process that
    keeps its activations."""
    words = [
        "max_steps=3",
        "logging_steps=1",
        "evaluation_records=",
        "records=mixed.jsonl",
        "per_device_train_batch_size=1",
        "disable_tqdm=true",
        "save_steps=3",
        "lora_dropout=0",
        "gradient_checkpointing=true",
        'gradient_checkpointing_kwargs={"use_reentrant": true}',
    ]
    statuses, said = train("scenes_lora_viral", mixed_data, tmp_path / "two", *words, processes=2)
    assert statuses == [0, 0], said[-2000:]
    run(
        "scenes_lora_viral",
        mixed_data,
        tmp_path / "one",
        {**FEW, "records": "mixed.jsonl", "per_device_train_batch_size": 2, "lora_dropout": 0.0},
    )
    one, two = (
        pd.read_csv(tmp_path / name / "curves.csv").pivot(index="step", columns="name", values="value")
        for name in ("one", "two")
    )
    for name in ("loss_text", "loss_viral", "grad_norm"):
        assert (one[name] - two[name]).abs().max() < 1e-3, name


def test_left_and_right_padding_agree(mixed_data, tmp_path, plain):
    samples, losses, gradients = plain
    assert len({len(sample["input_ids"]) for sample in samples}) > 1
    trainer, _ = made(mixed_data, tmp_path, records="mixed.jsonl")
    left = step(trainer, samples, "left")
    assert apart(left[0], losses) < 1e-5 and apart(left[1], gradients) < 1e-4


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_blocks_are_the_eager_ones(mixed_data, tmp_path, plain):
    """Same losses and gradients; every call of a tap sees its own states, also after a call without taps
    was compiled first."""
    samples, losses, gradients = plain
    trainer, _ = made(mixed_data, tmp_path, records="mixed.jsonl", compile_layers=True)
    batch = Collator(trainer.processing_class.tokenizer.pad_token_id)(samples)
    trainer.model(batch)  # no targets, so no taps
    with torch._dynamo.config.patch(error_on_recompile=False):
        found = step(trainer, samples)
    again = step(trainer, samples)
    assert (
        apart(found[0], losses) < 1e-4
        and apart(found[1], gradients) < 1e-4
        and apart(again[0], losses) < 1e-4
    )
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step(trainer, samples)
    assert counted == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, (
        "a call with the same shapes compiled again"
    )


def test_bfloat16_weights(small_data, tmp_path):
    """Student, adapters and teacher wholly in bfloat16; alignment projector and loss in float32, equal to
    the equation on the same states."""
    trainer, samples = made(small_data, tmp_path, recipe="scenes_lora_viral", weights="bfloat16")
    assert (
        {value.dtype for value in trainer.model.student.parameters()}
        == {torch.bfloat16}
        == {value.dtype for value in trainer.model.objectives["viral"].source.teacher.model.parameters()}
    )
    assert {value.dtype for value in trainer.model.objectives.parameters()} == {torch.float32}
    batch = targeted(trainer.model, Collator(trainer.processing_class.tokenizer.pad_token_id)(samples))
    trainer.model.eval()
    with torch.no_grad(), Taps(trainer.model.student, [3]) as taps:
        term = trainer.model(batch)["terms"][1]
    head = trainer.model.objectives["viral"].projector.double()
    states = taps.states(3, batch["visual_mask"]).double()
    reference = minus_cosine(head(states), batch["targets"]["viral"]["features"].double())
    head.float()
    assert term.total.dtype == torch.float32 and abs(term.total - reference) / term.count < 1e-6
    TermTrainer.train(trainer)  # the steps alone, without the finished folder
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]


def test_settings_that_do_not_go_together(small_data, tmp_path):
    for settings, said in (({"lora_dora": True}, "lora_rank"), ({"weights": "float8"}, "float32")):
        with pytest.raises(InputError, match=said):
            configured("scenes_viral", small_data, tmp_path, settings)


def sharded(rank: int, data: str, folder: str, adapters: bool) -> None:
    """One of two processes: shared-out weights by accelerate's own FSDP2 wrapping; what it finds is
    written by rank 0."""
    from types import SimpleNamespace

    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # before processes join: on its own, as one would be
        del os.environ[name]
    recipe = {"recipe": "scenes_lora_viral", "lora_dropout": 0.0} if adapters else {}
    trainer, samples = made(data, f"{folder}/{rank}", records="mixed.jsonl", **recipe)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    stand_in = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
    )
    model = fsdp2_prepare_model(stand_in, trainer.model)
    model.use_every_weight()
    shares = [samples[0::3] + samples[2::3], samples[1::3]][
        rank
    ]  # all text-only samples in the second process
    batch = Collator(trainer.processing_class.tokenizer.pad_token_id)(shares)
    terms = model(targeted(model, batch))["terms"]
    counts = torch.tensor([float(term.count) for term in terms])
    losses = {}
    torch.distributed.all_reduce(counts)
    # FSDP averages gradients over processes, as DDP does: times 2, as the trainer does
    sum(2 * term.weight * term.total / count for term, count in zip(terms, counts)).backward()
    for term, count in zip(terms, counts):
        total = term.total.detach() / count
        torch.distributed.all_reduce(total)
        losses[term.name] = total.item()
    gradients = {
        name: value.grad.full_tensor() for name, value in model.named_parameters() if value.grad is not None
    }
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_aligned(model, trainer.processing_class, __import__("pathlib").Path(folder) / "saved", state)
    torch.distributed.barrier()
    kept = {name: value.full_tensor() for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(0)
    load_aligned(model, __import__("pathlib").Path(folder) / "saved")
    back = all(
        torch.equal(value.full_tensor(), kept[name])
        for name, value in model.named_parameters()
        if value.requires_grad
    )
    if rank == 0:
        cut = all(isinstance(value, DTensor) for value in model.parameters())
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        torch.save(
            {"losses": losses, "gradients": gradients, "back": back, "cut": cut, "units": units},
            f"{folder}/found.pt",
        )


@pytest.mark.parametrize("adapters", [False, True])
def test_shared_out_weights_are_one_process(mixed_data, tmp_path, adapters):
    """FSDP2 over two CPU processes, one of them without a picture. accelerate itself turns FSDP on for
    accelerators only (its state stays MULTI_CPU), so its own wrapping function is called here, on the
    model that the trainer would hand to it."""
    recipe = {"recipe": "scenes_lora_viral", "lora_dropout": 0.0} if adapters else {}
    trainer, samples = made(mixed_data, tmp_path / "one", records="mixed.jsonl", **recipe)
    losses, gradients = step(trainer, samples)
    in_two_processes(tmp_path / "log.txt", sharded, str(mixed_data), str(tmp_path), adapters)
    found = torch.load(tmp_path / "found.pt")
    assert found["cut"] and found["units"] >= 1 + 6 and found["back"]
    assert apart(found["losses"], losses) < 1e-5
    zero = {name for name, value in found["gradients"].items() if name not in gradients and not value.any()}
    assert (
        apart({name: value for name, value in found["gradients"].items() if name not in zero}, gradients)
        < 1e-5
    )


def test_accelerate_leaves_fsdp_aside_on_a_cpu():
    "The obstacle named above; when this fails, the test above can go through the trainer."
    from accelerate.state import AcceleratorState
    import inspect

    source = inspect.getsource(AcceleratorState.__init__)
    assert (
        "DistributedType.MULTI_CPU"
        not in source.split("ACCELERATE_USE_FSDP")[0].split("elif self.distributed_type in [")[-1]
    )


def test_whole_tensors_stay_whole():
    layer = torch.nn.Linear(2, 2)
    assert as_sharded(layer.state_dict(), layer)["weight"] is layer.state_dict()["weight"] or torch.equal(
        as_sharded(layer.state_dict(), layer)["weight"], layer.weight
    )


def test_launch_files(tmp_path):
    import yaml
    from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: F401  (its import needs no DeepSpeed)

    paths = write_configs(tmp_path)
    assert {path.name for path in paths} == {
        "fsdp2.yaml",
        "zero2.json",
        "zero2.yaml",
        "zero3.json",
        "zero3.yaml",
    }
    assert (
        load_json(tmp_path / "zero3.json") == deepspeed_config(3)
        and deepspeed_config(2)["zero_optimization"]["stage"] == 2
    )
    said = yaml.safe_load((tmp_path / "fsdp2.yaml").read_text())
    assert (
        said == launch_config("fsdp2")
        and said["fsdp_config"] == fsdp_config()
        and said["fsdp_config"]["fsdp_version"] == 2
    )
    with pytest.raises(InputError, match="2 or 3"):
        deepspeed_config(1)


def test_the_wrapping_policy_knows_the_blocks(mixed_data, tmp_path):
    trainer, _ = made(mixed_data, tmp_path)
    assert (
        AlignedModel._no_split_modules.fget(trainer.model)
        and "LlamaDecoderLayer" in trainer.model._no_split_modules
    )
