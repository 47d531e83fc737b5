"""Teachers of every family on tiny random configurations of transformers' own classes, and the checks of
each: used by the tests and by the page that lists the teachers. A check returns its measurement as text
and fails by assertion."""

import tempfile

import torch
from PIL import Image

from aligned_mllm.core import InputError, seed_everything
from aligned_mllm.models.grid_vision import GridVisionConfig, GridVisionModel
from aligned_mllm.teachers.targets import Targets
from aligned_mllm.teachers.vision import Teacher, load_teacher

# No published model has these values: if a teacher uses them, it read them from the processor.
MEAN = (0.3, 0.45, 0.6)
DEVIATION = (0.2, 0.25, 0.3)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "intermediate_size": 48}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SAM = {
    **SMALL,
    "image_size": 128,
    "patch_size": 16,
    "output_channels": 8,
    "window_size": 2,
    "global_attn_indexes": [1],
    "initializer_range": 0.02,
    "num_pos_feats": 8,
}
PATCH = {
    "aligned_grid_vision": 16,
    "dinov2": 14,
    "dinov2_with_registers": 14,
    "dinov3_vit": 16,
    "clip": 14,
    "clip_vision_model": 14,
    "siglip": 16,
    "siglip_vision_model": 16,
    "siglip2": 16,
    "siglip2_vision_model": 16,
    "sam": 16,
    "sam_vision_model": 16,
    "depth_anything": 14,
    "radio": 16,
}


def tiny(name: str, canvas: int = 128):
    "A tiny random model of a family, and its image processor. canvas: the size of SAM's canvas in pixels."
    import transformers as t

    size = {"image_size": 5 * PATCH[name]}
    patch = {"patch_size": PATCH[name]}
    inner = {
        "backbone_config": t.Dinov2Config(
            **{**SMALL, "num_hidden_layers": 4},
            **size,
            **patch,
            out_indices=[1, 2, 3, 4],
            reshape_hidden_states=False,
        )
    }
    reassemble = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    prompt = {"hidden_size": 8, "image_size": canvas, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    sam = {**SAM, "image_size": canvas}
    packed = {**VISION, **patch, "num_patches": 16}
    make = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SMALL, **size, **patch)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**SMALL, **size, **patch, num_register_tokens=4)
        ),
        "dinov3_vit": lambda: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**VISION, **size, **patch, num_register_tokens=4)
        ),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                vision_config={**VISION, **size, **patch}, text_config={**TEXT, **IDS}, projection_dim=8
            )
        ),
        "clip_vision_model": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION, **size, **patch)),
        "siglip": lambda: t.SiglipModel(
            t.SiglipConfig(vision_config={**VISION, **size, **patch}, text_config={**TEXT, **IDS})
        ),
        "siglip_vision_model": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION, **size, **patch)),
        "siglip2": lambda: t.Siglip2Model(t.Siglip2Config(vision_config=packed, text_config={**TEXT, **IDS})),
        "siglip2_vision_model": lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**packed)),
        "sam": lambda: t.SamModel(
            t.SamConfig(vision_config=sam, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        ),
        "sam_vision_model": lambda: t.SamVisionModel(t.SamVisionConfig(**sam)),
        "depth_anything": lambda: t.DepthAnythingForDepthEstimation(
            t.DepthAnythingConfig(**inner, **reassemble)
        ),
        "radio": lambda: t.RadioModel(
            t.RadioConfig(**SMALL, **size, **patch, max_img_size=256, norm_mean=MEAN, norm_std=DEVIATION)
        ),
    }
    network = {"embedding_size": 8, "hidden_sizes": [32] * 4, "depths": [1] * 4, "layer_type": "basic"}
    make["aligned_grid_vision"] = lambda: GridVisionModel(
        GridVisionConfig(t.ResNetConfig(**network), layer=1, pool=4, hidden_size=32, **size, **patch)
    )
    statistics = {"image_mean": list(MEAN), "image_std": list(DEVIATION)}
    view = {
        "alig": lambda: t.CLIPImageProcessorPil(**statistics),
        "dino": lambda: t.BitImageProcessorPil(**statistics),
        "clip": lambda: t.CLIPImageProcessorPil(**statistics),
        "sigl": lambda: (
            t.Siglip2ImageProcessorPil if name.startswith("siglip2") else t.SiglipImageProcessorPil
        )(**statistics),
        "sam": lambda: t.SamImageProcessorPil(**statistics),
        "sam_": lambda: t.SamImageProcessorPil(**statistics),
        "dept": lambda: t.DPTImageProcessorPil(**statistics, ensure_multiple_of=14),
        "radi": lambda: t.CLIPImageProcessorPil(do_normalize=False),
    }
    return make[name](), view[name[:4]]()


def loaded(name: str, canvas: int = 1024) -> Teacher:
    "A tiny teacher of a family, saved and loaded as a user would; SAM's real canvas has 1024 pixels."
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        for part in tiny(name, canvas):
            part.save_pretrained(folder)
        return load_teacher(folder)


