"""Whether a server is fit to stand behind a QUIC-LB balancer: a client that looks, and checks of what it saw."""
