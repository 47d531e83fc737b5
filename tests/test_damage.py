"A damaged file is refused in one line that names it. `soak.py` does the same by the thousand, at random."

import io
import struct
import zlib

import numpy as np
import pytest
import teacher_checks
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import tiny

from aligned_mllm import load_model, open_records
from aligned_mllm.analysis.convergence import read_run_curves
from aligned_mllm.analysis.feature_files import mapped_rows
from aligned_mllm.core import InputError, checksum, load_json, save_json
from aligned_mllm.data.images import rgb_image
from aligned_mllm.objectives.base import Context, objective_class, settings_of
from aligned_mllm.reporting.model_card import NEEDED, model_card
from aligned_mllm.teachers.cache import FeatureCache
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.training.checkpoint import export_objectives, exported_objectives
from aligned_mllm.training.model import AlignedModel
from aligned_mllm.training.run_folder import last_checkpoint, mark_whole, remove_leftovers, require_whole


def refused(function, *arguments, **keywords) -> str:
    "The message of an InputError, which has one line."
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [b'{"seed": \xff}', b"", b"[" * 100_000, b"[1]", b"null", b"{}"])
def test_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in refused(load_json, tmp_path / "config.json", needs=("seed",))


def test_a_checkpoint_with_a_changed_file(tmp_path, capsys):
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "inner").mkdir(parents=True)
        for name in ("optimizer.pt", "inner/rng.pt"):
            (checkpoint / name).write_bytes(bytes(range(100)))
        mark_whole(checkpoint, {"step": step})
        require_whole(checkpoint)
    (checkpoint / "inner" / "rng.pt").write_bytes(bytes(range(99)) + b"\0")  # as long as before
    assert "inner/rng.pt is damaged" in refused(require_whole, checkpoint)
    (checkpoint / "inner" / "rng.pt").unlink()
    assert "inner/rng.pt is missing" in refused(require_whole, checkpoint)
    save_json({"step": 1}, tmp_path / "checkpoint-1" / "whole.json")  # a mark without a list of files
    require_whole(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2" / "whole.json").unlink()
    remove_leftovers(tmp_path)
    assert "checkpoint-2 has no whole.json: it was not written to its end" in capsys.readouterr().out
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    save_json({}, tmp_path / "done.json")
    remove_leftovers(tmp_path)
    assert last_checkpoint(tmp_path) is None and not list(tmp_path.glob("checkpoint-*"))


def test_rows_of_features(tmp_path):
    path = tmp_path / "layer.npy"
    np.save(path, np.ones((3, 2), "float32"))
    whole = path.read_bytes()
    assert mapped_rows(path, 3, "float32").shape == (3, 2)
    assert "layer.npy" in refused(mapped_rows, path, 4, "float32")
    assert "layer.npy" in refused(mapped_rows, path, 3, "float16")
    other_header = whole.replace(b"fortran", b"f\0rtran")
    for content in (b"", whole[:40], whole[:-1], whole + b"\0", other_header, b"{}"):
        path.write_bytes(content)
        assert "layer.npy" in refused(mapped_rows, path, 3, "float32")


def test_a_png_with_a_wrong_checksum():
    "Pillow alone decodes it without a word."
    picture = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(picture, "PNG")
    content = picture.getvalue()
    assert rgb_image(io.BytesIO(content), "row 3").size == (40, 40)
    at = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[at - 4 : at])
    code = struct.pack(">I", zlib.crc32(content[at : at + 4 + length]) ^ 1)
    wrong = content[: at + 4 + length] + code + content[at + 8 + length :]
    assert Image.open(io.BytesIO(wrong)).convert("RGB").size == (40, 40)
    assert refused(rgb_image, io.BytesIO(wrong), "row 3").startswith("row 3: ")


def test_a_parquet_file_with_damaged_pages(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "left"}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"messages": [turns] * 9}), path)
    content = path.read_bytes()
    assert len(open_records(path)) == 9
    for start in (4, 40, len(content) - 60):
        path.write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])
        assert "rows.parquet" in refused(open_records, path)


