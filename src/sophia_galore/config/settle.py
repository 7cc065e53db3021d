"""One value for each key, out of all that was given.

The file speaks first and may not contradict itself; overrides speak after it, and the last one wins.
"""

from __future__ import annotations

from collections.abc import Iterable

from sophia_galore.config.aliases import Denied, translate
from sophia_galore.config.given import Given
from sophia_galore.config.keys import children, keys, sections
from sophia_galore.config.nearest import nearest_key
from sophia_galore.config.problems import Problem, show


def settle(
    file: Iterable[Given | Problem], overrides: Iterable[Given | Problem]
) -> tuple[dict[str, Given], list[Problem]]:
    """Decides which value each key has.

    Args:
        file: What the file gives, in its order.
        overrides: What the overrides give, in their order.

    Returns:
        The value of each key that was given, and what is wrong.
    """
    problems: list[Problem] = []
    chosen: dict[str, Given] = {}
    denied: list[Given] = []
    for given in _translated(file, problems):
        first = chosen.get(given.key)
        if isinstance(given.value, Denied):
            denied.append(given)
        elif first is None:
            chosen[given.key] = given
        elif not _same(first.value, given.value):
            problems.append(_contradiction(first, given))
    later = list(_translated(overrides, problems))
    named_later = {given.key for given in later}
    denied = [given for given in denied if given.key not in named_later]
    for given in later:
        if isinstance(given.value, Denied):
            denied.append(given)
        else:
            chosen[given.key] = given
    problems.extend(_broken_denials(denied, chosen))
    return chosen, problems


def _translated(entries: Iterable[Given | Problem], problems: list[Problem]) -> Iterable[Given]:
    """The entries under known keys; everything else goes to `problems`."""
    for entry in entries:
        result = entry if isinstance(entry, Problem) else translate(entry)
        if result is None:
            continue
        if isinstance(result, Problem):
            problems.append(result)
        elif result.key in keys():
            yield result
        else:
            problems.append(_unknown(result))


def _unknown(given: Given) -> Problem:
    suggestion = nearest_key(given.key)
    section = next((name for name in reversed(sections()) if given.key.startswith(f"{name}.")), "")
    known = f"Known {f'under {section}' if section else 'sections'}: {', '.join(children(section))}."
    return Problem(given.where, f"unknown key '{given.key}'", f"Did you mean {suggestion}?" if suggestion else known)


def _contradiction(first: Given, second: Given) -> Problem:
    cause = (
        f"{second.name()} is {show(second.value)}, but {first.name()} is {show(first.value)} at {first.where}; "
        "both mean the same key"
    )
    return Problem(second.where, cause, f"Keep one of them, best {first.key}.")


def _broken_denials(denied: Iterable[Given], chosen: dict[str, Given]) -> Iterable[Problem]:
    for given in denied:
        asked = chosen.get(given.key)
        if isinstance(given.value, Denied) and asked is not None and asked.value == given.value.value:
            cause = f"{given.written} is false, but {asked.name()} is {show(asked.value)} ({asked.where})"
            yield Problem(given.where, cause, f"Remove {given.written}, or change {given.key}.")


def _same(one: object, other: object) -> bool:
    """Equality in which `true` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
