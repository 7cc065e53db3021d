"""Fix the date that chat templates see to the day on which the run began.

A template may write today's date by `strftime_now`, as that of Llama 3.2 does. Then the tokens of every example would
change from day to day. So a macro of that name with a fixed date is added to the template.
"""

from __future__ import annotations

import datetime
import json
import re

_ASKS = re.compile(r"\bstrftime_now\b")
# The directives of `strftime`.
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZ"


def today() -> str:
    """Return the current date, as `2026-11-28`."""
    return datetime.date.today().isoformat()


def asks_for_date(template: str) -> bool:
    """Return whether the output of a template depends on the date.

    Args:
        template: Its text.
    """
    return bool(_ASKS.search(template))


def with_date(template: str, date: str) -> str:
    """Fix the date that a template sees.

    Args:
        template: Its text.
        date: The date, as `2026-11-28`; "": the current date.

    Returns:
        A template that writes the same on any day; unchanged if it does not use the date.
    """
    if not date or not asks_for_date(template):
        return template
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    words = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    # Without leading zeros; not every platform's strftime supports these.
    words |= {f"%-{letter}": words[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMS"}
    # A double percent sign is replaced by a character that no format contains, and restored at the end.
    chain = "".join(f"|replace({json.dumps(key)}, {json.dumps(word)})" for key, word in sorted(words.items()))
    # The empty text prevents the end of the macro from trimming the beginning of the template.
    body = '{{ format|replace("%%", "\\u0000")' + chain + '|replace("\\u0000", "%") }}'
    return "{%- macro strftime_now(format) -%}" + body + "{%- endmacro -%}{{ '' }}" + template
