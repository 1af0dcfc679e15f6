"""A guest's identity renewed through its agent, and what is said when it cannot be."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from operations.waiting import wait_for

from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor, scratch
from services.cloner import identity
from services.cloner.identity import by_agent
from services.cloner.identity import guest as inside
from services.cloner.identity.by_agent import ByAgent
from services.cloner.identity.report import Renewal, report
from services.cloner.identity.way import Way
from shared.errors import Cancelled, IdentityNotRenewed
from shared.hypervisor import guest_exec
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.errors import GuestNotAnswering, HypervisorError
from shared.hypervisor.guest_exec import Ran
from shared.hypervisor.links import link_up, linked, without_links
from shared.settings import Settings

OLD_MAC, NEW_MAC = "52:54:00:AA:BB:01", "52:54:00:aa:bb:02"
OLD_KEY = "ssh-ed25519 OLD root@golden"
#: Stands in for openssh in the lab's guest, which has none: it makes a key that is new each time.
KEYGEN = """\
#!/bin/sh
while [ "$1" != -f ]; do shift; done
echo "ssh-ed25519 $(cat /proc/sys/kernel/random/uuid)" >"$2/etc/ssh/ssh_host_ed25519_key.pub"
echo private >"$2/etc/ssh/ssh_host_ed25519_key"
"""


@pytest.fixture(scope="module")
def running(hypervisor: Hypervisor) -> Iterator[Guest]:
    """A running guest whose one link is down, as a clone is started."""
    with scratch() as directory, Guest.create(hypervisor, directory, nic=True) as made:
        made.connection.defineXML(without_links(made.domain.XMLDesc())[0])
        yield made.start()


@pytest.fixture
def domain(running: Guest) -> Domain:
    return find_by_name(connect(running.hypervisor.uri), running.name)


def refusal(domain: Domain) -> str | None:
    with contextlib.suppress(HypervisorError):  # its agent is coming back
        return guest_exec.refusal(domain)
    return None


def not_wanted() -> None:
    raise Cancelled("Cancelled.")


@pytest.mark.vm
def test_what_a_guest_has_of_its_source_is_renewed_and_read_back(
    running: Guest, domain: Domain
) -> None:
    """Names, ids, keys, leases and the MAC in network files are the clone's afterwards."""
    running.run("mkdir -p /etc/ssh /etc/netplan /var/lib/dhcp /var/lib/dbus")
    running.run("mkdir -p /etc/systemd/system/multi-user.target.wants")
    running.write("/etc/hostname", "golden.example\n")
    running.write("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 golden.example golden goldeny\n")
    machine_id = running.read("/etc/machine-id")
    running.write("/var/lib/dbus/machine-id", machine_id)
    running.write("/etc/ssh/ssh_host_rsa_key.pub", OLD_KEY)
    running.write("/etc/ssh/ssh_host_rsa_key", "private")
    running.write("/usr/bin/ssh-keygen", KEYGEN)
    running.run("chmod 755 /usr/bin/ssh-keygen")
    running.write("/var/lib/dhcp/dhclient.eth0.leases", "lease { }")
    running.write("/etc/systemd/system/multi-user.target.wants/networking.service", "")
    running.write("/etc/netplan/50-cloud-init.yaml", f'macaddress: "{OLD_MAC.lower()}"\n')

    renewal = identity.renew_in_guest(domain, "web_1.example", {OLD_MAC: NEW_MAC})

    assert renewal == Renewal(
        way="agent",
        hostname="web-1.example",
        renewed=["hostname", "machine-id", "ssh-host-keys", "network-config", "dhcp"],
    )
    assert running.read("/etc/hostname") == "web-1.example\n"
    assert running.run("hostname") == (0, "web-1.example\n")
    hosts = "127.0.0.1 localhost\n127.0.1.1 web-1.example web-1 goldeny\n"
    assert running.read("/etc/hosts") == hosts
    own = running.read("/etc/machine-id")
    assert re.fullmatch(r"[0-9a-f]{32}\n", own)
    assert own != machine_id
    assert running.read("/var/lib/dbus/machine-id") == own
    keys = "ssh_host_ed25519_key\nssh_host_ed25519_key.pub\n"
    assert running.run("ls -A /etc/ssh") == (0, keys)
    assert running.run("ls -A /var/lib/dhcp") == (0, "")
    assert running.read("/etc/netplan/50-cloud-init.yaml") == f'macaddress: "{NEW_MAC}"\n'


