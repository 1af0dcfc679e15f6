"""Reading definitions and making the definition of a clone, without libvirt."""

import re
from pathlib import Path

import pytest
from lxml import etree

from shared.errors import DomainWithoutDisks
from shared.hypervisor.definition import DomainDefinition, LeftOut, log_files
from shared.hypervisor.duplicate import PSEUDO_TERMINAL, clone_definition, own_path, random_mac
from shared.hypervisor.errors import DefinitionInvalid, DiskNotCopyable

WINDOWS = (Path(__file__).parent / "data" / "windows.xml").read_text()
LIBVIRT_S = "/var/lib/libvirt/qemu/nvram/web1_VARS.fd"
CLONE_UUID = "99999999-aaaa-4bbb-8ccc-dddddddddddd"
DISKS = {"vda": "/srv/vms/qa-1-vda.qcow2", "vdb": "/srv/vms/qa-1-vdb.raw"}


def with_disk(disk: str) -> DomainDefinition:
    """A small domain with this one `<disk>`."""
    return DomainDefinition.parse(
        f"<domain type='qemu'><name>web1</name><memory>1024</memory><devices>{disk}</devices>"
        "</domain>"
    )


def clone(**changes: object) -> etree._Element:
    """The clone of the Windows server as XML, with these arguments changed."""
    arguments = {"name": "qa-1", "uuid": CLONE_UUID, "disk_paths": DISKS, **changes}
    return etree.fromstring(clone_definition(WINDOWS, **arguments).xml)


