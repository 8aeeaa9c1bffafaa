"""Rows of the table of nodes: constrained."""

from .row import Row

ROWS: list[Row] = []
