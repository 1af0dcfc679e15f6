"""What a domain gives QEMU past libvirt: what a copy says of it, what of it a clone can have."""

import json
import re
from pathlib import Path

import pytest
from lxml import etree

from shared.errors import Unsupported
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.duplicate import CloneDefinition, clone_definition
from shared.hypervisor.errors import MemoryNotCloneable
from shared.hypervisor.hot import refuse_hot

DRIVE = "if=none,id=x,format=qcow2"
DEVICE = "-device virtio-blk-pci,drive=x"
JSON_DISK = json.dumps(
    {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "/srv/x.qcow2"}}
)


def domain(*options: str, override: str = "") -> str:
    """A domain with one disk, and these arguments for QEMU; each string is split at blanks."""
    words = [word for each in options for word in each.split(" ")]
    arguments = "".join(f"<q:arg value='{each}'/>" for each in words)
    return f"""<domain type='qemu' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>web1</name><uuid>11111111-aaaa-4bbb-8ccc-dddddddddddd</uuid>
      <memory unit='MiB'>64</memory><devices><disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='/srv/web1.raw'/><target dev='vda'/></disk>
      </devices><q:commandline>{arguments}</q:commandline>
      <q:override><q:device alias='net0'><q:frontend>{override}</q:frontend></q:device></q:override>
    </domain>"""


def arguments(clone: CloneDefinition) -> list[str | None]:
    """What QEMU is given of it."""
    found = etree.fromstring(clone.xml).iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")
    return [each.get("value") for each in found]


def cloned(*options: str, **more: str) -> CloneDefinition:
    return clone_definition(
        domain(*options, **more),
        name="qa-1",
        uuid="99999999-aaaa-4bbb-8ccc-dddddddddddd",
        disk_paths={"vda": "/srv/qa-1-vda.raw"},
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (f"-drive file=/srv/x.qcow2,{DRIVE} {DEVICE}", "-drive /srv/x.qcow2"),
        (f"--drive {DRIVE},file=/srv/a,,b.qcow2 {DEVICE}", "-drive /srv/a,b.qcow2"),
        ("-drive file=rbd:pool/x,if=virtio", "-drive rbd:pool/x"),
        ("-blockdev driver=file,filename=/srv/x.raw,node-name=x", "-blockdev /srv/x.raw"),
        ("-blockdev driver=nbd,server.type=inet,server.host=h,node-name=x", "-blockdev nbd"),
        (f"-blockdev {JSON_DISK.replace(' ', '')}", "-blockdev /srv/x.qcow2"),
        ("-drive file=/srv/x.raw,readonly=on,readonly=off", "-drive /srv/x.raw"),
        ("-hda /srv/x.raw", "-hda /srv/x.raw"),
        ("-hdd /srv/x.raw", "-hdd /srv/x.raw"),
        ("-S /srv/x.raw", "-hda /srv/x.raw"),
        ("-fda /srv/x.raw", "-fda /srv/x.raw"),
        ("-sd /srv/x.raw", "-sd /srv/x.raw"),
        ("-pflash /srv/VARS.fd", "-pflash /srv/VARS.fd"),
        ("-mtdblock /srv/x.raw", "-mtdblock /srv/x.raw"),
        ("-usbdevice disk:/srv/x.raw", "-usbdevice /srv/x.raw"),
        (
            "-object memory-backend-file,id=m,share=on,mem-path=/srv/nv,size=1G",
            "-object /srv/nv",
        ),
        (
            "-object memory-backend-file,id=m,share=on,mem-path=/dev/shm/nv,size=1G",
            "-object /dev/shm/nv",
        ),
        (
            '-object {"qom-type":"memory-backend-file","share":true,"mem-path":"/dev/hugepages/x"}',
            "-object /dev/hugepages/x",
        ),
    ],
)
def test_disks_are_named_in_copies_and_refuse_clones(options: str, told: str) -> None:
    """A copy does not hold them and says so; a clone would write to its source's own."""
    _, left_out = DomainDefinition.parse(domain(options)).split_disks()
    assert [each.target for each in left_out] == [told]
    assert "<disk>" in left_out[0].reason
    with pytest.raises(Unsupported) as refused:
        cloned(options)
    assert told in refused.value.detail
    assert "make it a <disk>" in refused.value.detail


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("-fsdev local,id=f,path=/srv/share,security_model=none", "-fsdev /srv/share"),
        ("-virtfs local,path=/srv/share,mount_tag=t", "-virtfs /srv/share"),
        ("-device vfio-pci,host=01:00.0", "-device vfio-pci"),
        ('-device {"driver":"usb-host","vendorid":1}', "-device usb-host"),
        ("-device vhost-vsock-pci,guest-cid=3", "-device vhost-vsock-pci"),
        ("-device usb-mtp,rootdir=/srv/share", "/srv/share"),
        ("-netdev tap,id=n,ifname=tap7,script=no", "-netdev tap"),
        ("-netdev socket,id=n,listen=:4000", "-netdev socket"),
        ("-tpmdev passthrough,id=t,path=/dev/tpm0", "-tpmdev passthrough"),
        ("-readconfig /etc/vm.cfg", "-readconfig /etc/vm.cfg"),
        ("-audiodev wav,id=a,path=/srv/a.wav", "-audiodev wav"),
        ("-set drive.x.readonly=off", "-set drive.x.readonly=off"),
        ("-set device.net0.mac=52:54:00:00:00:01", "-set device.net0.mac"),
        ("-not-known-yet /srv/x", "-not-known-yet /srv/x"),
    ],
)
def test_what_cannot_be_in_two_machines_refuses_clones(options: str, told: str) -> None:
    """Directories, devices and places in the host's network, and what is not known here."""
    assert DomainDefinition.parse(domain(options)).split_disks()[1] == ()
    with pytest.raises(Unsupported) as refused:
        cloned(options)
    assert told in refused.value.detail


