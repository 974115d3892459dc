"Tools whose annotations are text, some of which names what only a type checker can find."

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

if TYPE_CHECKING:
    from nowhere import Elsewhere


class Colour(enum.Enum):
    RED = "red"


def typed(text: str, number: int, share: float, yes: bool, numbers: list[int], table: dict[str, int], maybe: Optional[int], words: str | None, either: Union[int, str],
          level: Literal[1, 2, 3], name: Literal["1", "two"], noted: Annotated[int, "how many"], anything: Any, colour: Colour, lost: Elsewhere, bare, pair: tuple[int, ...]): ...


class Environment:
    def go(self, steps: Optional[list[int]], fast: bool = False): ...
