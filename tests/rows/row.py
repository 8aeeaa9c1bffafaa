"""A row of the table of nodes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import declarative as dn


@dataclasses.dataclass
class Row:
    name: str
    node: Callable[..., dn.AbstractDeclarativeNode]  # constructor; takes adjoint=... and policy keywords
    x: Any
    y0: Any = None
    reference: Callable | None = None
    feasible: Callable | None = None
    failures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adjoints: tuple = (None,)
    unrolled: bool = True
    fast: bool = True  # False: in the full tier only, where compilation takes minutes or a like row is in CI
    slow: bool = False  # True: of the fast checks, in the slow tier

    def __str__(self):
        return self.name
