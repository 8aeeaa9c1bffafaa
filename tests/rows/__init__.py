"""The table of nodes: what to build, on which data, against which reference. A new node is one row in the module of its family."""

from . import constrained, core, geometry, ordering, pooling, projections, proximal, transport

ROWS = [
    row
    for family in (core, projections, proximal, constrained, pooling, geometry, ordering, transport)
    for row in family.ROWS
]

CASES = [(row, adjoint) for row in ROWS for adjoint in row.adjoints]


def case_id(case):
    row, adjoint = case
    return f"{row.name}-{'default' if adjoint is None else type(adjoint).__name__}"
