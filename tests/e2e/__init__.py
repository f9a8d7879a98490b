"""Real clients, real backends, a real balancer, real sockets."""
