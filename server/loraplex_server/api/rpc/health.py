"""The standard gRPC health service."""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2

from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2

SERVICE_NAMES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

_Status = health_pb2.HealthCheckResponse


class Health:
    """Says the same of the server as a whole ("") and of every service of it.

    Attributes:
        servicer: to be registered with the gRPC server.
    """

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def set(self, *, serving: bool) -> None:
        status = _Status.SERVING if serving else _Status.NOT_SERVING
        for service in ("", *SERVICE_NAMES):
            await self.servicer.set(service, status)

    async def end(self) -> None:
        """Not serving from now on, whatever is set later."""
        await self.servicer.enter_graceful_shutdown()
