"""What an operator may ask of a running deployment, and who may."""

from dataclasses import dataclass, field, replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distserve.api.app import create_app
from distserve.api.model import ServedModel
from distserve.api.settings import ApiSettings
from distserve.core.config import Role
from distserve.core.errors import ConflictError, UnavailableError, UnknownInstanceError
from distserve.core.messages import Status
from tests.api.fake_backend import FakeBackend, pool_status


@dataclass
class FakeOperator:
    """Notes what it is asked; does as it is told."""

    refusal: Exception | None = None
    asked: list[tuple[str, Role, float]] = field(default_factory=list)

    async def change_role(self, instance_id: str, role: Role, patience: float) -> None:
        self.asked.append((instance_id, role, patience))
        if self.refusal is not None:
            raise self.refusal


@dataclass
class Endpoint:
    """An app, and what is behind it."""

    backend: FakeBackend
    operator: FakeOperator
    model: ServedModel

    def client(self, host: str = "127.0.0.1", key: str | None = None) -> httpx.AsyncClient:
        app = create_app(self.backend, self.model, ApiSettings(api_key=key), operator=self.operator)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(host, 5)), base_url="http://here")


@pytest.fixture
def endpoint(demo_model: ServedModel) -> Endpoint:
    return Endpoint(FakeBackend(lambda _request, _choice: ()), FakeOperator(), demo_model)


async def test_an_instance_is_told_to_change(endpoint: Endpoint) -> None:
    async with endpoint.client() as client:
        answer = await client.post("/admin/instances/decode-1/role", json={"role": "prefill", "patience": 2})
        assert (answer.status_code, answer.json()) == (202, {"name": "decode-1", "becoming": "prefill"})
        await client.post("/admin/instances/decode-0/role", json={"role": "mixed"})
    assert endpoint.operator.asked == [("decode-1", Role.PREFILL, 2.0), ("decode-0", Role.MIXED, 30.0)]


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (ConflictError("prefill-0 is the last prefill instance"), 409),
        (UnknownInstanceError("no instance is called x; there are prefill-0, decode-0"), 404),
        (UnavailableError("the router does not answer"), 503),
    ],
)
async def test_a_refusal_says_why(endpoint: Endpoint, refusal: ConflictError, status: int) -> None:
    endpoint.operator.refusal = refusal
    async with endpoint.client() as client:
        answer = await client.post("/admin/instances/x/role", json={"role": "decode"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == refusal.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "role"),
        ({"role": "encode"}, "role"),
        ({"role": "decode", "patience": -1}, "patience"),
        ({"role": "decode", "patience": "5"}, "patience"),
        ({"role": "decode", "patience": 1e9}, "patience"),
    ],
)
async def test_bad_bodies_are_refused(endpoint: Endpoint, body: dict[str, object], param: str) -> None:
    async with endpoint.client() as client:
        answer = await client.post("/admin/instances/decode-0/role", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not endpoint.operator.asked


async def test_without_a_key_only_this_machine_may_and_with_one_whoever_has_it(endpoint: Endpoint) -> None:
    async with endpoint.client("10.1.2.3") as client:
        assert (await client.get("/admin/instances")).status_code == 403
        answer = await client.post("/admin/instances/decode-0/role", json={"role": "mixed"})
        assert answer.status_code == 403
        assert "--api-key" in answer.json()["error"]["message"]
    async with endpoint.client("10.1.2.3", key="secret") as client:
        assert (await client.get("/admin/instances")).status_code == 401
        allowed = await client.get("/admin/instances", headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200
    async with endpoint.client("127.0.0.1", key="secret") as client:
        assert (await client.post("/admin/instances/decode-0/role", json={"role": "mixed"})).status_code == 401
    assert not endpoint.operator.asked


async def test_instances_are_listed_with_what_they_become(endpoint: Endpoint) -> None:
    (first, report), second = pool_status(Role.PREFILL, Role.DECODE).instances
    endpoint.backend.current = Status(((first, replace(report, becoming=Role.DECODE)), second))
    async with endpoint.client() as client:
        listed = (await client.get("/admin/instances")).json()["instances"]
        metrics = (await client.get("/metrics")).text
        endpoint.backend.current = None
        assert (await client.get("/admin/instances")).status_code == 503
    assert listed[1] == {
        "name": "prefill-0",
        "role": "prefill",
        "becoming": "decode",
        "num_waiting": 3,
        "num_running": 2,
        "kv_cache_usage": 0.25,
    }
    assert (listed[0]["name"], listed[0]["becoming"]) == ("decode-1", None)
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    pending = [sample for sample in samples if sample.name == "distserve:role_change_pending"]
    assert [(sample.labels["instance"], sample.labels["role"]) for sample in pending] == [("prefill-0", "decode")]
    counted = [sample.value for sample in samples if sample.name == "distserve:role_changes_total"]
    assert counted == [0.0, 0.0]


async def test_there_is_nothing_below_admin_without_an_operator(endpoint: Endpoint) -> None:
    app = create_app(endpoint.backend, endpoint.model, ApiSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        assert (await client.get("/admin/instances")).status_code == 404


async def test_health_counts_who_changes_and_does_not_count_on_them(endpoint: Endpoint) -> None:
    (first, report), *others = pool_status(Role.PREFILL, Role.PREFILL, Role.DECODE).instances
    changing = (first, replace(report, becoming=Role.DECODE))
    async with endpoint.client() as client:
        endpoint.backend.current = Status((changing, *others))
        answer = await client.get("/health")
        assert answer.status_code == 200
        assert answer.json()["pools"]["prefill"] == {"instances": 2, "changing": 1}
        endpoint.backend.current = Status((changing, others[1]))
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["missing"]) == (503, ["prefill"])
