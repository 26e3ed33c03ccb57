"""Positions that rest as bytes are the same positions, whatever happens between two snapshots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.broker.groups.commands import CommitOffsets
from aegis_cluster.broker.groups.group_table import GroupTable
from aegis_cluster.broker.groups.positions import pack, unpack
from aegis_cluster.ids import GroupId, RecordOffset, TopicPartition

PLACES = st.builds(TopicPartition, st.sampled_from(["orders", "refunds", "ä"]), st.integers(0, 9))
COMMITS = st.builds(
    lambda group, session, number, place, offset: CommitOffsets(
        group, session, number, ((place, GroupId(7), RecordOffset(offset)),)
    ),
    st.sampled_from(["g", "h"]),
    st.sampled_from(["", "s", "t"]),
    st.integers(0, 9),
    PLACES,
    st.integers(0, 2**62),
)


def restarted(table: GroupTable) -> GroupTable:
    copy = GroupTable()
    for piece in table.slices():
        copy.add(piece)
    return copy


@given(st.lists(st.one_of(COMMITS, st.sampled_from(["snapshot", "restart"]))))
def test_a_table_that_is_written_and_read_again_stays_equal(
    steps: list[CommitOffsets | str],
) -> None:
    table, twin = GroupTable(), GroupTable()
    for time_ms, step in enumerate(steps):
        if isinstance(step, CommitOffsets):
            table.apply(step, time_ms)
            twin.apply(step, time_ms)
        elif step == "snapshot":
            list(table.slices())
        else:
            table = restarted(table)
        for name in ("g", "h"):
            assert dict(table.positions(name)) == dict(twin.positions(name))
            assert unpack(pack(table.positions(name))) == twin.positions(name)


def test_a_snapshot_is_of_the_moment_of_its_capture() -> None:
    def commit(offset: int) -> CommitOffsets:
        place = TopicPartition("orders", 0)
        return CommitOffsets("g", "", 0, ((place, GroupId(7), RecordOffset(offset)),))

    table = GroupTable()
    table.apply(commit(1), 1)
    captured = table.slices()
    table.apply(commit(2), 2)
    copy = GroupTable()
    for piece in captured:
        copy.add(piece)
    assert [one.offset for one in copy.positions("g").values()] == [1]
    assert [one.offset for one in restarted(table).positions("g").values()] == [2]
