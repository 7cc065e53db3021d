"""The date that chat templates see: the day on which the run began, whenever its data are rendered.

A template may ask for today's date by `strftime_now`, as that of Llama 3.2 does. What it would write changes over
night, and with it the tokens of every example. So a fixed day stands in the template itself, as a macro of that name.
"""

from __future__ import annotations

import datetime
import json
import re

_ASKS = re.compile(r"\bstrftime_now\b")
# What `strftime` knows of a day at midnight.
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZ"


def today() -> str:
    """This day, as `2026-11-28`."""
    return datetime.date.today().isoformat()


def asks_for_date(template: str) -> bool:
    """Whether what a template writes depends on the day.

    Args:
        template: Its text.
    """
    return bool(_ASKS.search(template))


def with_date(template: str, date: str) -> str:
    """Fixes the day that a template sees.

    Args:
        template: Its text.
        date: The day, as `2026-11-28`; "": whatever day it is.

    Returns:
        A template that writes the same on any day; the same text, if it does not ask.
    """
    if not date or not asks_for_date(template):
        return template
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    words = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    # Without leading zeros; not every platform's strftime knows these.
    words |= {f"%-{letter}": words[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMS"}
    # A double percent sign waits as a character that no format has.
    chain = "".join(f"|replace({json.dumps(key)}, {json.dumps(word)})" for key, word in sorted(words.items()))
    # The empty text keeps the macro's end from trimming what the template begins with.
    body = '{{ format|replace("%%", "\\u0000")' + chain + '|replace("\\u0000", "%") }}'
    return "{%- macro strftime_now(format) -%}" + body + "{%- endmacro -%}{{ '' }}" + template
