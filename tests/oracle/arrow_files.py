"""Small files of Arrow IPC as pyarrow and Hugging Face's `datasets` write them."""

import datetime
import decimal
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from datasets import Dataset

# Long and alike, so that compression makes the buffers smaller.
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}: what is {i} + {i}? " + "Think well. " * 8},
            {"role": "assistant", "content": f"It is {2 * i}. " + "I thought well. " * 8},
        ]
    }
    for i in range(4)
]
UTC = datetime.timezone.utc
MOMENTS = [datetime.datetime(2024, 7, 26, 1, 2, 3, 456000, UTC), datetime.datetime(1901, 2, 3, tzinfo=UTC)]
TIMES = [datetime.time(1, 2, 3), datetime.time(23, 59, 59)]
DECIMALS = [decimal.Decimal("-0.05"), decimal.Decimal("123.40")]


def make_all(root: Path) -> None:
    """Writes `chats.jsonl`, files with the same rows, and files with all types of columns."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    write_chats(root)
    write_types(root)
    write_wrong(root)


def write_chats(root: Path) -> None:
    table = pa.Table.from_pylist(CHATS)
    halves = pa.Table.from_batches(
        [*table.slice(0, 1).to_batches(), *table.slice(0, 0).to_batches(), *table.slice(1).to_batches()],
        schema=table.schema,
    )
    write_file(root / "batches.arrow", halves)
    write_stream(root / "stream.arrow", halves)
    write_stream(root / "legacy-stream.arrow", table, use_legacy_format=True)
    for compression in ["uncompressed", "lz4", "zstd"]:
        pa.feather.write_feather(table, root / f"{compression}.feather", compression=compression)
    write_stream(root / "lz4-stream.arrow", table, compression="lz4")
    write_stream(root / "zstd-stream.arrow", table, compression="zstd")
    write_file(root / "large.arrow", table.cast(chats_type(pa.large_string(), pa.large_list)))
    views = pa.array([row["messages"] for row in CHATS], chats_type(pa.string_view(), pa.list_view)[0].type)
    write_file(root / "views.arrow", pa.table({"messages": views}))
    dictionaries = chats_type(pa.dictionary(pa.int8(), pa.string()), pa.list_)
    write_file(root / "dictionary.arrow", table.cast(dictionaries))
    # Each batch of this stream adds values to the dictionary of the texts.
    texts = [[turn["content"] for row in CHATS[:n] for turn in row["messages"]] for n in (2, 4)]
    words = [pa.array(sorted(set(texts[0]), key=texts[0].index))]
    words.append(pa.array([*words[0].to_pylist(), *texts[1][len(texts[0]) :]]))
    batches = []
    for i, values in enumerate(words):
        contents = texts[i][len(texts[0]) * i :]
        keys = pa.array([values.to_pylist().index(text) for text in contents], pa.int32())
        batches.append(pa.record_batch({"text": pa.DictionaryArray.from_arrays(keys, values)}))
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(str(root / "delta-stream.arrow"), batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
        assert writer.stats.num_dictionary_deltas == 1
    with tempfile.TemporaryDirectory() as directory:
        Dataset.from_list(CHATS).save_to_disk(directory)
        [path] = Path(directory).glob("*.arrow")
        shutil.copy(path, root / "datasets.arrow")


def chats_type(text: pa.DataType, of) -> pa.Schema:
    turn = pa.struct([("role", text), ("content", text)])
    return pa.schema([("messages", of(turn))])


def write_types(root: Path) -> None:
    """`types.arrow`, `types.parquet` without the types that Parquet does not have, and their rows."""
    dates = [moment.date() for moment in MOMENTS]
    local = [moment.replace(tzinfo=None) for moment in MOMENTS]
    point = pa.struct([("x", pa.int32()), ("y", pa.string())])
    texts = ["aé", "b"]
    columns = {
        "null": pa.array([None, None], pa.null()),
        "bool": pa.array([True, False]),
        **{f"i{bits}": pa.array([-(2 ** (bits - 1)), 1], f"int{bits}") for bits in [8, 16, 32, 64]},
        **{f"u{bits}": pa.array([2**bits - 1, 1], f"uint{bits}") for bits in [8, 16, 32, 64]},
        "f16": pa.array([np.float16(1.5), np.float16(-0.25)]),
        "f32": pa.array([1.5, -0.25], "float32"),
        "f64": pa.array([0.1, 1e300]),
        **{
            f"{name}": pa.array(texts, name)
            for name in ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
        },
        "fixed": pa.array([b"abc", b"def"], pa.binary(3)),
        "date32": pa.array(dates, "date32"),
        "date64": pa.array(dates, "date64"),
        "time_s": pa.array(TIMES, pa.time32("s")),
        "time_ms": pa.array(TIMES, pa.time32("ms")),
        "time_us": pa.array(TIMES, pa.time64("us")),
        "time_ns": pa.array(TIMES, pa.time64("ns")),
        **{f"utc_{unit}": pa.array(MOMENTS, pa.timestamp(unit, "UTC")) for unit in ["s", "ms", "us", "ns"]},
        **{f"local_{unit}": pa.array(local, pa.timestamp(unit)) for unit in ["s", "ms", "us", "ns"]},
        "duration": pa.array([5, -7], pa.duration("ms")),
        "decimal32": pa.array(DECIMALS, pa.decimal32(5, 2)),
        "decimal64": pa.array(DECIMALS, pa.decimal64(9, 2)),
        "decimal128": pa.array(DECIMALS, pa.decimal128(30, 2)),
        "decimal256": pa.array(DECIMALS, pa.decimal256(60, 2)),
        "whole": pa.array([decimal.Decimal(5), decimal.Decimal(-70)], pa.decimal128(9, 0)),
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "struct": pa.array([{"x": 1, "y": None}, None], point),
        "list": pa.array([["a", None], []], pa.list_(pa.string())),
        "large_list": pa.array([[1, 2], None], pa.large_list(pa.int8())),
        "fixed_list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
        "list_view": pa.array([[1, 2], [3]], pa.list_view(pa.int8())),
        "large_list_view": pa.array([[1, 2], [3]], pa.large_list_view(pa.int8())),
        "lists": pa.array([[[1], []], [[2, 3]]], pa.list_(pa.list_(pa.int8()))),
        "structs": pa.array([[{"x": 1, "y": "a"}, {"x": None, "y": "b"}], []], pa.list_(point)),
        "map": pa.array([[("a", 1), ("b", None)], []], pa.map_(pa.string(), pa.int8())),
        "numbers": pa.array([[(1, "a")], [(-2, "b")]], pa.map_(pa.int8(), pa.string())),
    }
    table = pa.table(columns)
    write_file(root / "types.arrow", table)
    # A slice has offsets, and bits that do not begin at a byte.
    padded = pa.concat_tables([table.slice(1), table]).combine_chunks().slice(1)
    write_stream(root / "types-stream.arrow", padded, compression="zstd")
    others = ["list_view", "large_list_view", "string_view", "binary_view"]
    pa.parquet.write_table(table.drop_columns(others), root / "types.parquet", compression="none")


def write_wrong(root: Path) -> None:
    """Files that are read, but cannot be trained."""
    write_file(root / "no-rows.arrow", pa.table({"text": pa.array([], pa.string())}))
    pairs = {"prompt": pa.array(["a", "b"]), "completion": pa.array(["c", None])}
    write_file(root / "missing-key.arrow", pa.table(pairs))
    write_file(root / "bytes.arrow", pa.table({"text": pa.array([b"a", b"\xff"])}))
    write_file(root / "twice.arrow", pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    late = pa.array([0, 10**14], pa.timestamp("s"))
    write_file(root / "late.arrow", pa.table({"text": pa.array(["a", "b"]), "at": late}))
    spans = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    write_file(root / "interval.arrow", pa.table({"text": pa.array(["a"]), "span": spans}))


def write_file(path: Path, table: pa.Table, **options) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch)


def write_stream(path: Path, table: pa.Table, **options) -> None:
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch)


if __name__ == "__main__":
    make_all(Path(__file__).resolve().parents[1] / "golden" / "arrow")
