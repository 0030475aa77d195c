"""Unmodified tasks of lm-evaluation-harness on local files: our engine says what the harness's own `hf` model says."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bigram_model import follow, write_bigram
from click.testing import CliRunner

from athanor.cli.evaluate import command
from athanor.cli.preflight import refuse_early
from athanor.data.text.tokenizer import Tokenizer, train_tokenizer
from athanor.evaluate import find
from athanor.evaluate.ranks import Candidate, evaluate
from athanor.evaluate.scores import bootstrap, wilson
from athanor.evaluate.subject import Subject, open_subject
from athanor.foundation.errors import UserError
from athanor.foundation.recipe import load_recipe
from athanor.models.decoder import Decoder
from athanor.models.huggingface import save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

NOUNS = ("farmer", "teacher", "river", "engine", "window", "garden", "doctor", "singer")
PAIRS = [{"sentence_good": f"Who should the {a} visit after the {b} talked about it?",
          "sentence_bad": f"Who should the {a} visit it after the {b} talked about?"} for a in NOUNS for b in NOUNS[:3]]
QUESTIONS = [{"id": f"q{i}", "question": f"Which of these {noun}s is {i} metres long?", "answerKey": "ABCD"[i % 4],
              "choices": {"label": list("ABCD"), "text": [f"the {noun} of {i + j}" for j in range(4)]}}
             for i, noun in enumerate(NOUNS * 2)]
SUMS = [{"question": f"A {noun} has {i} apples and gets {j} more. How many?",
         "answer": f"{i} + {j} = <<{i}+{j}={i + j}>>{i + j}\n#### {i + j}"} for i, noun in enumerate(NOUNS) for j in (2, 7)]
PAGES = [{"page": f" = {noun.title()} = \n\n The {noun} @-@ house is {i} metres long . " * (3 + 9 * i)}
         for i, noun in enumerate(NOUNS[:6])]
STORIES = [{"text": f"The {a} saw the {b} and said nothing to the {a}"} for a, b in itertools.pairwise(NOUNS)]
TASKS = ["blimp_adjunct_island", "arc_easy", pytest.param("gsm8k", marks=pytest.mark.slow), "wikitext", "lambada_openai"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five tasks' data in the forms that their repositories have, jsonl or parquet."""
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("tasks") / "lm_eval"
    for folder, splits in {"nyu-mll/blimp/adjunct_island": {"train": PAIRS},
                           "allenai/ai2_arc/ARC-Easy": dict.fromkeys(("train", "validation", "test"), QUESTIONS),
                           "openai/gsm8k/main": {"train": SUMS[:10], "test": SUMS[10:]},
                           "EleutherAI/wikitext_document_level/wikitext-2-raw-v1":
                               dict.fromkeys(("train", "validation", "test"), PAGES)}.items():
        place = root / folder
        place.mkdir(parents=True)
        for split, rows in splits.items():
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = root / "EleutherAI" / "lambada_openai"
    place.mkdir()
    for number, rows in enumerate((STORIES[:4], STORIES[4:])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"test-0000{number}-of-00002.parquet")
    return root


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    texts = [json.dumps(row) for row in PAIRS + QUESTIONS + SUMS + STORIES] + [row["page"] for row in PAGES]
    return train_tokenizer(iter(texts), 400)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, words: Tokenizer) -> Subject:
    """A Llama of two blocks whose random weights are large enough for its answers to differ."""
    folder = tmp_path_factory.mktemp("model") / "m"
    module = Decoder(DecoderShape(words.vocab_size, 64, 96, 2, 4, 2, max_position_embeddings=512, initializer_range=0.2))
    initialize(module, 0)
    save_model(module, folder)
    words.save(folder)
    return open_subject("m", folder, False)


def nothing(done: int, total: int) -> None:
    assert 0 < done <= total


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [row["resps"] for row in sorted(found["samples"][task], key=lambda row: (row["filter"], row["doc_id"]))]


