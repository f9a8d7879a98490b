"""`quiclb conformance`: the checks, the report, and servers that must not pass."""
