"""Turns that share a picture and nothing else: the tokens, logits, loss and gradient that each has alone."""

import json

import pytest
import torch
from family_checks import photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.collate import Collator, model_inputs
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.separate_turns import encode_separate_turns, one_turn_records
from aligned_mllm.training.config import configured
from aligned_mllm.training.run import AlignTrainer, run
from aligned_mllm.worlds.small_models import embedded_model

TYPED = {"paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # their processors give tokens types


def conversation(pictures: int) -> Record:
    turns = (
        Turn("<image>" * pictures + "what is above", "two red towers", ""),
        Turn("where is the circle", "left", ""),
        Turn("is there one blue tower", "no", ""),
    )
    return Record("one", tuple(f"{index}.png" for index in range(pictures)), turns, "here:1")


def losses(model, processor, samples: list[dict]) -> torch.Tensor:
    "The sum of the answers' cross-entropy."
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    logits = model.eval()(**model_inputs(batch)).logits
    tokens = batch["labels"][:, 1:]
    learnt = tokens != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][learnt].float(), tokens[learnt], reduction="sum")


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TYPED])
def test_loss_and_gradient_are_those_of_one_conversation_a_turn(family, pictures):
    model, processor = tiny(family)
    images = [photo(seed, (90, 70)) for seed in range(pictures)]
    record = conversation(pictures)
    together = encode_separate_turns(record, images, processor)
    alone = [encode(each, images, processor) for each in one_turn_records(record)]
    for number, single in enumerate(alone, 1):
        own = (together["turn"] == 0) | (together["turn"] == number)
        assert together["input_ids"][own].equal(single["input_ids"])
        learnt = single["labels"][single["labels"] != IGNORED]
        labels = together["labels"][together["turn"] == number]
        assert labels[labels != IGNORED].equal(learnt)
    short = encode_separate_turns(Record("two", (), (Turn("where", "left"),), ""), [], processor)
    both = losses(model, processor, [together, short])  # padded
    expected = sum(losses(model, processor, [each]) for each in (*alone, short))
    assert both.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradient(model, expected)
    assert (gradient(model, both) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", sorted(TYPED))
def test_processors_with_token_types_are_refused(family):
    _, processor = tiny(family)
    with pytest.raises(InputError, match="whose tokens have types"):
        encode_separate_turns(conversation(1), [photo(0, (90, 70))], processor)


def settings(**more) -> dict:
    common = {"model": "embedded", "max_steps": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return {**common, "separate_turns": True, "per_device_train_batch_size": 4, "save_strategy": "no", **more}


def test_a_run_has_the_loss_of_its_turns_in_conversations_of_their_own(small_data, tmp_path):
    lines = (small_data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "joint.jsonl").write_text("\n".join(lines), encoding="utf-8")
    alone = []
    for line in map(json.loads, lines):
        pairs = zip(line["conversations"][::2], line["conversations"][1::2])
        for number, (question, answer) in enumerate(pairs):
            text = question["value"].removeprefix("<image>\n")
            said = [{**question, "value": f"<image>\n{text}"}, answer]
            own = {"id": f"{line['id']}-{number}", "image": line["image"], "conversations": said}
            alone.append(own)
    (tmp_path / "alone.jsonl").write_text("\n".join(map(json.dumps, alone)), encoding="utf-8")
    found = {}
    for name, count in (("joint", 4), ("alone", len(alone))):
        chosen = settings(per_device_train_batch_size=count, learning_rate=0.0)
        chosen |= {"images": str(small_data), "max_steps": 1}
        config = configured("", tmp_path, tmp_path / name, chosen)
        trainer = AlignTrainer("embedded", config, tmp_path / f"{name}.jsonl")
        batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
        found[name] = trainer.compute_loss(trainer.model.eval(), batches[0], num_items_in_batch=counts).item()
    assert len(alone) > 8
    assert found["joint"] == pytest.approx(found["alone"], rel=1e-5)


def test_a_model_with_another_attention_is_refused_before_the_first_step(small_data, tmp_path):
    model, processor = embedded_model(data_folder() / "parts")
    model.set_attn_implementation("eager")
    config = configured("", small_data, tmp_path / "run", settings())
    with pytest.raises(InputError, match="does not keep turns apart"):
        AlignTrainer(model, config, small_data / "train.jsonl", processing_class=processor)


def test_a_picture_behind_a_question_is_found_by_the_check(small_data, tmp_path):
    lines = (small_data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    last = json.loads(lines[2])
    first = last["conversations"][0]
    first["value"] = "now <image> " + first["value"].removeprefix("<image>\n")
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:2], json.dumps(last)]), encoding="utf-8")
    chosen = settings(images=str(small_data), repair_records=False)
    with pytest.raises(InputError, match="an image behind a question"):
        run("", tmp_path, tmp_path / "run", chosen)
    run("", tmp_path, tmp_path / "again", {**chosen, "broken_records": "leave_out"})
    assert "behind a question" in (tmp_path / "again" / "left_out.csv").read_text(encoding="utf-8")