@pytest.mark.parametrize("task", TASKS)
def test_the_harness_finds_what_its_own_model_finds(subject: Subject, data: Path, task: str) -> None:
    from lm_eval.models.huggingface import HFLM

    from athanor.evaluate import harness
    from athanor.evaluate.harness_model import EngineModel

    loaded, _ = harness.load_tasks(task, data)
    ours = harness.ask(EngineModel(subject, nothing), loaded)
    theirs_model = HFLM(pretrained=str(subject.folder), device="cpu", batch_size=4, dtype="float32")
    loaded, _ = harness.load_tasks(task, data)
    theirs = harness.ask(theirs_model, loaded)
    assert ours["n-samples"] == theirs["n-samples"]
    for key, value in theirs["results"][task].items():
        if isinstance(value, float):
            assert ours["results"][task][key] == pytest.approx(value, rel=0 if "acc" in key or "match" in key else 1e-5), key
    pairs = list(zip(np.ravel(np.array(answers(ours, task), dtype=object)),
                     np.ravel(np.array(answers(theirs, task), dtype=object)), strict=True))
    assert len(pairs) >= 6
    for mine, other in pairs:
        assert mine == other if isinstance(other, (str, bool, np.bool_)) else mine == pytest.approx(other, abs=1e-4, rel=1e-6)
    score = find.load("tasks", f"lm_eval:{task}").run(subject, data, None, nothing)
    assert score.low <= score.value <= score.high and score.details["data"]["files"] >= 1
    assert score.value == next(v for k, v in ours["results"][task].items() if "," in k and isinstance(v, float))


def test_a_model_that_knows_the_answers_is_right(tmp_path: Path, data: Path, words: Tokenizer) -> None:
    """A table that goes on along one story is the greedy answer there and nowhere else."""
    story = [0, *words.encode(STORIES[0]["text"])]
    assert len(set(story[-2:])) == 2
    folder = write_bigram(tmp_path / "m", words, follow(words, story[-2:]), 64)
    score = find.load("tasks", "lm_eval:lambada_openai").run(open_subject("m", folder, False), data, 4, nothing)
    assert score.count == 4 and score.unit == "perplexity" and not score.higher_is_better
    assert 0 < score.details["metrics"]["acc,none"] < 1


def test_a_share_has_wilsons_interval_and_another_metric_a_bootstrap(subject: Subject, data: Path) -> None:
    score = find.load("tasks", "lm_eval:blimp_adjunct_island").run(subject, data, 9, nothing)
    assert score.count == 9 and (score.low, score.high) == pytest.approx(wilson(9 * score.value, 9))
    assert (score.unit, score.details["interval"], score.details["shots"]) == ("acc", "95 % Wilson", 0)
    right = [float(value) for value in score.details["items"]["above"].split()]
    assert len(right) == 9 and sum(right) == pytest.approx(9 * score.value)
    low, high = bootstrap([1.0, 2.0, 3.0] * 30, lambda items: math.fsum(items) / len(items))
    assert low < 2 < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(2 / 3 / 90), rel=0.15)


def test_a_chat_model_is_asked_through_its_template(tmp_path: Path, data: Path, words: Tokenizer) -> None:
    """It answers every question with what follows the assistant's mark in its table."""
    chain = [words.special_ids["<|assistant|>"], *words.encode("9"), words.eos_id]
    folder = write_bigram(tmp_path / "m", words, follow(words, chain), 512)
    score = find.load("tasks", "lm_eval:gsm8k").run(open_subject("m", folder, True), data, None, nothing)
    right = sum(row["answer"].endswith("#### 9") for row in SUMS[10:]) / len(SUMS[10:])
    assert 0 < right < 1 and score.details["metrics"]["exact_match,flexible-extract"] == right
    assert (score.value, score.unit) == (0, "exact_match,strict-match"), "it writes no ####"
    assert score.details["asked"] == "chat template"


@pytest.mark.slow
def test_two_tensor_parallel_ranks_score_as_one_does(subject: Subject, data: Path, tmp_path: Path) -> None:
    tasks = ["lm_eval:arc_easy", "lm_eval:gsm8k"]
    whole = {task: asdict(find.load("tasks", task).run(subject, data, None, nothing)) for task in tasks}
    found = evaluate([Candidate("m", subject.folder, False)], tasks, data, log_folder=tmp_path, lm_eval_data=data, tp=2)
    assert {task: asdict(score) for task, score in found.scores["m"].items()} == whole


