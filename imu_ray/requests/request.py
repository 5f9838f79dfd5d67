"""What a deletion request says: read from OpenDSR's JSON, or made of a list of ids."""

import datetime
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from imu_ray.data.ids import IdList
from imu_ray.errors import RequestError
from imu_ray.run.record import Part, now

ID_TYPE = "controller_customer_id"  # OpenDSR's name for the id that who holds the data gave
# What OpenDSR (v1 and v2) has in a request. Those that are not read change nothing of what is to be erased.
NEEDED = ("subject_request_id", "subject_request_type", "submitted_time", "subject_identities")
OTHERS = ("regulation", "api_version", "status_callback_urls", "group_id", "property_id", "extensions")
LISTS = uuid.UUID("5f0dd6f3-6a6c-4e0f-9a30-2f5b8a5c1f6e")  # name space of the ids of plain lists


class Request(Part):
    """A request as it was taken into the queue; it is never changed.

    Attributes:
        request_id: UUID; of a plain list one that follows from its ids.
        submitted_time: RFC 3339, as the request has it; of a plain list when it was added.
        added: when it came into the queue.
        identity_type: type of the identities that were taken as ids; None for a plain list.
        not_used: identities of other types, which are other names of the same person, counted and not kept.
        doubles: ids that stood in it more than once.
        ids: of the samples to forget, sorted, each once.
        content: digest of what was asked, by which the same request is known when it comes again.
    """

    format: Literal[1] = 1
    request_id: str
    request_type: Literal["erasure"] = "erasure"
    regulation: str | None = None
    submitted_time: str
    added: str
    identity_type: str | None = None
    not_used: dict[str, int] = Field({})
    doubles: int = 0
    ids: list[str]
    content: str


def read_request(path: str | Path, identity_type: str = ID_TYPE) -> Request:
    """An erasure request from a file of OpenDSR's JSON.

    The rule by which identities become ids of samples: every identity of type ``identity_type`` in format ``raw`` is
    one id, as it stands in the id column of the data.

    Raises:
        RequestError: it is no such request, asks for something else, or has no identity of that type.
    """
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); expected OpenDSR's JSON of one request") from None
    return opendsr_request(given, str(path), identity_type)


def opendsr_request(given: Any, name: str, identity_type: str = ID_TYPE) -> Request:
    """As ``read_request``, of the parsed JSON; ``name`` says in errors where it is from."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{name} holds a {type(given).__name__}; expected a mapping, OpenDSR's JSON of one request")
    missing = [key for key in NEEDED if key not in given]
    unknown = sorted(set(given) - {*NEEDED, *OTHERS})
    if missing or unknown:
        wrong = f"has no {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which OpenDSR does not know"
        raise RequestError(f"{name} {wrong}; expected {', '.join(NEEDED)}, and of {', '.join(OTHERS)} what there is")
    kind = given["subject_request_type"]
    if kind != "erasure":
        raise RequestError(
            f"{name} asks for subject_request_type {kind!r}; expected 'erasure', the only one that is done here"
        )
    request_id, submitted = _uuid(given["subject_request_id"], name), _time(given["submitted_time"], name)
    ids, not_used = _identities(given["subject_identities"], name, identity_type)
    return _make(
        IdList.of(ids),
        [kind, submitted, identity_type],
        request_id=request_id,
        regulation=None if given.get("regulation") is None else str(given["regulation"]),
        submitted_time=submitted,
        identity_type=identity_type,
        not_used=not_used,
    )


def list_request(asked: IdList) -> Request:
    """A request for a list of ids; its own id follows from them, so that the same list is known when it comes again."""
    request_id = str(uuid.uuid5(LISTS, json.dumps(asked.ids)))
    return _make(asked, ["erasure"], request_id=request_id, submitted_time=now())


def _make(asked: IdList, terms: list[str], **values: Any) -> Request:
    content = hashlib.sha256(json.dumps([*terms, asked.digest]).encode()).hexdigest()
    return Request(**values, ids=list(asked.ids), doubles=asked.doubles, added=now(), content=content)


def _uuid(value: Any, name: str) -> str:
    try:
        return str(uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise RequestError(f"{name} has subject_request_id {value!r}; expected a UUID") from None


def _time(value: Any, name: str) -> str:
    try:
        datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (ValueError, AttributeError):
        raise RequestError(
            f"{name} has submitted_time {value!r}; expected a time of RFC 3339, such as 2026-01-31T08:15:30Z"
        ) from None
    return str(value)


def _identities(given: Any, name: str, identity_type: str) -> tuple[list[str], dict[str, int]]:
    """The ids, and how many identities there are of each other type. Values are personal: no error shows one."""
    keys = {"identity_type", "identity_value", "identity_format"}
    if not isinstance(given, list) or not all(isinstance(each, Mapping) and set(each) == keys for each in given):
        raise RequestError(
            f"{name} has subject_identities of another shape; expected a list of {{identity_type, identity_value, "
            "identity_format}"
        )
    ids, others = [], Counter[str]()
    for each in given:
        if each["identity_type"] != identity_type:
            others[str(each["identity_type"])] += 1
            continue
        form, value = each["identity_format"], each["identity_value"]
        if form != "raw":
            raise RequestError(
                f"{name} has an identity in format {form!r}; expected 'raw', because ids are looked up as they stand "
                "in the data"
            )
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise RequestError(f"{name} has an identity whose value is no text; expected the id of a sample")
        ids.append(str(value))
    if not ids:
        found = ", ".join(sorted(others)) or "none"
        raise RequestError(
            f"{name} has no identity of type {identity_type!r} (types: {found}); expected one for each sample; "
            "--identity-type names the type whose values are ids of samples"
        )
    return ids, dict(others)
