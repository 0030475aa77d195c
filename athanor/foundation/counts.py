"""Types of a recipe's counts, which may be written as people write them: "15T", "2.5B", 1e6."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from athanor.foundation.units import read_count


def _counted(value: Any) -> Any:
    """The number that a text stands for, and a whole one as such, also where TOML wrote 1e6; pydantic judges the rest."""
    if isinstance(value, str):
        try:
            return read_count(value)
        except ValueError as error:
            raise PydanticCustomError("count", "{sentence}", {"sentence": str(error)}) from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


# beyond all text that there is, and all machines
Count = Annotated[float, Field(le=1e18), BeforeValidator(_counted)]
Whole = Annotated[int, Field(le=10**12), BeforeValidator(_counted)]
