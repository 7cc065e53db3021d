"""List the documented functions, classes and methods of Python's standard library.

This file only uses the standard library, because `stdlib_docs` runs it as a script in a separate interpreter: so the
caller does not import two hundred modules, and patches of other packages do not change the result.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

# Importing these opens a window or a browser, prints, changes the process, or is no documentation.
EXCLUDED = (
    "antigravity this idlelib turtle turtledemo tkinter lib2to3 test ensurepip venv site sitecustomize usercustomize "
    "distutils imp readline rlcompleter pydoc_data xxlimited xxlimited_35 xxsubtype nt ntpath posix posixpath "
    "genericpath nturl2path sre_compile sre_constants sre_parse msilib msvcrt winreg winsound pip"
)
SUBMODULES = (
    "asyncio.subprocess collections.abc concurrent.futures ctypes.util curses.ascii dbm.dumb email.charset "
    "email.generator email.header email.headerregistry email.message email.mime.text email.parser email.policy "
    "email.utils encodings.idna html.entities html.parser http.client http.cookiejar http.cookies http.server "
    "importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util json.decoder "
    "json.encoder logging.config logging.handlers multiprocessing.connection multiprocessing.managers "
    "multiprocessing.pool multiprocessing.shared_memory os.path pathlib.types string.templatelib unittest.mock "
    "urllib.error urllib.parse urllib.request urllib.response urllib.robotparser wsgiref.headers wsgiref.simple_server "
    "wsgiref.util wsgiref.validate xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax.handler "
    "xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server"
)
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{9,}")
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
)

Entry = tuple[str, str, str, str]
"""Name, kind (function, class, method), call and documentation."""


def entries() -> list[Entry]:
    """List everything documented that can be called, once each, sorted by name.

    Returns:
        Entries, the same for every run of one Python installation.
    """
    found: dict[str, Entry] = {}
    for module_name in module_names():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated modules warn when imported
                module = importlib.import_module(module_name)
        except Exception:  # the module does not exist on this platform
            continue
        for entry in _of_module(module, module_name):
            found.setdefault(entry[0], entry)
    # Inherited and re-exported documentation is listed under the shortest name.
    owners: dict[str, str] = {}
    for name in sorted(found, key=lambda name: (name.count("."), name)):
        owners.setdefault(found[name][3], name)
    return [found[name] for name in sorted(owners.values())]


def module_names() -> list[str]:
    """Return the public modules that are safe to import.

    Returns:
        Names, sorted; some may not exist on this platform or in this version.
    """
    excluded = EXCLUDED.split()
    top = (name for name in sys.stdlib_module_names if not name.startswith("_") and name not in excluded)
    return sorted({*top, *SUBMODULES.split()})


def call_of(name: str, thing: Any, *, bound: bool) -> str | None:
    """Return how a function or class is called, unless the signature depends on this machine.

    Args:
        name: Its dotted name.
        thing: A function or a class.
        bound: Whether its first parameter is filled in by Python (self, cls).

    Returns:
        Such as ``json.dumps(obj, *, indent=None)``, or None if it has no signature or one with a
        default that is not the same everywhere (a path, an object's address).
    """
    try:
        signature = inspect.signature(thing)
    except Exception:  # many builtins have none; annotations may fail to evaluate
        return None
    parameters = list(signature.parameters.values())
    if bound:
        if not parameters:
            return None
        if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]
    if not all(parameter.default is inspect.Parameter.empty or _plain(parameter.default) for parameter in parameters):
        return None
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    call = f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"
    return None if ADDRESS.search(call) else call


def documentation_of(thing: Any) -> str | None:
    """Return the documentation of a function or class, unless it is inherited.

    Args:
        thing: A function or a class.

    Returns:
        The text without its indentation, or None.
    """
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    if not isinstance(doc, str):
        return None
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(doc).splitlines()).strip()
    return None if not text or ADDRESS.search(text) else text


def _of_module(module: types.ModuleType, module_name: str) -> Iterator[Entry]:
    exported = getattr(module, "__all__", None)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name in sorted(set(exported) if exported is not None else vars(module)):
        thing = vars(module).get(name)
        if name.startswith("_") or not isinstance(thing, (type, *FUNCTIONS)):
            continue
        home = str(getattr(thing, "__module__", None) or "").partition(".")[0]
        if home not in sys.stdlib_module_names or (exported is None and home.lstrip("_") != module_name.split(".")[0]):
            continue
        yield from _entry(prefix + name, "class" if isinstance(thing, type) else "function", thing, bound=False)
        if isinstance(thing, type):
            yield from _methods(thing, prefix + name)


def _methods(owner: type, owner_name: str) -> Iterator[Entry]:
    for name, member in sorted(vars(owner).items()):
        if name.startswith("_"):
            continue
        static = isinstance(member, staticmethod)
        thing = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if not isinstance(thing, FUNCTIONS):
            continue
        # Of a class method written in C, the signature has no first parameter to take away.
        bound = not static and not isinstance(thing, (types.ClassMethodDescriptorType, types.BuiltinFunctionType))
        yield from _entry(f"{owner_name}.{name}", "method", thing, bound=bound)


def _entry(name: str, kind: str, thing: Any, *, bound: bool) -> Iterator[Entry]:
    doc = documentation_of(thing)
    call = call_of(name, thing, bound=bound) if doc else None
    if doc and call:
        yield name, kind, call, doc


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) < 80 and not value.startswith(("/", "~")) and "\\" not in value and ":/" not in value
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    if isinstance(value, (type, enum.Enum)) or value is None or value is Ellipsis:
        return True
    return isinstance(value, (bool, int, float, bytes)) or value == {}


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # should an import print something, it is not part of the answer
    json.dump(entries(), answer)
