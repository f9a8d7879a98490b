"""What quiclb costs, measured beside nginx on the same machine in the same run. `python -m bench` runs it all."""
