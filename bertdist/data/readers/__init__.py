"""Readers of file formats: csv, tsv, jsonl, parquet, hub data sets and remote files."""
