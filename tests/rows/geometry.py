"""Rows of the table of nodes: geometry."""

from .row import Row

ROWS: list[Row] = []
