"""Which weights an adapter was trained on, kept beside it: on others of the same shape it would load and mislead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.tensor_files import Stored, stored_in

_SAMPLE_BYTES = 1024
"""Read at the beginning, the middle and the end of each tensor: milliseconds, where all of a 70B model is minutes."""


def write(folder: Path, base: Path, name: str, *, rounding: Mapping[str, Any] | None = None) -> None:
    """Write the base's fingerprint into an adapter's folder; nothing where the base has no safetensors.

    `rounding` says how the base was rounded, for an adapter that belongs to it in that form alone.
    """
    made = of(base)
    if made is not None:
        known = {"base": name, **({"rounding": dict(rounding)} if rounding else {}), **made}
        rundir.write_text(folder / rundir.BASE_FINGERPRINT, json.dumps(known, indent=1) + "\n")


def check(folder: Path, base: Path, name: str) -> None:
    """Raise RunError where an adapter's folder says that it was trained on other weights than those in `base`."""
    known = _read(folder / rundir.BASE_FINGERPRINT)
    found = of(base) if known is not None else None
    if known is None or found is None or found["sha256"] == known["sha256"]:
        return
    was, now = known["tensors"], found["tensors"]
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        shown = [f"{key} {was.get(key, 'missing')} there, {now.get(key, 'missing')} here" for key in changed[:3]]
        why = "; ".join(shown) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    else:
        why = "the tensors have the same names and shapes, and other numbers"
    what = f"the adapter in `{folder}` was not trained on the weights that `{name}` now has"
    fix = (
        f"name the model it was trained on (`{known['base']}` at that time); if the change is meant, "
        f"delete {rundir.BASE_FINGERPRINT} in `{folder}`"
    )
    raise RunError(Problem("base-differs", what, why=why, fix=fix))


def of(folder: Path) -> dict[str, Any] | None:
    """Return the shapes of all tensors in a folder, and a SHA-256 of names, shapes, types and samples of each.

    How tensors are spread over files does not count. None where there are no safetensors.
    """
    stored = stored_in(folder)
    if not stored:
        return None
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(json.dumps([name, stored[name].dtype, stored[name].shape]).encode("ascii"))
        digest.update(_sample(stored[name]))
    return {"sha256": digest.hexdigest(), "tensors": {name: list(stored[name].shape) for name in sorted(stored)}}


def _sample(stored: Stored) -> bytes:
    """Return the bytes at three places of a tensor."""
    begin, end = stored.begin, stored.end
    sample = b""
    with stored.path.open("rb") as content:
        for place in (begin, begin + (end - begin) // 2, max(begin, end - _SAMPLE_BYTES)):
            content.seek(place)
            sample += content.read(min(_SAMPLE_BYTES, end - place))
    return sample


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None  # made by other tools
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known["tensors"], dict):
            raise TypeError("`tensors` is no mapping")
        return {"base": str(known["base"]), "sha256": str(known["sha256"]), "tensors": known["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why, fix = f"{type(error).__name__}: {error}", f"restore `{path}` from a copy, or delete it"
        raise RunError(Problem("run-damaged", f"`{path}` cannot be read", why=why, fix=fix)) from None
