"""The reader of pages itself: one that lets everything pass would make every page true."""

from __future__ import annotations

from tests.docs.page import prints


def test_what_the_page_does_not_show_is_not_accepted() -> None:
    """… is the only freedom."""
    assert prints("a …\n…\nend\n", "a b\nx\ny\nend\n")
    assert not prints("a …\nend\n", "a b\nx\nend\n")
    assert not prints("", "noise\n")
