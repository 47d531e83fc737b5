"""The model for lmms-eval: against a small base class of the same form, and, where the package is installed,
against lmms-eval itself, by its command line and in memory; prediction files in VLMEvalKit's form."""

import json
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT
from PIL import Image
from test_score import NOUNS, drawn
from tiny_models import tiny

from aligned_mllm.cli import main
from aligned_mllm.core import InputError
from aligned_mllm.evals import lmms_adapter
from aligned_mllm.evals.asking import answer_batches
from aligned_mllm.evals.benchmark import BenchmarkQuestion, benchmark_named
from aligned_mllm.reporting.score import score
from aligned_mllm.reporting.vlmevalkit import prediction_tables

COUNT = 12
TOKENS = 5


class SmallBase(ABC):
    "What the adapter relies on: lmms_eval.api.model.lmms of lmms-eval 0.7.3, in short."

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, text, more):
        given = dict(part.split("=", 1) for part in text.split(","))
        return cls(**given, **{name: value for name, value in more.items() if value is not None})

    def clean(self):
        for name in [name for name, value in vars(self).items() if isinstance(value, torch.nn.Module)]:
            delattr(self, name)


@pytest.fixture
def small_base(monkeypatch):
    "The adapter's class over it, as if lmms-eval were installed."
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = SmallBase
    sys.modules["lmms_eval.api.instance"].GenerationResult = lambda text: SimpleNamespace(text=text)
    monkeypatch.setattr(lmms_adapter, "find_spec", lambda name: name == "lmms_eval")
    lmms_adapter.lmms_model_class.cache_clear()
    yield lmms_adapter.lmms_model_class()
    lmms_adapter.lmms_model_class.cache_clear()


def random_llava():
    "A tiny LLaVA that answers in letters, differently to most questions, and its processor."
    model, processor = tiny("llava")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    tokenizer, head = processor.tokenizer, model.get_output_embeddings().weight
    texts = [tokenizer.decode([token]).strip() for token in range(len(head))]
    spoken = [text.isascii() and text.isalpha() for text in texts]
    head.data[~torch.tensor(spoken)] = 0
    return model.eval(), processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    for part in random_llava():
        part.save_pretrained(folder)
    return folder


def texts() -> list[str]:
    return [f"Is there a {NOUNS[number % 4]} in the image?" for number in range(COUNT)]


def pictures(document) -> list:
    return [drawn(document["number"])]


def requests_for(second, numbers=range(COUNT), visuals=pictures) -> list:
    "Requests for documents, as lmms-eval makes them; second: settings, or a target."
    return [SimpleNamespace(args=(texts()[n], second, visuals, n, "drawn", "test")) for n in numbers]


def with_documents(lmms):
    lmms.task_dict = {"drawn": {"test": [{"number": number} for number in range(COUNT)]}}
    return lmms


def pairs_of(lmms, requests) -> list[tuple[float, bool]]:
    "Losses, and whether the targets are the likeliest, out of their envelopes."
    return [each.text for each in lmms.loglikelihood(requests)]


def by_score(model, processor, tmp_path, **settings) -> list[dict]:
    "Rows of answers to the same questions as `aligned-mllm score` finds them."
    questions = []
    for number, text in enumerate(texts()):
        drawn(number).save(tmp_path / f"{number}.png")
        questions.append(
            BenchmarkQuestion(str(number), (tmp_path / f"{number}.png",), text, choices=("Yes", "No"))
        )
    rows = {
        row["id"]: row for batch in answer_batches(model, processor, questions, **settings) for row in batch
    }
    return [rows[each.id] for each in questions]


def test_answers_are_those_of_score_in_any_batch(small_base, tmp_path):
    model, processor = random_llava()
    expected = [row["answer"] for row in by_score(model, processor, tmp_path, max_new_tokens=TOKENS)]
    assert len(set(expected)) > 3
    settings = {"max_new_tokens": TOKENS, "until": []}
    for batch_size in (1, 8):
        lmms = with_documents(small_base(model, processor, batch_size))
        assert lmms.generate_until(requests_for(settings)) == expected
    lmms.clean()
    model.train()
    model.model.vision_tower.eval()
    assert lmms.generate_until(requests_for(settings)) == expected, "usable as before"
    assert model.training and not model.model.vision_tower.training


