"""quiclb: a QUIC-aware UDP load balancer.

The modules read from the bottom up: `cid` and `packet` know the wire, `router` decides,
`udp` moves packets, `control` keeps them all running.
"""
