"""A composed model with its language model's own chat template: prompts as the tokenizer alone renders
them, labels on answers only, and a processor that still does this after it was saved."""

import jinja2
import pytest
from PIL import Image
from tiny_models import tiny
from transformers import AutoProcessor, AutoTokenizer

from aligned_mllm.core import InputError
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.models.compose import CHATS, chat_template_of, composed_model
from aligned_mllm.training.tiny_parts import tiny_part

TOWER = "openai/clip-vit-large-patch14-336"
LANGUAGE_MODELS = ("Qwen/Qwen2.5-7B-Instruct", "lmsys/vicuna-7b-v1.5")
WORDS = (
    "system user assistant you are a helpful assistant where is the circle left what is above two red towers"
)
CHATML = (  # like Qwen2.5's: a default system message, string contents
    "{%- if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_2 = (  # like LLaMA 2's: bos before each question, the content trimmed
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
RECORD = Record(
    "1",
    ("a", "b"),
    (
        Turn("<image>what is above", "two red towers", ""),
        Turn("where is <image> the circle", "left", ""),
    ),
    "",
)
STRINGS = [
    {"role": "user", "content": "<image>\nwhat is above"},
    {"role": "assistant", "content": "two red towers"},
    {"role": "user", "content": "where is<image>\nthe circle"},
    {"role": "assistant", "content": "left"},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "Folders of a tiny encoder and of two tiny language models without a chat template."
    root = tmp_path_factory.mktemp("parts")
    return {source: str(tiny_part(source, root, [WORDS])) for source in (TOWER, *LANGUAGE_MODELS)}


def with_template(folder: str, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("source, template", zip(LANGUAGE_MODELS, (CHATML, LLAMA_2)))
def test_the_own_chat_template_of_a_language_model(parts, source, template, tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        composed_model(parts[TOWER], parts[source], chat="own")
    with_template(parts[source], template)
    _, processor = composed_model(parts[TOWER], parts[source], chat="own", pad_to_square=False)
    processor.save_pretrained(tmp_path)
    images = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        messages = [
            {
                "role": message["role"],
                "content": [
                    part
                    for index, text in enumerate(message["content"].split("<image>\n"))
                    for part in (
                        [{"type": "image"}] * bool(index) + [{"type": "text", "text": text}] * bool(text)
                    )
                ],
            }
            for message in STRINGS
        ]
        for chosen, strings in ((messages, STRINGS), (messages[:3], STRINGS[:3])):
            prompt = len(chosen) == 3
            expected = AutoTokenizer.from_pretrained(parts[source]).apply_chat_template(
                strings, tokenize=False, add_generation_prompt=prompt
            )
            assert each.apply_chat_template(chosen, add_generation_prompt=prompt) == expected
        sample = encode(RECORD, images, each)
        labelled = sample["labels"] != IGNORED
        text = each.tokenizer.decode(sample["input_ids"][labelled], skip_special_tokens=True)
        assert text.split() == "two red towers left".split() or text == "two red towersleft"
        assert sample["visual_mask"].sum() == 2 * 16


def test_other_chats_do_not_depend_on_the_tokenizer(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts[LANGUAGE_MODELS[0]])
    assert chat_template_of("vicuna_v1", tokenizer) == chat_template_of("vicuna_v1", None)


@pytest.mark.parametrize(("chat", "end"), [("vicuna_v1", "</s>"), ("qwen_2", "<|im_end|>")])
def test_templates_serve_other_tools(chat, end):
    """Content as a string or as parts, a system turn in its place, and a mask over exactly the tokens that
    are learnt here."""
    _, processor = tiny("llava")
    processor.chat_template = CHATS[chat]
    processor.tokenizer.chat_template = CHATS[chat]
    render = processor.tokenizer.apply_chat_template
    plain = [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "left"}]
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in plain]
    assert render(plain, tokenize=False) == render(parts, tokenize=False)
    system = {"role": "system", "content": "Be brief."}
    text = render([system, *plain], tokenize=False)
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("where is it")
    assert "helpful" in render(plain, tokenize=False) and "helpful" not in text
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = render(plain, **options)
    sample = encode(Record("one", (), (Turn("where is it", "left"),)), [], processor)
    learnt = sample["labels"][sample["labels"] != IGNORED].tolist()
    masked = [each for each, kept in zip(found["input_ids"], found["assistant_masks"]) if kept]
    texts = [processor.tokenizer.decode(each).strip() for each in (masked, learnt)]
    assert texts == [f"left{end}"] * 2
    if chat == "vicuna_v1":
        with pytest.raises(jinja2.TemplateError, match="not the first turn"):
            render([*plain, system], tokenize=False)