def test_until_and_the_longest_answer(small_base):
    lmms = with_documents(small_base(*random_llava(), 8))
    long, short = (lmms.generate_until(requests_for({"max_new_tokens": n})) for n in (8, 2))
    assert all(text.startswith(begin) for text, begin in zip(long, short)) and long != short
    mixed = requests_for({"max_new_tokens": 8})[:6] + requests_for({"max_gen_toks": 2})[6:]
    assert lmms.generate_until(mixed) == long[:6] + short[6:], "each with its own limit, in their order"
    stops = [long[0][3:5], long[1][4:6]]
    for until in (stops, stops[0]):
        cut = lmms.generate_until(requests_for({"max_new_tokens": 8, "until": until}))
        for text, whole in zip(cut, long):
            ends = [whole.find(stop) for stop in ([until] if isinstance(until, str) else until)]
            assert text == whole[: min([end for end in ends if end >= 0], default=None)].strip()
        assert cut != long


def test_losses_choose_what_score_chooses(small_base, tmp_path):
    model, processor = random_llava()
    rows = by_score(model, processor, tmp_path, way="likelihood_per_token")
    lmms = with_documents(small_base(model, processor, 8))
    pairs = requests_for(" Yes"), requests_for(lambda document: "No")
    losses = [[loss for loss, _ in pairs_of(lmms, part)] for part in pairs]
    for row, *mine in zip(rows, *losses):
        assert mine == pytest.approx([-value for value in row["log_likelihoods"]], abs=1e-4)
        assert row["answer"] == ("Yes", "No")[mine.index(min(mine))]
    processor.chat_template = processor.chat_template.replace("part['text'] + ' '", "part['text']")
    begun = lmms.generate_until(requests_for({"max_new_tokens": 1}))
    greedy = [pairs_of(lmms, requests_for(text, [number]))[0][1] for number, text in enumerate(begun)]
    assert sum(greedy) > COUNT / 2, (
        "what greedy decoding gives; a token with a space before it does not count"
    )
    assert not any(best for _, best in pairs_of(lmms, requests_for("tower")))
    with pytest.raises(InputError, match="document 4: an empty target"):
        lmms.loglikelihood(requests_for(" ", [4]))


def test_rounds_end_when_the_task_ends_them(small_base):
    lmms = with_documents(small_base(*random_llava(), 8))
    seen = []

    def following(document, previous_output, round_idx, previous_round_info):
        seen.append((document["number"], round_idx, previous_round_info))
        ended = round_idx > document["number"] % 3
        return pictures(document), f"{previous_output[-1]} what", ended, previous_output, round_idx

    args = [(*each.args[:3], following, *each.args[3:]) for each in requests_for({"max_new_tokens": 3})]
    answers = lmms.generate_until_multi_round([SimpleNamespace(args=each) for each in args])
    assert [len(each) for each in answers] == [number % 3 + 1 for number in range(COUNT)]
    assert [each[0] for each in answers] == lmms.generate_until(requests_for({"max_new_tokens": 3}))
    assert [each for each in seen if each[0] == 2] == [(2, 1, None), (2, 2, 1), (2, 3, 2)]


