"""Readers of file formats: csv, tsv, jsonl, json, parquet, txt; of folders, hub data sets, URLs.

How to add a format: file_reader.py.
"""
