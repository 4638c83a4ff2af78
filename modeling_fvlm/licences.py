"""Licences as the Hub knows them: an id of its list, or `other` with a name and the address of one's own terms."""

import re

from .organs import nearest_name

# The Hub's licence ids, from https://huggingface.co/docs/hub/repositories-licenses (November 2026), without those of
# single models; not `unknown`, which is no answer.
LICENCES = (
    *("apache-2.0", "mit", "openrail", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0"),
    *("etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0"),
    *("isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "osl-3.0", "postgresql", "ofl-1.1", "ncsa"),
    *("unlicense", "zlib", "pddl", "lgpl-lr", "other"),
)


def licence_fields(licence: str, name: str | None, link: str | None, option: str = "--license") -> dict[str, str]:
    """The licence as a card's header has it.

    Args:
        licence: Id of the Hub's list, in any spelling of its letters.
        name, link: With `other`: a short name, and the web address of the terms.
        option: What the licence was given with; `_name` and `_link` behind it are the options of the other two.

    Raises:
        ValueError: If the id is not on the Hub's list, or name and link of other terms are missing or uncalled for.
    """
    found = licence.strip().lower()  # SPDX writes CC-BY-4.0, the Hub cc-by-4.0
    if found not in LICENCES:
        raise ValueError(
            f"{option} {licence!r} is no licence id of the Hub{nearest_name(found, LICENCES)}. For terms that have "
            f"none give {option} other {option}_name NAME {option}_link URL."
        )
    if found != "other":
        if name or link:
            raise ValueError(f"{option}_name and {option}_link go with {option} other, not with {found}.")
        return {"license": found}
    if not name or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(
            f"{option} other needs {option}_name of lower-case letters, digits, dots and dashes, got {name!r}; for "
            "example hospital-research-terms."
        )
    if not link or not re.match(r"https?://\S+$", link):
        raise ValueError(f"{option} other needs {option}_link with the address of its text, got {link!r}.")
    return {"license": found, "license_name": name, "license_link": link}