def test_a_static_address_is_known_though_the_renewal_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guest that is too slow for the rest has told it by then: its links stay down."""
    told = "kernel\tLinux\nhostname\tgolden\nstatic-address\t10.0.0.7 in /etc/network/interfaces\n"

    def run(_domain: object, _program: str, arguments: list[str], **_more: object) -> Ran:
        if arguments[2] == "look":
            return Ran(0, told)
        raise GuestNotAnswering("/bin/sh did not end within 60 s.")

    monkeypatch.setattr(by_agent.guest_exec, "run", run)
    for name in ("wait_for_agent", "system_of", "refusal"):
        monkeypatch.setattr(by_agent.guest_exec, name, lambda *_given: "")

    renewal = identity.renew_in_guest(object(), "web2", {})  # type: ignore[arg-type]

    assert renewal.renewed == []
    assert renewal.addresses == ["10.0.0.7 in /etc/network/interfaces"]
    assert {part for part, _ in renewal.kept} == {"hostname", "machine-id", "ssh-host-keys"}


@pytest.mark.vm
@pytest.mark.parametrize("status", [0, 1])
def test_old_keys_stay_where_no_new_ones_can_be_made(
    running: Guest, domain: Domain, status: int
) -> None:
    """A guest is never left without SSH host keys, though an ssh-keygen that knows of no other
    place says that all is well; that they are the old ones is said."""
    running.run("mkdir -p /etc/ssh; rm -f /etc/ssh/*")
    running.write("/etc/ssh/ssh_host_rsa_key.pub", OLD_KEY)
    running.write("/etc/ssh/ssh_host_rsa_key", "private")
    running.write("/usr/bin/ssh-keygen", f"#!/bin/sh\nexit {status}\n")
    running.write("/etc/hostname", "localhost.localdomain\n")
    hosts = "127.0.0.1 localhost localhost.localdomain localhost4\n"
    running.write("/etc/hosts", hosts)

    renewal = identity.renew_in_guest(domain, "web2", {})

    assert "machine-id" in renewal.renewed
    ((part, reason),) = renewal.kept
    assert (part, "the old ones stay" in reason) == ("ssh-host-keys", True)
    assert running.run("ls -A /etc/ssh") == (0, "ssh_host_rsa_key\nssh_host_rsa_key.pub\n")
    assert running.read("/etc/ssh/ssh_host_rsa_key.pub") == OLD_KEY
    assert running.read("/etc/hosts") == hosts  # which stays the machine's own name, whoever it is


@pytest.mark.vm
def test_a_bridge_of_a_card_gets_an_address_of_its_own(running: Guest, domain: Domain) -> None:
    """What a guest sends through it would else come from its source's. One without a card, and one
    that has its card's address, are left alone."""
    for number, card in ((0, "eth0"), (1, None)):
        given = f"ip link set br{number} address 02:00:00:00:00:7{number}"
        assert running.run(f"ip link add name br{number} type bridge && {given}")[0] == 0
        if card:
            assert running.run(f"ip link set {card} master br{number}")[0] == 0

    renewal = identity.renew_in_guest(domain, "web2", {})

    assert "bridge-mac" in renewal.renewed
    address = running.read("/sys/class/net/br0/address").strip()
    assert re.fullmatch(r"02(:[0-9a-f]{2}){5}", address)
    assert address != "02:00:00:00:00:70"
    assert running.read("/sys/class/net/br1/address").strip() == "02:00:00:00:00:71"


