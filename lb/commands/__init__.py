"""The commands, one noun each: their arguments, what they call, and what they print."""
