"The words of visual tokens, for every run of a plan: by hand for one model, and once for a shared stage 1."

import pandas as pd
import pytest
from torch.nn.functional import normalize

from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.word_probe import visual_tokens
from aligned_mllm.core import data_folder
from aligned_mllm.data.images import open_image
from aligned_mllm.data.open import open_texts
from aligned_mllm.experiments.jobs import graph_of
from aligned_mllm.experiments.plan import prepare_data, quick_plan
from aligned_mllm.experiments.word_tables import read_word_measures, word_measures
from aligned_mllm.teachers.exact_labels import ExactLabeller
from aligned_mllm.teachers.targets import BatchView
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.small_models import embedded_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A plan, and its folder with an untrained model in every run."
    folder = tmp_path_factory.mktemp("words")
    plan = quick_plan("scenes", arms=("plain", "sea"), words=True)
    prepare_data(plan, folder, 0)
    model, processor = embedded_model(data_folder() / "parts")
    for job in graph_of(plan, folder).jobs:
        model.save_pretrained(job.output / "model")
        processor.save_pretrained(job.output / "model")
    return plan, folder, LoadedModel("untrained", model, processor)


def test_right_words_are_those_of_the_objects(finished):
    plan, folder, loaded = finished
    data = folder / "data" / "seed0"
    found = word_measures(loaded, data, pictures=4)
    labeller = ExactLabeller(KnownObjects(data))
    names = list(dict.fromkeys(record.images[0] for record in open_texts(data / "test.jsonl")))[:4]
    ids = loaded.processor.tokenizer(list(labeller.words.words), add_special_tokens=False).input_ids
    embeddings = loaded.model.get_input_embeddings().weight[[row[0] for row in ids]]
    shares = []
    for name in names:
        tokens = visual_tokens(loaded, [open_image(name, data)]).states
        nearest = (normalize(tokens, dim=1) @ normalize(embeddings, dim=1).T).argmax(1)
        labels = labeller.labels([BatchView(name, (0.0, 0.0, 1.0, 1.0), (5, 5))])
        hit = (labels.words == nearest[:, None]).any(1)
        shares.append(float(hit[~labels.empty].float().mean()))
    assert found["right words"] == pytest.approx(sum(shares) / 4, abs=1e-6)
    assert 0 < found["right words by chance"] < 0.5 < found["modality gap"]


def test_every_run_is_measured_after_both_stages_and_once(finished):
    plan, folder, _ = finished
    table = read_word_measures(plan, folder, pictures=4)
    assert {*table.arm} == {"plain", "sea"} and {*table.stage} == {1, 2}
    assert len(table) == 2 * 2 * 3 and table.value.notna().all()
    kept = folder / "seed0" / "stage1_sea" / "words_4pictures.csv"
    pd.read_csv(kept).assign(value=-1.0).to_csv(kept, index=False)
    again = read_word_measures(plan, folder, pictures=4)
    assert (again.value == -1).sum() == 3 and {*again.arm[again.value == -1]} == {"sea"}
