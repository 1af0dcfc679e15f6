"""What the tests, the bench and `make demo` stand on: a libvirtd, small guests, file systems.

Nothing in here touches a domain, a file or a mount that it did not make itself; where the
machine's own state has to change for a while (the mode of `/dev/kvm`, `qemu.conf` in a
container), it is put back.
"""
