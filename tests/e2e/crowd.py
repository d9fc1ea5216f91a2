"""A client process that opens many streams, says so once each has begun, and then reads no more; for tests.

Arguments: the server's address, how many streams, names of adapters.
"""

from __future__ import annotations

import sys
import time

import grpc

from loraplex.v1 import generation_pb2, generation_pb2_grpc


def main(address: str, count: str, *adapters: str) -> None:
    """Opens the streams and waits to be killed."""
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        streams = []
        for index in range(int(count)):
            request = generation_pb2.GenerateRequest(text=f"stream {index}\n")
            request.stopping.max_tokens, request.stopping.ignore_eos = 480, True
            request.adapters.add(adapter=adapters[index % len(adapters)])
            streams.append(stub.Generate(request))
        for stream in streams:
            next(stream)
        print("begun", flush=True)
        time.sleep(3600)


main(*sys.argv[1:])
