"""Recognises by its first bytes a file that is no text, or text that is not UTF-8."""

import codecs
import unicodedata

SAMPLE = 4096  # bytes that are looked at
BYTE_ORDER_MARKS = {  # the longer first: that of UTF-16 begins that of UTF-32
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# beginnings of files that are no text, what they are, and what to do
KINDS = (
    (b"\x1f\x8b", "gzip data", "add .gz to its name"),
    (b"PAR1", "a parquet file", "give it a name that ends in .parquet"),
    (b"PK\x03\x04", "a zip archive, as .docx and .xlsx are", "unpack it, or save it as text"),
    (b"BZh91AY&SY", "data of bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "data of xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "data of zstd", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"ARROW1\0\0", "an Arrow file", "write it as .parquet"),
    (b"SQLite format 3\0", "a database of SQLite", "write a table of it as .csv"),
    (b"%PDF-", "a PDF", "save it as text, for example with pdftotext"),
)
TEXT_TOO = (b"PAR1", b"%PDF-")  # text may begin so: a gene is called PAR1


def require_utf8(start: bytes) -> None:
    """Raise OSError, with what to do, where the first bytes are those of a file that is no text, of UTF-16 or of UTF-32.

    Without a byte order mark the positions of NUL and other control bytes show it. Text without any, such as Chinese in
    UTF-16 without a line end, is not recognised.
    """
    for mark, kind, advice in KINDS:
        if start.startswith(mark) and (mark not in TEXT_TOO or b"\0" in start or not _is_utf8(start)):
            raise OSError(f"it is {kind}, not text; {advice}")
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