class TestReading:
    def test_size_and_disks(self) -> None:
        """Name, size and disks are read in bytes and with their formats and paths."""
        found = DomainDefinition.parse(WINDOWS)
        assert (found.name, found.vcpus, found.memory_bytes) == ("win1", 8, 8 << 30)
        assert found.nvram_path == "/var/lib/libvirt/qemu/nvram/win1_VARS.fd"
        assert [(d.target, d.kind, d.format, d.path) for d in found.disks] == [
            ("vda", "file", "qcow2", "/srv/vms/win1.qcow2"),
            ("vdb", "block", "raw", "/dev/vg0/win1-data"),
            ("sda", "file", "raw", "/srv/iso/virtio-win.iso"),
            ("vdc", "file", "raw", "/srv/vms/cluster.img"),
        ]
        assert not any(disk.has_backing for disk in found.disks)

    @pytest.mark.parametrize(
        ("backend", "state"),
        [
            ("<backend type='emulator' version='2.0'/>", "u-1/tpm2/tpm2-00.permall"),
            ("<backend type='emulator' version='1.2'/>", "u-1/tpm1.2/tpm-00.permall"),
            (
                "<backend type='emulator' version='2.0'><source type='file' path='/t'/></backend>",
                "/t",
            ),
            (
                "<backend type='emulator' version='2.0'><source type='dir' path='/t'/></backend>",
                "/t/tpm2-00.permall",
            ),
            ("<backend type='passthrough'><device path='/dev/tpm0'/></backend>", None),
            ("<backend type='external'><source type='unix' path='/s'/></backend>", None),
        ],
    )
    def test_state_of_a_tpm(self, backend: str, state: str | None) -> None:
        """It is in libvirt's directory by UUID and version, or where the definition says; only
        that of an emulated one can be had."""
        found = DomainDefinition.parse(
            f"<domain><name>a</name><uuid>u-1</uuid><devices><tpm>{backend}</tpm></devices></domain>"
        )
        assert found.tpm_state == state

    @pytest.mark.parametrize(
        ("boot", "path"),
        [
            ("<os firmware='efi'/>", LIBVIRT_S),
            ("<os firmware='efi'><loader secure='yes'/></os>", LIBVIRT_S),
            ("<os firmware='efi'><nvram>/srv/n.fd</nvram></os>", "/srv/n.fd"),
            ("<os firmware='efi'><loader type='rom'>/o.fd</loader></os>", None),
            ("<os><loader type='pflash' stateless='yes'>/o.fd</loader></os>", None),
            ("<os firmware='efi'><loader stateless='yes'/></os>", None),
            ("<os firmware='bios'/>", None),
            ("<os/>", None),
        ],
    )
    def test_uefi_variables(self, boot: str, path: str | None) -> None:
        """They are where the definition says, or, where libvirt is to choose a firmware and it does
        not say, where libvirt has them; a loader that is named without any is stateless."""
        found = DomainDefinition.parse(f"<domain><name>web1</name>{boot}</domain>")
        assert found.nvram_path == path

    def test_left_out_with_reasons(self) -> None:
        """CD-ROM and shared disk are left out, each with its reason; the rest is copied."""
        copied, left_out = DomainDefinition.parse(WINDOWS).split_disks()
        assert [disk.target for disk in copied] == ["vda", "vdb"]
        assert {item.target: item.reason for item in left_out} == {
            "sda": "a CD-ROM is not copied",
            "vdc": "the disk is shared with other guests",
            "hostdev pci": "what a device of the host stores is not copied",
        }

    @pytest.mark.parametrize(
        ("where", "told"),
        [
            ("<devices><hostdev mode='subsystem' type='scsi'/></devices>", ["hostdev scsi"]),
            (
                "<devices><filesystem type='mount'><target dir='data'/></filesystem></devices>",
                ["filesystem mount data"],
            ),
            ("<devices><filesystem type='mount'><readonly/></filesystem></devices>", []),
            (
                "<devices><memory model='nvdimm'/><memory model='dimm'/></devices>",
                ["memory nvdimm"],
            ),
            ("<os><nvram type='block'><source dev='/dev/v'/></nvram></os>", ["nvram"]),
            ("<os><nvram type='file'><source file='/v'/></nvram></os>", []),
            ("<os><loader type='pflash'>/f.fd</loader></os>", ["nvram"]),
            ("<os><loader type='pflash' readonly='yes'>/f.fd</loader></os>", []),
        ],
    )
    def test_what_keeps_data_beside_disks_is_named(self, where: str, told: list[str]) -> None:
        """A copy without it would look whole."""
        found = DomainDefinition.parse(f"<domain><name>web1</name>{where}</domain>")
        assert [each.target for each in found.left_beside] == told

    @pytest.mark.parametrize(
        "disk",
        [
            "<disk type='network'><source protocol='rbd' name='p/v'/><target dev='vda'/></disk>",
            "<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>",
            "<disk type='block' device='lun'><source dev='/dev/sdb'/><target dev='sda'/></disk>",
            "<disk type='file'><target dev='vda'/></disk>",
            "<disk type='file'><source file='/a'/><target dev='vda'/><transient/></disk>",
        ],
    )
    def test_writable_disk_that_cannot_be_copied_refuses_the_copy(self, disk: str) -> None:
        """A copy without a writable disk would look whole and not be, so it is refused."""
        with pytest.raises(DiskNotCopyable) as refusal:
            with_disk(disk).split_disks()
        assert refusal.value.status == 422

    def test_without_writable_disks(self) -> None:
        """A server with nothing but a CD-ROM has nothing to copy."""
        with pytest.raises(DomainWithoutDisks):
            with_disk("<disk device='cdrom'><target dev='sda'/></disk>").split_disks()

    def test_files_that_character_devices_write_to(self) -> None:
        """Logs, and lines whose far end is a file; a console that is the serial line counts once.
        Sockets and terminals are no files."""
        devices = """<devices>
          <serial type='file'><source path='/var/log/vm/win1.log' append='on'/></serial>
          <console type='file'><source path='/var/log/vm/win1.log'/></console>
          <parallel type='file'><source path='/srv/printed'/></parallel>
          <channel type='file'><source path='/srv/told'/></channel>"""
        found = log_files(WINDOWS.replace("<devices>", devices, 1))
        assert sorted(found) == [
            "/srv/printed",
            "/srv/told",
            "/var/log/consoles/win1.log",
            "/var/log/vm/win1.log",
        ]

    def test_raw_unless_said_otherwise(self) -> None:
        """A disk without a driver type is raw: formats are never guessed from contents."""
        found = with_disk("<disk type='file'><source file='/a'/><target dev='vda'/></disk>")
        assert found.disks[0].format == "raw"

    def test_backing_chain_is_seen(self) -> None:
        """A live definition with a chain under a disk says so."""
        found = with_disk(
            "<disk type='file'><source file='/a'/><backingStore type='file'><format type='raw'/>"
            "<source file='/b'/></backingStore><target dev='vda'/></disk>"
        )
        assert found.disks[0].has_backing

    @pytest.mark.parametrize("xml", ["", "<domain/>", "<network><name>x</name></network>", "<a"])
    def test_not_a_domain(self, xml: str) -> None:
        """What is no domain definition is refused as such."""
        with pytest.raises(DefinitionInvalid):
            DomainDefinition.parse(xml)

    def test_entities_are_not_resolved(self) -> None:
        """A definition cannot pull in files of the host."""
        xml = (
            "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>"
            "<domain><name>web&x;1</name></domain>"
        )
        assert DomainDefinition.parse(xml).name == "web"

    def test_other_disk_paths(self) -> None:
        """Disks are pointed at new files with their new format; what stays, stays."""
        xml = DomainDefinition.parse(WINDOWS).with_disk_paths(DISKS, {"vdb": "qcow2"})
        root = etree.fromstring(xml)
        disks = {d.find("target").get("dev"): d for d in root.iterfind("devices/disk")}
        assert disks["vda"].find("source").get("file") == DISKS["vda"]
        assert disks["vda"].findtext("serial") == "WIN1-SYSTEM"
        assert disks["vdb"].get("type") == "file"
        assert disks["vdb"].find("driver").get("type") == "qcow2"
        assert disks["vdb"].find("driver").get("io") == "native"
        assert disks["vdc"].find("source").get("file") == "/srv/vms/cluster.img"
        assert not root.findall("devices/disk/source/seclabel")

    def test_unknown_disk_is_refused(self) -> None:
        """A path for a disk that is not there is an error, not a silence."""
        with pytest.raises(DefinitionInvalid):
            DomainDefinition.parse(WINDOWS).with_disk_paths({"vdz": "/x"})


