"""The engine: plan, run, commit, emit. It runs apart from the API, in a process of its own.

process            starts the engine's process and watches it
build              makes an engine of a configuration
host               the loop around the engine; connections: its clients; commands: what they ask for
engine             one step, and the requests that it owns
admission          requests that come in; structured_output: those that wait for a grammar
scheduler          the next step's tokens: order by fairness and accounts, room by adapter_room and kv_blocks
sequence           one request in the engine; schedule: a step's choice of them
planning           from that choice to a step plan
commit             from a step's output to the sequences; emission: to what clients are told
drafts             speculation; grammars, grammar_matcher, token_trie: structured output
drains, audit, stats   unloads with a time limit, checks while idle, counters
"""
