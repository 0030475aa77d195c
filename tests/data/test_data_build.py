"""The build: files that agree with each other, whole or not there, the same every time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from athanor.data.build import EXACT, NEAR, build, choose_evaluation
from athanor.data.deduplicate import content_hash
from athanor.data.lineage import damaged_files, trace
from athanor.data.pairs import place
from athanor.data.rows import open_rows
from athanor.data.shards import Shard
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import DataError, RecipeError, UserError
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import read_json, read_jsonl

MakeRecipe = Callable[..., Recipe]


def story(number: int, words: int = 120) -> str:
    """A text of its own."""
    source = random.Random(number)
    lines = [" ".join(source.choice("abcdefghijklmnop") * source.randint(2, 7) for _ in range(10)) for _ in range(words // 10)]
    return "\n".join(lines) + "\n"


def write_stories(folder: Path, texts: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_funnel_adds_up_at_every_stage(data_folder: Path) -> None:
    funnel = read_json(data_folder / "funnel.json")
    assert [stage["name"] for stage in funnel["stages"]] == ["read", "filter", "deduplicate"]
    documents = pq.read_table(data_folder / "documents").num_rows
    incoming = {"documents": documents, "bytes": funnel["stages"][0]["bytes"]}
    for stage in funnel["stages"]:
        assert {unit: stage[unit] for unit in incoming} == incoming
        for unit in incoming:
            assert stage[unit] == stage["kept"][unit] + sum(counts[unit] for counts in stage["dropped"].values())
        incoming = stage["kept"]
    for unit in incoming:
        assert incoming[unit] == sum(counts[unit] for counts in funnel["splits"].values())
    assert {"kept", "dropped", "near_threshold"} <= set(funnel["samples"])


def test_manifest_agrees_with_the_files(data_folder: Path) -> None:
    manifest = read_json(data_folder / "manifest.json")
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    assert manifest["vocab_size"] == tokenizer.vocab_size == 600
    for name, counts in [("evaluation", manifest["evaluation"]),
                         *((f"train-{name}", counts) for name, counts in manifest["sources"].items())]:
        shard = Shard(data_folder / name)
        lineage = read_jsonl(data_folder / f"{name}.lineage.jsonl")
        assert len(shard) == counts["documents"] == len(lineage) > 0
        assert len(shard.tokens) == counts["tokens"]
        assert sum(len(tokenizer.decode(shard.document(i).tolist()).encode()) for i in range(len(shard))) == counts["bytes"]
        assert all(shard.document(i)[0] == 0 and shard.document(i)[-1] == 1 for i in range(len(shard)))
    assert 1.5 < manifest["bytes_per_token"] < 4
    assert set(manifest["seconds"]) == {"read", "filter", "deduplicate", "tokenizer", "encode", "pairs", "write"}
    assert damaged_files(data_folder) == []


def test_evaluation_texts_are_those_of_the_tokens_and_nowhere_in_training(data_folder: Path) -> None:
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    shard = Shard(data_folder / "evaluation")
    rows = read_jsonl(data_folder / "evaluation.jsonl")
    assert [row["text"] for row in rows] == [tokenizer.decode(shard.document(i).tolist()) for i in range(len(shard))]
    held_out = {row["doc_id"] for row in rows}
    training = {row["doc_id"] for name in ("asyncio", "email") for row in read_jsonl(data_folder / f"train-{name}.lineage.jsonl")}
    assert held_out and training and not held_out & training
    assert {row["doc_id"] for row in read_jsonl(data_folder / "pairs.jsonl")} <= training
    for row in read_jsonl(data_folder / "functions.jsonl"):
        assert row["doc_id"] in held_out
        text = next(r["text"] for r in rows if r["doc_id"] == row["doc_id"])
        assert text.startswith(row["before"]) and text.endswith(row["after"]) and row["prompt"] == row["header"]
        compile(place(row["before"], row["indent"], row["body"], row["after"]), "f.py", "exec", dont_inherit=True)


def test_decisions_stand_beside_the_documents(data_folder: Path) -> None:
    documents = pq.read_table(data_folder / "documents").to_pylist()
    decisions = pq.read_table(data_folder / "decisions").to_pylist()
    assert len(documents) == len(decisions)
    for document, decision in zip(documents, decisions, strict=True):
        assert decision["keep"] == (not decision["reason"]) == bool(decision["split"])
        assert (document["text"] is None) == (decision["value_short"] is None)
    assert {decision["split"] for decision in decisions} >= {"train", "evaluation"}


def test_a_second_build_is_the_same(data_folder: Path, small_sources: list[dict[str, object]], make_recipe: MakeRecipe,
                                    tmp_path: Path) -> None:
    again = build(make_recipe(small_sources), tmp_path / "again")
    first = read_json(data_folder / "manifest.json")
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_every_token_leads_back_to_its_bytes(data_folder: Path) -> None:
    documents = {row["doc_id"].hex(): row["text"].encode() for row in pq.read_table(data_folder / "documents").to_pylist()
                 if row["text"]}
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    draw = random.Random(0)
    for split, source, name in [("train", "asyncio", "train-asyncio"), ("train", "email", "train-email"),
                                ("evaluation", None, "evaluation")]:
        tokens = Shard(data_folder / name).tokens
        for index in [0, len(tokens) - 1, *(draw.randrange(len(tokens)) for _ in range(40))]:
            found = trace(data_folder, index, split, source)
            start, end = found["bytes"]
            assert found["token_id"] == tokens[index]
            assert documents[found["document"]["doc_id"]][start:end] == tokenizer.token_bytes()[int(tokens[index])]
    with pytest.raises(DataError, match="there is no token"):
        trace(data_folder, 10**9, "evaluation")
    with pytest.raises(DataError, match="several sources"):
        trace(data_folder, 0)
    with pytest.raises(DataError, match="did you mean 'email'"):
        trace(data_folder, 0, source="emial")


def test_duplicates_are_dropped_for_their_reason(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    texts = [story(i) for i in range(40)]
    held_out = [i for i, chosen in enumerate(choose_evaluation([content_hash(text) for text in texts], 0.2)) if chosen]
    near = []
    for index in held_out:
        candidates = (texts[index] + f"one more line {n}\n" for n in range(100))  # near copies that are not held out themselves
        near.append(next(c for c in candidates if int.from_bytes(content_hash(c)[:8], "big") >= 0.2 * 2**64))
    source = write_stories(tmp_path / "s", [*texts, *near, texts[3], texts[5]])
    recipe = make_recipe([{"name": "s", "kind": "folder", "path": source}], evaluation_share=0.2)
    manifest = build(recipe, tmp_path / "data")
    dropped = read_json(tmp_path / "data" / "funnel.json")["stages"][2]["dropped"]
    assert dropped[EXACT]["documents"] == 2
    assert dropped[NEAR]["documents"] == len(held_out) == manifest["evaluation"]["documents"]
    assert manifest["sources"]["s"]["documents"] == 40 - len(held_out)
    samples = read_json(tmp_path / "data" / "funnel.json")["samples"]["dropped"][NEAR]
    assert all(sample["value"] >= sample["threshold"] and sample["like"] != sample["uri"] for sample in samples)


def test_holding_out_depends_on_content_alone() -> None:
    hashes = [content_hash(story(i)) for i in range(2000)]
    chosen = choose_evaluation(hashes, 0.1)
    assert 0.07 < sum(chosen) / 2000 < 0.13
    backwards = choose_evaluation(hashes[::-1], 0.1)[::-1]
    assert chosen == backwards and choose_evaluation(hashes[:1000], 0.1) == chosen[:1000]
    assert choose_evaluation(hashes, 0.0) == [False] * 2000
    assert sum(choose_evaluation(hashes[:3], 1e-9)) == 1 and choose_evaluation(hashes[:1], 0.5) == [False]
    assert sum(choose_evaluation(hashes[:3], 1 - 1e-9)) == 2


def check_refused(recipe: Recipe, folder: Path, error: type[Exception], words: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=words):
        build(recipe, folder / "data")
    assert sorted(folder.iterdir()) == before  # nothing half written


def test_bad_sources_are_named_with_reasons(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "a").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "garbage" / "b").write_bytes(b"\xff" * 99)
    (tmp_path / "garbage" / "c").write_bytes(b"short")
    good = {"name": "good", "kind": "folder", "path": write_stories(tmp_path / "s", [story(i) for i in range(5)])}
    garbage = {"name": "bad", "kind": "folder", "path": str(tmp_path / "garbage")}
    recipe = make_recipe([good, garbage])
    check_refused(recipe, tmp_path, DataError, r"source 'bad': no document is left .*1 binary, 1 not UTF-8, 1 too short")
    missing = make_recipe([good, {"name": "bad", "kind": "folder", "path": str(tmp_path / "nowhere")}])
    check_refused(missing, tmp_path, DataError, "source 'bad': .*nowhere does not exist")
    twice = make_recipe([good, {"name": "same", "kind": "folder", "path": str(tmp_path / "s")}])
    check_refused(twice, tmp_path, DataError, f"source 'same': no document is left .*5 {EXACT}")
    check_refused(make_recipe([good], vocab_size=None), tmp_path, RecipeError, r"data\.vocab_size is open")


def test_a_given_tokenizer_and_its_tokens_are_used(tmp_path: Path, make_recipe: MakeRecipe, data_folder: Path) -> None:
    recipe = make_recipe([{"name": "old", "kind": "tokens", "path": str(data_folder / "train-email")}], vocab_size=None,
                         tokenizer=str(data_folder / "tokenizer"))
    steps: list[tuple[str, float, float]] = []
    manifest: dict[str, Any] = build(recipe, tmp_path / "data", progress=lambda *step: steps.append(step))
    first = read_json(data_folder / "manifest.json")
    assert manifest["tokenizer_hash"] == first["tokenizer_hash"] and manifest["template_hash"] == first["template_hash"]
    assert manifest["sources"]["old"]["read"]["documents"] == first["sources"]["email"]["documents"]
    assert {step for step, _, _ in steps} == {"read and filter", "deduplicate", "encode"}
    assert all(0 <= done <= total for _, done, total in steps)
    assert manifest["evaluation"]["documents"] == len(read_jsonl(tmp_path / "data" / "evaluation.jsonl")) > 0


def test_a_tokenizer_without_template_or_names_is_judged(tmp_path: Path, make_recipe: MakeRecipe, data_folder: Path) -> None:
    shutil.copytree(data_folder / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    source = {"name": "s", "kind": "folder", "path": write_stories(tmp_path / "s", [story(i) for i in range(5)])}
    recipe = make_recipe([source], vocab_size=None, tokenizer=str(tmp_path / "t"))
    assert build(recipe, tmp_path / "data")["template_hash"] is None
    (talk := tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, '
                                                 '{"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(DataError, match="has no chat template"):
        open_rows(tmp_path / "data", str(talk), 64, 0)
    shutil.rmtree(tmp_path / "data")
    wrong = make_recipe([source], vocab_size=None, tokenizer=str(tmp_path / "s"))
    check_refused(wrong, tmp_path, DataError, r"has no tokenizer\.json")


def test_a_build_replaces_built_data_alone(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe([{"name": "s", "kind": "folder", "path": write_stories(tmp_path / "s", [story(i) for i in range(5)])}])
    with pytest.raises(DataError, match="holds something else than built data"):
        build(recipe, tmp_path / "s")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file, and a folder is to be written there"):
        build(recipe, tmp_path / "file")
    assert len(list((tmp_path / "s").iterdir())) == 5 and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    (tmp_path / ".other.building-x").mkdir()  # somebody else's build beside it
    build(recipe, tmp_path / "data")
    build(recipe, tmp_path / "data")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".other.building-x"]


def test_documents_held_out_are_told_when_none_is_left(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    first, second = (write_stories(tmp_path / name, [story(i)]) for i, name in enumerate("ab"))
    recipe = make_recipe([{"name": "a", "kind": "folder", "path": first}, {"name": "b", "kind": "folder", "path": second}])
    check_refused(recipe, tmp_path, DataError, "no document is left to train on .1 held out for evaluation")


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    markers = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=12)) for i in range(40)]
    source = write_stories(tmp_path / "s", [story(i) + f"{marker}\n" * 3 for i, marker in enumerate(markers)])
    recipe = make_recipe([{"name": "s", "kind": "folder", "path": source}], vocab_size=8000, evaluation_share=0.3)
    build(recipe, tmp_path / "data")
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer")
    held_out = {int(row["uri"].removesuffix(".txt")) for row in read_jsonl(tmp_path / "data" / "evaluation.jsonl")}
    known = {i for i, marker in enumerate(markers) if len(tokenizer.encode(marker)) == 1}
    assert held_out and len(known) > 10 and not known & held_out


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is not the manifest of a data folder"):
        damaged_files(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json is not the manifest of a data folder"):
        open_rows(tmp_path, "documents", 64, 0)


def test_lineage_cut_short_is_not_taken_for_another_document(tmp_path: Path, data_folder: Path) -> None:
    shutil.copytree(data_folder, tmp_path / "data")
    file = tmp_path / "data" / "train-email.lineage.jsonl"
    file.write_text(file.read_text()[1:])  # one damaged line would shift all others
    with pytest.raises(DataError, match=r"whole lines for .* documents"):
        trace(tmp_path / "data", 0, source="email")