@pytest.mark.slow  # the index of all the harness's tasks takes 10 s
def test_a_group_has_the_score_that_the_harness_gives_it(subject: Subject, tmp_path: Path) -> None:
    for level, count in (("easy", 8), ("medium", 12), ("hard", 20)):
        place = tmp_path / "ofir408" / "MedConceptsQA" / f"atc_{level}"
        place.mkdir(parents=True)
        rows = [{"question": f"Which {noun} is {i} years old?", "answer_id": "ABCD"[i % 4]} for i, noun in enumerate(NOUNS * 3)]
        for split, many in (("dev", 4), ("test", count)):
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:many]))
    score = find.load("tasks", "lm_eval:med_concepts_qa_atc").run(subject, tmp_path, None, nothing)
    parts = {name.rpartition("_")[2]: value for name, value in score.details["tasks"].items()}
    assert score.value == pytest.approx((8 * parts["easy"] + 12 * parts["medium"] + 20 * parts["hard"]) / 40)
    assert score.count == 40
    assert score.low < score.value < score.high and score.unit == "acc"


def test_a_task_in_a_file_of_ones_own(subject: Subject, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ndataset_path: nyu-mll/blimp\ndataset_name: adjunct_island\noutput_type: multiple_choice\n"
                    "test_split: train\ndoc_to_text: ''\ndoc_to_target: 1\ndoc_to_choice: '{{[sentence_bad, sentence_good]}}'\n"
                    "metric_list: [{metric: acc}]\n")
    score = find.load("tasks", f"lm_eval:{file}").run(subject, data, None, nothing)
    assert score.value == find.load("tasks", "lm_eval:blimp_adjunct_island").run(subject, data, None, nothing).value
    file.write_text("group: mine\ntask: [arc_easy]\n")
    with pytest.raises(UserError, match="is several tasks without a score"):
        find.load("tasks", f"lm_eval:{file}")


def test_too_long_contexts_are_cut_on_the_left_and_counted(subject: Subject, data: Path) -> None:
    short = Subject("m", subject.folder, False, 64, subject.engine, subject.tokenizer)
    score = find.load("tasks", "lm_eval:gsm8k").run(short, data, 3, nothing)
    assert (score.details["cut_contexts"], score.details["new_tokens"], score.details["shots"]) == (3, 32, 5)


def test_the_command_evaluates_a_folder_on_ranks(subject: Subject, data: Path) -> None:
    arguments = [str(subject.folder), "--data", str(data.parent), "--task", "lm_eval:arc_easy", "--ask", "text", "--limit", "5"]
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    score = json.loads(result.stdout)["models"]["m"]["lm_eval:arc_easy"]
    assert score["count"] == 5 and set(score["details"]["metrics"]) == {"acc,none", "acc_norm,none"}


def test_a_recipe_says_where_the_data_are(subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('name = "tiny"\n[[data.source]]\nname = "a"\nkind = "python"\n[[stage]]\nname = "pretrain"\n'
                      f'[evaluate]\ntasks = ["lm_eval:blimp_adjunct_island"]\nlm_eval_data = "{data}"\n')
    shutil.copytree(subject.folder, tmp_path / "runs" / "tiny" / "pretrain" / "model")
    refuse_early(load_recipe(recipe))
    result = CliRunner().invoke(command, [str(recipe), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["models"]["pretrain"]["lm_eval:blimp_adjunct_island"]["count"] == len(PAIRS)
    for wrong in ("", f'lm_eval_data = "{tmp_path / "nowhere"}"\n'):
        recipe.write_text(recipe.read_text().split("lm_eval_data")[0] + wrong)
        with pytest.raises(UserError, match=r"evaluate\.lm_eval_data must name the folder with the data of 'lm_eval:blimp"):
            refuse_early(load_recipe(recipe))


@pytest.mark.parametrize(("name", "sentence"), [
    ("arc_eazy", "lm_eval has no task 'arc_eazy'; did you mean 'arc_easy'"),
    ("ai2_arc", "'ai2_arc' is several tasks without a score of their own together; name one of arc_challenge, arc_easy")])
def test_unknown_tasks_and_tags_are_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        find.load("tasks", f"lm_eval:{name}")


@pytest.mark.parametrize(("content", "sentence"), [
    (None, "baber/piqa has no <split>.jsonl or <split>.parquet; put the data of 'baber/piqa' there"),
    ("{", r"train\.jsonl cannot be read as jsonl"), (f'{{"goal": {10**30}}}', r"train\.jsonl cannot be read as jsonl"),
    ('{"goal": "x"}\n', "'piqa' cannot use the data in .*")])
def test_missing_and_wrong_data_are_one_sentence(subject: Subject, tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        place = tmp_path / "baber" / "piqa"
        place.mkdir(parents=True)
        for split in ("train", "validation"):
            (place / f"{split}.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        find.load("tasks", "lm_eval:piqa").run(subject, tmp_path, None, nothing)
    assert "\n" not in str(caught.value)
