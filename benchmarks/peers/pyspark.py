"""PySpark, local[2]: everything in Spark's own functions but masking, texts beyond ASCII, and tokens.

Python sees, by Arrow, only the messages of conversations that need it: those with something suspicious in them, found
by the same regular expression, and those beyond ASCII. Copies are told by a 64-bit hash.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema

from app.conversation import normalised
from app.ingestion.anomalies import mojibake, repaired
from app.privacy import SUSPECT, Mask
from benchmarks.peers.protocol import BATCH_ROWS, PROCESSES, Counts, Request, main
from benchmarks.peers.records import DETECTOR, RULES, Packer

RECORD = (
    "conversation_id string, channel string, language string, started_at string, "
    "messages array<struct<role: string, content: string, intent: string>>"
)
BLOCKS = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "position_ids", "labels")])


def session() -> SparkSession:
    """Two cores, one JVM."""
    options = {
        "spark.driver.memory": "6g",
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "8",
        "spark.sql.files.maxPartitionBytes": "32m",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
        "spark.serializer": "org.apache.spark.serializer.KryoSerializer",
        "spark.sql.parquet.compression.codec": "snappy",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "false",
        "spark.log.level": "ERROR",
    }
    builder = SparkSession.builder.master(f"local[{PROCESSES}]")
    for name, value in options.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def fixed(contents: pa.Array, masks: bool) -> pa.Array:
    """The messages of conversations that need it, normalised, repaired and masked; none for the others."""
    return pa.array([None if texts is None else _fixed(texts, masks) for texts in contents.to_pylist()], contents.type)


def _fixed(texts: list[str], masks: bool) -> list[str]:
    made = [text if text.isascii() else normalised(repaired(text) if mojibake(text) else text) for text in texts]
    mask = Mask(DETECTOR, made)
    return [mask.text(text) for text in made] if masks else made


def cleaned(rows: DataFrame, masks: bool) -> DataFrame:
    """The valid conversations of `RECORD` rows, with a column `key`."""
    # No filter before Python's part and one after it: Spark pushes each below what it depends on, and computes that
    # twice.
    contents = sf.transform(sf.col("messages.content"), _normal)
    rows = rows.filter(sf.col("messages").isNotNull()).withColumn("contents", contents)
    needed = sf.concat_ws("\n", "contents").rlike(r"[^\x00-\x7f]")
    if masks:
        needed = needed | sf.exists("contents", lambda text: text.rlike(SUSPECT))
    by_python = sf.arrow_udf(lambda column: fixed(column, masks), "array<string>")
    rows = rows.withColumn("contents", sf.coalesce(by_python(sf.when(needed, sf.col("contents"))), sf.col("contents")))
    channel, time = sf.lower(sf.coalesce("channel", sf.lit("unknown"))), sf.try_to_timestamp("started_at")
    messages = sf.col("messages")
    rows = rows.filter(
        (sf.length(sf.trim("conversation_id")) > 0)
        & sf.size(messages).between(1, RULES.max_messages)
        & channel.isin(sorted(RULES.channels))
        & (sf.col("started_at").isNull() | time.between(sf.lit("1970-01-01"), sf.lit(RULES.now)))
        & sf.forall("contents", _is_right)
        & _alternate()
    )
    said = sf.zip_with(
        sf.col("messages.role"), sf.col("contents"), lambda role, text: sf.concat_ws("\x1f", role, sf.lower(text))
    )
    whole = sf.zip_with(messages, sf.col("contents"), lambda message, text: message.withField("content", text))
    labelled = sf.filter(messages, lambda message: (message.role == "user") & message.intent.isNotNull())
    return rows.select(
        "conversation_id", channel.alias("channel"), "language", time.alias("started_at"),
        sf.try_element_at(labelled, sf.lit(1))["intent"].alias("intent"), whole.alias("messages"),
        sf.xxhash64(sf.concat_ws("\x1e", said)).alias("key"),
    )  # fmt: skip


def _is_right(text: Column) -> Column:
    whole = sf.length(text).between(1, RULES.max_message_chars) & ~sf.contains(text, sf.lit("\ufffd"))
    return sf.coalesce(whole, sf.lit(False))


def _normal(text: Column) -> Column:
    return sf.trim(sf.regexp_replace(text, r"[\x00-\x1f\x7f\s]+", " "))


def _alternate() -> Column:
    roles = sf.col("messages.role")
    system = sf.coalesce(roles[0] == "system", sf.lit(False)).cast("int")
    expected = sf.transform(
        roles,
        lambda role, place: (
            sf.when(place < system, "system").when((place - system) % 2 == 0, "user").otherwise("assistant")
        ),
    )
    return sf.coalesce((expected == roles) & (sf.size(roles) > system), sf.lit(False))


def packed(batches: Iterator[pa.RecordBatch], path: Any) -> Iterator[pa.RecordBatch]:
    """Blocks of conversations."""
    packer = Packer(path)
    for batch in batches:
        blocks = packer.blocks(batch.column("messages").to_pylist()).cast(BLOCKS)
        yield from blocks.to_batches()


def work(request: Request) -> Counts:
    """One job."""
    spark = session()
    valid, kept = Observation(), Observation()
    # The files, not their lines as text: from_json is evaluated again for each filter that is pushed below it.
    read = spark.read.schema(RECORD).json([str(file) for file in request.files])
    rows = cleaned(read, request.masks).observe(valid, sf.count("*").alias("rows"))
    rows = rows.dropDuplicates(["key"]).observe(kept, sf.count("*").alias("rows"))
    if request.task == "A":
        rows = rows.select("messages").mapInArrow(
            lambda batches: packed(batches, request.tokenizer), from_arrow_schema(BLOCKS)
        )
    rows.write.mode("overwrite").parquet(str(request.result))
    return Counts(kept.get["rows"], valid.get["rows"] - kept.get["rows"])


if __name__ == "__main__":
    main(work)
    session().stop()
