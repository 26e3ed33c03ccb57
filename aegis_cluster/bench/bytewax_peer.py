"""The two pipelines of `stream` in Bytewax (`pip install bytewax`), which needs no broker.

It reads records from memory as JSON and keeps its results there: no log, no recovery, no
transaction. So its figures are an upper bound for it, not the same work.
"""

from __future__ import annotations

import importlib
import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

op: Any = importlib.import_module("bytewax.operators")
windowing: Any = importlib.import_module("bytewax.operators.windowing")
testing: Any = importlib.import_module("bytewax.testing")
dataflow: Any = importlib.import_module("bytewax.dataflow")

BATCH: Final = 1_000
RECORDS: Final = 20_000


def rates(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Records a second of each pipeline."""
    encoded = [json.dumps(record).encode() for record in records[:RECORDS]]
    return {
        "bytewax filter+map records/s": _rate(encoded, _filter_and_map),
        "bytewax count records/s": _rate(encoded, _count),
    }


def _rate(encoded: list[bytes], build: Any) -> float:
    flow = dataflow.Dataflow("bench")
    parsed = op.input("in", flow, testing.TestingSource(encoded, batch_size=BATCH))
    results = build(op.map("parse", parsed, json.loads))
    op.output("out", results, testing.TestingSink([]))
    begin = time.perf_counter()
    testing.run_main(flow)
    return len(encoded) / (time.perf_counter() - begin)


def _filter_and_map(stream: Any) -> Any:
    wanted = op.filter("purchases", stream, lambda e: e["type"] == "purchase")
    made = op.map(
        "made",
        wanted,
        lambda e: {"customer": e["customer_id"], "amount": e["total"], "at": e["created_at"]},
    )
    return op.map("dump", made, json.dumps)


def _count(stream: Any) -> Any:
    clock = windowing.EventClock(
        ts_getter=lambda e: datetime.fromtimestamp(e["created_at"], UTC),
        wait_for_system_duration=timedelta(0),
    )
    windows = windowing.TumblingWindower(
        length=timedelta(minutes=1), align_to=datetime(2020, 1, 1, tzinfo=UTC)
    )
    counted = windowing.count_window("count", stream, clock, windows, lambda e: e["customer_id"])
    return counted.down
