"""What a stage was trained with beside what would train it now, told in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from athanor.foundation.errors import UserError
from athanor.foundation.identity import check_same
from athanor.foundation.run_folder import StageFolder


@pytest.mark.parametrize(("changes", "words"), [
    ({"hash.rows": "b"}, "configuration: the conversations of talk.jsonl are others than it was trained on; start"),
    ({"hash.rows": "b", "seq_len": 8}, "hash.rows was a and is b; seq_len was 4 and is 8; start"),
    ({"hash.rows": "b", "data": "other.jsonl"}, "data was talk.jsonl and is other.jsonl; hash.rows was a and is b; start"),
    ({"steps": 2}, "configuration: steps was 1 and is 2; start")])
def test_changed_conversations_are_told_as_such(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder, now = StageFolder(tmp_path), {"data": "talk.jsonl", "hash.rows": "a", "seq_len": 4, "steps": 1}
    folder.config.write_text('[identity]\ndata = "talk.jsonl"\n"hash.rows" = "a"\nseq_len = 4\nsteps = 1\n')
    check_same(folder, now)
    with pytest.raises(UserError, match=words):
        check_same(folder, now | changes)