#: Files with an address of their own, each as its network manager has it written.
WRITTEN = {
    "/etc/network/interfaces": "iface lo inet static\n address 127.0.0.1\n"
    "iface eth0 inet static\n\taddress  10.0.0.1/24\n\tgateway 10.0.0.254\n",
    "/etc/netplan/a.yaml": "ethernets:\n  e:\n    addresses: # two\n    - '10.0.0.2/24':\n"
    "    - 2001:db8::2/64\n    routes: [{to: 10.9.0.0/16, via: 10.0.0.254}]\n"
    "    nameservers: {addresses: [10.9.9.9]}\n    macaddress: 52:54:00:aa:bb:01\n",
    "/etc/systemd/network/a.network": "[Network]\nAddress = 10.0.0.3/24\nGateway=10.0.0.254\n",
    "/etc/NetworkManager/system-connections/a.nmconnection": "[ipv4]\n"
    "address1=10.0.0.4/24,10.0.0.254\ndns=10.9.9.9;\n",
    "/etc/sysconfig/network-scripts/ifcfg-eth0": 'IPADDR="10.0.0.5"\nGATEWAY=10.0.0.254\n',
}


@pytest.mark.vm
def test_links_stay_down_where_the_guest_has_its_sources_addresses(
    running: Guest, domain: Domain
) -> None:
    """Those that are written down in it, which no DHCP server makes its own. All are named."""
    for path, text in WRITTEN.items():
        running.run(f"mkdir -p {Path(path).parent}")
        running.write(path, text)
    by_agent = ByAgent("web2", Path(), False, lambda: None)
    by_agent.links = [mac.attrib["address"] for mac in running.xml.iterfind(".//mac")]
    try:
        by_agent.after_start(domain)
    finally:
        running.run(f"rm {' '.join(WRITTEN)}")

    places = dict(each.split(" in ") for each in by_agent.renewal.addresses)
    assert sorted(places) == [*(f"10.0.0.{number}" for number in range(1, 6)), "2001:db8::2"]
    assert set(places.values()) == set(WRITTEN)
    assert running.xml.find(".//interface/link").attrib == {"state": "down"}
    definition = CloneDefinition("", "web2", "", {}, (), (("cpu-pins", "2-3"),))
    kept = {
        each["part"]: each["reason"] for each in report(definition, False, by_agent.renewal)["kept"]
    }
    assert kept["cpu-pins"] == "2-3: its source's"
    assert "10.0.0.1 in /etc/network/interfaces" in kept["ip-address"]
    assert "domif-setlink" in kept["ip-address"]


@pytest.mark.vm
def test_arguments_are_never_read_by_a_shell(running: Guest, domain: Domain) -> None:
    """What is handed over arrives as it is, whatever is in it."""
    wicked = ["$(touch /run/one)", "; touch /run/one", "`touch /run/one`", "a b\n'\""]

    ran = guest_exec.run(
        domain,
        "/bin/sh",
        ["-s", "--", *wicked],
        standard_input='printf "%s|" "$@"; exit 3',
        timeout_s=60,
    )

    assert ran == guest_exec.Ran(3, "".join(f"{each}|" for each in wicked))
    assert running.run("ls /run/one")[0] != 0
    assert guest_exec.has_file(domain, "/etc/rc")
    assert not guest_exec.has_file(domain, "/etc/no-such-file")


@pytest.mark.vm
def test_links_are_down_until_they_are_put_up(running: Guest, domain: Domain) -> None:
    """The guest has no carrier until then, and has one at its next start."""
    running.run("ip link set eth0 up")
    assert running.read("/sys/class/net/eth0/carrier") == "0\n"

    link_up(domain, [mac.attrib["address"] for mac in running.xml.iterfind(".//mac")])

    wait_for(lambda: running.read("/sys/class/net/eth0/carrier") == "1\n")
    states = [link.attrib["state"] for link in running.xml.iterfind(".//interface/link")]
    assert states == ["up"]


