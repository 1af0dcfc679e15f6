# Renews who a Linux guest is, inside the guest. It is handed to `sh` on its standard input, or
# as a file, by the ways that the modules beside it take; what is chosen outside comes as
# arguments, none of which is ever read as shell. Any POSIX sh does, busybox's too.
#
#   look                                          tell who the guest is: KEY <tab> VALUE lines
#   renew HOSTNAME MACHINE-ID [OLD-MAC=NEW-MAC]…  change it; the network must not reach anybody
#   machine HOSTNAME MACHINE-ID                   change what cloud-init leaves, from its bootcmd
#   connect [MAC]…                                have DHCP clients ask, once the network does; the
#                                                 cards of these MACs were plugged in just now
#
# `renew` changes what it can and fails for nothing: what counts is what `look` tells afterwards.
# With OFFLINE=1 the guest does not run: only its files are changed.

dhcp_files() {
    for file in /var/lib/dhcp/*.leases /var/lib/dhclient/*.leases* \
        /var/lib/dhcpcd/*.lease* /var/lib/dhcpcd/duid /var/lib/dhcpcd/secret /etc/dhcpcd.duid \
        /run/systemd/netif/leases/* \
        /var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key; do
        [ -f "$file" ] && echo "$file"
    done
}

network_files() {
    for file in /etc/netplan/*.yaml /etc/systemd/network/*.network /etc/systemd/network/*.link \
        /etc/systemd/network/*.netdev /run/systemd/network/*.netdev \
        /run/systemd/network/*.network /run/systemd/network/*.link \
        /etc/network/interfaces /etc/network/interfaces.d/* \
        /etc/udev/rules.d/*persistent-net.rules \
        /etc/NetworkManager/system-connections/* /etc/sysconfig/network-scripts/ifcfg-*; do
        [ -f "$file" ] && echo "$file"
    done
}

# Those of a card that were given an address of their own, as systemd makes one of the machine-id:
# it does not go with the card, and is the source's until it is made anew.
bridges() {
    [ -z "$OFFLINE" ] || return 0
    for ports in /sys/class/net/*/brif; do
        bridge=$(dirname "$ports")
        [ "$(cat "$bridge/addr_assign_type")" = 3 ] || continue
        for port in "$ports"/*; do
            [ -e "/sys/class/net/${port##*/}/device" ] && echo "${bridge##*/}" && break
        done
    done
}

# Addresses that are written down: no DHCP server sees to it that a clone gets another one. In
# netplan's files they have a length, as what a route or rule leads to has.
static_addresses() {
    network_files | while read -r file; do
        case $file in
            *.yaml)
                sed -E 's/#.*//; /(to|from|via|allowed-ips):/d' "$file" |
                    grep -oE '[0-9A-Fa-f.:]*[.:][0-9A-Fa-f.:]*/[0-9]+'
                ;;
            *.network) sed -nE 's/^Address[[:space:]]*=[[:space:]]*//p' "$file" ;;
            /etc/network/interfaces*) sed -nE 's/^[[:space:]]*address[[:space:]]+//p' "$file" ;;
            */ifcfg-*) sed -nE 's/^IP(V6)?ADDR[0-9]*=//p' "$file" | tr -d "\"'" ;;
            */system-connections/*) sed -nE 's/^address[0-9]*=//p' "$file" ;;
        esac | sed -E 's/[/, ].*//' | grep -vE '^(127\.|0\.0\.0\.0$|::|[Ff][Ee]80:|$)' |
            while read -r address; do echo "$address in $file"; done
    done | sort -u -k 1,1
}

running() {
    [ -z "$OFFLINE" ] && command -v systemctl >/dev/null && systemctl -q is-active "$1"
}

fact() { printf '%s\t%s\n' "$1" "$2"; }

# --- look ------------------------------------------------------------------------------------

look() {
    fact kernel "$(uname -s)"
    [ -n "$OFFLINE" ] || fact hostname "$(uname -n)"
    [ -f /etc/hostname ] && fact stored-hostname "$(cat /etc/hostname)"
    [ -f /etc/machine-id ] && fact machine-id "$(cat /etc/machine-id)"
    [ -f /var/lib/dbus/machine-id ] && fact dbus-machine-id "$(cat /var/lib/dbus/machine-id)"
    for file in /etc/ssh/ssh_host_*_key.pub; do
        [ -f "$file" ] && fact ssh-host-key "$(cut -d ' ' -f 1,2 "$file")"
    done
    for client in systemd-networkd NetworkManager networking; do
        [ -e "/etc/systemd/system/multi-user.target.wants/$client.service" ] &&
            fact dhcp-client "$client"
    done
    dhcp_files | while read -r file; do fact dhcp-state "$(cksum "$file")"; done
    bridges | while read -r bridge; do
        fact bridge-mac "$(cat "/sys/class/net/$bridge/address") of $bridge"
    done
    static_addresses | while read -r address; do fact static-address "$address"; done
    for pair in "$@"; do
        network_files | while read -r file; do
            grep -qi "${pair%=*}" "$file" && fact source-mac "${pair%=*} in $file"
        done
    done
}

# --- renew -----------------------------------------------------------------------------------

# A clone that was resumed with its source's memory, and others of the same memory, would draw
# the same random numbers. The seed is from outside; it counts at once where the kernel can be
# told to use it, and from its next reseeding on otherwise.
stir() {
    [ -n "$SEED" ] && printf %s "$SEED" >/dev/urandom
    reseed=0x5207 # RNDRESEEDCRNG, random(4)
    perl -e "open my \$r, '>', '/dev/urandom'; exit !ioctl \$r, $reseed, 0" ||
        python3 -c "import fcntl; fcntl.ioctl(open('/dev/urandom', 'wb'), $reseed)"
}

