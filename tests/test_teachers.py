"""Teachers of every family on tiny random configurations of transformers' own classes: their input, their
features, and that nothing changes them."""

import copy
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import FORKS
from safetensors.torch import load_file, save_file
from teacher_checks import DEVIATION, MEAN, PATCH, VISION, checked, tiny

from aligned_mllm.core import InputError, checksum, seed_everything
from aligned_mllm.teachers.cache import FeatureCache
from aligned_mllm.teachers.families import FAMILIES
from aligned_mllm.models.taps import Taps
from aligned_mllm.objectives.viral import ViralLoss
from aligned_mllm.teachers.targets import Pairing, Targets, position_mean, whole_images
from aligned_mllm.teachers.pixels import crop_view, on_grid, shows_picture
from aligned_mllm.teachers.vision import Teacher, encoder_teacher, load_teacher, random_teacher


@pytest.fixture(scope="module")
def originals() -> dict:
    return {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, originals) -> dict[str, Path]:
    "One folder for each family, as `save_pretrained` leaves it."
    seed_everything(0)
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        originals[name], view = tiny(name)
        originals[name].save_pretrained(made[name])
        view.save_pretrained(made[name])
        if name == "dinov3_vit":  # as in its authors' files; transformers' class for it needs torchvision
            settings = json.loads((made[name] / "preprocessor_config.json").read_text()) | {
                "image_processor_type": "DINOv3ViTImageProcessorFast"
            }
            (made[name] / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def teachers(folders) -> dict[str, Teacher]:
    return {name: load_teacher(str(folder)) for name, folder in folders.items()}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_the_row_of_the_page_of_teachers(name):
    row = checked(name, large=(66, 2), canvas=512)
    assert row["patch"] == PATCH[name]
    assert row["24 x 24 tokens"] == ("336 x 336, coincide" if PATCH[name] == 14 else "384 x 384, coincide")
    assert row["66 x 2 tokens"].endswith("interpolated from 32 x 1" if name.startswith("sam") else "coincide")
    assert row["padded, count"] == "384 of 576" and row["width"] == (8 if name.startswith("sam") else 32)


@each_family
def test_changing_a_patch_changes_its_feature_most(teachers, name):
    teacher = teachers[name]
    grid = (3, 4)
    patch = PATCH[name]
    image = noise(4 * patch, 3 * patch)
    plain = teacher.pixels_of_view(image, (0, 0, 1, 1), grid)
    assert plain.shape == (3, 3 * patch, 4 * patch)
    for row, column in ((0, 0), (1, 2), (2, 3)):
        other = image.copy()
        other.paste((255, 0, 255), (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        before, after = teacher.features([plain, teacher.pixels_of_view(other, (0, 0, 1, 1), grid)])
        assert before.shape == (12, teacher.width)
        change = (after - before).norm(dim=1) / before.norm(dim=1)
        most = divmod(int(change.argmax()), 4)
        if name.startswith("sam"):  # its neck mixes neighbours
            assert abs(most[0] - row) <= 1 and abs(most[1] - column) <= 1
        else:
            assert most == (row, column)
    assert teacher.plan(grid)["features"] == "coincide"


@each_family
def test_what_was_loaded_is_what_was_saved(teachers, originals, name):
    original = originals[name].get_submodule(FAMILIES[name].part)
    assert teachers[name].checksum == checksum(original)
    assert teachers[name].verify() == teachers[name].checksum


@each_family
def test_own_mean_and_deviation(teachers, name):
    patch = PATCH[name]
    image = noise(2 * patch, 2 * patch)
    values = np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255
    expected = (
        values
        if name == "radio"
        else (values - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))
    )
    assert teachers[name].pixels_of_view(image, (0, 0, 1, 1), (2, 2)).numpy() == pytest.approx(
        expected, abs=1e-5
    )


@each_family
def test_features_against_the_class_itself(teachers, originals, name):
    "The whole path against a plain call of the class, with prefix tokens counted by hand."
    teacher = teachers[name]
    patch = PATCH[name]
    model = originals[name].eval()
    pixels = teacher.pixels_of_view(noise(40, 30), (0, 0, 1, 1), teacher.native)[None]
    with torch.no_grad():
        if name.startswith("clip"):
            expected = getattr(model, "vision_model", model)(pixels, output_hidden_states=True).hidden_states[
                -2
            ][:, 1:]
        elif name.startswith("siglip2"):
            squares = [
                pixels[0, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
                for r in range(4)
                for c in range(4)
            ]
            flat = torch.stack([square.permute(1, 2, 0).flatten() for square in squares])[None]
            given = {"pixel_values": flat, "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
            expected = getattr(model, "vision_model", model)(
                **given, spatial_shapes=torch.tensor([[4, 4]])
            ).last_hidden_state
        elif name.startswith("sam"):
            expected = model.vision_encoder(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        elif name == "depth_anything":
            expected = model.backbone(pixels).feature_maps[-1][:, 1:]
        elif name == "radio":
            expected = model(pixels).features
        else:
            before = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5}.get(name, 0)
            expected = getattr(model, "vision_model", model)(pixels).last_hidden_state[:, before:]
    assert torch.allclose(teacher.features(pixels), expected, atol=1e-6)
    assert torch.allclose(teacher.features([pixels[0]])[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("name", ["siglip2", "siglip2_vision_model", "radio"])
def test_whole_images_where_the_processor_gives_no_image(teachers, name):
    teacher = teachers[name]
    pixels = teacher.pixels([noise(40, 30)])
    assert torch.equal(pixels[0], teacher.pixels_of_view(noise(40, 30), (0, 0, 1, 1), teacher.native))
    assert teacher.features(pixels).shape == (1, teacher.native[0] * teacher.native[1], teacher.width)


@pytest.mark.parametrize(
    "name,size",
    [
        ("dinov2", 336),
        ("depth_anything", 336),
        ("clip", 336),
        ("siglip", 384),
        ("dinov3_vit", 384),
        ("radio", 384),
    ],
)
def test_grids_coincide_for_llava(teachers, name, size):
    plan = teachers[name].plan((24, 24))
    assert plan["input"] == [size, size]
    assert plan["teacher_grid"] == [24, 24]
    assert plan["features"] == "coincide"
    features = teachers[name].features(
        [teachers[name].pixels_of_view(noise(50, 70), (0.1, 0, 0.9, 1), (24, 24))]
    )
    assert features[0].shape == (576, 32)
    json.dumps(plan)


def test_sam_geometry_is_the_papers():
    """1024 canvas, 384 picture at 320, features [20:44]: VIRAL's numbers, with a tiny network of that
    geometry."""
    from transformers import SamImageProcessorPil, SamVisionConfig, SamVisionModel

    seed_everything(1)
    config = SamVisionConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=1024,
        patch_size=16,
        output_channels=4,
        window_size=14,
        global_attn_indexes=[],
        initializer_range=0.1,
    )
    teacher = Teacher("sam", SamVisionModel(config).vision_encoder, SamImageProcessorPil())
    pixels = teacher.pixels_of_view(noise(100, 100), (0, 0, 1, 1), (24, 24))
    assert pixels.shape == (3, 384, 384) and teacher.width == 4
    canvas = torch.zeros(1, 3, 1024, 1024)
    canvas[:, :, 320:704, 320:704] = pixels
    expected = teacher.model(canvas).last_hidden_state[0, :, 20:44, 20:44].reshape(4, 576).T
    assert torch.allclose(teacher.features([pixels])[0], expected, atol=1e-6)
    plan = teacher.plan((100, 50))
    assert plan["features"] == "interpolate"
    assert plan["teacher_grid"] == [64, 32]
    assert plan["canvas"] == [1024, 1024]


def test_interpolation_against_loops():
    "Bilinear between patch centres, edges held, as the definition says."
    rows = 3
    columns = 5
    to_rows = 4
    to_columns = 2
    values = np.random.default_rng(0).normal(size=(rows, columns, 6))
    expected = np.zeros((to_rows, to_columns, 6))
    for i in range(to_rows):
        for j in range(to_columns):
            y = max((i + 0.5) * rows / to_rows - 0.5, 0)
            x = max((j + 0.5) * columns / to_columns - 0.5, 0)
            y0 = int(y)
            x0 = int(x)
            y1 = min(y0 + 1, rows - 1)
            x1 = min(x0 + 1, columns - 1)
            fy = y - int(y)
            fx = x - int(x)
            expected[i, j] = (1 - fy) * ((1 - fx) * values[y0, x0] + fx * values[y0, x1]) + fy * (
                (1 - fx) * values[y1, x0] + fx * values[y1, x1]
            )
    features = torch.tensor(values, dtype=torch.float32).view(15, 6)
    assert on_grid(features, (3, 5), (4, 2)).numpy() == pytest.approx(expected.reshape(8, 6), abs=1e-6)
    assert torch.equal(
        on_grid(features.expand(2, 7, 15, 6), (3, 5), (4, 2))[1, 3], on_grid(features, (3, 5), (4, 2))
    )
    with pytest.raises(InputError, match="15 features"):
        on_grid(features, (5, 5), (4, 2))


def test_interpolated_features_are_used_where_grids_differ(teachers):
    from dataclasses import replace

    limited = replace(teachers["dinov2"], most_patches=16)
    plan = limited.plan((6, 6))
    assert plan["features"] == "interpolate" and plan["teacher_grid"] == [4, 4]
    pixels = limited.pixels_of_view(noise(60, 60), (0, 0, 1, 1), (6, 6))
    values, keep = Targets(limited)(whole_images(["a"], [pixels], (6, 6)))
    assert torch.allclose(
        values, on_grid(teachers["dinov2"].features([pixels])[0], (4, 4), (6, 6)), atol=1e-6
    )
    assert len(keep) == 36


def test_views_against_pillow():
    image = noise(60, 40)
    assert np.array_equal(
        crop_view(image, (0, 0, 1, 1), (28, 28)), image.resize((28, 28), Image.Resampling.BICUBIC)
    )
    square = Image.new("RGB", (60, 60), (9, 8, 7))
    square.paste(image, (0, 10))
    padded = crop_view(image, (0, -0.25, 1, 1.25), (36, 36), (9, 8, 7))
    assert np.array_equal(padded, square.resize((36, 36), Image.Resampling.BICUBIC))
    cropped = crop_view(image, (1 / 6, 0, 5 / 6, 1), (20, 20))
    resized = image.resize((30, 20), Image.Resampling.BICUBIC).crop(
        (5, 0, 25, 20)
    )  # as processors do: resize, then cut
    assert np.abs(np.asarray(cropped, dtype=int) - np.asarray(resized, dtype=int)).max() <= 1
    smooth = noise(6, 4).resize(
        (60, 40), Image.Resampling.BICUBIC
    )  # Pillow rounds between its two passes, which noise makes visible
    half = smooth.resize((56, 28), Image.Resampling.BICUBIC).crop((28, 0, 56, 28))
    assert (
        np.abs(
            np.asarray(crop_view(smooth, (0.5, 0, 1, 1), (28, 28)), dtype=int) - np.asarray(half, dtype=int)
        ).max()
        <= 1
    )
    assert (
        np.abs(
            np.asarray(crop_view(smooth, (0.52, 0, 1, 1), (28, 28)), dtype=int) - np.asarray(half, dtype=int)
        ).max()
        > 5
    )
    assert crop_view(image.convert("L"), (-1, -1, 0, 0), (4, 4), (1, 2, 3)).getpixel((1, 1)) == (
        1,
        2,
        3,
    )


def test_padding_is_the_mean_colour(teachers):
    pixels = teachers["dinov2"].pixels_of_view(noise(60, 20), (0, -1, 1, 2), (6, 6))
    assert (
        pixels[:, : 2 * 14 - 2].abs().max() < 0.5 / 255 / min(DEVIATION) + 1e-6 < pixels[:, 30:50].abs().max()
    )


BOXES = [
    ((0, -0.25, 1, 1.25), (6, 4)),
    ((-0.5, 0, 1.5, 1), (3, 8)),
    ((0.1, 0.2, 0.7, 0.9), (5, 5)),
    ((0, -1, 1, 2), (6, 6)),
    ((0.5, 0.5, 1.5, 1.5), (4, 6)),
]


@pytest.mark.parametrize("box,grid", BOXES)
def test_padding_mask_against_painting(box, grid):
    """Paint the image white on black padding, at high resolution: a patch shows the image if any of it is
    white."""
    fine = crop_view(
        Image.new("RGB", (240, 240), (255,) * 3),
        box,
        (grid[0] * 20, grid[1] * 20),
        resample=Image.Resampling.BOX,
    )
    white = (np.asarray(fine)[..., 0] > 0).reshape(grid[0], 20, grid[1], 20).any((1, 3))
    assert shows_picture(box, grid).numpy().tolist() == white.flatten().tolist()


def test_student_pixels_are_the_students(folders, teachers):
    from transformers import CLIPImageProcessorPil

    clip = CLIPImageProcessorPil()
    image = noise(28, 28)
    released = load_teacher(str(folders["dinov2"]), pixels="student", student=clip)
    expected = (
        np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 - np.reshape(clip.image_mean, (3, 1, 1))
    ) / np.reshape(clip.image_std, (3, 1, 1))
    assert released.pixels_of_view(image, (0, 0, 1, 1), (2, 2)).numpy() == pytest.approx(expected, abs=1e-5)
    assert released.checksum == teachers["dinov2"].checksum and released.plan((2, 2))["pixels"] == "student"
    assert random_teacher(released, 0).plan((2, 2))["pixels"] == "student"
    radio = load_teacher(str(folders["radio"]), pixels="student", student=clip)
    assert radio.plan((2, 2))["pixels"] == "own"


def test_a_source_without_a_teacher_is_refused(folders, tmp_path):
    def copied(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(folders["dinov2"], folder)
        change(folder)
        return str(folder)

    def only_code(folder):
        weights = load_file(folder / "model.safetensors")
        torch.save({**weights, "code": Path.cwd}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def lacking(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop("encoder.layer.1.mlp.fc1.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def own_code(folder):
        auto = {"AutoConfig": "hf_model.RADIOConfig", "AutoModel": "hf_model.RADIOModel"}
        (folder / "config.json").write_text(json.dumps({"architectures": ["RADIOModel"], "auto_map": auto}))

    def other_type(folder):
        (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))

    for change, message in (
        (only_code, "Weights only load failed"),
        (lacking, "1 weights are missing, such as encoder.layer.1.mlp.fc1.weight"),
        (own_code, "never run"),
        (other_type, "'swin'"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config"),
    ):
        with pytest.raises(InputError, match=message):
            load_teacher(copied(f"{message[:5].strip()}{id(change)}".replace("'", ""), change))
    for settings in ({"layer": 3}, {"pixels": "student"}, {"pixels": "theirs"}):
        with pytest.raises(InputError):
            load_teacher(str(folders["dinov2"]), **settings)
    with pytest.raises(InputError, match="neck"):
        load_teacher(str(folders["sam"]), layer=1).features(torch.zeros(1, 3, 32, 32))


def test_older_weights_are_those_of_the_safetensors(folders, teachers, tmp_path, capsys):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "older")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_teacher(str(folder)).checksum == teachers["dinov2"].checksum
    assert "weights_only=True" in capsys.readouterr().out


def test_a_changed_weight_is_noticed(folders):
    teacher = load_teacher(str(folders["dinov2"]))
    assert teacher.verify() == teacher.checksum
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        teacher.model.layernorm.bias[0] += 1e-6
    with pytest.raises(InputError, match="discard the run"):
        teacher.verify()


def test_a_student_around_a_teacher_changes_it_and_ours_stays(folders, tmp_path):
    """What the paper's code does: the teacher inside the class that `from_pretrained` loads. transformers
    re-initializes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    teacher = load_teacher(str(folders["dinov2"]))

    class Around(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.teacher = copy.deepcopy(teacher.model)

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    inside = Around.from_pretrained(tmp_path).teacher
    assert checksum(inside) != teacher.checksum
    changed = [
        name
        for name, value in inside.state_dict().items()
        if not torch.equal(value, teacher.model.state_dict()[name])
    ]
    assert any("mlp.fc1.weight" in name for name in changed) and any("attention" in name for name in changed)
    assert teacher.verify() == teacher.checksum == load_teacher(str(folders["dinov2"])).checksum

    class Loading(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.teacher = load_teacher(str(folders["dinov2"])).model

    with pytest.raises(InputError, match="outside every student"):
        Loading.from_pretrained(tmp_path)


def batch_of(teacher: Teacher, views: list[tuple], images: dict[str, Image.Image]) -> dict:
    names = list(images)
    return {
        "image_names": names,
        "view_of": torch.tensor([names.index(name) for name, _, _ in views]),
        "boxes": torch.tensor([box for _, box, _ in views]),
        "grids": torch.tensor([grid for _, _, grid in views]),
        "view_pixels": {
            "viral": [teacher.pixels_of_view(images[name], box, grid) for name, box, grid in views]
        },
    }


WHOLE = (0.0, 0.0, 1.0, 1.0)
PADDED = (0.0, -1.0, 1.0, 2.0)
IMAGES = {"a": noise(60, 20, 1), "b": noise(30, 30, 2), "c": noise(20, 40, 3)}
VIEWS = [
    ("a", PADDED, (6, 6)),
    ("b", WHOLE, (6, 6)),
    ("b", (0, 0, 0.5, 1), (3, 6)),
    ("a", PADDED, (6, 6)),
    ("c", WHOLE, (3, 6)),
]


def test_targets_of_mixed_views(folders):
    teacher = load_teacher(str(folders["dinov2"]))
    asked = []
    features = teacher.features
    batch = batch_of(teacher, VIEWS, IMAGES)
    teacher.features = lambda pixels: (
        asked.append([tuple(item.shape[1:]) for item in pixels]) or features(pixels)
    )
    targets = Targets(teacher)
    values, keep = targets(batch)
    assert sorted(asked[0]) == [(42, 84), (42, 84), (84, 84), (84, 84)]  # five views, four different
    assert values.shape == (36 + 36 + 18 + 36 + 18, 32) and torch.equal(values[:36], values[90:126])
    assert torch.allclose(values[72:90], features(batch["view_pixels"]["viral"][2][None])[0], atol=1e-5)
    shown = [False] * 12 + [True] * 12 + [False] * 12
    assert keep.tolist() == shown + [True] * 54 + shown + [True] * 18
    assert torch.equal(targets(batch)[0], values) and asked[1:] in ([], [[]])
    empty = {
        "image_names": [],
        "grids": torch.zeros(0, 2).long(),
        "boxes": torch.zeros(0, 4),
        "view_of": torch.zeros(0).long(),
        "view_pixels": {"viral": []},
    }
    assert [tuple(part.shape) for part in targets(empty)] == [(0, 32), (0,)]


def test_controls_of_mixed_views(teachers):
    teacher = teachers["dinov2"]
    batch = batch_of(teacher, VIEWS, IMAGES)
    own = Targets(teacher).features(batch)
    mean = position_mean(torch.stack([own[0], own[1]]))
    made = {
        kind: Targets(teacher, Pairing(kind, mean))(batch)
        for kind in ("other_image", "position_mean", "mean_removed", "mean_removed_other")
    }
    partners = [1, 3, 4, 1, 2]  # the next of another picture on the same grid
    assert torch.equal(made["other_image"][0], torch.cat([own[index] for index in partners]))
    assert torch.equal(made["position_mean"][0][:36], mean[0])
    on_small = on_grid(mean[0], (6, 6), (3, 6))
    assert torch.allclose(made["mean_removed"][0][72:90], own[2] - on_small)
    assert torch.allclose(made["mean_removed_other"][0][72:90], own[4] - on_small)
    both = shows_picture(PADDED, (6, 6))
    assert torch.equal(made["other_image"][1][36:72], both)
    assert torch.equal(made["mean_removed"][1][36:72], torch.ones(36, dtype=torch.bool))
    alone = batch_of(teacher, [VIEWS[0], VIEWS[2]], {name: IMAGES[name] for name in "ab"})
    assert torch.equal(Targets(teacher, "other_image")(alone)[0][36:], on_grid(own[0], (6, 6), (3, 6)))
    with pytest.raises(InputError, match="at least two"):
        Targets(teacher, "other_image")(batch_of(teacher, VIEWS[:1], {"a": IMAGES["a"]}))


def test_memory_has_a_limit(teachers):
    batch = batch_of(teachers["dinov2"], VIEWS, IMAGES)
    without = Targets(teachers["dinov2"], cache_mib=0)
    assert torch.allclose(without(batch)[0], Targets(teachers["dinov2"])(batch)[0]) and not without.cache


def test_own_projection_follows_the_projector(parts):
    from aligned_mllm.models.compose import compose
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
    )

    tower = CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=40, patch_size=8))
    view = CLIPImageProcessorPil(size={"height": 40, "width": 40}, do_center_crop=False)
    words = parts / "language_model"
    model, processor = compose(
        tower, AutoModelForCausalLM.from_pretrained(words), AutoTokenizer.from_pretrained(words), view
    )
    given = processor(images=[noise(40, 40)], text="<image>", return_tensors="pt")
    batch = {
        **given,
        "visual_mask": given["input_ids"] == processor.image_token_id,
        **whole_images(["a"], torch.zeros(1, 3, 2, 2), (5, 5)),
    }
    own = encoder_teacher(model, processor)
    raw = own.features([own.pixels_of_view(noise(40, 40), WHOLE, (5, 5))])[0]
    objective = ViralLoss(model.config.get_text_config().hidden_size, 24, [1], source=Pairing())
    for _ in range(2):
        (target,) = objective.targets([batch])
        with Taps(model, [0]) as taps:
            model(**given)
        values = objective.input_features(taps.states(0, batch["visual_mask"]), target)
        assert torch.allclose(values, model.model.multi_modal_projector(raw), atol=1e-4)
        assert target["keep"].all() and target.count == 25 and not values.requires_grad
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.mul_(-3)
    assert own.verify() and not model.model.language_model.layers[0]._forward_pre_hooks


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name, image in IMAGES.items():
        image.save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def test_cache_gives_what_was_put_and_only_that(teachers, pictures, tmp_path):
    teacher = teachers["dinov2"]
    folder = tmp_path / "features"
    images = {f"{name}.png": image for name, image in IMAGES.items()}
    batch = batch_of(teacher, [(f"{name}.png", box, grid) for name, box, grid in VIEWS], images)
    fresh, kept = Targets(teacher)(batch)
    first = FeatureCache(folder, teacher)
    assert torch.equal(Targets(teacher, disk=first, image_folder=pictures)(batch)[0], fresh)
    assert first.counts["written"] == 4
    again = FeatureCache(folder, teacher)
    other = {
        **batch,
        "view_pixels": {
            "viral": [torch.full_like(pixels, torch.nan) for pixels in batch["view_pixels"]["viral"]]
        },
    }  # never read
    values, keep = Targets(teacher, disk=again, image_folder=pictures)(other)
    assert torch.equal(values, fresh)
    assert torch.equal(keep, kept)
    assert again.counts["read"] == 4
    assert again.size == first.size > 4 * 18 * 32 * 4
    assert again.get(pictures / "b.png", (0, 0, 0.5, 1), (6, 6)) is None
    assert again.get(pictures / "b.png", (0, 0, 0.4, 1), (3, 6)) is None
    with pytest.raises(InputError, match="not finite"):
        Targets(teacher, disk=FeatureCache(tmp_path / "new", teacher), image_folder=pictures)(other)
    with pytest.raises(InputError, match="image folder"):
        Targets(teacher, disk=again)


def test_cache_knows_content_not_names(teachers, pictures, tmp_path):
    cache = FeatureCache(tmp_path / "features", teachers["dinov2"])
    features = torch.arange(4.0).view(2, 2)
    assert cache.put(pictures / "a.png", WHOLE, (1, 2), features)
    shutil.copy(pictures / "a.png", pictures / "same.png")
    assert torch.equal(cache.get(pictures / "same.png", WHOLE, (1, 2)), features)
    IMAGES["b"].save(pictures / "a.png")
    assert cache.get(pictures / "a.png", WHOLE, (1, 2)) is None  # noticed by the same cache
    with pytest.raises(InputError, match="cannot be read"):
        cache.get(pictures / "none.png", WHOLE, (1, 2))


def test_cache_refuses_other_teachers_and_other_preprocessing(folders, teachers, tmp_path):
    from dataclasses import replace
    from transformers import CLIPImageProcessorPil

    folder = tmp_path / "features"
    FeatureCache(folder, teachers["dinov2"])
    FeatureCache(folder, load_teacher(str(folders["dinov2"])))
    same = teachers["dinov2"]
    different = {
        "checksum": random_teacher(same, 3),
        "layer": replace(same, layer=1),
        "most_patches": replace(same, most_patches=9),
        "pixels": replace(same, student=CLIPImageProcessorPil()),
        "type": load_teacher(str(folders["dinov2"]), dtype=torch.bfloat16),
    }
    for what, teacher in different.items():
        with pytest.raises(InputError, match=what):
            FeatureCache(folder, teacher)
    changed = load_teacher(str(folders["dinov2"]))
    with torch.no_grad():
        changed.model.layernorm.weight[0] += 1
    with pytest.raises(InputError, match="as loaded"):
        FeatureCache(tmp_path / "another", changed)


def test_cache_refuses_foreign_and_damaged_entries(teachers, pictures, tmp_path):
    cache = FeatureCache(tmp_path / "features", teachers["dinov2"])
    places = {}
    for name in "abc":
        cache.put(pictures / f"{name}.png", WHOLE, (2, 2), torch.full((4, 2), float(ord(name))))
        places[name] = cache.path(cache.key(pictures / f"{name}.png", WHOLE, (2, 2)))
    places["b"].write_bytes(places["a"].read_bytes())
    places["c"].write_bytes(places["c"].read_bytes()[:-5])
    for name, message in (("b", "was not written by this cache"), ("c", "whole safetensors")):
        with pytest.raises(InputError, match=message):
            cache.get(pictures / f"{name}.png", WHOLE, (2, 2))
    assert cache.get(pictures / "a.png", WHOLE, (2, 2))[0, 0] == ord("a")


def test_cache_has_a_limit(teachers, pictures, tmp_path):
    cache = FeatureCache(tmp_path / "features", teachers["dinov2"], limit_mib=1)
    entry = torch.zeros(1000, 100)  # 0.38 MiB
    assert [cache.put(pictures / f"{name}.png", WHOLE, (10, 100), entry) for name in "abc"] == [
        True,
        True,
        False,
    ]
    held = sum(path.stat().st_size for path in (tmp_path / "features").rglob("*.safetensors"))
    assert held <= 2**20 and cache.counts["full"] == 1
    reopened = FeatureCache(tmp_path / "features", teachers["dinov2"], limit_mib=1)
    assert not reopened.put(pictures / "c.png", WHOLE, (10, 100), entry)
    assert reopened.get(pictures / "a.png", WHOLE, (10, 100)) is not None


def write_entries(folder, teacher, image) -> None:
    "One entry after another, until it is stopped."
    cache = FeatureCache(folder, load_teacher(teacher))
    for count in itertools.count():
        cache.put(image, (0, 0, 1, 1), (count + 1, 1), torch.full((500000,), float(count)))


def test_cache_survives_being_killed_while_it_writes(folders, teachers, pictures, tmp_path):
    folder = tmp_path / "features"
    arguments = (folder, folders["dinov2"], pictures / "a.png")
    process = FORKS.Process(target=write_entries, args=arguments)
    process.start()
    while len(list(folder.rglob("*.safetensors"))) < 3:
        assert process.is_alive()
    until = time.time() + 20  # end it when a half file is there
    while time.time() < until and not list(folder.rglob("*.part")):
        pass
    process.terminate()
    process.join()
    assert process.exitcode < 0
    cache = FeatureCache(folder, teachers["dinov2"])
    whole = 0
    entries = len(list(folder.rglob("*.safetensors")))
    for count in range(entries + 1):
        values = cache.get(pictures / "a.png", WHOLE, (count + 1, 1))
        whole += values is not None and len(values) == 500000 and bool((values == count).all())
    assert whole == entries >= 3
    assert cache.put(pictures / "a.png", WHOLE, (entries + 1, 1), torch.zeros(3))
    assert len(cache.get(pictures / "a.png", WHOLE, (entries + 1, 1))) == 3
