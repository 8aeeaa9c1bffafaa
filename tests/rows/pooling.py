"""Rows of the table of nodes: pooling."""

from .row import Row

ROWS: list[Row] = []
