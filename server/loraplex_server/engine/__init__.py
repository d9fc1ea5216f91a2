"""The engine: plan, run, commit, emit. It runs apart from the API, in a process of its own."""
