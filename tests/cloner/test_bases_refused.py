"""What linked clones cannot stand on."""

from pathlib import Path
from typing import Any

import pytest

from services.cloner import bases
from shared.database import now
from shared.errors import Unsupported
from shared.manifest import Manifest, ManifestDisk, ManifestServer

ENCRYPTED = """
<domain><name>web1</name><devices><disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/srv/web1.qcow2'><encryption format='luks'/></source><target dev='vda'/>
</disk></devices></domain>
"""


def test_an_encrypted_disk_is_no_base(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No overlay on it can be made without its key: said before anything is copied."""
    nothing: Any = None
    disk = ManifestDisk(target="vda", file="vda.qcow2", format="qcow2", virtual_bytes=1, bytes=1)
    manifest = Manifest(
        kind="snapshot",
        id="snap1",
        server=ManifestServer(id="srv1", name="web1", uuid="u"),
        taken_at=now(),
        way="reflink",
        consistency="crash",
        disks=[disk],
    )
    (workspace / manifest.definition).write_text(ENCRYPTED)
    monkeypatch.setattr(bases, "can_reflink", lambda _source, _folder: False)
    with pytest.raises(Unsupported, match="encrypted"):
        bases.make(nothing, workspace, manifest, {"vda": workspace}, temporary=False)
