"""What the guests are: the spec, their domains, images and the hypervisor."""
