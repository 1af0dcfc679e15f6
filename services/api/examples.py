"""One example of each shape, shown in /docs; a test holds them against the shapes."""

import json
from typing import Any

SERVER_ID = "srv_01kayq2f7g9h3j5k8m0n4p6qrs"
IMAGE_ID = "img_01kayq3zx6c8v0b2n4m6a8s0df"

DISK: dict[str, Any] = {
    "target": "vda",
    "format": "qcow2",
    "path": "/var/lib/libvirt/images/web-1.qcow2",
    "capacity_bytes": 21474836480,
    "writable": True,
}

HOST: dict[str, Any] = {
    "name": "kvm-1",
    "answering": True,
    "silent": False,
    "draining": False,
    "operations": {"queued": 0, "running": 1},
    "last_seen_at": "2026-03-10T02:59:58.120000Z",
    "problem": None,
    "libvirt": "11.4.0",
    "qemu": "10.0.2",
    "vault": "/var/lib/triptych",
    "vault_usage": {
        "copies": 24,
        "measured": 24,
        "apparent_bytes": 115964116992,
        "unique_bytes": 9663676416,
        "shared_bytes": 106300440576,
        "measured_at": "2026-03-10T02:12:40.700000Z",
    },
    "reflink": True,
    "quiesce": True,
    "memory": True,
    "free_bytes": 412316860416,
    "total_bytes": 1099511627776,
}

DOMAIN: dict[str, Any] = {
    "name": "web-1",
    "uuid": "6f0c1c8e-9d0c-4f0e-8a54-0d3f1f2b7c11",
    "state": "running",
    "vcpus": 2,
    "memory_bytes": 2147483648,
    "disks": [DISK],
    "server": SERVER_ID,
}

SNAPSHOT: dict[str, Any] = {
    "id": "snp_01kayq3d9v0w2m8r5x7h1t4bcd",
    "server": SERVER_ID,
    "taken_at": "2026-03-10T03:00:00.482000Z",
    "expires_at": "2026-03-12T03:00:00.482000Z",
    "with_memory": False,
    "consistency": "file-system",
    "way": "reflink",
    "pause_ms": 9.4,
    "bytes": 4831838208,
    "unique_bytes": 25165824,
    "description": "before the update to 3.2",
}

IMAGE: dict[str, Any] = {
    "id": IMAGE_ID,
    "name": "web-1-2026-03-10",
    "server": SERVER_ID,
    "created_at": "2026-03-10T03:00:01.117000Z",
    "description": "",
    "pinned": False,
    "origin": "daily",
    "state": "complete",
    "way": "reflink",
    "consistency": "file-system",
    "pause_ms": 11.2,
    "bytes": 4831838208,
    "unique_bytes": 402653184,
    "verified": {"at": "2026-03-10T04:10:00.530000Z", "result": "passed"},
    "proof": {
        "at": None,
        "result": "not_run",
        "reason": "boot proof not available in this version",
    },
    "left_out": [{"target": "sda", "reason": "CD-ROM"}],
}

SERVER: dict[str, Any] = {
    "id": SERVER_ID,
    "name": "web-1",
    "host": "kvm-1",
    "domain": "web-1",
    "uuid": DOMAIN["uuid"],
    "state": "running",
    "vcpus": 2,
    "memory_bytes": 2147483648,
    "disks": [DISK],
    "snapshot": SNAPSHOT["id"],
    "newest_image": IMAGE_ID,
}

FORGOTTEN: dict[str, Any] = {
    "id": SERVER_ID,
    "name": "web-1",
    "forgotten_at": "2026-03-10T11:20:00.480000Z",
    "images_kept": 7,
    "images_kept_bytes": 33822867456,
    "schedules_ended": ["daily"],
}

OPERATION: dict[str, Any] = {
    "id": "op_01kayq4h2k8n3v6c9w5z0m7pqr",
    "kind": "image.create",
    "server": SERVER_ID,
    "host": "kvm-1",
    "state": "queued",
    "phase": "queued",
    "progress": 0,
    "bytes_done": 0,
    "bytes_total": 0,
    "created_at": "2026-03-10T03:00:00.010000Z",
    "started_at": None,
    "finished_at": None,
    "requested_by": "token:bootstrap",
    "attempt": 0,
    "waiting": None,
    "error": None,
    "result": None,
    "undo_until": None,
}

DONE: dict[str, Any] = {
    **OPERATION,
    "state": "succeeded",
    "phase": "succeeded",
    "progress": 100,
    "bytes_done": 4831838208,
    "bytes_total": 4831838208,
    "started_at": "2026-03-10T03:00:00.041000Z",
    "finished_at": "2026-03-10T03:00:01.130000Z",
    "attempt": 1,
    "result": {"image": IMAGE_ID},
}

RUNNING: dict[str, Any] = {
    **OPERATION,
    "state": "running",
    "phase": "copying",
    "progress": 42,
    "bytes_done": 2029372047,
    "bytes_total": 4831838208,
    "started_at": "2026-03-10T03:00:00.041000Z",
    "attempt": 1,
}

