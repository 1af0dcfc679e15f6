"""The world that the API's tests run in: rows as the workers write them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

from shared.database import now, transaction
from shared.models import Clone, Domain, Farm, Host, Image, Operation, Server, Snapshot

TOKEN = "a-token-for-tests"
Refused = Callable[..., dict[str, Any]]

DISK = {
    "target": "vda",
    "format": "qcow2",
    "path": "/images/web-1.qcow2",
    "capacity_bytes": 1 << 30,
    "writable": True,
}


class World:
    """Rows as the workers write them."""

    def host(self, name: str = "kvm-1", **fields: Any) -> Host:
        facts = {"reflink": True, "quiesce": True, "memory": True, "free_bytes": 1 << 40}
        given = {"last_seen_at": now(), "facts": facts, **fields}
        return self.add(Host(name=name, **given))

    def domain(self, name: str = "web-1", **fields: Any) -> Domain:
        given = {
            "host": "kvm-1",
            "uuid": str(uuid4()),
            "state": "running",
            "vcpus": 2,
            "memory_bytes": 1 << 31,
            "disks": [DISK],
            **fields,
        }
        return self.add(Domain(name=name, **given))

    def server(self, name: str = "web-1", **fields: Any) -> Server:
        given = {"host": "kvm-1", "domain_uuid": str(uuid4()), **fields}
        return self.add(Server(name=name, **given))

    def snapshot(self, server: Server, **fields: Any) -> Snapshot:
        given = {
            "taken_at": now(),
            "expires_at": now() + timedelta(hours=48),
            "consistency": "crash",
            "way": "reflink",
            "pause_ms": 9.5,
            "bytes": 1 << 30,
            **fields,
        }
        return self.add(Snapshot(server_id=server.id, **given))

    def image(self, server: Server, name: str = "first", **fields: Any) -> Image:
        given = {"consistency": "crash", "way": "reflink", "bytes": 1 << 30, **fields}
        return self.add(Image(server_id=server.id, name=name, **given))

    def clone(self, name: str = "qa-1", **fields: Any) -> Clone:
        given = {
            "operation_id": "op_x",
            "host": "kvm-1",
            "source_kind": "server",
            "source_id": "srv_x",
            **fields,
        }
        return self.add(Clone(name=name, **given))

    def farm(self, server: Server, name: str = "qa-{n}", **fields: Any) -> Farm:
        source = {"kind": "server", "id": server.id}
        given = {
            "host": server.host,
            "operation_id": "op_x",
            "command": {"source": source, "name": name, "count": 2},
            **fields,
        }
        return self.add(Farm(server_id=server.id, name=name, **given))

    def operation(self, server: Server, kind: str = "image.create", **fields: Any) -> Operation:
        given = {
            "service": "imager",
            "host": server.host,
            "requested_by": "token:bootstrap",
            "command": {"server": server.id},
            **fields,
        }
        return self.add(Operation(kind=kind, server_id=server.id, **given))

    def add(self, row: Any) -> Any:
        with transaction() as session:
            session.add(row)
            session.flush()
            session.refresh(row)
        return row
