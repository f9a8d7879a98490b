"""Real QUIC clients that can be moved: aioquic, qh3 and ngtcp2's gtlsclient, and a NAT to put before them."""
