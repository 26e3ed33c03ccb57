"""Every checker says no to the history that breaks its promise, and only then."""

from __future__ import annotations

from aegis_cluster.testing.checkers import check_history, check_logs
from aegis_cluster.testing.history import Gone, History, Outcome, Read, Watermark, Write


def good() -> History:
    """Two producers, one reader, everything as it should be."""
    history = History()
    history.writes = [
        Write(1, 0, (b"a", b"b"), 10, Outcome.OK, 0, 20),
        Write(2, 0, (b"c",), 30, Outcome.OK, 2, 40),
        Write(1, 0, (b"d",), 50, Outcome.UNKNOWN, -1, 60),
        Write(1, 0, (b"e",), 70, Outcome.REFUSED, -1, 80),
    ]
    history.reads = [Read(9, 0, offset, value, 100) for offset, value in enumerate((b"a", b"b"))]
    history.watermarks = [Watermark(8, 0, 3, 45, 47, linearizable=True)]
    history.final = {0: [(0, b"a"), (1, b"b"), (2, b"c"), (3, b"d")]}
    return history


def names(history: History) -> set[str]:
    return {found.split(":")[0] for found in check_history(history)}


def test_a_good_history() -> None:
    assert check_history(good()) == []


def test_unknown_may_or_may_not_have_happened() -> None:
    history = good()
    history.final[0].pop()
    assert check_history(history) == []


def test_lost_write() -> None:
    history = good()
    history.final[0] = history.final[0][:2]
    assert names(history) == {"lost_write"}


def test_lost_after_it_was_read() -> None:
    history = good()
    history.reads += [Read(9, 0, 2, b"c", 110), Read(9, 0, 3, b"d", 110)]
    history.final[0].pop()
    assert names(history) == {"lost_write"}


def test_duplicate() -> None:
    history = good()
    history.final[0].append((4, b"c"))
    assert "duplicate" in names(history)


def test_two_values_at_one_offset() -> None:
    history = good()
    history.reads += [Read(9, 0, 2, b"d", 110)]
    assert "inconsistent_offsets" in names(history)


def test_refused_and_yet_there() -> None:
    history = good()
    history.final[0].append((4, b"e"))
    assert names(history) == {"aborted_read"}


def test_never_written() -> None:
    history = good()
    history.final[0].append((4, b"x"))
    assert names(history) == {"aborted_read"}


def test_order_of_a_producer() -> None:
    history = good()
    history.writes[0].outcome = Outcome.UNKNOWN
    history.reads.clear()
    history.final[0] = [(0, b"d"), (1, b"a"), (2, b"c"), (3, b"b")]
    assert names(history) == {"nonmonotonic_send"}


def test_an_older_holder_behind_a_newer_one() -> None:
    history = good()
    history.tokens = {1: 1, 2: 2}
    assert names(history) == {"lease_fenced"}
    history.tokens = {1: 2, 2: 1}
    assert names(history) == {"lease_fenced"}
    history.tokens = {2: 1}
    assert names(history) == set()


def test_half_a_batch() -> None:
    history = good()
    history.writes[0].outcome = Outcome.UNKNOWN
    history.reads.clear()
    history.writes[1].base_offset = 1
    history.watermarks.clear()
    history.final[0] = [(0, b"a"), (1, b"c")]
    assert names(history) == {"torn_batch"}


def test_a_poll_that_skips_or_goes_back() -> None:
    skipped, back = good(), good()
    skipped.reads += [Read(9, 0, 3, b"d", 110)]
    back.reads += [Read(9, 0, 0, b"a", 110)]
    assert names(skipped) == names(back) == {"poll_skip"}


def test_a_place_that_is_denied() -> None:
    history = good()
    history.denied.append("no such offset")
    assert names(history) == {"denied_read"}


def expiring() -> History:
    """As `good`, in a topic whose first three records have gone; the reader was told so."""
    history = good()
    history.expires = True
    history.gone = [Gone(9, 0, 2, 3)]
    history.reads.append(Read(9, 0, 3, b"d", 110))
    history.watermarks.append(Watermark(8, 0, 4, 105, 107, linearizable=True, start=3))
    history.starts = {0: 3}
    history.final = {0: [(3, b"d")]}
    return history


def test_what_was_kept_long_enough_may_go() -> None:
    assert check_history(expiring()) == []


def test_what_is_gone_where_everything_is_kept() -> None:
    history = expiring()
    history.expires = False
    assert names(history) == {"denied_read"}


def test_lost_behind_the_log_start() -> None:
    history = expiring()
    history.starts = {0: 2}
    assert names(history) == {"lost_write"}


def test_a_reader_that_is_sent_on_too_far() -> None:
    history = expiring()
    history.gone.clear()
    assert names(history) == {"poll_skip"}


def test_a_log_start_that_goes_back() -> None:
    history = expiring()
    history.watermarks.append(Watermark(8, 0, 4, 111, 112, linearizable=True, start=1))
    assert names(history) == {"start_goes_back"}


def test_holes() -> None:
    history = good()
    history.writes[2].outcome = Outcome.UNKNOWN
    history.final[0][3] = (4, b"d")
    assert names(history) == {"hole"}


def test_a_stale_answer() -> None:
    history = good()
    history.watermarks.append(Watermark(8, 0, 2, 45, 50, linearizable=True))
    assert names(history) == {"stale_read"}


def test_what_was_asked_before_the_answer_may_be_older() -> None:
    history = good()
    history.watermarks.append(Watermark(8, 0, 2, 35, 50, linearizable=True))
    assert check_history(history) == []


def test_logs_match_up_to_where_they_agree() -> None:
    one = [(1, 1, b"a"), (2, 1, b"b"), (3, 1, b"c")]
    other_tail = [(1, 1, b"a"), (2, 1, b"b"), (3, 2, b"x")]
    other_past = [(1, 1, b"A"), (2, 1, b"b")]
    assert check_logs({"one": one, "other": other_tail}) == []
    assert len(check_logs({"one": one, "other": other_past})) == 1
