"""The one door through which text from outside reaches a screen or a Markdown file."""

from __future__ import annotations

import io
import unicodedata

import pytest

from gadcore.text import clean, code, markdown, say, short, visible

EVIL = "a\x1b[31m\u202eb\u2066\x07\x9b\u200b\ud800\x00"


def test_what_a_terminal_obeys_is_shown_as_a_point() -> None:
    assert visible(EVIL) == "a·[31m·b······"
    assert visible("tab\tline\r\nfeed\rü 🧑‍🚀") == "tab\tline\nfeed\nü 🧑‍🚀"
    assert clean(f" two \n\u2028 words {EVIL}") == "two words a·[31m·b······"


def test_what_is_long_is_cut_and_its_length_said() -> None:
    assert short("ab" * 100) == "ab" * 100
    assert short("ab" * 2200) == "ab" * 100 + ".. (4,400 characters)"


def test_every_control_and_format_of_unicode_is_thought_of() -> None:
    seen = {"\n", "\t", "\r", "\u200c", "\u200d"}
    for code_point in range(0x110000):
        character = chr(code_point)
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in seen
        # The formats that stand for something to be read.
        hidden &= not (unicodedata.bidirectional(character) == "AN" or 0x13430 <= code_point <= 0x13440)
        hidden &= code_point not in (0x70F, 0x110BD, 0x110CD)
        assert (visible(character) == "·") == (hidden or character == "·"), hex(code_point)


def test_a_printed_line_is_one_line_and_keeps_its_spaces() -> None:
    file = io.StringIO()
    say(f"  a  b\nc {EVIL}", file)
    assert file.getvalue() == "  a  b c a·[31m·b······\n"
    ascii_only = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    say("ü", ascii_only)
    assert raw.getvalue() == b"\\xfc\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 1.5 (so)", "plain text, 1.5 (so)"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("[a](b) ![i](j)", r"\[a\]\(b) \!\[i\]\(j)"),
        ("a|b\n# c", r"a\|b \# c"),
        ("`c` *d* _e_ ~f~ @g $h$", r"\`c\` \*d\* \_e\_ \~f\~ \@g \$h\$"),
        ("https://x.example www.x.example", r"https\://x.example www\.x.example"),
        (EVIL, r"a·\[31m·b······"),
    ],
)
def test_markdown_shows_what_was_said(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize(("text", "span"), [("a", "`a`"), ("a`b", "``a`b``"), ("`a", "`` `a ``"), ("a|b", r"`a\|b`")])
def test_a_span_of_code_cannot_be_left(text: str, span: str) -> None:
    assert code(text) == span
