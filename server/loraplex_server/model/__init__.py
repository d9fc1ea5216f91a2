"""The model side: a frozen base in 4 bits, and the runner that turns a step plan into tokens."""