def test_files_of_a_model_that_transformers_passes_over(tmp_path):
    model, processor = tiny("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    damages = (("generation_config.json", "{"), ("chat_template.jinja", "{% for message in"))
    for name, content in (*damages, ("chat_template.jinja", "{{ messages }}\0")):
        whole = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert f"{name} cannot be read" in refused(load_model, tmp_path)
        (tmp_path / name).write_text(whole, encoding="utf-8")
    load_model(tmp_path)
    file = tmp_path / "processor_config.json"
    save_json({**load_json(file), "processor_class": "PreTrainedTokenizerFast"}, file)
    assert "Expected: a processor" in refused(load_model, tmp_path)


def test_tables_and_facts_of_a_run(tmp_path):
    for name, needs in NEEDED.items():
        save_json(dict.fromkeys(needs, {}), tmp_path / f"{name}.json")
    save_json({"model_type": "llava"}, tmp_path / "model" / "config.json")
    save_json({"steps": 2, "checksum": "a1", "seconds": 1.0}, tmp_path / "done.json")
    assert "Not scored" in model_card(tmp_path)
    (tmp_path / "scores.csv").touch()  # its scores.json is lost
    assert "has no scores" in refused(model_card, tmp_path)
    (tmp_path / "scores.csv").unlink()
    done = load_json(tmp_path / "done.json")
    save_json(done | {"export": {"update_error": 0.0}}, tmp_path / "done.json")
    assert "done.json lacks 'logits_difference'" in refused(model_card, tmp_path)
    save_json(done, tmp_path / "done.json")
    (tmp_path / "environment.json").write_text("[]", encoding="utf-8")
    assert "environment.json" in refused(model_card, tmp_path)
    for content in (b"", b"step,name,value\n1,loss,0.x\n", b"step,name,v\xffl\n", b"step,name\n1,loss\n"):
        (tmp_path / "curves.csv").write_bytes(content)
        assert "curves.csv" in refused(read_run_curves, [tmp_path], ["a"])


def test_a_teacher_without_the_settings_of_its_pictures(tmp_path):
    model, view = teacher_checks.tiny("dinov2")
    model.save_pretrained(tmp_path)
    view.save_pretrained(tmp_path)
    load_teacher(str(tmp_path))
    for content in (b"{}", b"[1]", b"\xff"):
        (tmp_path / "preprocessor_config.json").write_bytes(content)
        assert f"image processor of {tmp_path}" in refused(load_teacher, str(tmp_path))


def test_exported_objectives(tmp_path):
    model, processor = tiny("llava")
    settings = {"teacher": "dense", "hidden": 8, "layers": [1]}
    context = Context(model, processor)
    objective = objective_class("viral").build(settings_of("viral", settings), context)
    objective.label = "viral"
    objective.in_model = True
    export_objectives(AlignedModel(model, [objective]), tmp_path, {"viral": settings})
    assert checksum(exported_objectives(tmp_path, context)[0]) == checksum(objective)
    weights = tmp_path / "objectives.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], whole.replace(b"viral", b"v_ral"), b""):
        weights.write_bytes(content)
        assert "objectives.safetensors" in refused(exported_objectives, tmp_path, context)
    weights.write_bytes(whole)
    save_json({"viral": settings | {"hidden": 4}}, tmp_path / "objectives.json")
    assert "of another shape" in refused(exported_objectives, tmp_path, context)
    save_json({"v_ral": settings}, tmp_path / "objectives.json")
    assert "objectives.json" in refused(exported_objectives, tmp_path, context)
    (tmp_path / "objectives.json").unlink()
    assert "objectives.json" in refused(exported_objectives, tmp_path, context)


def test_an_adapter_and_a_cache_with_other_settings(tmp_path):
    model, processor = tiny("llava")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    load_model(tmp_path / "adapter")
    settings = load_json(tmp_path / "adapter" / "adapter_config.json")
    save_json(settings | {"target_modules": None}, tmp_path / "adapter" / "adapter_config.json")
    assert "adapter" in refused(load_model, tmp_path / "adapter")
    teacher = load_teacher("dense")
    FeatureCache(tmp_path / "cache", teacher)
    for content in (b"[]", b"null", b"{}", b"\xff"):
        (tmp_path / "cache" / "cache.json").write_bytes(content)
        assert str(tmp_path / "cache") in refused(FeatureCache, tmp_path / "cache", teacher)
