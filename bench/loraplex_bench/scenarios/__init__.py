"""One bench each of a real server or of the engine: what it answers, how fast, and what is left behind."""
