"""A reference backend: an HTTP/3 server whose clients a QUIC-LB balancer can follow."""