def test_no_exception_becomes_an_answer(small_base, monkeypatch):
    model, processor = random_llava()
    lmms = with_documents(small_base(model, processor, 4))

    def odd(document):
        "Document 7 lacks its picture, document 3 is a film, document 5 far too narrow."
        found = {
            7: lambda: document["picture"],
            3: lambda: ["film.mp4"],
            5: lambda: [Image.new("RGB", (900, 2))],
        }
        return found.get(document["number"], lambda: pictures(document))()

    for number, fault in ((7, "KeyError: 'picture'"), (3, "a visual of type str"), (5, "900 x 2 pixels")):
        numbers = [0, 1, 2, number]
        with pytest.raises(InputError, match=f"task drawn, split test, document {number}: .*{fault}"):
            lmms.generate_until(requests_for({"max_new_tokens": 2}, numbers, odd))
        with pytest.raises(InputError, match=f"document {number}: "):
            lmms.loglikelihood(requests_for("Yes", numbers, odd))
    whole = model.generate

    def failing(**inputs):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("out of memory")
        return whole(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    with pytest.raises(InputError, match="and 3 with it: RuntimeError: out of memory.*smaller batch_size"):
        lmms.generate_until(requests_for({"max_new_tokens": 2}))


def test_what_it_can_not_do_is_told(small_base, checkpoint, capsys):
    lmms = with_documents(small_base(*random_llava(), 8))
    lmms.generate_until(requests_for({"max_new_tokens": 1, "temperature": 0.7}))
    lmms.generate_until(
        requests_for({"max_new_tokens": 1, "do_sample": False, "temperature": 0, "num_beams": 1})
    )
    assert capsys.readouterr().out == "NOTE: task drawn asks for sampling; the answers are greedy\n"
    with pytest.raises(InputError, match="batch_size 'auto'"):
        small_base(checkpoint, batch_size="auto")
    with pytest.raises(InputError, match="dtype 'half a byte'"):
        small_base(checkpoint, dtype="half a byte")
    with pytest.raises(InputError, match="no model in"):
        small_base(checkpoint / "nowhere")
    with pytest.raises(InputError, match="a PosixPath with a LlavaProcessor"):
        small_base(checkpoint, random_llava()[1])


def test_a_checkpoint_and_an_adapter_are_loaded_by_name(small_base, checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    from aligned_mllm.models.load import load_model, save_adapter

    settings = {"max_new_tokens": TOKENS}
    more = {"batch_size": "8", "max_batch_size": None, "device": None}
    lmms = with_documents(small_base.create_from_arg_string(f"pretrained={checkpoint}", more))
    assert lmms.device.type == ("cuda" if torch.cuda.is_available() else "cpu") and lmms.batch_size == 8
    plain = lmms.generate_until(requests_for(settings))
    model, processor = load_model(checkpoint)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_adapter(wrapped, processor, tmp_path / "adapter", str(checkpoint))
    lmms = with_documents(small_base.create_from_arg_string(f"pretrained={tmp_path / 'adapter'}", more))
    assert lmms.generate_until(requests_for(settings)) != plain


def test_without_the_package_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(lmms_adapter, "find_spec", lambda name: None)
    lmms_adapter.lmms_model_class.cache_clear()
    for ask in (lmms_adapter.lmms_model_class, lambda: lmms_adapter.AlignedMLLM):
        with pytest.raises(InputError, match=r"pip install -e '.\[lmms\]'"):
            ask()
    with pytest.raises(AttributeError):
        lmms_adapter.AlignedLLM


needs_lmms_eval = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms_eval not installed: pip install -e '.[lmms]'"
)
TASK = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: {text}
"""
ENDS = {
    "drawn_generate": """doc_to_target: "{{label}}"
generation_kwargs:
  max_new_tokens: 5
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    "drawn_choose": """doc_to_target: "{{['Yes', 'No'].index(label)}}"
doc_to_choice: ["Yes", "No"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "drawn_rounds": """doc_to_target: "{{label}}"
generation_kwargs:
  max_new_tokens: 5
process_results: !function utils.count
metric_list:
  - metric: rounds
    aggregation: mean
    higher_is_better: true
""",
}
KINDS = {
    "drawn_generate": "generate_until",
    "drawn_choose": "multiple_choice",
    "drawn_rounds": "generate_until_multi_round",
}
UTILS = """def pictures(document):
    if document["question"].startswith("FAIL"):
        raise OSError("no such picture")
    return [document["image"].convert("RGB")]


def rounds(document, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, **more):
    if round_idx is None:
        return document["question"]
    ended = round_idx == (2 if document["label"] == "Yes" else 3)
    return pictures(document), previous_output[-1] + " what", ended, previous_output, None


def count(document, results):
    return {"rounds": len(results[0])}
"""


@pytest.fixture(scope="module")
def local_questions(tmp_path_factory):
    "The questions in the form of POPE's files, for score."
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, text in enumerate(texts()):
        drawn(number).save(folder / f"{number}.png")
        line = {"question_id": number, "image": f"{number}.png", "text": text}
        lines.append(json.dumps({**line, "label": ("Yes", "No")[number // 2 % 2]}))
    (folder / "coco_pope_random.json").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    "Tasks of lmms-eval on a Parquet file, and those with a document that fails."
    import io

    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, text in enumerate(texts()):
        content = io.BytesIO()
        drawn(number).save(content, "PNG")
        rows.append({"question": text, "label": ("Yes", "No")[number // 2 % 2], "image": content.getvalue()})
    features = datasets.Features(
        {"question": datasets.Value("string"), "label": datasets.Value("string"), "image": datasets.Image()}
    )
    for file in ("drawn", "broken"):
        rows[5]["question"] = ("FAIL" if file == "broken" else "") + texts()[5]
        made = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        datasets.Dataset.from_list(made, features).to_parquet(folder / f"{file}.parquet")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    for name, kind in KINDS.items():
        text = "!function utils.rounds" if name == "drawn_rounds" else '"{{question}}"'
        for file in ("drawn", "broken"):
            facts = {"name": name.replace("drawn", file), "data": folder / f"{file}.parquet", "kind": kind}
            task = TASK.format(**facts, text=text) + ENDS[name]
            (folder / f"{file}_{kind}.yaml").write_text(task, encoding="utf-8")
    return folder


def evaluated(lmms, folder, task: str) -> dict:
    "What lmms-eval returns."
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="aligned_mllm")
    return simple_evaluate(
        model=lmms, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0
    )


def answer_in(sample: dict) -> str:
    "The answer in what lmms-eval has kept of a document."
    (answer,) = (
        sample["filtered_resps"] if isinstance(sample["filtered_resps"], list) else [sample["filtered_resps"]]
    )
    return answer


def lmms_eval_command(checkpoint, folder, task: str, output, batch_size: int) -> subprocess.CompletedProcess:
    "`lmms-eval`, as a user types it."
    words = ["--model", "aligned_mllm", "--model_args", f"pretrained={checkpoint}", "--tasks", task]
    words += ["--include_path", str(folder), "--batch_size", str(batch_size), "--log_samples"]
    words += ["--output_path", str(output), "--verbosity", "DEBUG"]
    environment = {**ENVIRONMENT, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "home")}
    command = [sys.executable, "-m", "lmms_eval", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@needs_lmms_eval
def test_lmms_eval_asks_as_score_does(local_tasks, local_questions, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lmms_adapter.lmms_model_class.cache_clear()
    score([checkpoint], ["pope"], local_questions, tmp_path / "scores", max_new_tokens=TOKENS, draws=20)
    kept = tmp_path / "scores" / checkpoint.name / "pope" / "answers.jsonl"
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    expected = {int(row["id"].removeprefix("random-")): row["answer"] for row in rows}
    assert len(expected) == COUNT and len(set(expected.values())) > 3
    model, processor = random_llava()
    for batch_size in (1, 8):
        lmms = lmms_adapter.lmms_model(model, processor, batch_size)
        samples = evaluated(lmms, local_tasks, "drawn_generate")["samples"]["drawn_generate"]
        assert {each["doc_id"]: answer_in(each) for each in samples} == expected
        done = lmms_eval_command(
            checkpoint, local_tasks, "drawn_generate", tmp_path / f"{batch_size}", batch_size
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        path = next((tmp_path / f"{batch_size}").rglob("*samples*drawn_generate*.jsonl"))
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert {each["doc_id"]: answer_in(each) for each in samples} == expected


@needs_lmms_eval
def test_lmms_eval_chooses_as_score_does(local_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lmms_adapter.lmms_model_class.cache_clear()
    model, processor = random_llava()
    found = evaluated(lmms_adapter.lmms_model(model, processor, 8), local_tasks, "drawn_choose")
    rows = by_score(model, processor, tmp_path, way="likelihood_per_token")
    labels = [("Yes", "No")[number // 2 % 2] for number in range(COUNT)]
    right = [row["answer"] == label for row, label in zip(rows, labels)]
    assert found["results"]["drawn_choose"]["acc,none"] == pytest.approx(sum(right) / COUNT)
    assert 0 < sum(right) < COUNT


@needs_lmms_eval
def test_lmms_eval_goes_through_rounds(local_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lmms_adapter.lmms_model_class.cache_clear()
    for batch_size in (1, 8):
        lmms = lmms_adapter.lmms_model(*random_llava(), batch_size)
        found = evaluated(lmms, local_tasks, "drawn_rounds")
        assert found["results"]["drawn_rounds"]["rounds,none"] == 2.5, "half of them two, half three"
        first = evaluated(lmms, local_tasks, "drawn_generate")["samples"]["drawn_generate"]
        rounds = found["samples"]["drawn_rounds"]
        assert [answer_in(each)[0] for each in rounds] == [answer_in(each) for each in first]


@needs_lmms_eval
def test_lmms_eval_stops_at_a_broken_document(local_tasks, checkpoint, tmp_path, monkeypatch):
    done = lmms_eval_command(checkpoint, local_tasks, "broken_generate", tmp_path, 8)
    assert done.returncode != 0
    assert (
        "task broken_generate, split test, document 5: OSError: no such picture" in done.stdout + done.stderr
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "POPE and MME as VLMEvalKit has them: pictures in base64, one of them named by the row that holds it."
    import base64

    folder = tmp_path_factory.mktemp("LMUData")
    path = tmp_path_factory.mktemp("picture") / "one.png"
    drawn(1).save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    rows = [(7, encoded, "Is there a tower?", "Yes", "random"), (9, "7", "Is there a cat?", "No", "popular")]
    columns = ["index", "image", "question", "answer", "category"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "POPE.tsv", sep="\t", index=False)
    text = "Is it red? Please answer yes or no."
    rows = [(n, encoded, f"scene/{n // 2}.png", text, ("Yes", "No")[n % 2], "scene") for n in range(4)]
    columns = ["index", "image", "image_path", "question", "answer", "category"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "MME.tsv", sep="\t", index=False)
    return folder


def test_prediction_files_are_what_vlmevalkit_reads(published, checkpoint, tmp_path, capsys, monkeypatch):
    output = tmp_path / "scores"
    few = {"max_new_tokens": TOKENS, "draws": 20}
    score([checkpoint], ["pope", "mme"], published, output, **few, export="vlmevalkit")
    written = sorted((output / "vlmevalkit").rglob("*.tsv"))
    assert [path.name for path in written] == ["tiny_MME.tsv", "tiny_POPE.tsv"]
    assert all(
        re.fullmatch(r"T\d{8}-\d{6}", path.parent.name) and path.parts[-3] == "tiny" for path in written
    )
    assert capsys.readouterr().out.count("written:") == 2
    for name, path in zip(("MME", "POPE"), written):
        source, found = (pd.read_csv(each, sep="\t") for each in (published / f"{name}.tsv", path))
        assert found.drop(columns="prediction").equals(source.drop(columns="image"))
        verdicts = pd.read_csv(output / "tiny" / name.lower() / "verdicts.csv")
        assert found.prediction.tolist() == verdicts.answer.tolist()
    shutil.rmtree(output / "vlmevalkit")
    monkeypatch.setattr("aligned_mllm.reporting.score.load_checkpoint", None)  # a call would fail
    arguments = [str(checkpoint), "--benchmarks", "pope", "--data", str(published), "--output", str(output)]
    assert main(["score", *arguments, "--max-new-tokens", str(TOKENS), "--export", "vlmevalkit"]) == 0
    assert [path.name for path in (output / "vlmevalkit").rglob("*.tsv")] == ["tiny_POPE.tsv"]


def test_only_questions_of_vlmevalkit_are_exported(published, checkpoint, local_questions, tmp_path):
    with pytest.raises(InputError, match="coco_pope_random.json:1: not a TSV"):
        score([checkpoint], ["pope"], local_questions, tmp_path / "scores", export="vlmevalkit")
    with pytest.raises(InputError, match="export 'vlmeval'"):
        score([checkpoint], ["pope"], published, tmp_path / "scores", export="vlmeval")
    assert not (tmp_path / "scores").exists(), "before anything is asked"
    few = {"limit": 1, "max_new_tokens": 2, "draws": 20}
    score([checkpoint], ["pope"], published, tmp_path / "scores", **few, export="vlmevalkit")
    [path] = (tmp_path / "scores" / "vlmevalkit").rglob("*.tsv")
    assert len(pd.read_csv(path, sep="\t")) == 1, "a question without an answer has no row"
    with pytest.raises(InputError, match="no row of pope"):
        prediction_tables(benchmark_named("pope"), published / "POPE.tsv", {"random-8": "yes"})