@pytest.mark.vm
def test_what_was_taken_down_is_brought_up(
    running: Guest, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the guest's ifupdown, which took it down before; a card that the guest does not see is
    told of."""
    # Its last look for a card comes ten seconds of the guest's own after the first.
    monkeypatch.setattr("services.cloner.identity.by_agent._CONNECT_S", 120)
    address = "10.0.3.15"
    shown = f"ip address show dev eth0 | grep -c {address}"
    interfaces = f"iface eth0 inet static\n  address {address}\n  netmask 255.255.255.0\n"
    running.run("mkdir -p /etc/network; ln -s /run /var/run")
    running.write("/etc/network/interfaces", interfaces)
    assert running.run("ifup eth0")[0] == 0
    assert running.run(shown) == (0, "1\n")
    card = running.read("/sys/class/net/eth0/address").strip()

    for name in ("web2", "web3"):  # the first comes to no end, and is done again
        identity.renew_in_guest(domain, name, {})
        assert running.run(shown) == (1, "0\n")

    assert identity.connect(domain, [card]) is None
    wait_for(lambda: running.run(shown) == (0, "1\n"))
    assert "does not see" in str(identity.connect(domain, ["52:54:00:00:00:01"]))


@pytest.mark.vm
def test_an_agent_that_runs_nothing_is_said(running: Guest, domain: Domain) -> None:
    """Where guest-exec is blocked all parts are kept, with what to do about it."""
    running.run("sed -i 's/--statedir/--block-rpcs=guest-exec --statedir/' /sbin/agent")
    running.agent("guest-exec", path="/bin/sh", arg=["-c", "sleep 0.2; killall qemu-ga"])
    assert wait_for(lambda: refusal(domain))

    renewal = identity.renew_in_guest(domain, "web3", {})

    assert renewal.renewed == []
    assert [part for part, _ in renewal.kept] == ["hostname", "machine-id", "ssh-host-keys"]
    assert all("guest-exec" in reason for _, reason in renewal.kept)


@pytest.mark.vm
def test_a_silent_guest_is_waited_for_a_while_and_connected(
    hypervisor: Hypervisor, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` says what is kept and puts the links up; `agent` fails the clone; cancel ends it."""
    monkeypatch.setattr(
        "services.cloner.identity.by_agent.settings", lambda: Settings(identity_timeout="0.5")
    )
    blank = str(make_disk(workspace, "raw", "blank"))
    with Guest.create(hypervisor, workspace, disks=[blank], nic=True) as made:
        definition = CloneDefinition(made.domain.XMLDesc(), made.name, "", {}, ())
        by_agent = ByAgent("c", workspace, False, lambda: None)
        made.connection.defineXML(by_agent.prepare(definition).xml)
        assert made.xml.find(".//interface/link").attrib == {"state": "down"}
        made.start(wait=False)
        domain = find_by_name(connect(hypervisor.uri), made.name)

        by_agent.after_start(domain)

        assert all("did not answer within" in reason for _, reason in by_agent.renewal.kept)
        assert made.xml.find(".//interface/link").attrib == {"state": "up"}
        with pytest.raises(IdentityNotRenewed, match="did not answer"):
            ByAgent("c", workspace, True, lambda: None).after_start(domain)
        with pytest.raises(Cancelled):
            ByAgent("c", workspace, False, not_wanted).after_start(domain)


@pytest.mark.parametrize(
    ("name", "hostname"),
    [
        ("web1", "web1"),
        ("QA_7", "QA-7"),
        ("a.-b_.c..", "a.b.c"),
        ("1--2", "1--2"),
        (f"{'x' * 62}_", "x" * 62),
    ],
)
def test_names_become_names_of_hosts(name: str, hostname: str) -> None:
    """Letters, digits and inner dashes stay, in labels that are not empty."""
    assert hostname == inside.hostname_for(name)


BEFORE = {
    "hostname": ["golden"],
    "stored-hostname": ["golden"],
    "machine-id": ["0" * 32],
    "dbus-machine-id": ["0" * 32],
    "ssh-host-key": ["ssh-rsa A", "ssh-ed25519 B"],
    "dhcp-client": ["systemd-networkd"],
    "dhcp-state": ["123 4 /var/lib/dhcpcd/duid"],
    "source-mac": ["52:54:00:aa:bb:01 in /etc/netplan/a.yaml"],
    "bridge-mac": ["02:00:00:00:00:77 of br0"],
}
AFTER = {
    "hostname": ["web"],
    "stored-hostname": ["web"],
    "machine-id": ["1" * 32],
    "dbus-machine-id": ["1" * 32],
    "ssh-host-key": ["ssh-rsa C", "ssh-ed25519 D"],
    "dhcp-client": ["systemd-networkd"],
    "bridge-mac": ["02:11:22:33:44:55 of br0"],
}


def test_a_guest_that_tells_new_values_is_renewed() -> None:
    """All that it had is listed as its own."""
    judged = inside.judge(BEFORE, AFTER, "web", "1" * 32)

    everything = ["hostname", "machine-id", "ssh-host-keys", "network-config", "bridge-mac", "dhcp"]
    assert judged == Renewal(hostname="web", renewed=everything)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("hostname", {"stored-hostname": ["golden"]}),
        ("hostname", {"hostname": ["localhost"]}),
        ("machine-id", {"machine-id": ["0" * 32]}),
        ("machine-id", {"machine-id": ["2" * 32]}),  # not the one that was written
        ("machine-id", {"dbus-machine-id": ["0" * 32]}),  # systemd would take it back from there
        ("ssh-host-keys", {"ssh-host-key": ["ssh-rsa C", "ssh-ed25519 B"]}),
        ("ssh-host-keys", {"ssh-host-key": []}),
        ("network-config", {"source-mac": BEFORE["source-mac"]}),
        ("bridge-mac", {"bridge-mac": BEFORE["bridge-mac"]}),
        ("dhcp", {"dhcp-state": BEFORE["dhcp-state"]}),
    ],
)
def test_what_reads_as_before_is_kept(part: str, told: dict[str, list[str]]) -> None:
    """One value of the source's is enough for the part to be named."""
    judged = inside.judge(BEFORE, AFTER | told, "web", "1" * 32)

    assert [part] == [name for name, _ in judged.kept]
    assert part not in judged.renewed


