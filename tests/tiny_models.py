"""Tiny random models of transformers' own image-text classes, with real processors, built offline, for
tests and documentation. `tiny(family)` returns a model and a processor whose classes, chat template and
special tokens are those of the published models. Widths, depths, image sizes and the vocabulary are
small, the weights random."""

import torch

from aligned_mllm.core import InputError, seed_everything

WORDS = (
    "a photo of two red towers and one blue circle left right above below what is where "
    "the answer yes no top bottom 0 1 2 3 4 5 6 7 8 9 USER ASSISTANT"
)

VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def chatml(image: str, last: str = "") -> str:
    "ChatML, as in the templates of Qwen, InternVL and OneVision. image: the text of an image."
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ '"
        + image
        + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + last + "' }}{% endif %}"
    )


IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}"
    "{% endif %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The published models have no template; they were trained with images, prompt, newline, answer, end.
PALIGEMMA = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}"
)


def bytes_tokenizer(
    template: str, bos: str | None, eos: str, pad: str, named: dict[str, str], more: tuple[str, ...] = ()
):
    "A byte-level BPE tokenizer with a few merges; `named` special tokens become attributes of the tokenizer."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([WORDS + " " + WORDS], trainer)
    special = [token for token in dict.fromkeys([pad, bos, eos, *named.values(), *more]) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=named,
        chat_template=template,
    )


def text_sizes(tokenizer, **more) -> dict:
    "The sizes of every language model here; the vocabulary has spare rows for tokens that a processor adds."
    return {
        "vocab_size": len(tokenizer) + 1300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def vision_sizes(**more) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 40,
        "patch_size": 8,
        **more,
    }


def video_part(kind: str):
    """The family's own video processor; without torchvision, which it needs, a stand-in that pictures
    never touch. pytest's last lines say so."""
    import transformers
    from transformers.utils import is_torchvision_available
    from transformers.video_processing_utils import BaseVideoProcessor

    return getattr(transformers, kind)() if is_torchvision_available() else BaseVideoProcessor()


