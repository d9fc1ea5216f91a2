"""The connection between the API and the engine.

messages           everything that is said; commands: operations and their answers; stats: counters
frames             messages as bytes
client             the API's end; deltas and watcher: what waits there to be read
"""
