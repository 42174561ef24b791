"""StopMatcher: however the text is cut into pieces, it shows what comes before the first completed stop string."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.engine import StopMatcher

STOPS = st.lists(st.text("ab\né", min_size=1, max_size=6), max_size=4)
PIECES = st.lists(st.text("ab\nécd", max_size=5), max_size=12)


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The whole text at once: the shortest beginning that ends with a stop, less the longest such stop."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=250)
@given(STOPS, PIECES)
def test_equals_the_non_streaming_cut_whatever_the_pieces(stops, pieces):
    matcher = StopMatcher(stops)
    shown, hit = "", False
    for piece in pieces:
        emitted, hit = matcher.push(piece)
        shown += emitted
        if hit:
            break
    shown += matcher.flush()
    expected, stop = cut_at_first_stop("".join(pieces), stops)
    assert (shown, hit, matcher.hit) == (expected, stop is not None, stop)


@settings(max_examples=150)
@given(STOPS, PIECES)
def test_holds_back_exactly_what_may_still_become_a_stop(stops, pieces):
    matcher = StopMatcher(stops)
    shown = fed = ""
    for piece in pieces:
        emitted, hit = matcher.push(piece)
        shown, fed = shown + emitted, fed + piece
        if hit:
            return
        held = fed[len(shown) :]
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        assert held == max((b for b in beginnings if fed.endswith(b)), key=len, default="")


def test_across_token_boundaries():
    matcher = StopMatcher(["<|end|>"])
    assert [matcher.push(piece) for piece in ["Hi <", "|en", "d", "|> more"]] == [
        ("Hi ", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert matcher.push("x") == ("", True)
    assert matcher.flush() == ""


def test_a_false_start_is_shown_when_it_breaks_and_at_the_end():
    matcher = StopMatcher(["###"])
    assert matcher.push("a##") == ("a", False)
    assert matcher.push("b#") == ("##b", False)
    assert matcher.flush() == "#"
    assert matcher.hit is None


def test_the_longest_of_the_stops_that_end_together_is_cut():
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", True)
    assert StopMatcher(["ab", "b"]).push("xab") == ("x", True)


def test_without_stops_nothing_is_held():
    assert StopMatcher().push("anything") == ("anything", False)


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_time_is_linear_for_the_worst_stop():
    stop = "a" * 999 + "b"
    matcher = StopMatcher([stop])
    start = time.process_time()
    for _ in range(2_000):
        matcher.push("a" * 50)
    assert (
        time.process_time() - start < 3.0
    )  # 100,000 characters; a quadratic search would take a hundred times as long
    assert matcher.push("b") == ("", True)
