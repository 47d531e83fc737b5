"""Random damage of every kind of file that a user has, for `soak.py`. A damaged file must give the result of
the whole one, or one line that names the file."""

import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import teacher_checks
import torch
import transformers
from PIL import Image
from conftest import data_folder, write_scenes
from tiny_models import tiny
from transformers import TrainerCallback

from aligned_mllm import AlignConfig, AlignTrainer, Viral, load_checkpoint, load_model, open_records
from aligned_mllm.analysis.convergence import read_run_curves
from aligned_mllm.analysis.feature_files import read_features, write_features
from aligned_mllm.core import InputError, checksum
from aligned_mllm.data.collate import Samples
from aligned_mllm.data.encode import encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records
from aligned_mllm.evals.task import score_run
from aligned_mllm.objectives.base import Context, objective_class, settings_of
from aligned_mllm.reporting.model_card import model_card
from aligned_mllm.teachers.cache import FeatureCache
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.training.checkpoint import export_objectives, exported_objectives
from aligned_mllm.training.model import AlignedModel
from aligned_mllm.worlds.scene_data import Sizes

SECONDS = 60  # a case that takes longer hangs


@dataclass
class Place:
    "A folder whose files are damaged one at a time, and how a user reads it."

    folder: Path
    use: Callable[[], object]  # returns what the reader got; compared by its text
    files: list[Path] = field(default_factory=list)  # all files below the folder by default
    names: tuple[str, ...] = ()  # what a message may name instead of the file

    def __post_init__(self):
        self.files = self.files or sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.content = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.whole = digest_of(self.use())
        self.restore()

    def restore(self) -> None:
        "Every file as it was, and no other."
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.content:
                path.unlink()
        for path, content in self.content.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def digest_of(value) -> str:
    "A digest of tensors, arrays, tables and plain values."
    digest = hashlib.sha256()

    def add(item):
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().numpy()
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype} {item.shape}".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, dict):
            for name in sorted(item, key=str):
                add(name)
                add(item[name])
        elif isinstance(item, (list, tuple)):
            digest.update(f"{len(item)} items".encode())
            for each in item:
                add(each)
        else:
            digest.update(item if isinstance(item, bytes) else str(item).encode())

    add(value.to_csv() if isinstance(value, pd.DataFrame) else value)
    return digest.hexdigest()[:16]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def emptied(content: bytes, draw: random.Random) -> bytes:
    return b""


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def overwritten(content: bytes, draw: random.Random) -> bytes:
    "With zeros or with noise, in a range."
    start = draw.randrange(len(content))
    length = draw.randint(1, len(content) - start)
    length = min(length, draw.choice([4, 64, 4096, length]))
    middle = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
    return content[:start] + middle + content[start + length :]


def replaced(content: bytes, draw: random.Random) -> bytes:
    return draw.choice([b"{}", b"[]", b"null", b"some text\n", b"<html>404</html>"])


def removed(content: bytes, draw: random.Random) -> None:
    return None


DAMAGES = {each.__name__: each for each in (cut, flipped, overwritten, emptied, replaced, removed)}
SHARES = [4, 4, 4, 1, 1, 1]  # how often each is drawn


def sound(path: Path, content: bytes) -> bool:
    """Whether a damaged file is still a valid one of the same kind, with other values: nothing inside it
    tells. content: the whole file."""
    found = path.read_bytes() if path.is_file() else b""
    try:
        return bool(found) and SOUND[path.suffix](path, found, content)
    except Exception:  # the reader of the kind refuses it
        return False


def _sound_json(path: Path, found: bytes, content: bytes) -> bool:
    value, before = json.loads(found), json.loads(content)
    may_be_empty = path.name in ("generation_config.json", "objectives.json")
    return type(value) is type(before) and (bool(value) or may_be_empty)


def _sound_lines(path: Path, found: bytes, content: bytes) -> bool:
    "Each line that is there is an object. A file cut at the end of a line is a shorter file."
    return all(isinstance(json.loads(line), dict) for line in found.splitlines() if line.strip())


def _sound_safetensors(path: Path, found: bytes, content: bytes) -> bool:
    "The numbers alone differ."
    header = 8 + struct.unpack("<Q", content[:8])[0]
    return len(found) == len(content) and found[:header] == content[:header]


def _sound_bin(path: Path, found: bytes, content: bytes) -> bool:
    "The same tensors, with other numbers; PyTorch does not compare the checksums in the file."
    before = torch.load(io.BytesIO(content), weights_only=True)
    after = torch.load(io.BytesIO(found), weights_only=True)
    return {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }


