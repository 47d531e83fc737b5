"""Runs that are killed at random points and resumed, for `soak.py`: each must end as an unbroken one. A
process is killed by SIGKILL, so that it has no chance to clean up."""

import builtins
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import peft
import safetensors.torch
import torch
import transformers
from conftest import ENVIRONMENT, FORKS, free_port, into_file, write_scenes
from tiny_models import tiny
from transformers import TrainerCallback

from aligned_mllm import AlignConfig, AlignTrainer, Viral
from aligned_mllm.core import InputError
from aligned_mllm.worlds.scene_data import Sizes

SAMPLES = 7  # the last of four steps of an epoch has one sample: nothing is left for a second process
SECONDS = 120  # a start that takes longer hangs
FILE_OPERATIONS = ("mkdir", "replace", "unlink", "rmdir", "fsync")
WRITERS = [  # of large files, which a kill leaves half written
    (torch, "save"),
    (safetensors.torch, "save_file"),
    (transformers.modeling_utils, "safe_save_file"),
    (peft.peft_model, "safe_save_file"),
]
# functions in which an operation counts as one inside saving, rotating, evaluating or exporting
PHASES = {
    "remove_older": "rotating",
    "mark_whole": "saving",
    "_save_checkpoint": "saving",
    "evaluate": "evaluating",
    "finish": "exporting",
    "remove_leftovers": "clearing up",
    "claim_folder": "starting",
}
POINTS = ("step", "training", "evaluating", "saving", "rotating", "exporting", "files", "time")


def cells(seed: int) -> list[dict]:
    "Kinds of runs: every sampler on one process and two, with LoRA and whole, each with two other draws."
    draw = random.Random(f"cells {seed}")
    found = []
    for strategy, processes, lora in itertools.product(
        ("random", "sequential", "group_by_length"), (1, 2), (0, 2)
    ):
        limits = draw.sample([None, 1, 2], 2)
        for dropout, limit in zip(draw.sample([0.0, 0.2], 2), limits):
            found.append(
                {
                    "strategy": strategy,
                    "processes": processes,
                    "lora": lora,
                    "dropout": dropout,
                    "limit": limit,
                    "evaluation": draw.random() < 0.7,
                    "save_steps": draw.choice([2, 3]),
                    "accumulation": draw.choice([1, 2]) if processes == 1 else 1,
                }
            )
    return found


def data_in(folder: Path) -> Path:
    "Drawn scenes to train on."
    sizes = Sizes(train=SAMPLES, captions=4, validation=2, test=2)
    return folder / "data" if (folder / "data").is_dir() else write_scenes(folder / "data", 0, sizes)


