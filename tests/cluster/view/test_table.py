"""The view's table: folds commands, keeps time, notices that it differs, and never raises."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.cluster.view import table as table_module
from aegis_cluster.cluster.view.leases import GRANTED, LOST, REFUSED, TICK_MS_MAX
from aegis_cluster.cluster.view.table import ViewTable, check_lease
from aegis_cluster.wall_clock import clock_problem


def do(table: ViewTable, *command: Any) -> str:
    return table.apply(msgpack.packb(command)).kind


def tick(table: ViewTable, delta_ms: int = 1_000, term: int = 1) -> str:
    return do(table, "tick", term, delta_ms, table.ticks, table.digest)


@pytest.fixture
def table() -> ViewTable:
    table = ViewTable()
    do(table, "reign", 1)
    return table


def test_a_node_is_up_as_long_as_it_announces_itself(table: ViewTable) -> None:
    do(table, "node", 1, {"name": "node-1"})
    do(table, "node", 2, {"name": "node-2"})
    for _ in range(8):
        tick(table)
        do(table, "node", 2, {"name": "node-2"})
    assert [table.is_up(record) for record in table.nodes.values()] == [False, True]
    assert table.nodes[2].said == {"name": "node-2"}


def test_a_wall_clock_is_held_against_the_others(table: ViewTable) -> None:
    for node, ahead_ms in ((1, 0), (2, 172_800_000), (3, 400)):
        tick(table)
        said = {"name": f"node-{node}", "wall_ms": 1_000_000 + table.clock_ms + ahead_ms}
        do(table, "node", node, said)
    do(table, "node", 4, {"name": "node-4"})
    do(table, "node", 5, {"name": "node-5", "wall_ms": "noon"})
    assert table.clocks_ahead() == {1: -400, 2: 172_799_600, 3: 0}
    assert ViewTable().clocks_ahead() == {}
    sentences = {node: clock_problem(ahead) for node, ahead in table.clocks_ahead().items()}
    assert sentences[1] is sentences[3] is clock_problem(None) is None
    assert sentences[2] is not None
    assert sentences[2].startswith("The clock is 2.0 days ahead of the other nodes'.")
    behind = clock_problem(-7_200_000)
    assert behind is not None
    assert "2.0 hours behind" in behind


def test_a_node_that_is_gone_for_long_is_forgotten(table: ViewTable) -> None:
    do(table, "node", 1, {"name": "node-1"})
    for _ in range(table_module.FORGET_MS // 1_000 + 1):
        tick(table)
    assert table.nodes == {}


def test_the_clock_moves_by_ticks_of_the_present_reign_alone(table: ViewTable) -> None:
    tick(table)
    assert tick(table, term=2) == REFUSED
    do(table, "reign", 2)
    assert tick(table, term=1) == REFUSED
    assert tick(table, delta_ms=-1, term=2) == REFUSED
    assert table.clock_ms == 1_000
    tick(table, delta_ms=60_000, term=2)
    assert table.clock_ms == 1_000 + TICK_MS_MAX
    do(table, "reign", 1)
    assert table.reign == 2


def test_leases_run_on_that_clock(table: ViewTable) -> None:
    granted = table.apply(msgpack.packb(["acquire", "job", "a", 0, 5_000]))
    assert granted.kind == GRANTED
    assert do(table, "acquire", "job", "b", 0, 5_000) == "held"
    assert do(table, "renew", "job", "a", granted.token, 5_000) == GRANTED
    for _ in range(7):
        tick(table)
    assert do(table, "renew", "job", "a", granted.token, 5_000) == LOST
    assert do(table, "acquire", "job", "b", 0, 5_000) == GRANTED
    assert do(table, "release", "job", "b", 0, 5_000) == LOST


def test_there_are_no_leases_before_the_first_reign() -> None:
    assert do(ViewTable(), "acquire", "job", "a", 0, 5_000) == REFUSED


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["job", "a", 0],
        ["", "a", 0, 5_000],
        ["job", "", 0, 5_000],
        ["x" * 129, "a", 0, 5_000],
        ["job", "a", -1, 5_000],
        ["job", "a", 0, limits.LEASE_TTL_MS_MIN - 1],
        ["job", "a", 0, limits.LEASE_TTL_MS_MAX + 1],
        ["job", b"a", 0, 5_000],
    ],
)
def test_a_malformed_lease_is_refused(table: ViewTable, fields: list[Any]) -> None:
    with pytest.raises(ValueError, match="a lease has"):
        check_lease(fields)
    before = table.to_fields()
    assert do(table, "acquire", *fields) == REFUSED
    assert table.to_fields() == before


def test_equal_logs_make_equal_tables_also_through_a_snapshot(table: ViewTable) -> None:
    copy = ViewTable()
    do(table, "node", 1, {"name": "node-1", "load": {"cpu": 1.5}})
    do(table, "acquire", "job", "a", 0, 5_000)
    tick(table)
    packed = msgpack.packb(table.to_fields())
    copy.restore(msgpack.unpackb(packed, use_list=False, strict_map_key=False))
    for each in (table, copy):
        do(each, "acquire", "job", "b", 0, 5_000)
        do(each, "node", 2, {"name": "node-2"})
        tick(each)
    assert copy.to_fields() == table.to_fields()
    assert not copy.diverged


def test_a_table_that_differs_is_told_by_the_next_tick(table: ViewTable) -> None:
    other = ViewTable()
    do(other, "reign", 1)
    for each in (table, other):
        tick(each)
    do(other, "node", 9, {"name": "only here"})
    commands = []
    for _ in range(2):
        commands.append(msgpack.packb(["tick", 1, 1_000, table.ticks, table.digest]))
        table.apply(commands[-1])
    for command in commands:
        assert not other.diverged
        other.apply(command)
    assert other.diverged
    assert not table.diverged


def test_a_snapshot_of_another_kind_is_told() -> None:
    with pytest.raises(ValueError, match="version 9"):
        ViewTable().restore((9, (), b""))


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_change_nothing_and_raise_nothing(blob: bytes) -> None:
    table = ViewTable()
    do(table, "reign", 1)
    before = table.to_fields()
    if table.apply(blob).kind == REFUSED:
        assert table.to_fields() == before


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.sampled_from(["node", "reign", "tick", "acquire", "renew", "release"]), st.data())
def test_fields_of_any_kind_raise_nothing(kind: str, data: st.DataObject) -> None:
    table = ViewTable()
    do(table, "reign", 1)
    table.apply(msgpack.packb([kind, *data.draw(st.lists(anything, max_size=5))]))
    msgpack.packb(table.to_fields())


def test_records_and_nodes_have_limits(table: ViewTable) -> None:
    assert do(table, "node", 1, {"name": "x" * 20_000}) == REFUSED
    for node in range(1, limits.VIEW_NODES_MAX + 1):
        do(table, "node", node, {})
    assert do(table, "node", limits.VIEW_NODES_MAX + 1, {}) == REFUSED
    assert do(table, "node", 1, {"name": "again"}) == "announced"
