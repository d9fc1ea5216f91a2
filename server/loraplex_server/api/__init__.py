"""The API: checks requests, makes the engine's of them, and streams the answers, by gRPC and HTTP.

A generation passes each room once::

    rpc | http          a transport reads a message; a body of HTTP becomes one (`http.translate`)
    requests.intake     checks it, chooses the tokenizer, makes the engine's requests
    answers.generator   runs them on the engine; tokens become pieces of text
    rpc | http          the transport writes the pieces (`answers.to_proto`, `http.completion_format`, ...)
"""