def trainer_in(run: Path, data: Path, cell: dict, callbacks=()) -> AlignTrainer:
    "The trainer of a run of eight steps in two epochs."
    model, processor = tiny("llava")
    model.config.text_config.attention_dropout = 0.0 if cell["lora"] else cell["dropout"]
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = model.config.text_config.attention_dropout
    together = cell["processes"] * cell["accumulation"]
    args = AlignConfig(
        str(run),
        per_device_train_batch_size=2 // together,
        gradient_accumulation_steps=cell["accumulation"],
        num_train_epochs=2,
        first_records=SAMPLES,
        learning_rate=1e-3,
        logging_steps=cell["save_steps"],
        save_steps=cell["save_steps"],
        save_total_limit=cell["limit"],
        train_sampling_strategy=cell["strategy"],
        eval_strategy="steps" if cell["evaluation"] else "no",
        eval_steps=2,
        lora_rank=cell["lora"],
        lora_dropout=cell["dropout"] if cell["lora"] else 0.0,
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    source = data / "train.jsonl"
    terms = [Viral(teacher="dense", hidden=8)]
    questions = data / "test.jsonl" if cell["evaluation"] else None
    return AlignTrainer(
        model, args, source, terms, questions, processing_class=processor, callbacks=[*callbacks]
    )


class Watch(TrainerCallback):
    "Counts the points of a run at which it may be killed, and kills at one of them."

    def __init__(self, point: str = "", count: int = -1):
        self.point = point
        self.count = count
        self.seen = {}

    def at(self, point: str, last=lambda: None) -> None:
        """One more point of this kind; it, and what would follow, does not happen if it is the chosen one.
        last: what happens before the end."""
        if point == self.point and self.seen.get(point, 0) == self.count:
            last()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[point] = self.seen.get(point, 0) + 1

    def on_step_begin(self, *arguments, **keywords):
        self.at("step")

    def on_pre_optimizer_step(self, *arguments, **keywords):
        self.at("step")

    def on_optimizer_step(self, *arguments, **keywords):
        self.at("step")

    def on_step_end(self, *arguments, **keywords):
        self.at("step")

    def forward(self, module, arguments) -> None:
        self.at("training" if module.training else "evaluating")

    def file_operation(self, last=lambda: None) -> None:
        "The innermost function that has a phase decides."
        frame = sys._getframe(2)
        phase = None
        while frame and not phase:
            phase = PHASES.get(frame.f_code.co_name)
            frame = frame.f_back
        self.at("files", last)
        if phase in POINTS:
            self.at(phase, last)

    def follow_files(self) -> None:
        "From now on count operations on files in this process."

        def counted(operation):
            def wrapped(*arguments, **keywords):
                self.file_operation()
                return operation(*arguments, **keywords)

            return wrapped

        def opened(operation):
            def wrapped(file, mode="r", *arguments, **keywords):
                if isinstance(file, int) or not set(mode) & set("wax+"):
                    return operation(file, mode, *arguments, **keywords)
                self.file_operation()
                handle = operation(file, mode, *arguments, **keywords)
                self.file_operation()  # it is there, and empty
                return handle

            return wrapped

        def half_written(operation):
            def wrapped(value, path, *arguments, **keywords):
                def half():
                    operation(value, path, *arguments, **keywords)
                    os.truncate(path, os.path.getsize(path) // 2)

                if isinstance(path, (str, Path)):
                    self.file_operation(half)
                return operation(value, path, *arguments, **keywords)

            return wrapped

        for name in FILE_OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = opened(builtins.open)
        for module, name in WRITERS:
            setattr(module, name, half_written(getattr(module, name)))


def train_once(run: Path, data: Path, cell: dict, rank: int, port: int, point: str, count: int) -> None:
    "One process of one start of a run, perhaps killed; exit status 0 if the run is done."
    os.environ.update(ENVIRONMENT)
    if cell["processes"] > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(cell["processes"]), "LOCAL_RANK": str(rank)}
    into_file(run.parent / f"{run.name}.log")
    torch.set_num_threads(1)
    watch = Watch(point, count)
    trainer = trainer_in(run, data, cell, [watch])
    trainer.model.register_forward_pre_hook(watch.forward)
    watch.follow_files()
    try:
        trainer.train()
    except InputError as error:
        if "holds a finished run" not in str(error):
            raise
        print(error, flush=True)
    seen = json.dumps(watch.seen)
    (run.parent / f"{run.name}.{rank}.seen").write_text(seen, encoding="utf-8")
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)


def start(run: Path, data: Path, cell: dict, kill: dict | None = None) -> tuple[list[int], float]:
    "One start of a run: exit statuses of its processes, and the seconds that it took."
    kill = kill or {}
    begin = time.perf_counter()
    processes = []
    port = free_port()
    for rank in range(cell["processes"]):
        own = (kill["point"], kill["count"]) if kill and kill["rank"] == rank else ("", -1)
        process = FORKS.Process(target=train_once, args=(run, data, cell, rank, port, *own))
        process.start()
        processes.append(process)
    while any(process.exitcode is None for process in processes):
        after = time.perf_counter() - begin
        if any(process.exitcode for process in processes) or after > SECONDS:
            time.sleep(kill.get("delay", 0))
            for process in processes:  # as a launcher does
                process.kill()
        if kill.get("point") == "time" and after > kill["seconds"]:
            processes[kill["rank"]].kill()
        processes[0].join(0.01)
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    return [process.exitcode for process in processes], seconds