CANCELLED: dict[str, Any] = {
    **OPERATION,
    "state": "cancelled",
    "phase": "cancelled",
    "finished_at": "2026-03-10T03:00:00.031000Z",
    "error": {
        "code": "cancelled",
        "message": "Cancelled before it started; nothing was touched.",
    },
}

CLONE: dict[str, Any] = {
    "id": "cln_01kayq5m1n2b3v4c5x6z7a8s9d",
    "name": "qa-001",
    "host": "kvm-1",
    "server": "srv_01kayq5t6y7h8n9b0g1f2d3s4a",
    "source": {"kind": "image", "id": IMAGE_ID},
    "created_at": "2026-03-10T09:15:00.005000Z",
    "with_memory": False,
    "way": "reflink",
    "linked_to": [],
    "identity": {
        "way": "agent",
        "hostname": "qa-001",
        "renewed": ["name", "uuid", "mac 52:54:00:1f:6c:04", "hostname", "machine-id"],
        "pending": [],
        "kept": [],
        "left_out": [{"target": "hostdev pci", "reason": "a host device belongs to one guest"}],
    },
    "state": "ready",
    "error": None,
    "farm": "frm_01kayq5m0p9o8i7u6y5t4r3e2w",
    "operation": "op_01kayq5k9j8h7g6f5d4s3a2p1q",
}

FARM: dict[str, Any] = {
    "id": CLONE["farm"],
    "name": "qa-{n:03}",
    "host": "kvm-1",
    "source": CLONE["source"],
    "created_at": CLONE["created_at"],
    "expires_in_h": 8,
    "expires_at": "2026-03-10T17:15:03.512000Z",
    "clones": {"ready": 9, "failed": 1},
    "power": {"running": 9},
    "operation": CLONE["operation"],
}

FARM_WITH_CLONES: dict[str, Any] = {**FARM, "items": [CLONE]}

SCHEDULE: dict[str, Any] = {
    "kind": "daily",
    "at": "03:00",
    "weekday": None,
    "timezone": "Europe/London",
    "keep": 7,
    "require": "complete",
    "enabled": True,
    "catch_up": 21600,
    "next_run_at": "2026-03-11T03:00:00Z",
    "next_start_at": "2026-03-11T03:07:12Z",
    "failures_in_row": 0,
    "goes_next": [
        {
            "id": "img_01kaf5v0c2n4m6q8s0w2y4a6c8",
            "name": "web-1-20260304-030001-f3k9",
            "created_at": "2026-03-04T03:00:01.092000Z",
            "bytes": 4714397696,
        }
    ],
}

RUNS: dict[str, Any] = {
    "upcoming": [
        {
            "slot": "2026-03-11T03:00:00Z",
            "first_slot": None,
            "start_at": "2026-03-11T03:07:12Z",
            "state": "scheduled",
            "image": None,
            "reason": None,
            "lateness_s": None,
        }
    ],
    "items": [
        {
            "slot": "2026-03-10T03:00:00Z",
            "first_slot": None,
            "start_at": "2026-03-10T03:07:12Z",
            "state": "succeeded",
            "image": IMAGE_ID,
            "reason": None,
            "lateness_s": 0.041,
        }
    ],
}

EVENT: dict[str, Any] = {
    "specversion": "1.0",
    "id": "evt_01kayq4k0z9x8c7v6b5n4m3a2s",
    "source": "/triptych",
    "type": "triptych.operation.succeeded",
    "subject": SERVER_ID,
    "time": "2026-03-10T03:00:01.130000Z",
    "datacontenttype": "application/json",
    "data": {"operation": OPERATION["id"], "kind": "image.create", "error": None},
}

EVENT_STREAM = f"id: {EVENT['id']}\nevent: {EVENT['type']}\ndata: {json.dumps(EVENT)}\n\n"

METRICS = """\
# HELP triptych_operations_total Operations that have ended
# TYPE triptych_operations_total counter
triptych_operations_total{host="kvm-1",kind="image.create",service="imager",state="succeeded"} 42.0
"""

HEALTH: dict[str, Any] = {"status": "ok", "checks": {}}

READINESS: dict[str, Any] = {
    "status": "degraded",
    "checks": {
        "database": {"status": "ok", "reason": None},
        "broker": {
            "status": "degraded",
            "reason": "The broker does not answer. Requests are accepted; their work starts when "
            "it is back.",
        },
    },
}

UNREADY: dict[str, Any] = {
    "status": "failed",
    "checks": {
        "database": {"status": "failed", "reason": "The database does not answer."},
        "broker": {"status": "ok", "reason": None},
    },
}

PROBLEM_KIND: dict[str, Any] = {
    "type": "/problems/snapshot_exists",
    "code": "snapshot_exists",
    "title": "The server has a snapshot already",
    "status": 409,
}


def shown(example: dict[str, Any], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of a route that answers with one of these."""
    return {status: {"content": {"application/json": {"example": example}}}}


def paged(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The same for a page of them."""
    return shown({"items": [example], "next": None})