hostname_() {
    old=$(cat /etc/hostname 2>/dev/null || uname -n)
    printf '%s\n' "$1" >/etc/hostname
    if [ -f /etc/hosts ]; then
        # The name and its first label where either stands as a word of its own.
        copy=$(OLD=$old NEW=$1 awk '
            BEGIN { old = ENVIRON["OLD"]; new = ENVIRON["NEW"]
                    short = old; sub(/\..*/, "", short); new_short = new; sub(/\..*/, "", new_short) }
            /^[ \t]*#/ || short == "localhost" { print; next }
            { for (i = 2; i <= NF; i++)
                  if ($i == old) $i = new; else if ($i == short) $i = new_short
              print }' /etc/hosts) && printf '%s\n' "$copy" >/etc/hosts
    fi
    [ -n "$OFFLINE" ] || printf %s "$1" >/proc/sys/kernel/hostname
    running systemd-hostnamed && systemctl restart systemd-hostnamed
}

# systemd-machine-id-setup is no help: it takes the old id back from D-Bus, or one from the
# SMBIOS UUID, which is the source's where the memory is.
machine_id() {
    [ -e /etc/machine-id ] && printf '%s\n' "$1" >/etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
        printf '%s\n' "$1" >/var/lib/dbus/machine-id
    fi
}

# The new keys are there before the old ones go: a guest without any cannot be logged in to.
ssh_host_keys() {
    ls /etc/ssh/ssh_host_*_key || return 0
    new=$(mktemp -d /etc/ssh/.new.XXXXXX) || return 0
    mkdir -p "$new/etc/ssh"
    # Before OpenSSH 7.6 it takes no other place, and says that all is well.
    if ssh-keygen -q -A -f "$new" && ls "$new"/etc/ssh/ssh_host_*_key; then
        rm -f /etc/ssh/ssh_host_*
        mv "$new"/etc/ssh/ssh_host_* /etc/ssh/
        command -v restorecon && restorecon -R /etc/ssh
        for unit in ssh sshd; do
            running "$unit" && systemctl restart "$unit"
        done
    fi
    rm -rf "$new"
}

own_macs() {
    changed=
    for pair in "$@"; do
        for file in $(network_files); do
            if grep -qi "${pair%=*}" "$file"; then
                copy=$(sed "s/${pair%=*}/${pair#*=}/gI" "$file") && printf '%s\n' "$copy" >"$file"
                changed=$file
            fi
        done
    done
    [ -n "$changed" ] && [ -z "$OFFLINE" ] && command -v netplan && netplan apply
}

dhcp() {
    if [ -z "$OFFLINE" ] && command -v ifdown; then
        mkdir -p /run/triptych
        # lo, and what DHCP has no part in, come back as they were. The second is busybox's way.
        # What a renewal took down that came to no end stays on the list.
        [ -e /run/triptych/connected ] && rm -f /run/triptych/interfaces /run/triptych/connected
        { ifquery --state || cat /var/run/ifstate; } |
            sed 's/=.*//' | grep -vx lo >>/run/triptych/interfaces
        while read -r interface; do
            ifdown --force "$interface" || ifdown -f "$interface"
        done </run/triptych/interfaces
    fi
    running NetworkManager && network_manager=1 && systemctl stop NetworkManager
    dhcp_files | while read -r file; do rm -f "$file"; done
    [ -n "$network_manager" ] && systemctl start NetworkManager
    if running systemd-networkd; then # its DUID is made of the machine-id when it starts
        systemctl restart systemd-networkd
    fi
}

renew() {
    stir
    hostname_ "$1"
    machine_id "$2"
    ssh_host_keys
    shift 2
    own_macs "$@"
    bridges | while read -r bridge; do
        ip link set dev "$bridge" address "02$(od -An -N5 -tx1 /dev/urandom | tr ' ' :)"
    done
    dhcp
    if [ -n "$OFFLINE" ]; then
        rm -f /var/lib/systemd/random-seed
        # Files made while SELinux does not run have no label until the next boot gives them one.
        grep -q '^SELINUX=\(enforcing\|permissive\)' /etc/selinux/config && touch /.autorelabel
    fi
    sync
}

machine() {
    stir
    hostname_ "$1" # in /etc/hosts too, which cloud-init leaves unless it is told to manage it
    machine_id "$2"
    dhcp
    connect
    sync
}

# --- connect ---------------------------------------------------------------------------------

# networkd and NetworkManager ask by themselves as soon as there is a carrier.
connect() {
    [ -s /run/triptych/interfaces ] || return 0
    seen=0
    for mac in "$@"; do wait_for_card "$mac" || seen=1; done
    command -v udevadm && udevadm settle --timeout=5 # it names them
    touch /run/triptych/connected
    awk '!seen[$0]++' /run/triptych/interfaces |
        while read -r interface; do ifup "$interface"; done &
    return "$seen"
}

wait_for_card() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        grep -qix "$1" /sys/class/net/*/address && return 0
        sleep 1
    done
    return 1
}

main() {
    action=$1
    shift
    case $action in
        look) look "$@" ;;
        renew) renew "$@" >/dev/null 2>&1 ;;
        machine) machine "$@" >/dev/null 2>&1 ;;
        connect) connect "$@" >/dev/null 2>&1 || return 1 ;;
    esac
    return 0
}

main "$@" </dev/null
