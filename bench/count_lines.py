"""Lines of code in each room of the source: lines that are neither blank, comment nor docstring.

    python bench/count_lines.py
    python bench/count_lines.py --files memory plan

Files are tokenised, so a line counts if some token of code lies on it. A string that stands alone as a statement is
documentation: the docstring of a module, class, function or field.
"""

from __future__ import annotations

import argparse
import tokenize
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sophia_galore"
_LAYOUT = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_code_lines(path: Path) -> int:
    """Lines of a Python file that hold code."""
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in _LAYOUT:
                statement.append(token)
            elif token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                if any(part.type != tokenize.STRING for part in statement):
                    lines.update(line for part in statement for line in range(part.start[0], part.end[0] + 1))
                statement = []
    return len(lines)


def main() -> None:
    """Print a line for each room, or for each file of some rooms, and the total."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="the package's folder")
    parser.add_argument("--files", nargs="*", default=[], metavar="ROOM", help="rooms whose files are listed")
    arguments = parser.parse_args()
    rooms: Counter[str] = Counter()
    for path in sorted(arguments.source.rglob("*.py")):
        place, count = path.relative_to(arguments.source), count_code_lines(path)
        room = place.parts[0] if len(place.parts) > 1 else "(package)"
        rooms[room] += count
        if room in arguments.files:
            print(f"{count:7,}  {place}")
    for room, count in rooms.items():
        print(f"{count:7,}  {room}")
    print(f"{rooms.total():7,}  total")


if __name__ == "__main__":
    main()
