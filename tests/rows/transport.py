"""Rows of the table of nodes: transport."""

from .row import Row

ROWS: list[Row] = []
