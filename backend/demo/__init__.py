"""The demonstration: one balancer, three backends and real clients on loopback, and all that can go wrong."""