def _sound_png(path: Path, found: bytes, content: bytes) -> bool:
    "The checksum of every chunk is right, up to the last."
    at = 8
    while True:
        length, kind = struct.unpack(">I4s", found[at : at + 8])
        (code,) = struct.unpack(">I", found[at + 8 + length : at + 12 + length])
        if zlib.crc32(found[at + 4 : at + 8 + length]) != code:
            return False
        if kind == b"IEND":
            return True
        at += 12 + length


def _sound_jpeg(path: Path, found: bytes, content: bytes) -> bool:
    "JPEG has no checksum: whatever has a beginning and an end may be an image."
    return len(found) == len(content)


def _sound_parquet(path: Path, found: bytes, content: bytes) -> bool:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(found)).num_rows > 0


def _sound_npy(path: Path, found: bytes, content: bytes) -> bool:
    before, after = np.load(io.BytesIO(content)), np.load(io.BytesIO(found))
    return before.shape == after.shape and before.dtype == after.dtype and len(found) == len(content)


def _sound_csv(path: Path, found: bytes, content: bytes) -> bool:
    before, after = pd.read_csv(io.BytesIO(content)), pd.read_csv(io.BytesIO(found))
    return list(before.columns) == list(after.columns)


def _sound_jinja(path: Path, found: bytes, content: bytes) -> bool:
    "A template without its end may be a template, too."
    return b"\0" not in found


SOUND = {
    ".json": _sound_json,
    ".jsonl": _sound_lines,
    ".safetensors": _sound_safetensors,
    ".bin": _sound_bin,
    ".png": _sound_png,
    ".jpg": _sound_jpeg,
    ".parquet": _sound_parquet,
    ".npy": _sound_npy,
    ".csv": _sound_csv,
    ".jinja": _sound_jinja,
}


OPTIONAL = ("generation_config.json",)  # nothing tells that a model once had it


class Hangs(BaseException):
    "The case took too long."


def _too_long(*arguments):
    raise Hangs


def damaged(place: Place, draw: random.Random) -> dict:
    "Damage one file of a place, use it, restore it: file, damage, outcome, message."
    path = draw.choice(place.files)
    content = place.content[path]
    (name,) = draw.choices(list(DAMAGES), SHARES)
    harmed = DAMAGES[name](content, draw) if content else b"{}"
    if harmed is None:
        path.unlink()
    else:
        path.write_bytes(harmed)
    found = {"where": str(path.relative_to(place.folder)), "how": name}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            digest = digest_of(place.use())
        if digest == place.whole:
            return found | {"outcome": "same", "message": ""}
        if harmed is None and path.name in OPTIONAL or sound(path, content):
            return found | {"outcome": "cannot be known", "message": ""}
        return found | {"outcome": "SILENT", "message": "another result"}
    except InputError as error:
        message = str(error)
        known = (path.name, str(place.folder), *place.names)
        fault = "LINES" if "\n" in message else "" if any(each in message for each in known) else "NAMELESS"
        return found | {"outcome": fault or "refused", "message": message}
    except BaseException as error:  # anything else than a refusal is a failure
        if isinstance(error, KeyboardInterrupt):
            raise
        return found | {"outcome": "RAISED", "message": f"{type(error).__name__}: {error}"}
    finally:
        signal.alarm(0)
        place.restore()


def samples_of(source, processor, images=None) -> list[dict]:
    "Every record of a source, encoded."
    samples = Samples(open_records(source, images), processor, cache_mib=0)
    return [samples[index] for index in range(len(samples))]


def record_places(folder: Path) -> dict[str, list[Place]]:
    "Files of records in every form, and pictures."
    import datasets

    data = write_scenes(folder / "data", 0, Sizes(train=4, captions=4, validation=2, test=2))
    processor = tiny("llava")[1]
    records = Records(data / "train.jsonl")
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    llava = [json.loads(line) for line in lines]
    chat = [
        {
            "id": record.id,
            "images": list(record.images),
            "messages": [
                {"role": role, "content": text}
                for turn in record.turns
                for role, text in (("user", turn.question), ("assistant", turn.answer))
            ],
        }
        for record in records
    ]
    forms = folder / "forms"
    forms.mkdir()
    (forms / "llava.json").write_text(json.dumps(llava, indent=1), encoding="utf-8")
    shutil.copy(data / "train.jsonl", forms / "llava.jsonl")
    (forms / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)), encoding="utf-8")
    rows = [{**row, "images": [str(data / name) for name in row["images"]]} for row in chat]
    table = datasets.Dataset.from_list(rows).cast_column("images", [datasets.Image()])
    pictures = [{**row, "images": [records.image(name) for name in row["images"]]} for row in chat]
    datasets.Dataset.from_list(pictures, features=table.features).to_parquet(forms / "rows.parquet")
    found = []
    for path in sorted(forms.iterdir()):
        place = folder / path.stem.replace(".", "_") / path.suffix[1:]
        place.mkdir(parents=True)
        shutil.copy(path, place)
        use = (lambda file: lambda: samples_of(file, processor, data))(place / path.name)
        found.append(Place(place, use))
    return {"records": found, "pictures": [picture_place(folder, records, processor)]}


