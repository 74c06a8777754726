"""Text in pieces: together the whole text, cut before the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlpmem_rag.pieces import TextPieces

STOPS = st.lists(st.text("ab \n", min_size=1, max_size=3), max_size=3)


def decode(ids: list[int]) -> str:
    """One byte a token; a character of several bytes comes in parts."""
    return bytes(ids).decode(errors="replace")


def pieces_of(text: str, stop: list[str], *, strip: bool) -> tuple[list[str], TextPieces]:
    pieces = TextPieces(decode, stop, strip=strip)
    given_out = [pieces.add(byte) for byte in text.encode()]
    return [*given_out, pieces.end()], pieces


def cut(text: str, stop: list[str]) -> str:
    """The slow way: look at every place in turn."""
    for place in range(len(text)):
        if any(text.startswith(s, place) for s in stop):
            return text[:place]
    return text


@given(st.text("abc \né€🙂", max_size=12), STOPS, st.booleans())
def test_pieces_are_the_text_up_to_a_stop_string(text: str, stop: list[str], strip: bool) -> None:
    found, pieces = pieces_of(text, stop, strip=strip)
    expected = earliest_seen(text, stop)
    assert "".join(found) == (expected.strip() if strip else expected)
    assert pieces.stopped == any(s in text for s in stop)


def earliest_seen(text: str, stop: list[str]) -> str:
    """A stop string counts as soon as it is there, even if a longer one began before it."""
    for length in range(len(text) + 1):
        if any(s in text[:length] for s in stop):
            return cut(text[:length], stop)
    return text


def test_what_may_become_a_stop_string_is_held_back() -> None:
    found, _ = pieces_of("one en two end three", ["end"], strip=False)
    assert "".join(found[:6]) == "one "
    assert "".join(found[:7]) == "one en "
    assert "".join(found) == "one en two "


def test_a_character_is_given_out_whole() -> None:
    found, _ = pieces_of("a€b", [], strip=False)
    assert found == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    pieces = TextPieces(decode, strip=False)
    assert [pieces.add(97), pieces.add(0xE2), pieces.end()] == ["a", "", "\ufffd"]


def test_white_space_at_both_ends_is_left_out() -> None:
    found, _ = pieces_of("  a b \n", [], strip=True)
    assert found == ["", "", "a", "", " b", "", "", ""]
