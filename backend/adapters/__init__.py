"""Servers of other makes, made routable: one folder for each, and a list of them all."""
