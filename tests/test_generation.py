"""Answers of words and pictures against a plain loop that reads everything again at each step; words alone
against transformers' own generation."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from aligned_mllm.core import data_folder
from aligned_mllm.data.record import IMAGE, Record, Turn
from aligned_mllm.models.generation import MadePicture, MixedGenerator
from aligned_mllm.models.image_tokens import VisionHead, add_image_tokens
from aligned_mllm.models.residual import visual_projector
from aligned_mllm.worlds.scenes import draw, sample_scene
from aligned_mllm.worlds.small_models import embedded_model

@pytest.fixture(scope="module")
def generate():
    model, processor = embedded_model(data_folder() / "parts", seed=1)
    add_image_tokens(model, processor, 16)
    torch.manual_seed(0)
    return MixedGenerator(model, VisionHead(64, 64), processor)


CONVERSATIONS = [
    (Record("0", (), (Turn("draw red circle", ""),)), []),
    (Record("1", ("1.png",), (Turn(f"{IMAGE}\nwhere blue square circle", ""),)), [draw(sample_scene(1))]),
    (Record("2", (), (Turn("draw", ""),)), []),
]


def always(generate, word: int):
    "Make one word the likeliest everywhere, the scores of all others as they were."
    return generate.model.get_output_embeddings().register_forward_hook(
        lambda layer, given, scores: scores.index_add(
            -1, torch.tensor([word]), torch.full((*scores.shape[:-1], 1), 1e3)
        )
    )


@torch.no_grad()
def read_again(generate, conversation, steps: int) -> list:
    """Ids and visual tokens of a greedy answer by the definition: every step reads the whole sequence as
    embeddings, the last state gives a word, or inside a picture a visual token."""
    model = generate.model
    inputs = generate.prompt([conversation])
    embed = model.get_input_embeddings()
    entered = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, given, named: entered.update(named), with_kwargs=True
    )
    model.model(**inputs)
    hook.remove()
    embedded = entered["inputs_embeds"]
    found = []
    inside = None
    for _ in range(steps):
        state = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
        if inside is not None and inside < generate.count:
            token = nn.functional.normalize(generate.head(state), dim=-1)
            found.append(token[0])
            embedded = torch.cat([embedded, visual_projector(model)(token[:, None])], 1)
            inside += 1
            continue
        if inside == generate.count:
            word = generate.end
        else:
            scores = model.get_output_embeddings()(state)[0]
            scores[[generate.image, generate.end]] = -torch.inf
            word = int(scores.argmax())
        inside = 0 if word == generate.start else None
        found.append(word)
        embedded = torch.cat([embedded, embed(torch.tensor([[word]]))], 1)
        if word in generate.stops:
            break
    return found


@pytest.mark.parametrize("likely", ["start", "none"])
def test_every_step_is_that_of_a_loop_without_a_cache(generate, likely):
    "Alone and in a batch of three of different lengths: each word, each visual token."
    hook = always(generate, generate.start) if likely == "start" else None
    made = {number: [] for number in range(len(CONVERSATIONS))}
    generate(CONVERSATIONS, GenerationConfig(max_new_tokens=40), watch=lambda n, each: made[n].append(each))
    wanted = [read_again(generate, each, 40) for each in CONVERSATIONS]
    if hook:
        hook.remove()
    for number, steps in enumerate(wanted):
        assert len(made[number]) == len(steps)
        for one, other in zip(made[number], steps):
            assert type(one) is type(other)
            same = one == other if isinstance(one, int) else torch.allclose(one, other, atol=1e-4)
            assert same
    pictures = sum(isinstance(step, torch.Tensor) for step in wanted[0])
    assert pictures == (2 * 16 + 3 if likely == "start" else 0)  # start, 16, end, twice; start, 3


def test_no_word_ends_a_picture_and_several_follow_each_other(generate):
    "The end of the text has the highest score from the second step on."
    (stop,) = generate.stops
    calls = []

    def scores_of(layer, given, scores):
        calls.append(1)
        wanted = generate.start if len(calls) <= 2 else stop
        return scores.index_add(-1, torch.tensor([wanted]), torch.full((*scores.shape[:-1], 1), 1e3))

    hook = generate.model.get_output_embeddings().register_forward_hook(scores_of)
    (answer,) = generate(CONVERSATIONS[:1], GenerationConfig(max_new_tokens=60))
    hook.remove()
    assert [type(part) for part in answer.parts] == [MadePicture, MadePicture] and not answer.cut
    assert all(picture.tokens.shape == (16, 64) for picture in answer.pictures)
    assert answer.text == f"{IMAGE} {IMAGE}" and len(calls) == 3  # one score of words for each word chosen


def test_a_picture_that_is_not_whole_is_left_out(generate):
    hook = always(generate, generate.start)
    (part,) = generate(CONVERSATIONS[:1], GenerationConfig(max_new_tokens=12))
    (whole,) = generate(CONVERSATIONS[:1], GenerationConfig(max_new_tokens=17))
    hook.remove()
    assert part.cut and not part.pictures
    assert whole.cut and len(whole.pictures) == 1


def test_words_alone_are_those_of_transformers(generate):
    "Greedy, with a penalty on repetition, and cut at the end of the text."
    model = generate.model
    for penalty in (1.0, 1.7):
        settings = GenerationConfig(max_new_tokens=8, repetition_penalty=penalty)
        answers = generate(CONVERSATIONS, settings)
        for conversation, answer in zip(CONVERSATIONS, answers):
            inputs = generate.prompt([conversation])
            unwanted = [[generate.image], [generate.end]]
            common = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": penalty}
            ids = model.generate(**inputs, **common, bad_words_ids=unwanted)
            text = generate.processor.tokenizer.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            assert answer.text == text.strip()


def test_sampling_follows_its_generator(generate):
    def drawn(seed: int, **settings):
        chosen = GenerationConfig(max_new_tokens=8, do_sample=True, **settings)
        return [each.text for each in generate(CONVERSATIONS, chosen, torch.Generator().manual_seed(seed))]

    assert drawn(0, temperature=3.0, top_k=0) == drawn(0, temperature=3.0, top_k=0)
    assert len({tuple(drawn(seed, temperature=3.0, top_k=0)) for seed in range(4)}) > 1
    greedy = [each.text for each in generate(CONVERSATIONS, GenerationConfig(max_new_tokens=8))]
    assert drawn(0, top_k=1) == greedy
