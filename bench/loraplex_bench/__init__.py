"""Load harness, benches and the embedded demo model of loraplex."""
