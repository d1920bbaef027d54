"""docs/support.md says what happens today."""

from __future__ import annotations

import difflib

from support_page import COMMAND, PAGE, page


def test_the_page_of_what_is_supported_is_what_comes_out() -> None:
    """Every row of the page is run again; a difference means that the page or the pass has changed."""
    written, made = PAGE.read_text(encoding="utf-8"), page()
    difference = "\n".join(
        difflib.unified_diff(written.splitlines(), made.splitlines(), "docs/support.md", "made", "", "", 0)
    )
    assert written == made, (
        f"docs/support.md is not what comes out today; write it again with `{COMMAND}`\n{difference}"
    )
