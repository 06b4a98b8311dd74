"""Rows: any source -> records -> tokens -> each rank's micro-batches of each step."""
