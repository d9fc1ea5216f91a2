"""The load harness: draws a workload, sends it to a server, and reports what came back and when."""
