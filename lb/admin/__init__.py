"""The admin API, the status page and the metrics port: what a running balancer shows and lets be changed over HTTP."""
