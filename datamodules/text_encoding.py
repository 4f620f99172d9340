"""Recognises a text file that is not UTF-8 by its first bytes."""

import codecs
import unicodedata

SAMPLE = 4096  # bytes that are looked at
BYTE_ORDER_MARKS = {  # the longer first: that of UTF-16 begins that of UTF-32
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def require_utf8(start: bytes) -> None:
    """Raise OSError, with how to convert the file, where its first bytes are those of UTF-16 or UTF-32.

    Without a byte order mark the positions of NUL and other control bytes show it. Text without any, such as Chinese in
    UTF-16 without a line end, is not recognised.
    """
    for name, marks in BYTE_ORDER_MARKS.items():
        if start.startswith(marks):
            raise OSError(_sentence(name, name))
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        if _looks_like(start[:SAMPLE], name):
            raise OSError(_sentence(name[:6], name))


def _sentence(name: str, codec: str) -> str:
    return (
        f"it is text in {name}, and only UTF-8 is read; convert it with `iconv -f {codec} -t UTF-8 FILE > NEW`, "
        "or in PowerShell with `Get-Content FILE | Set-Content -Encoding utf8 NEW`"
    )


def _looks_like(start: bytes, codec: str) -> bool:
    """Whether bytes without a byte order mark are text in this encoding rather than in UTF-8."""
    width = int(codec[4:6]) // 8
    whole = start[: len(start) // width * width]
    high = slice(width - 1, None, width) if codec.endswith("LE") else slice(0, None, width)
    low = slice(0, None, width) if codec.endswith("LE") else slice(width - 1, None, width)
    if len(whole) < 2 * width or whole[high].count(0) < 2:
        return False
    try:
        characters = whole.decode(codec)
    except UnicodeDecodeError as error:
        if error.start < len(whole) - 4:  # nearer the end it may be a character that the sample cuts
            return False
        characters = whole[: error.start].decode(codec)
    if sum(map(_is_text, characters)) < 0.99 * len(characters):
        return False
    if width == 4:
        return True  # other text hardly ever stays below the highest code point in all groups of four bytes
    # In alphabets the high bytes are small numbers, which UTF-8 has for control characters alone.
    return sum(byte < 9 for byte in whole[high]) > 0.3 * len(characters) or not (0 in whole[low] or _is_utf8(start))


def _is_text(character: str) -> bool:
    return character in "\t\n\r\f" or unicodedata.category(character) not in ("Cc", "Cn", "Co", "Cs")


def _is_utf8(start: bytes) -> bool:
    """Whether the bytes are UTF-8, but for a character that the sample may cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=False)
    except UnicodeDecodeError:
        return False
    return True