def picture_only(processor_class: type) -> type:
    """The processor class itself; without torchvision, which transformers' check of video processors
    needs, a subclass that leaves this check out."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return processor_class

    def check_argument_for_proper_class(self, name, value):
        return (
            None
            if name == "video_processor"
            else processor_class.check_argument_for_proper_class(self, name, value)
        )

    return type(
        processor_class.__name__,
        (processor_class,),
        {"check_argument_for_proper_class": check_argument_for_proper_class},
    )


def llava(padded: bool = False):
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = bytes_tokenizer(VICUNA, "<s>", "</s>", "<pad>", {"image_token": "<image>"})
    pictures = (LlavaImageProcessorPil if padded else CLIPImageProcessorPil)(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, do_pad=padded
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes()),
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next():
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        MistralConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = bytes_tokenizer(MISTRAL, "<s>", "</s>", "<pad>", {"image_token": "<image>"})
    points = [[40, 80], [80, 40], [80, 80], [120, 40], [40, 120]]
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, image_grid_pinpoints=points
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision_sizes()),
        text_config=MistralConfig(**text_sizes(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=points,
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    )
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    template = chatml("<image>\n")
    tokenizer = bytes_tokenizer(
        template,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        {"image_token": "<image>", "video_token": "<video>"},
        ("<|im_start|>",),
    )
    points = [[40 * rows, 40 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 40, "width": 40}, image_grid_pinpoints=points)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision_sizes()),
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=points,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_4",
    )
    processor = picture_only(LlavaOnevisionProcessor)(
        pictures,
        tokenizer,
        video_part("LlavaOnevisionVideoProcessor"),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=template,
        vision_aspect_ratio="anyres_max_4",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def qwen(generation: str = "2_5"):
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = bytes_tokenizer(template, None, "<|im_end|>", "<|endoftext|>", named, ("<|im_start|>",))
    ids = {
        name.replace("_token", "_token_id"): tokenizer.convert_tokens_to_ids(token)
        for name, token in named.items()
    }
    pictures = Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 16}
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = text_sizes(tokenizer, rope_parameters=rope)
    if generation == "2":
        text.pop("head_dim")
        vision = dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=8)
        config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
        return transformers.Qwen2VLForConditionalGeneration(config), picture_only(
            transformers.Qwen2VLProcessor
        )(pictures, tokenizer, video_part("Qwen2VLVideoProcessor"), chat_template=template)
    if generation == "2_5":
        text.pop("head_dim")
        vision = dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=8,
            window_size=32,
            fullatt_block_indexes=[1],
        )
        config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
        return transformers.Qwen2_5_VLForConditionalGeneration(config), picture_only(
            transformers.Qwen2_5_VLProcessor
        )(pictures, tokenizer, video_part("Qwen2VLVideoProcessor"), chat_template=template)
    vision = dict(
        depth=2,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=8,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config), picture_only(transformers.Qwen3VLProcessor)(
        pictures, tokenizer, video_part("Qwen3VLVideoProcessor"), chat_template=template
    )


def internvl():
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    template = chatml("<IMG_CONTEXT>\n")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = bytes_tokenizer(template, None, "<|im_end|>", "<|endoftext|>", named, ("<|im_start|>",))
    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=6)
    vision = InternVLVisionConfig(**vision_sizes(image_size=[32, 32], patch_size=[4, 4]))
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=16,
    )
    return InternVLForConditionalGeneration(config), picture_only(InternVLProcessor)(
        pictures, tokenizer, video_part("InternVLVideoProcessor"), image_seq_length=16, chat_template=template
    )


def idefics3(smol: bool = False):
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.utils.import_utils import is_num2words_available

    tags = (
        "<|im_start|>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    )
    tokenizer = bytes_tokenizer(
        IDEFICS, "<|im_start|>", "<end_of_utterance>", "<|endoftext|>", {"image_token": "<image>"}, tags
    )
    pictures = (SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil)(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
    )
    kind = "SmolVLM" if smol else "Idefics3"
    vision = getattr(transformers, f"{kind}VisionConfig")(**vision_sizes(image_size=32, patch_size=4))
    text = transformers.LlamaConfig(**text_sizes(tokenizer))
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if (
        smol and is_num2words_available()
    ):  # without it, SmolVLM's processor cannot be made; Idefics 3's writes the same
        return model, picture_only(transformers.SmolVLMProcessor)(
            pictures, tokenizer, video_part("SmolVLMVideoProcessor"), image_seq_len=16, chat_template=IDEFICS
        )
    return model, transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=16, chat_template=IDEFICS)


def paligemma():
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = bytes_tokenizer(PALIGEMMA, "<bos>", "<eos>", "<pad>", {"image_token": "<image>"})
    pictures = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    pictures.image_seq_length = 25
    processor = PaliGemmaProcessor(pictures, tokenizer, chat_template=PALIGEMMA)
    vision = SiglipVisionConfig(**vision_sizes(projection_dim=32, vision_use_head=False))
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=GemmaConfig(**text_sizes(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    config.image_token_id = tokenizer.image_token_id
    return PaliGemmaForConditionalGeneration(config), processor


def gemma3():
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = bytes_tokenizer(GEMMA, "<bos>", "<eos>", "<pad>", named, ("<start_of_turn>", "<end_of_turn>"))
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=GEMMA,
        image_seq_length=16,
    )
    ids = {
        name.replace("_token", "_token_index"): tokenizer.convert_tokens_to_ids(token)
        for name, token in named.items()
    }
    ids["image_token_id"] = ids.pop("image_token_index")
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text_sizes(tokenizer, sliding_window=64, query_pre_attn_scalar=16)),
        vision_config=SiglipVisionConfig(**vision_sizes(image_size=32, patch_size=4, vision_use_head=False)),
        mm_tokens_per_image=16,
        **ids,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=0.1
    )  # transformers starts it at zero
    return model, processor


FAMILIES = {
    "llava": llava,
    "llava_padded": lambda: llava(padded=True),
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen("2"),
    "qwen2_5_vl": qwen,
    "qwen3_vl": lambda: qwen("3"),
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(smol=True),
    "paligemma": paligemma,
    "gemma3": gemma3,
}


def tiny(family: str, seed: int = 0):
    "(model, processor) of a family; raises InputError for a name that is not in FAMILIES."
    if family not in FAMILIES:
        raise InputError(f"family {family!r}", f"one of {list(FAMILIES)}", "correct the name")
    seed_everything(seed)
    model, processor = FAMILIES[family]()
    return model.eval(), processor