@pytest.mark.parametrize(
    "options",
    [
        "-fw_cfg name=opt/org.x,file=/srv/x.ign",
        "-cpu host,+vmx",
        "-global ICH9-LPC.disable_s3=1",
        "-snapshot",
        "-S",
        "-smbios type=11,value=a/b",
        "-netdev user,id=n,net=10.0.9.0/24",
        "-chardev pty,id=c",
        "-serial chardev:c",
        "-monitor none",
        "-vnc none",
        "-display none",
        "-audiodev pa,id=a,server=/run/user/1000/pulse/native",
        "-object memory-backend-file,id=m,mem-path=/dev/hugepages,size=1G",
        "-object memory-backend-file,id=m,share=on,mem-path=/dev/shm,size=1G",
        "-object memory-backend-file,id=m,share=on,mem-path=/dev/shm/,size=1G",
        "-object secret,id=s,file=/etc/s",
        "-blockdev driver=null-co,node-name=x",
        "-blockdev driver=raw,node-name=y,file=x",
        f"-device isa-applesmc,osk=words {DEVICE}",
        "-device virtio-vga,romfile=/srv/rom",
        "-set device.virtio-disk0.logical_block_size=4096",
        "-append -x",
    ],
)
def test_harmless_options_stay_as_they_are(options: str) -> None:
    """They are the clone's too, and it is told which."""
    clone = cloned(options)
    assert arguments(clone) == options.split(" ")
    ((part, which),) = clone.kept
    assert (part, which.split(", ")[0]) == ("qemu:commandline", options.split(" ")[0])
    assert clone.left_out == ()


def test_memory_in_a_directory_is_the_machine_s_own(tmp_path: Path) -> None:
    """There QEMU makes a file that nobody else finds; given a file, it maps what others map."""
    options = f"-object memory-backend-file,id=m,share=on,size=1G,mem-path={tmp_path}"
    assert arguments(cloned(options)) == options.split(" ")
    (tmp_path / "memory").touch()
    with pytest.raises(Unsupported, match=f"-object {tmp_path}/memory"):
        cloned(f"{options}/memory")


@pytest.mark.parametrize(
    "options",
    [
        "-drive file=/srv/x.iso,media=cdrom,if=none,id=x",
        "-drive file=/srv/CODE.fd,if=pflash,readonly=on",
        "-drive file=/srv/CODE.fd,if=pflash,readonly",
        "-blockdev driver=file,filename=/srv/x,node-name=x,read-only=on",
        "-drive file=/srv/x.raw,snapshot=on,if=virtio",
        "-cdrom /srv/x.iso",
    ],
)
def test_disks_that_are_only_read_can_be_shared(options: str) -> None:
    """A clone has them; a copy does not hold them."""
    assert len(DomainDefinition.parse(domain(options)).split_disks()[1]) == 1
    assert arguments(cloned(options)) == options.split(" ")


