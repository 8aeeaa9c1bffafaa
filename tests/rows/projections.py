"""Rows of the table of nodes: projections."""

from .row import Row

ROWS: list[Row] = []
