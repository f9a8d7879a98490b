"""The xdp engine: one BPF program, and what fills its maps."""
