"""The checks of every model family, on tiny random models: used by the tests and by the page that lists the
families. A check takes a family's name, returns its measurement as text and fails by assertion."""

import tempfile

import numpy as np
import torch
from PIL import Image, ImageDraw
from tiny_models import tiny

from aligned_mllm.data.collate import Collator, model_inputs
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.models.trainable import (
    STAGES,
    add_lora,
    parameter_audit,
    parameters_by_part,
    parts_of,
    train_only,
)
from aligned_mllm.models.taps import Taps, decoder_layers

SIZES = [(150, 100), (70, 110), (97, 97)]  # width and height in pixels


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    "A smooth coloured picture."
    coarse = np.random.default_rng(seed).integers(60, 190, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def record(images: int) -> Record:
    turns = (
        Turn("<image>" * images + "what is above", "two red towers", ""),
        Turn("where is the circle", "left", ""),
    )
    return Record(f"{images} pictures", tuple(f"{index}.png" for index in range(images)), turns, "")


def sample(processor, images: list[Image.Image], **settings) -> dict:
    names = [f"{index}.png" for index in range(len(images))]
    return {**encode(record(len(images)), images, processor, **settings), "image_names": names}


def mixed(processor, side: str = "right", **settings) -> dict:
    "Two pictures of different sizes, one more, and none: a batch of three."
    pictures = [photo(seed, size) for seed, size in enumerate(SIZES)]
    samples = [sample(processor, images, **settings) for images in (pictures[:2], pictures[2:], [])]
    return Collator(processor.tokenizer.pad_token_id, side)(samples)


@torch.no_grad()
def first_states(model, batch: dict) -> torch.Tensor:
    "What enters the language model: (B, S, D)."
    with Taps(model, [0]) as taps:
        model(**model_inputs(batch))
    return taps.states(0)


def positions(family: str) -> str:
    """The states at visual positions are the model's own image features, in order; placeholders that are
    not visual tokens have the newline vector."""
    model, processor = tiny(family)
    batch = mixed(processor)
    states = first_states(model, batch)
    placeholders = batch["input_ids"] == model.config.image_token_id
    pictures = {
        name: value
        for name, value in model_inputs(batch).items()
        if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    with torch.no_grad():
        features = model.get_image_features(**pictures).pooler_output
    features = (
        torch.cat([part.flatten(0, -2) for part in features])
        if isinstance(features, (list, tuple))
        else features.flatten(0, -2)
    )
    assert torch.allclose(states[placeholders], features, atol=1e-5)
    assert batch["visual_mask"].sum() == batch["grids"].prod(1).sum() > 0
    assert not (batch["visual_mask"] & ~placeholders).any()
    left_out = states[placeholders & ~batch["visual_mask"]]
    if len(left_out):
        assert torch.allclose(left_out, model.model.image_newline.expand_as(left_out))
    assert batch["view_of"].tolist() == sorted(batch["view_of"].tolist())
    assert set(batch["view_of"].tolist()) == {0, 1, 2}
    return f"{int(batch['visual_mask'].sum())} visual tokens in {len(batch['grids'])} views of 3 pictures" + (
        f", {len(left_out)} newlines" if len(left_out) else ""
    )


def places(family: str, mirrored: bool = False, tries: int = 12) -> str:
    """Painting over the place of a token changes this token most, among the tokens of its view.
    `mirrored` uses wrong places, and must fail."""
    model, processor = tiny(family)
    generator = np.random.default_rng(0)
    checked = 0
    views = 0
    for seed, size in enumerate(SIZES):
        picture = photo(seed, size)
        plain = sample(processor, [picture])
        grids = plain["grids"].tolist()
        starts = [0, *plain["grids"].prod(1).cumsum(0).tolist()]
        tokens = []
        changed = [plain]
        for view in [*range(len(grids)), *generator.integers(0, len(grids), max(0, tries - len(grids)))]:
            row, column = (int(generator.integers(0, count)) for count in grids[view])
            left, top, right, bottom = plain["boxes"][view].tolist()
            shown = grids[view][1] - 1 - column if mirrored else column
            edges = np.array(
                [
                    left + (right - left) * np.array([shown + 0.05, shown + 0.95]) / grids[view][1],
                    top + (bottom - top) * np.array([row + 0.05, row + 0.95]) / grids[view][0],
                ]
            )
            if edges.min() < 0 or edges.max() > 1:
                continue  # padding, or a patch at the edge
            painted = picture.copy()
            ImageDraw.Draw(painted).rectangle(
                [
                    (edges[0, 0] * size[0], edges[1, 0] * size[1]),
                    (edges[0, 1] * size[0] - 1, edges[1, 1] * size[1] - 1),
                ],
                fill=(255, 0, 255),
            )
            changed.append(sample(processor, [painted]))
            tokens.append((view, row * grids[view][1] + column))
        batch = Collator(processor.tokenizer.pad_token_id)(changed)
        states = first_states(model, batch)[batch["visual_mask"]].unflatten(0, (len(changed), -1))
        difference = (states[1:] - states[0]).norm(dim=-1)
        for (view, token), row in zip(tokens, difference):
            assert int(row[starts[view] : starts[view + 1]].argmax()) == token, (
                f"{family}, picture {size}: view {view}, token {token}"
            )
        checked = checked + len(tokens)
        views = views + len(grids)
    assert checked >= 12
    return f"{checked} tokens of {views} views"


def pictures_apart(family: str) -> str:
    "Another second picture changes the visual tokens of that picture, and no others, on the way in."
    model, processor = tiny(family)
    one, other = (
        Collator(processor.tokenizer.pad_token_id)(
            [
                sample(processor, [photo(0, SIZES[0]), photo(seed, SIZES[1])]),
                sample(processor, [photo(2, SIZES[2])]),
            ]
        )
        for seed in (1, 9)
    )
    moved = (first_states(model, one) - first_states(model, other)).abs().amax(-1)[one["visual_mask"]] > 1e-6
    picture = one["view_of"].repeat_interleave(one["grids"].prod(1))
    assert moved[picture == 1].float().mean() > 0.95 and not moved[picture != 1].any()
    return f"{int(moved.sum())} of {len(moved)} visual tokens"


def labels(family: str) -> str:
    "Exactly the answers and their end-of-turn tokens are learned, in samples with two, one and no pictures."
    _, processor = tiny(family)
    batch = mixed(processor)
    texts = set()
    for row in batch["labels"]:
        pieces = []
        last = -2
        for place in (row != IGNORED).nonzero()[:, 0].tolist():
            pieces = pieces if place == last + 1 else [*pieces, []]
            pieces[-1].append(int(row[place]))
            last = place
        texts.add(tuple(processor.tokenizer.decode(piece).strip() for piece in pieces))
    (learned,) = texts
    closing = learned[1].removeprefix("left").strip()
    assert closing in processor.tokenizer.get_vocab()
    assert learned == (learned[0], f"left{learned[1][4:]}")
    assert learned[0].startswith("two red towers")
    assert learned[0].removeprefix("two red towers").strip() == closing
    prompt = sample(processor, [photo(0, SIZES[0])], with_last_answer=False)
    whole = sample(processor, [photo(0, SIZES[0])])
    assert torch.equal(whole["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])
    return f"answers with {closing}"


def loss_of(
    model, head: torch.nn.Module, batch: dict, target: torch.Tensor, layer: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers, and minus the mean cosine of a layer's visual states, through
    `head`, with `target`."""
    with Taps(model, [layer]) as taps:
        logits = model(**model_inputs(batch)).logits
    text = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    return text, -torch.nn.functional.cosine_similarity(
        head(taps.states(layer, batch["visual_mask"])), target, dim=-1
    ).mean()


def prepared(family: str, names: tuple[str, ...]):
    model, processor = tiny(family)
    batch = mixed(processor)
    train_only(model, names)
    head = torch.nn.Linear(32, 16)
    return model.train(), head, batch, torch.randn(int(batch["visual_mask"].sum()), 16)


def one_step(family: str) -> str:
    """A training step changes exactly the parameters that should train (of a vision tower that trains,
    those that lie before the features)."""
    words = []
    for stage, names in STAGES.items():
        model, head, batch, target = prepared(family, names)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(
            [value for value in model.parameters() if value.requires_grad], lr=1e-2, weight_decay=0
        )
        sum(loss_of(model, head, batch, target)).backward()
        optimizer.step()
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        parts = {part: set(parameters) for part, parameters in parameters_by_part(model).items()}
        wanted = set().union(*(parts[part] for part in names))
        unused = wanted - moved
        assert moved <= wanted and unused <= (parts["vision_tower"] if stage == 3 else set()), sorted(
            wanted ^ moved
        )[:5]
        assert all(moved & parts[part] for part in names)
        assert not any(name in moved for part in set(parts) - set(names) for name in parts[part])
        assert parameter_audit(model).trained[list(names)].sum() == sum(
            value.numel() for value in model.parameters() if value.requires_grad
        )
        words.append(str(len(moved)))
    return " / ".join(words) + " tensors in stages 1 / 2 / 3"


def falls(family: str, steps: int = 20) -> str:
    "Both terms of the loss fall over twenty steps of stage 2."
    model, head, batch, target = prepared(family, STAGES[2])
    optimizer = torch.optim.AdamW(
        [*(value for value in model.parameters() if value.requires_grad), *head.parameters()], lr=5e-3
    )
    losses = []
    for _ in range(steps):
        text, cosine = loss_of(model, head, batch, target)
        optimizer.zero_grad()
        (text + cosine).backward()
        optimizer.step()
        losses.append((text.item(), cosine.item()))
    assert losses[-1][0] < 0.6 * losses[0][0] and losses[-1][1] < losses[0][1] - 0.1, losses
    (text, cosine), (last_text, last_cosine) = losses[0], losses[-1]
    return f"text {text:.2f} to {last_text:.2f}, cosine term {cosine:.2f} to {last_cosine:.2f}"


@torch.no_grad()
def padding(family: str) -> str:
    """Left and right padding give the same states at visual positions, at every layer, and the same
    logits at real positions."""
    model, processor = tiny(family)
    found = []
    for side in ("left", "right"):
        batch = mixed(processor, side)
        with Taps(model, range(len(decoder_layers(model)) + 1)) as taps:
            logits = model(**model_inputs(batch)).logits
        found.append(
            [
                *(taps.states(layer, batch["visual_mask"]) for layer in taps.layers),
                logits[batch["attention_mask"].bool()],
            ]
        )
    worst = max(float((one - other).abs().max()) for one, other in zip(*found))
    assert worst < 1e-4
    return f"largest difference {worst:.0e}"


@torch.no_grad()
def text_only(family: str) -> str:
    "A text-only sample gives the same logits beside samples with pictures as alone."
    model, processor = tiny(family)
    batch = mixed(processor)
    alone = Collator(processor.tokenizer.pad_token_id)([sample(processor, [])])
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][2, :length], alone["input_ids"][0])
    assert not alone["visual_mask"].any()
    assert len(alone["grids"]) == 0
    worst = float(
        (model(**model_inputs(batch)).logits[2, :length] - model(**model_inputs(alone)).logits[0]).abs().max()
    )
    assert worst < 1e-4
    return f"largest difference {worst:.0e}"


@torch.no_grad()
def answers_hidden(family: str) -> str:
    """Logits before an answer are computed without it: another answer leaves the logits before it as
    they were."""
    model, processor = tiny(family)
    logits = []
    places = []
    for answer in ("two red towers", "one blue circle"):
        said = Record("", ("0.png",), (Turn("<image>what is above", answer, ""),), "")
        batch = Collator(processor.tokenizer.pad_token_id)(
            [{**encode(said, [photo(0, SIZES[0])], processor), "image_names": ["0.png"]}]
        )
        logits.append(model(**model_inputs(batch)).logits[0])
        places.append(batch["labels"][0] != IGNORED)
    begin = int(places[0].nonzero()[0])
    worst = float((logits[0][:begin] - logits[1][:begin]).abs().max())
    assert begin == int(places[1].nonzero()[0])
    assert worst < 1e-5
    assert (logits[0][begin] - logits[1][begin]).abs().max() > 1e-4
    return f"largest difference {worst:.0e}"


@torch.no_grad()
def generation(family: str) -> str:
    "Greedy answers to a left-padded batch are those to each sample alone."
    model, processor = tiny(family)
    batch = mixed(processor, "left", with_last_answer=False)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    together = model.generate(**model_inputs(batch), **settings)[:, batch["input_ids"].shape[1] :]
    pictures = [photo(seed, size) for seed, size in enumerate(SIZES)]
    for row, images in zip(together, (pictures[:2], pictures[2:], [])):
        alone = Collator(processor.tokenizer.pad_token_id)(
            [sample(processor, images, with_last_answer=False)]
        )
        said = model.generate(**model_inputs(alone), **settings)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(row[: len(said)], said), (row, said)
    return f"{together.numel()} tokens"


def checkpointing(family: str) -> str:
    "Gradients of a tapped loss are the same with gradient checkpointing, reentrant or not."
    found = []
    passes = []
    for kind in (None, False, True):
        model, head, batch, target = prepared(family, STAGES[2])
        times = []
        decoder_layers(model)[1].self_attn.register_forward_hook(lambda *_: times.append(1))
        torch.manual_seed(0)
        torch.nn.init.normal_(head.weight)
        target = torch.randn_like(target)
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.enable_input_require_grads()
        loss_of(model, head, batch, target)[1].backward()
        projector = parameters_by_part(model)["projector"]
        passes.append(len(times))
        found.append(
            torch.cat([value.grad.flatten() for value in projector.values() if value.grad is not None])
        )
    worst = max(float((other - found[0]).abs().max() / found[0].abs().max()) for other in found[1:])
    assert passes == [1, 2, 2], "checkpointing did not compute the block again"
    assert found[0].abs().max() > 0 and worst < 1e-4
    return f"largest relative difference {worst:.0e}"


def lora(family: str) -> str:
    """LoRA: the projector trains, the tower does not; the adapter on disk holds both, and gives the same
    logits when loaded."""
    from peft import PeftModel

    model, processor = tiny(family)
    wrapped = add_lora(model, rank=2, dropout=0.0)
    batch = mixed(processor)
    audit = parameter_audit(wrapped)
    assert audit.trained["projector"] > 0
    assert audit.trained["language_model"] > 0
    assert audit.trained["vision_tower"] == 0
    assert len(decoder_layers(wrapped)) == 3
    assert parts_of(wrapped)["language_model"][0].layers is decoder_layers(wrapped)
    head = torch.nn.Linear(32, 16)
    target = torch.randn(int(batch["visual_mask"].sum()), 16)
    optimizer = torch.optim.AdamW([value for value in wrapped.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss_of(wrapped, head, batch, target)).backward()
        optimizer.step()
    wrapped.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wrapped.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny(family)[0], folder).eval()
        new, old, first = (each(**model_inputs(batch)).logits for each in (again, wrapped, tiny(family)[0]))
    assert torch.allclose(new, old, atol=1e-5) and (new - first).abs().max() > 1e-3
    return f"{int(audit.trained.sum())} parameters, {int(audit.trained['projector'])} of them the projector"


CHECKS = {
    "visual positions": positions,
    "places in the image": places,
    "several images": pictures_apart,
    "labels": labels,
    "one step": one_step,
    "loss over 20 steps": falls,
    "left and right padding": padding,
    "text-only sample": text_only,
    "answers hidden": answers_hidden,
    "greedy answers": generation,
    "checkpointing": checkpointing,
    "LoRA": lora,
}