@pytest.mark.parametrize(
    ("options", "becomes", "told"),
    [
        (
            "-netdev user,id=n,hostfwd=tcp::2222-:22,net=10.0.9.0/24,hostfwd=udp::53-:53",
            ["-netdev", "user,id=n,net=10.0.9.0/24"],
            "-netdev user,hostfwd",
        ),
        (
            '-netdev {"type":"user","id":"n","hostfwd":[{"str":"tcp::2222-:22"}]}',
            ["-netdev", '{"type": "user", "id": "n"}'],
            "-netdev user,hostfwd",
        ),
        ("-nic user,smb=/srv/share", ["-nic", "user"], "-nic user,smb"),
        ("-vnc :1", [], "-vnc"),
        ("-spice port=5901,disable-ticketing=on", [], "-spice"),
        ("-display vnc=:1", [], "-display"),
        ("-gdb tcp::1234", [], "-gdb"),
        ("-s", [], "-s"),
        ("-incoming tcp:0:4444", [], "-incoming"),
        ("-qmp unix:/run/x.sock,server,nowait", [], "-qmp"),
        ("-pidfile /run/x.pid", [], "-pidfile"),
        ("-monitor tcp:127.0.0.1:55555,server,nowait", ["-monitor", "null"], "-monitor tcp"),
        ("-serial telnet::4321,server", ["-serial", "null"], "-serial telnet"),
        ("-serial file:/srv/x.log", ["-serial", "null"], "-serial file"),
        (
            "-chardev socket,id=c,path=/run/x.sock,server=on,wait=off,mux=on",
            ["-chardev", "null,id=c,mux=on"],
            "-chardev socket",
        ),
        ("-chardev file,id=c,path=/srv/x.log", ["-chardev", "null,id=c"], "-chardev file"),
    ],
)
def test_ports_and_sockets_of_the_host_are_left_to_the_source(
    options: str, becomes: list[str], told: str
) -> None:
    """What refers to them finds something of the same name still, so that the clone starts."""
    clone = cloned(options)
    assert [each.target for each in clone.left_out] == [told]
    assert arguments(clone) == becomes


def test_cards_get_addresses_of_their_own() -> None:
    """As those of <interface> do, and they are told; an override of an address goes."""
    clone = cloned(
        "-device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01",
        "-net nic,macaddr=52:54:00:00:00:02",
        override="<q:property name='mac' type='string' value='52:54:00:00:00:03'/>"
        "<q:property name='x-vga' type='bool' value='true'/>",
    )
    assert sorted(clone.macs) == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    assert all(f"={mac}" in clone.xml for mac in clone.macs.values())
    assert "52:54:00:00:00:0" not in clone.xml
    assert "x-vga" in clone.xml


def test_cards_without_an_address_are_given_one() -> None:
    """QEMU would give each machine the same."""
    given = ["-netdev bridge,id=n", "-device virtio-net-pci,netdev=n", "-nic bridge", "-net nic"]
    clone = cloned(*given, '-device {"driver":"e1000","netdev":"n"}')
    bridge, card, nic, net, other = (each or "" for each in arguments(clone)[1::2])
    assert bridge == "bridge,id=n"
    own = "52:54:00:[0-9a-f:]{8}"
    assert re.fullmatch(f"virtio-net-pci,netdev=n,mac={own}", card)
    assert re.fullmatch(f"bridge,mac={own}", nic)
    assert re.fullmatch(f"nic,macaddr={own}", net)
    assert re.fullmatch(own, json.loads(other)["mac"])


def test_override_of_a_backend_refuses_clones() -> None:
    """It would lead the clone's device to its source's."""
    with pytest.raises(Unsupported, match="qemu:override drive"):
        cloned(override="<q:property name='drive' type='string' value='x'/>")


def test_a_card_refuses_memory() -> None:
    """Nobody takes its link down until its address is the clone's own."""
    with pytest.raises(MemoryNotCloneable, match="network card on QEMU's command line"):
        refuse_hot(domain("-nic user"))
    refuse_hot(domain("-cpu host"))
