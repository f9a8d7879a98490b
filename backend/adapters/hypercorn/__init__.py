"""hypercorn, an ASGI server on aioquic, made routable; and a small application to see it at work."""
