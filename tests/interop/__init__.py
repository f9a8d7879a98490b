"""Every client at every server behind every balancer, whatever moves or dies: the matrix of docs/interop.md."""