def result_of(run: Path) -> dict:
    "What a finished run has left: contents, and names."
    done = json.loads((run / "done.json").read_text(encoding="utf-8"))
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    weights = [run / "objectives.safetensors", *sorted((run / "model").glob("*.safetensors"))]
    return {
        "checksum": done["checksum"],
        "steps": done["steps"],
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights],
        "curves": (run / "curves.csv").read_text(encoding="utf-8"),
        "files": files,
    }


def seen_in(run: Path, rank: int) -> dict:
    return json.loads((run.parent / f"{run.name}.{rank}.seen").read_text(encoding="utf-8"))


def reference(folder: Path, cell: dict, number: int) -> dict:
    "An unbroken run of a cell: its result, its points, its seconds. Made once, and kept in a file."
    path = folder / f"cell{number}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    run = folder / f"cell{number}"
    shutil.rmtree(run, ignore_errors=True)
    status, seconds = start(run, data_in(folder), cell)
    assert not any(status), f"cell {number} {cell} has failed:\n{(folder / f'{run.name}.log').read_text()}"
    seen = [seen_in(run, rank) for rank in range(cell["processes"])]
    found = {"result": result_of(run), "seen": seen, "seconds": seconds}
    path.write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(run)
    return found


def drawn_kill(draw: random.Random, cell: dict, whole: dict, part: int) -> dict:
    "Where the n-th start is killed; later ones have less to do."
    rank = draw.randrange(cell["processes"])
    seen = whole["seen"][rank]
    point = draw.choice([point for point in POINTS if point == "time" or seen.get(point)])
    kill = {"point": point, "rank": rank, "delay": draw.choice([0, 0, 0.05, 0.3])}
    if point == "time":
        return kill | {"count": -1, "seconds": draw.uniform(0.2, 0.8) * whole["seconds"]}
    return kill | {"count": draw.randrange(-(-seen[point] // part))}


def case(folder: Path, seed: int, number: int) -> dict:
    "One case, the same for the same seed and number, but for kills by the clock."
    draw = random.Random(f"kill {seed} {number}")
    every = cells(seed)
    at = number % len(every)
    cell = every[at]
    whole = reference(folder, cell, at)
    run = folder / f"run{number}"
    data = data_in(folder)
    log = folder / f"{run.name}.log"
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    kills = [drawn_kill(draw, cell, whole, part) for part in range(1, draw.choice([2, 2, 2, 3, 4]))]
    fault = ""
    hit = 0
    for kill in [*kills, None]:
        status, seconds = start(run, data, cell, kill)
        died = -signal.SIGKILL in status
        hit += died
        if any(status) and not died:  # what is left of a killed pair fails as well
            fault = f"exit statuses {status}"
        if kill is None and (died or seconds > SECONDS):
            fault = f"exit statuses {status} after {seconds:.0f} s"
        if fault:
            break
    fault = fault or difference(run, whole["result"])
    words = ", ".join(f"{kill['point']} {kill['count']} of rank {kill['rank']}" for kill in kills)
    kind = f"{cell['processes']} process{'es' * (cell['processes'] - 1)}"
    found = {"kind": f"{kind}, {describe(cell)}", "how": kills[0]["point"], "kills": hit, "where": words}
    if fault:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return found | {"outcome": "LOST", "message": f"{fault}; {' '.join(tail)[:300]}"}
    shutil.rmtree(run)
    for path in folder.glob(f"{run.name}.*"):
        path.unlink()
    return found | {"outcome": "equal", "message": ""}


def describe(cell: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell.items() if name != "processes")


def difference(run: Path, whole: dict) -> str:
    "How a finished run differs from the unbroken one; empty if it does not."
    if not (run / "done.json").is_file():
        return "no done.json"
    found = result_of(run)
    if found["files"] != whole["files"]:
        more = sorted(set(found["files"]) ^ set(whole["files"]))
        return f"other files: {more[:6]}"
    return ", ".join(f"another {name}" for name in whole if found[name] != whole[name])
