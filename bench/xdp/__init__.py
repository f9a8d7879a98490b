"""What the xdp engine costs: nanoseconds per packet by path, packets per second over veth, and table changes."""
