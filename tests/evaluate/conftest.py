"""A tokenizer and a data folder's held-out files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from athanor.data.pairs import find_functions
from athanor.data.text.tokenizer import Tokenizer, train_tokenizer

SOURCE = '''"""Some words to count."""


def area(width, height):
    """The area of a rectangle."""
    return width * height


class Box:
    def volume(self, depth):
        """The volume of a box, in litres or so."""
        base = area(self.width, self.height)
        return base * depth
'''


@pytest.fixture(scope="session")
def source() -> str:
    return SOURCE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE in which the words of SOURCE, and a line end with its indentation, are single tokens."""
    return train_tokenizer(iter([SOURCE] * 4), 340)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder's held-out files: SOURCE, a longer Python file, and prose."""
    folder = tmp_path / "data"
    folder.mkdir()
    longer = SOURCE * 3 + "caf\u00e9 = 'na\u00efve \u4e2d\u6587'\n"
    documents = [{"doc_id": "a", "source": "s", "uri": "box.py", "text": SOURCE},
                 {"doc_id": "b", "source": "s", "uri": "longer.py", "text": longer},
                 {"doc_id": "c", "source": "s", "uri": "notes.txt", "text": "area of a box"}]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    rows = []
    for document in documents[:1]:
        for function in find_functions(document["text"]):
            rows.append({"doc_id": document["doc_id"], "uri": document["uri"], "line": function.line, "name": function.name,
                         "prompt": function.messages[0]["content"], "header": function.header, "body": function.body,
                         "before": function.before, "after": function.after, "indent": function.indent})
    (folder / "functions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
