"""Rows and files of rows, short to write."""

import json

import pytest


def u(content):
    return {"role": "user", "content": content}


def a(content):
    return {"role": "assistant", "content": content}


def s(content):
    return {"role": "system", "content": content}


def write(path, *records):
    """JSON Lines; bytes are written as they are."""
    lines = [
        r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = {"messages": [u("q"), a("r")]}


def parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path
