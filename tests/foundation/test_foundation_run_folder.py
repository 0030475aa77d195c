from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from athanor.foundation import run_folder
from athanor.foundation.errors import DiskError, UserError
from athanor.foundation.run_folder import (
    append_jsonl,
    disk_errors,
    folder_renamed_last,
    hash_folder,
    read_json,
    read_jsonl,
    sweep,
    write_atomic,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.json"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(DiskError, match=r"book\.json: No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["book.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with folder_renamed_last(target) as building:
        (building / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(FileNotFoundError), folder_renamed_last(target) as building:
        (building / "none").read_text()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["a"]
    with folder_renamed_last(target) as building:
        (building / "c").write_text("3")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["c"]


def test_what_a_kill_left_is_swept_and_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".model.building-x1").mkdir()
    (tmp_path / ".data.building-x2-old").mkdir()
    (tmp_path / ".data.building-x2-old" / "kept").write_text("1")
    (tmp_path / ".other").mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".other", "data"] and (tmp_path / "data" / "kept").exists()


def test_lines_cut_short_are_skipped_and_the_next_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('17\n[]\n{"step": 2, "lo')  # and what is JSON, but no line of ours
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_json_that_is_none_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{,}")
    with pytest.raises(UserError, match=r"x\.json is not JSON: .*line 1"):
        read_json(tmp_path / "x.json")


def test_folder_hashes_see_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = hash_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = hash_folder(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, hash_folder(tmp_path)}) == 3


def test_a_file_where_a_folder_is_to_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for place, words in ((tmp_path / "runs", "file exists"), (tmp_path / "runs" / "mine", "not a directory")):
        with pytest.raises(UserError, match=f"cannot write {place}: {words}"), disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