class TestClone:
    def test_identity(self) -> None:
        """Name, UUID, SMBIOS UUID and generation id are the clone's own; metadata stays."""
        root = clone()
        assert root.get("id") is None
        assert (root.findtext("name"), root.findtext("uuid")) == ("qa-1", CLONE_UUID)
        assert root.findtext("sysinfo/system/entry[@name='uuid']") == CLONE_UUID
        assert root.findtext("genid") != "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
        assert root.find("metadata")[0] is not None

    def test_nothing_names_the_source(self) -> None:
        """No path of the clone's definition leads to a file or socket of its source."""
        text = etree.tostring(clone(nvram_path="/srv/vms/qa-1_VARS.fd"), encoding="unicode")
        for line in text.splitlines():
            assert "win1" not in line or "WIN1-SYSTEM" in line, line

    def test_interfaces(self) -> None:
        """Every NIC gets a fresh MAC and loses its host-side names and fixed addresses."""
        made = clone_definition(WINDOWS, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        root = etree.fromstring(made.xml)
        nics = root.findall("devices/interface")
        macs = [nic.find("mac").get("address") for nic in nics]
        assert len(nics) == 2
        assert list(made.macs) == ["52:54:00:aa:bb:01", "52:54:00:aa:bb:02"]
        assert list(made.macs.values()) == macs
        assert all(re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac) for mac in macs)
        assert not set(macs) & set(made.macs)
        assert not root.findall("devices/interface/target")
        assert root.find(".//virtualport/parameters").get("interfaceid") is None
        parameters = root.findall(".//filterref/parameter")
        assert [p.get("name") for p in parameters] == ["CTRL_IP_LEARNING"]

    def test_macs_that_are_given(self) -> None:
        """A clone that runs has the MACs of its definition; a card that is not in it a new one."""
        nics = clone(macs={"52:54:00:aa:bb:02": "52:54:00:00:00:07"}).findall(
            "devices/interface/mac"
        )
        first, second = (nic.get("address") for nic in nics)
        assert second == "52:54:00:00:00:07"
        assert first not in ("52:54:00:aa:bb:01", second)

    def test_two_cards_that_are_a_team_have_one_address(self) -> None:
        """The guest's net_failover finds them by it."""
        alike = WINDOWS.replace("52:54:00:aa:bb:02", "52:54:00:aa:bb:01")
        for more, addresses in (("", 2), ("<teaming type='persistent'/>", 1)):
            source = alike.replace("</interface>", f"{more}</interface>")
            made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
            nics = etree.fromstring(made.xml).findall("devices/interface/mac")
            assert len({nic.get("address") for nic in nics}) == addresses
            assert nics[-1].get("address") == made.macs["52:54:00:aa:bb:01"]

    def test_cpus_of_the_host(self) -> None:
        """That it has its source's is told; it takes none from its source by its priority."""
        pins = (
            "<vcpu cpuset='0-3'>2</vcpu><cputune><vcpupin vcpu='0' cpuset='2'/>"
            "<vcpusched vcpus='0' scheduler='fifo' priority='1'/></cputune>"
        )
        source = re.sub("<vcpu .*</cputune>", pins, WINDOWS, flags=re.DOTALL)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        assert ("cpu-pins", "0-3, 2") in made.kept
        assert "vcpusched" in [each.target for each in made.left_out]
        assert [each.tag for each in etree.fromstring(made.xml).find("cputune")] == ["vcpupin"]

    def test_what_it_is_called(self) -> None:
        """virt-manager shows a title in the name's place, and would call it as its source."""
        source = WINDOWS.replace("<uuid>", "<title>Production</title><uuid>", 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        assert "Production" not in made.xml

    def test_sound_goes_to_a_file_of_its_own(self) -> None:
        """QEMU writes it."""
        audio = "<devices><audio id='1' type='file' path='/srv/sound.wav'/>"
        source = WINDOWS.replace("<devices>", audio, 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        assert etree.fromstring(made.xml).find("devices/audio").get("path") == "/srv/qa-1-sound.wav"

    def test_disks(self) -> None:
        """Copied disks are the clone's files, the CD-ROM drive is empty, shared disks go."""
        root = clone()
        disks = {d.find("target").get("dev"): d for d in root.iterfind("devices/disk")}
        assert sorted(disks) == ["sda", "vda", "vdb"]
        assert disks["sda"].find("source") is None
        assert disks["vda"].find("source").attrib == {"file": DISKS["vda"]}
        assert disks["vdb"].get("type") == "file"
        assert not root.findall("devices/disk/backingStore")

    def test_shared_disk_is_kept_on_request(self) -> None:
        """A shared disk stays attached only when it is named."""
        root = clone(keep_left_out=["vdc"])
        assert "/srv/vms/cluster.img" in [
            source.get("file") for source in root.iterfind("devices/disk/source")
        ]

    def test_what_belongs_to_one_guest_is_left_out_and_named(self) -> None:
        """Host devices, shared disks, a TPM's state and outside serial ends go, and the result
        names them."""
        made = clone_definition(WINDOWS, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        root = etree.fromstring(made.xml)
        assert [item.target for item in made.left_out] == [
            "hostdev pci",
            "interface hostdev",
            "vdc",
            "tpm",
            "serial pty",
        ]
        for path in ("hostdev", "lease"):
            assert not root.findall(f"devices/{path}")
        assert not root.findall("seclabel")

    def test_directories_of_the_host_that_can_be_written_to_go(self) -> None:
        """A clone writes into nothing that its source has (C2); what it only reads stays."""
        devices = """<devices>
          <filesystem type='mount'><source dir='/srv/data'/><target dir='data'/></filesystem>
          <filesystem type='mount'><source dir='/srv/iso'/><target dir='iso'/><readonly/>
          </filesystem>
          <interface type='user'><backend type='passt'/>
            <portForward proto='tcp'><range start='2022' to='22'/></portForward></interface>"""
        source = WINDOWS.replace("<devices>", devices, 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        root = etree.fromstring(made.xml)
        stays = root.findall("devices/filesystem/target")
        assert [each.get("dir") for each in stays] == ["iso"]
        assert not root.findall("devices/interface/portForward")
        named = [each.target for each in made.left_out]
        assert "filesystem mount data" in named and "portForward" in named

    @pytest.mark.parametrize(
        ("device", "target"),
        [
            ("<shmem name='x'><model type='ivshmem-plain'/></shmem>", "shmem"),
            (
                "<tpm><backend type='external'><source type='unix' path='/run/t'/></backend></tpm>",
                "tpm",
            ),
            ("<interface type='ethernet'><target dev='t' managed='no'/></interface>", "ethernet"),
            ("<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>", "vdpa"),
            (
                "<interface type='direct'><source dev='eth0' mode='passthrough'/></interface>",
                "direct",
            ),
            (
                "<interface type='server'><source address='::1' port='5558'/></interface>",
                "server",
            ),
            (
                "<interface type='client'><source address='::1' port='5558'/></interface>",
                "client",
            ),
            (
                "<interface type='udp'><source address='::1' port='5558'>"
                "<local address='::1' port='5559'/></source></interface>",
                "udp",
            ),
            (
                "<redirdev bus='usb' type='tcp'><source mode='connect' host='::1' service='4000'/>"
                "</redirdev>",
                "redirdev tcp",
            ),
            (
                "<redirdev bus='usb' type='unix'><source mode='bind' path='/run/u'/></redirdev>",
                "redirdev unix",
            ),
            (
                "<smartcard mode='passthrough' type='tcp'>"
                "<source mode='bind' host='::1' service='2001'/></smartcard>",
                "smartcard tcp",
            ),
            (
                "<smartcard mode='passthrough' type='unix'>"
                "<source mode='bind' path='/run/s'/></smartcard>",
                "smartcard unix",
            ),
            ("<smartcard mode='host'/>", "smartcard"),
            (
                "<rng model='virtio'><backend model='egd' type='tcp'>"
                "<source mode='bind' host='::1' service='1234'/></backend></rng>",
                "rng",
            ),
        ],
    )
    def test_what_two_machines_cannot_have_at_once_goes(self, device: str, target: str) -> None:
        """Memory that others map, a TPM of the host's, a network device or a port: whoever starts
        second would fail, or get what is the source's (C2)."""
        source = WINDOWS.replace("<devices>", f"<devices>{device}", 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        assert target in [each.target.removeprefix("interface ") for each in made.left_out]
        devices = etree.fromstring(made.xml).find("devices")
        assert [each.tag for each in clone().find("devices")] == [each.tag for each in devices]

    def test_network_cards_that_can_share_a_device_stay(self) -> None:
        """Of macvtap only the mode passthrough takes the device for itself."""
        card = "<devices><interface type='direct'><source dev='eth0' mode='bridge'/></interface>"
        source = WINDOWS.replace("<devices>", card, 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        assert etree.fromstring(made.xml).find("devices/interface[@type='direct']") is not None

    @pytest.mark.parametrize(
        "device",
        [
            "<redirdev bus='usb' type='spicevmc'/>",
            "<smartcard mode='passthrough' type='spicevmc'/>",
            "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
            "<rng model='virtio'><backend model='egd' type='tcp'>"
            "<source mode='connect' host='::1' service='1234'/></backend></rng>",
        ],
    )
    def test_what_each_machine_has_of_its_own_stays(self, device: str) -> None:
        """What goes through the clone's own display, and randomness, also of a daemon's."""
        source = WINDOWS.replace("<devices>", f"<devices>{device}", 1)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        kind = etree.fromstring(device).tag
        assert etree.fromstring(made.xml).find(f"devices/{kind}") is not None
        assert not [each for each in made.left_out if each.target.startswith(kind)]

    @pytest.mark.parametrize("written", ["", "readonly='no'"])
    def test_firmware_that_is_written_to_is_refused(self, written: str) -> None:
        """A loader without read-only holds the UEFI variables itself; libvirt's default is that."""
        source = WINDOWS.replace("readonly='yes'", written, 1)
        with pytest.raises(DefinitionInvalid, match=r"OVMF_CODE_4M.ms.fd.*No clone was made"):
            clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)

    def test_ports_and_sockets(self) -> None:
        """Displays get automatic ports, sockets and logs paths of the clone's own."""
        root = clone()
        spice, vnc = root.findall("devices/graphics")
        assert (spice.get("port"), spice.get("autoport"), spice.get("tlsPort")) == (
            "-1",
            "yes",
            None,
        )
        assert (vnc.get("port"), vnc.get("websocket"), vnc.get("passwd")) == ("-1", "-1", "x")
        first, second = root.findall("devices/serial")
        assert first.find("source").get("path") == "/run/consoles/qa-1.sock"
        assert first.find("log").get("file") == "/var/log/consoles/qa-1.log"
        assert second.get("type") == "pty"
        assert second.find("protocol") is None
        assert root.find("devices/channel[@type='unix']/source").get("path") is None
        assert root.find("devices/vsock/cid").attrib == {"auto": "yes"}

    def test_a_pipe_becomes_a_pseudo_terminal(self) -> None:
        """QEMU makes none: the clone would not start."""
        pipe = "<serial type='pipe'><source path='/run/web.pipe'/></serial></devices>"
        source = WINDOWS.replace("</devices>", pipe)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        line = etree.fromstring(made.xml).findall("devices/serial")[-1]
        assert (line.get("type"), line.find("source")) == ("pty", None)
        assert made.left_out[-1] == LeftOut("serial pty", PSEUDO_TERMINAL)

    @pytest.mark.parametrize("fixed", ["tlsPort='5908'", "port='5907'", "port='-1' tlsPort='5908'"])
    def test_no_port_of_a_display_stays(self, fixed: str) -> None:
        """Also of one that is reached by TLS alone."""
        source = WINDOWS.replace("port='5907' tlsPort='5908'", fixed)
        made = clone_definition(source, name="qa-1", uuid=CLONE_UUID, disk_paths=DISKS)
        display = etree.fromstring(made.xml).find("devices/graphics[@type='spice']")
        assert (display.get("port"), display.get("autoport")) == ("-1", "yes")
        assert display.get("tlsPort") is None

    def test_uefi_variables_that_the_source_does_not_name(self) -> None:
        """The clone's are named where they were copied, since libvirt looks for them by the
        domain's name; one without copied ones, or without UEFI, names none."""
        boot = "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type></os>"
        source = f"<domain type='kvm'><name>web1</name>{boot}<devices/></domain>"
        for text, path, named in (
            (source, "/srv/n.fd", "/srv/n.fd"),
            (source, None, None),
            (source.replace(" firmware='efi'", ""), "/srv/n.fd", None),
        ):
            made = clone_definition(
                text, name="qa-1", uuid=CLONE_UUID, disk_paths={}, nvram_path=path
            )
            variables = etree.fromstring(made.xml).findall("os/nvram")
            assert [each.text for each in variables] == [named] * (named is not None)

    def test_nvram(self) -> None:
        """UEFI variables are at the given path, or at one libvirt makes; the template stays."""
        assert clone(nvram_path="/srv/n.fd").findtext("os/nvram") == "/srv/n.fd"
        fresh = clone().find("os/nvram")
        assert not (fresh.text or "").strip()
        assert fresh.get("template") == "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"

    def test_same_size_by_default(self) -> None:
        """A clone has its source's vCPUs, memory and topology unless asked otherwise."""
        root = clone()
        assert root.findtext("vcpu") == "8"
        assert root.findtext("memory") == "8"
        assert root.find("cpu/topology").attrib["sockets"] == "2"

    @pytest.mark.parametrize(
        ("vcpus", "sockets", "cores", "threads"), [(4, "2", "1", "2"), (3, "1", "3", "1")]
    )
    def test_other_vcpus(self, vcpus: int, sockets: str, cores: str, threads: str) -> None:
        """Topology, NUMA cells and pins agree with another number of vCPUs."""
        root = clone(vcpus=vcpus)
        topology = root.find("cpu/topology")
        assert root.findtext("vcpu") == str(vcpus)
        assert (topology.get("sockets"), topology.get("cores"), topology.get("threads")) == (
            sockets,
            cores,
            threads,
        )
        assert [pin.get("vcpu") for pin in root.iterfind("cputune/vcpupin")] == ["0"]
        assert root.find("cpu/numa/cell[@id='0']").get("cpus") == "0-1"

    def test_other_memory(self) -> None:
        """NUMA cells add up to another memory size."""
        root = clone(memory_bytes=3 << 30)
        assert root.findtext("memory") == root.findtext("currentMemory") == str(3 << 20)
        cells = [int(cell.get("memory")) for cell in root.iterfind("cpu/numa/cell")]
        assert sum(cells) == 3 << 20

    def test_source_is_left_alone(self) -> None:
        """The source's text is not changed by cloning it."""
        before = WINDOWS
        clone()
        assert before == WINDOWS

    @pytest.mark.parametrize("prefix", ["", "zz:00", "53:54:00", "52:54:00:1:2:3", "152:0"])
    def test_bad_mac_prefix(self, prefix: str) -> None:
        """A prefix that is none, or names a multicast address, is refused."""
        with pytest.raises(DefinitionInvalid):
            random_mac(prefix)

    def test_own_path_never_equals_the_source(self) -> None:
        """A path without the source's name in it gets the clone's put before it."""
        assert own_path("/run/serial.sock", "win1", "qa-1") == "/run/qa-1-serial.sock"
