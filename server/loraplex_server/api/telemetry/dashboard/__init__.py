"""The metrics port: what Prometheus reads, and a page that shows it to people."""
