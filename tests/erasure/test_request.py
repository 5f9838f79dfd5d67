"""What is taken as a deletion request, and what is refused."""

import json
import stat

import pytest
from erasure.paper import UUID, add, asking, new_queue

from imu_ray import RequestError
from imu_ray.data.ids import IdList
from imu_ray.requests.request import list_request, opendsr_request, read_request


def test_identities_of_the_named_type_are_ids_and_others_are_counted_and_not_kept(tmp_path):
    path = tmp_path / "request.json"
    path.write_text(json.dumps(asking(1, "row-2", "row-1", "row-2")))
    request = read_request(path)
    assert request.ids == ["row-1", "row-2"]
    assert (request.doubles, request.not_used, request.regulation) == (1, {"email": 1}, "gdpr")
    assert "a@b.c" not in request.model_dump_json()
    assert read_request(path, "email").ids == ["a@b.c"]


def identities(**changes):
    given = {"identity_type": "controller_customer_id", "identity_value": "row-1", "identity_format": "raw"}
    return {"subject_identities": [given | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject_request_type": "access"}, "asks for subject_request_type 'access'; expected 'erasure'"),
        ({"subject_request_type": None}, "subject_request_type None; expected 'erasure'"),
        ({"subject_request_id": "request-1"}, "subject_request_id 'request-1'; expected a UUID"),
        ({"subject_request_id": 5}, "subject_request_id 5; expected a UUID"),
        ({"submitted_time": "yesterday"}, "submitted_time 'yesterday'; expected a time of RFC 3339"),
        ({"subject_identities": []}, r"no identity of type 'controller_customer_id' \(types: none\)"),
        ({"subject_identities": {"email": "a@b.c"}}, "subject_identities of another shape"),
        ({"subject_identities": ["row-1"]}, "subject_identities of another shape"),
        (identities(identity_type="email"), r"no identity of type 'controller_customer_id' \(types: email\)"),
        (identities(identity_format="sha256"), "in format 'sha256'; expected 'raw'"),
        (identities(identity_value=""), "whose value is no text"),
        (identities(identity_value=["row-1"]), "whose value is no text"),
        (identities(more=1), "subject_identities of another shape"),
        ({"delete_after": "2027"}, "has delete_after, which OpenDSR does not know"),
    ],
)
def test_another_request_is_refused_by_name(changes, message):
    with pytest.raises(RequestError, match=message) as refused:
        opendsr_request(asking(1, "row-1") | changes, "request.json")
    assert "row-1" not in str(refused.value)


def test_what_is_no_request_is_refused(tmp_path):
    without = asking(1, "row-1")
    del without["submitted_time"]
    with pytest.raises(RequestError, match="has no submitted_time"):
        opendsr_request(without, "it")
    with pytest.raises(RequestError, match="holds a list; expected a mapping"):
        opendsr_request([asking(1, "row-1")], "it")
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "nowhere.json"):
        with pytest.raises(RequestError, match="cannot be read"):
            read_request(tmp_path / name)


def test_a_list_of_ids_has_an_id_of_its_own_whatever_its_order():
    first, again, other = (list_request(IdList.of(ids)) for ids in (["a", "b", "a"], ["b", "a"], ["a", "c"]))
    assert (first.ids, first.doubles) == (["a", "b"], 1)
    assert first.request_id == again.request_id != other.request_id
    assert first.content == again.content


def test_a_request_that_comes_again_is_known_and_another_under_its_id_is_refused(tmp_path):
    queue = new_queue(tmp_path)
    assert add(queue, 1, "row-1", "row-2")
    assert not add(queue, 1, "row-2", "row-1")
    with pytest.raises(RequestError, match=f"request {UUID}1 is in the queue already.*asks for something else"):
        add(queue, 1, "row-1")
    assert queue.request(f"{UUID}1").ids == ["row-1", "row-2"]
    (written,) = (tmp_path / "queue" / "requests").iterdir()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "queue").stat().st_mode) == 0o700


def test_a_file_of_the_queue_that_was_changed_is_refused(tmp_path):
    queue = new_queue(tmp_path)
    add(queue, 1, "row-1")
    (written,) = (tmp_path / "queue" / "requests").iterdir()
    written.write_text("{}")
    with pytest.raises(RequestError, match="is no request of this release"):
        queue.standings()
    with pytest.raises(RequestError, match="holds no request; expected a queue"):
        new_queue(tmp_path / "elsewhere").require()
