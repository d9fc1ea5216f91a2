"""The connection between the API and the engine.

messages           all messages; commands: operations and their answers; stats: counters and gauges
frames             messages as bytes
client             the API's end of the connection; deltas and watcher: its queues for readers
"""
