"""What the physical machine is: topology, platform, health, fabric."""