def test_what_a_guest_does_not_have_is_not_spoken_of() -> None:
    """No SSH server, no machine-id, no DHCP client: the hostname alone is told."""
    judged = inside.judge({"hostname": ["golden"]}, {"hostname": ["web"]}, "web", "1" * 32)

    assert (judged.renewed, judged.kept) == (["hostname"], [])


def test_a_link_that_its_owner_took_out_stays_out() -> None:
    """Only links that were up are taken down, and told of."""
    xml = """<domain><name>a</name><devices>
      <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
      <interface type='user'><mac address='52:54:00:00:00:02'/><link state='down'/></interface>
      <interface type='user'><mac address='52:54:00:00:00:03'/><link state='up'/></interface>
    </devices></domain>"""

    changed, macs = without_links(xml)

    assert macs == ["52:54:00:00:00:01", "52:54:00:00:00:03"]
    assert changed.count('state="down"') == 3


def test_a_function_of_the_hosts_from_a_pool_is_not_touched() -> None:
    """libvirt refuses any change to one, and would undo the clone."""
    xml = """<domain><name>a</name><devices>
      <interface type='hostdev'><mac address='52:54:00:00:00:01'/><link state='down'/></interface>
      <interface type='network'><mac address='52:54:00:00:00:02'/><link state='down'/></interface>
      <interface type='network'><mac address='52:54:00:00:00:03'/><link state='down'/></interface>
    </devices></domain>"""

    found = dict(linked(xml, ["52:54:00:00:00:01", "52:54:00:00:00:02"]))

    assert list(found) == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    assert found["52:54:00:00:00:01"] is None
    assert 'state="up"' in (found["52:54:00:00:00:02"] or "")


def test_the_report_names_parts_with_reasons_and_what_to_do() -> None:
    """The host's side is renewed in any case; each kept part has its reason and its remedy."""
    definition = CloneDefinition("", "web", "", {OLD_MAC: NEW_MAC}, ())
    kept = Way("web", Path(), False, lambda: None, inside.nothing("it was to be kept."))

    told = report(definition, True, kept.renewal)

    assert told["renewed"] == ["name", "uuid", f"mac {NEW_MAC}", "nvram"]
    assert told["way"] == "keep"
    assert [each["part"] for each in told["kept"]] == ["hostname", "machine-id", "ssh-host-keys"]
    assert told["kept"][0]["reason"] == "it was to be kept; set it in the guest"
