"""Text from outside (rows, replies, files, errors of other programs) on its way to a screen, a Markdown file or a page.

Every command prints by say(), and writes foreign text into Markdown by markdown() or code(): nothing that a terminal or
a reader of Markdown would obey gets through. HTML pages escape, and pass what they show through visible().
"""

from __future__ import annotations

import re
import sys
from typing import IO

# Unicode's Cc, Cf and Cs (controls, formats, surrogates), but line feed and tab, the joiners U+200C and U+200D, which
# many scripts and emoji need, and the formats that are seen, such as the Arabic number signs.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)
_MARKUP = re.compile(r"(?<=\])\(|[\\`*_{}\[\]#|!~$@]")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# What GitHub's Markdown makes a link of without being asked.
_LINKS = re.compile(r"(?i)(?<=http)(s?):(?=//)|(?<=www)\.")


def visible(text: str) -> str:
    """The text with · for control characters but line feed and tab: escapes, overrides of direction, surrogates."""
    return _HIDDEN.sub("·", text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text)


def clean(text: str) -> str:
    """The text as one line without anything that a terminal would obey: white space is joined."""
    return visible(" ".join(text.split()))


def short(text: str, most: int = 200) -> str:
    """The text, or its beginning and its length where it has more than `most` characters: a sentence stays one."""
    return text if len(text) <= most else f"{text[:most]}.. ({len(text):,} characters)"


def say(line: object, file: IO[str] | None = None) -> None:
    """Prints one line, flushed; file: default standard output.

    Its spaces stay as they are, so that figures stand in columns; a line feed inside it becomes a space. A stream that
    cannot take a character gets its escape: that must end no command.
    """
    file = file or sys.stdout
    text = re.sub(r"[\n\t\u2028\u2029]", " ", visible(str(line)))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def markdown(text: str) -> str:
    """The text as one line of Markdown that shows just it: no element, link, image, cell of a table or mention."""
    escaped = _MARKUP.sub(r"\\\g<0>", clean(text).translate(_ENTITIES))
    return _LINKS.sub(lambda found: "\\" + found[0] if found[0] == "." else found[1] + r"\:", escaped)


def code(text: str) -> str:
    """The text as a span of code, in or outside a table's cell."""
    shown = clean(text).replace("|", r"\|")
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"