def normalization(teacher: Teacher) -> str:
    "The mean and standard deviation in use, computed from the input for a black and a white image."
    black, white = (
        teacher.pixels_of_view(Image.new("RGB", (64, 64), (value,) * 3), (0, 0, 1, 1), (2, 2)).mean((1, 2))
        for value in (0, 255)
    )
    deviation = 1 / (white - black)
    mean = -black * deviation
    wanted = ((0.0,) * 3, (1.0,) * 3) if teacher.family == "radio" else (MEAN, DEVIATION)
    assert torch.allclose(torch.stack([mean, deviation]), torch.tensor(wanted), atol=1e-4)
    return "none: 0 to 1, the network normalizes" if teacher.family == "radio" else "its processor's"


def grid_met(teacher: Teacher, rows: int, columns: int) -> str:
    "How a student's grid is met: the input size, and whether the patches are the student's tokens."
    seen = teacher.pixels_of_view(Image.new("RGB", (10 * columns, 10 * rows)), (0, 0, 1, 1), (rows, columns))
    (features,), plan = teacher.features([seen]), teacher.plan((rows, columns))
    own = seen.shape[1] // teacher.patch, seen.shape[2] // teacher.patch
    assert len(features) == own[0] * own[1]
    assert list(own) == plan["teacher_grid"]
    assert (plan["features"] == "coincide") == (own == (rows, columns))
    return f"{seen.shape[1]} x {seen.shape[2]}, " + (
        "coincide" if own == (rows, columns) else f"interpolated from {own[0]} x {own[1]}"
    )


def masked(teacher: Teacher) -> str:
    """How many tokens count in an image of 3 : 2, padded to a square of 24 x 24 tokens. The padding is
    zero in the encoder's input, up to rounding."""
    box = (0.0, -0.25, 1.0, 1.25)
    grid = (24, 24)
    seen = teacher.pixels_of_view(Image.new("RGB", (1200, 800), (255, 0, 255)), box, grid)
    batch = {
        "image_names": ["wide"],
        "view_of": torch.tensor([0]),
        "boxes": torch.tensor([box]),
        "grids": torch.tensor([grid]),
        "view_pixels": {"viral": [seen]},
    }
    features, keep = Targets(teacher)(batch)
    wanted = torch.tensor([4 <= row < 20 for row in range(24) for _ in range(24)])
    centre, step = (
        (torch.tensor(MEAN)[:, None, None], 0.5 / 255)
        if teacher.family == "radio"
        else (0.0, 0.5 / 255 / min(DEVIATION))
    )
    assert torch.equal(keep, wanted) and features.shape == (576, teacher.width)
    above, inside = (
        seen[:, first : last - 4] - centre
        for first, last in ((0, 4 * teacher.patch), (4 * teacher.patch + 4, 20 * teacher.patch))
    )
    assert above.abs().max() < step + 1e-6 < inside.abs().min()
    return f"{int(keep.sum())} of {len(keep)}"


def places(teacher: Teacher) -> str:
    """Painting over one patch of an image on 3 x 4 tokens changes the feature of that patch most (or of a
    neighbour, as SAM's neck mixes neighbours)."""
    patch = teacher.patch
    grid = (3, 4)
    worst = 0
    image = Image.effect_noise((4 * patch, 3 * patch), 60).convert("RGB")
    plain = teacher.pixels_of_view(image, (0, 0, 1, 1), grid)
    for row, column in ((0, 0), (1, 2), (2, 3)):
        other = image.copy()
        other.paste((255, 0, 255), (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        before, after = teacher.features([plain, teacher.pixels_of_view(other, (0, 0, 1, 1), grid)])
        found = divmod(int(((after - before).norm(dim=1) / before.norm(dim=1)).argmax()), 4)
        worst = max(worst, abs(found[0] - row), abs(found[1] - column))
    assert worst <= (1 if teacher.family.startswith("sam") else 0)
    return "3 of 3" if worst == 0 else "3 of 3, within one patch"


def change_detected(teacher: Teacher) -> str:
    "The weights are as loaded after all other checks; a change of one weight by a thousandth is detected."
    assert teacher.verify() == teacher.checksum
    assert not any(value.requires_grad for value in teacher.model.parameters())
    with torch.no_grad():
        next(teacher.model.parameters()).view(-1)[0] += 1e-3
    try:
        teacher.verify()
    except InputError:
        return "a changed weight is detected"
    raise AssertionError(f"{teacher.family}: a changed weight is not detected")


def checked(name: str, large: tuple[int, int] = (80, 40), canvas: int = 1024) -> dict[str, str | int]:
    "A row of the table: all measurements of a family, on 24 x 24 tokens and on a large grid."
    teacher = loaded(name, canvas)
    one = teacher.pixels_of_view(Image.new("RGB", (64, 64)), (0, 0, 1, 1), (1, 1))
    grids = {
        f"{rows} x {columns} tokens": grid_met(teacher, rows, columns) for rows, columns in ((24, 24), large)
    }
    return {
        "encoder": type(teacher.model).__name__,
        "patch": one.shape[-1],
        "width": teacher.features(one[None]).shape[-1],
        "mean, deviation": normalization(teacher),
        **grids,
        "places": places(teacher),
        "padded, count": masked(teacher),
        "checksum": change_detected(teacher),
    }