def picture_place(folder: Path, records: Records, processor) -> Place:
    "Pictures as PNG and JPEG, small and large."
    place = folder / "pictures"
    place.mkdir()
    first = records.image(records[0].images[0])
    rows = []
    for number, (side, end) in enumerate([(40, "png"), (300, "png"), (40, "jpg"), (300, "jpg")]):
        image = first.resize((side, side))
        image.save(place / f"{number}.{end}")
        turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "left"}]
        rows.append({"id": str(number), "image": f"{number}.{end}", "conversations": turns})
    source = folder / "pictures.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    return Place(place, lambda: samples_of(source, processor, place))


def read_model(folder: Path) -> list:
    "Weights and settings of a model folder, and how its processor encodes."
    model, processor = load_model(folder)
    pixels = torch.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).byte().numpy()
    record = Record("1", ("1",), (Turn("<image>\nwhat is it", "left", ""),))
    generation = model.generation_config.to_diff_dict()
    encoded = encode(record, [Image.fromarray(pixels)], processor)
    return [checksum(model), model.config.to_dict(), generation, encoded]


def model_places(folder: Path) -> dict[str, list[Place]]:
    "A model folder with safetensors in one file and in several, with older files, and an adapter."
    from peft import LoraConfig, get_peft_model

    model, processor = tiny("llava")
    model.generation_config.max_new_tokens = 7
    kinds = {"one": {}, "shards": {"max_shard_size": "200KB"}, "older": {}}
    for name, options in kinds.items():
        model.save_pretrained(folder / name, **options)
        processor.save_pretrained(folder / name)
    (folder / "older" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "older" / "pytorch_model.bin")
    wrapped = get_peft_model(load_model(folder / "one")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            value.data += 1
    wrapped.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    readers = {name: (lambda name: lambda: read_model(folder / name))(name) for name in [*kinds, "adapter"]}
    parts = ("chat template", "the processor")  # of a sample that cannot be encoded
    return {
        "models": [Place(folder / name, readers[name], names=parts) for name in kinds],
        "adapters": [Place(folder / "adapter", readers["adapter"])],
    }


def teacher_places(folder: Path) -> dict[str, list[Place]]:
    "Folders of teachers."
    places = []
    for name in ("dinov2", "siglip_vision_model"):
        model, view = teacher_checks.tiny(name)
        model.save_pretrained(folder / name)
        view.save_pretrained(folder / name)
        places.append(Place(folder / name, (lambda name: lambda: features_of(folder / name))(name)))
    return {"teachers": places}


def features_of(folder: Path) -> list:
    "The features of one picture by the teacher in a folder."
    teacher = load_teacher(str(folder))
    picture = Image.linear_gradient("L").convert("RGB")
    with torch.inference_mode():
        return [teacher.checksum, teacher.features([teacher.pixels_of_view(picture, (0, 0, 1, 1), (3, 3))])]


def objective_places(folder: Path) -> dict[str, list[Place]]:
    "Objectives that were exported with a model."
    model, processor = tiny("llava")
    context = Context(model, processor, parts=str(data_folder() / "parts"))
    settings = {"teacher": "dense", "hidden": 8, "layers": [1]}
    objective = objective_class("viral").build(settings_of("viral", settings), context)
    objective.label = "viral"
    objective.in_model = True
    exported = folder / "exported"
    exported.mkdir()
    export_objectives(AlignedModel(model, [objective]), exported, {"viral": settings})

    def read() -> list:
        found = exported_objectives(exported, context)
        return [[each.label, each.layers, each.weight, checksum(each)] for each in found]

    return {"objectives": [Place(exported, read)]}


def cache_places(folder: Path) -> dict[str, list[Place]]:
    "A feature cache, and feature files."
    data = write_scenes(folder / "data", 0, Sizes(train=4, captions=4, validation=2, test=2))
    images = sorted((data / "images").glob("train*.png"))
    teacher = load_teacher("dense", parts=str(data_folder() / "parts"))
    records = Records(data / "train.jsonl")

    def cached() -> list:
        cache = FeatureCache(folder / "cache", teacher)
        found = []
        for number, path in enumerate(images):
            features = cache.get(path, (0, 0, 1, 1), (3, 3))
            if features is None:  # computed again
                features = torch.arange(90.0).reshape(9, 10) + number
                cache.put(path, (0, 0, 1, 1), (3, 3), features)
            found.append(features)
        return found

    loaded = load_checkpoint_of(folder)
    pictures = [records.image(name) for record in records[:2] for name in record.images][:2]

    def written() -> dict:
        place = folder / "features"
        write_features(loaded, pictures, place, layers=[0, 2], batch_size=1)
        return {
            name: [each.states(0), each.states(2), each.reference("encoder"), each.index.to_csv()]
            for name, each in read_features(place).items()
        }

    def read() -> dict:
        return {
            name: [each.states(0), each.states(2), each.reference("encoder"), each.index.to_csv()]
            for name, each in read_features(folder / "features").items()
        }

    cached()
    written()
    features = [path for path in (folder / "features").rglob("*") if path.is_file() and path.name != "lock"]
    return {
        "caches": [Place(folder / "cache", cached)],
        "feature files": [Place(folder / "features", use, features) for use in (read, written)],
    }


def load_checkpoint_of(folder: Path):
    "A tiny model, saved and loaded."
    model, processor = tiny("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return load_checkpoint(folder / "model", "tiny")


class Stopped(Exception):
    "The run ends here."


class StopAfter(TrainerCallback):
    "Stops a run once a checkpoint is whole."

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **keywords):
        if state.global_step == self.step:
            raise Stopped


def trainer_in(run: Path, data: Path, lora: int, callbacks=()) -> AlignTrainer:
    model, processor = tiny("llava")
    args = AlignConfig(
        str(run),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        save_steps=1,
        lora_rank=lora,
        use_cpu=True,
        disable_tqdm=True,
        data=str(data),
    )
    terms = [Viral(teacher="dense", hidden=8)]
    source = data / "train.jsonl"
    return AlignTrainer(model, args, source, terms, processing_class=processor, callbacks=[*callbacks])


def resumed(run: Path, data: Path, lora: int) -> list:
    "Train on from the checkpoint: the exported weights and the curves."
    trainer_in(run, data, lora).train()
    curves = (run / "curves.csv").read_text(encoding="utf-8")
    return [json.loads((run / "done.json").read_text(encoding="utf-8"))["checksum"], curves]


def run_places(folder: Path) -> dict[str, list[Place]]:
    "Stopped runs with a checkpoint, and finished ones."
    data = write_scenes(folder / "data", 0, Sizes(train=8, captions=4, validation=2, test=4))
    found = {"checkpoints": [], "runs": []}
    for name, lora in (("whole", 0), ("lora", 2)):
        run = folder / name
        with contextlib.suppress(Stopped):
            trainer_in(run, data, lora, [StopAfter(2)]).train()
        shutil.rmtree(run / "checkpoint-1")
        files = [path for path in (run / "checkpoint-2").rglob("*") if path.is_file()]
        files += [run / "config.json", run / "environment.json"]
        use = (lambda run, lora: lambda: resumed(run, data, lora))(run, lora)
        found["checkpoints"].append(Place(run, use, sorted(files), ("checkpoint-2",)))
        done = folder / f"done_{name}"
        trainer_in(done, data, lora).train()
        score_run(done, data)
        found["runs"].append(Place(done, (lambda done: lambda: read_run(done))(done), plain_files(done)))
    return found


def plain_files(run: Path) -> list[Path]:
    "The files beside the model that `card` and the curves read."
    return sorted(path for path in run.iterdir() if path.is_file() and path.name != "lock")


def read_run(run: Path) -> list:
    "The model card and the curves of a finished run."
    return [model_card(run), read_run_curves([run], ["a"]).to_csv()]


PLACES = {  # how many cases of each kind, in 100, and what makes its places
    "records": (26, record_places),
    "pictures": (17, record_places),
    "models": (14, model_places),
    "adapters": (6, model_places),
    "teachers": (6, teacher_places),
    "objectives": (3, objective_places),
    "caches": (8, cache_places),
    "feature files": (8, cache_places),
    "checkpoints": (7, run_places),
    "runs": (5, run_places),
}


def quiet() -> None:
    "No progress bars and no reports of transformers in this process."
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def places_in(folder: Path) -> dict[str, list[Place]]:
    "All places, made below a folder."
    found = {}
    for make in dict.fromkeys(make for _, make in PLACES.values()):
        below = folder / make.__name__
        below.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found |= make(below)
    return found


def kind_of(number: int) -> str:
    "The kind of the n-th case: the kinds take turns by their shares."
    at = number * 37 % 100
    for kind, (share, _) in PLACES.items():
        if at < share:
            return kind
        at -= share
    raise AssertionError("the shares are 100 together")


def case(places: dict[str, list[Place]], seed: int, number: int) -> dict:
    "One case, the same for the same seed and number."
    draw = random.Random(f"damage {seed} {number}")
    kind = kind_of(number)
    return {"kind": kind, **damaged(draw.choice(places[kind]), draw)}
