"""The command line, the demo and the benchmark. Nothing else of the package imports this."""
