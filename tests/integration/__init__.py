"""The whole way from vms.yaml to QEMU, with a real libvirtd of our own."""
